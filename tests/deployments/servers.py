"""Real servers: ``python -m deployments.local`` in a process and a Ray cluster of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import yaml
from clusters import free_port, with_token
from openai import OpenAI

ROOT = Path(__file__).parent.parent.parent
PROMPT = [{"role": "user", "content": "How was your day?"}]


@dataclass(frozen=True)
class Serving:
    """A server, its process, and its log."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self, key: str = "none") -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        """A chat request, with these fields in place of the usual ones."""
        body = {"model": "tiny", "messages": PROMPT, "max_tokens": 8, "temperature": 0} | fields
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30)

    def metric(self, name: str) -> float:
        """A figure of ``/metrics``."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"mage_ray_{name} "))

    def actors(self, name: str) -> list[psutil.Process]:
        """Its Ray actors of this class, oldest first; of a gang, the leader is."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        named = []
        for child in children:
            try:
                if f"ray::{name}" in " ".join(child.cmdline()):
                    named.append(child)
            except psutil.Error:
                continue
        return sorted(named, key=lambda child: child.create_time())

    def logs(self) -> list[str]:
        """What is in each of its Ray cluster's log files."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        raylet = next(child for child in children if "raylet" in child.name())
        place = next(Path(a.split("=", 1)[1]) for a in raylet.cmdline() if a.startswith("--log_dir="))
        return [path.read_text(errors="replace") for path in place.rglob("*") if path.is_file()]


def until(done: Callable[[], Any], seconds: float = 60, what: str = "it") -> Any:
    """What ``done`` gives, once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := done():
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


def answers(server: Serving) -> bool:
    """Whether it is there and well."""
    try:
        return server.get("/healthz").status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def serving(
    study: Path, place: Path, *options: str, script: str | None = None, **environment: str
) -> Iterator[Serving]:
    """A server of a study; ``options`` as on the command line. ``script``: one to start it in place of the module."""
    port = free_port()
    command = [sys.executable, "-m", "deployments.local", "--study", str(study), "--port", str(port), *options]
    if script is not None:
        command = [sys.executable, script, str(study), str(port)]
        environment["PYTHONPATH"] = str(ROOT)
    with started(command, f"http://127.0.0.1:{port}", place, **environment) as server:
        yield server


@contextmanager
def started(
    command: list[str], url: str, place: Path, ready: str = "playground:", **environment: str
) -> Iterator[Serving]:
    """A process that says ``ready`` when it is; it is ended with all that it has started."""
    log = place / f"server-{time.monotonic_ns()}.log"
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MAGE_RAY_API_KEYS")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=kept | environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        until(lambda: process.poll() is not None or ready in log.read_text(), 240, "the server's start")
        assert process.poll() is None, log.read_text()
        yield Serving(url, process, log)
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        _, left = psutil.wait_procs(children, 20)
        for child in left:
            child.kill()


def config_of(study: Path, port: int) -> dict[str, Any]:
    """``cpu_fused.yaml`` for a study and a port, with one thread and short answers."""
    config = yaml.safe_load((ROOT / "deployments" / "config" / "cpu_fused.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"study": str(study), "cpus": 1, "length": 400, "max_tokens": 300}
    return dict(config)


def deploy(cluster: Serving, config: dict[str, Any], user_config: Mapping[str, Any], place: Path) -> None:
    """``serve deploy`` of a config with this ``user_config``."""
    config["applications"][0]["deployments"] = [{"name": "mage_ray", "user_config": dict(user_config)}]
    (place / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", cluster.url, "config.yaml"]
    done = subprocess.run(command, cwd=place, env=with_token(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
