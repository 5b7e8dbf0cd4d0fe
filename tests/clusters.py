"""A Ray cluster of a process's own, so that nothing that other tests have left in this one reaches it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The agent that starts jobs listens at one port for all clusters of a machine, unless it may take any; without it a
# cluster beside another one takes no jobs. ray.init has no word for it.
_CODE = """
import ray, signal, sys
from pathlib import Path
from ray._private.parameter import RayParams
init = RayParams.__init__
RayParams.__init__ = lambda self, *given, **named: init(self, *given, **{**named, "dashboard_agent_listen_port": 0})
own = sys.argv[2] if len(sys.argv) > 2 else None
context = ray.init(
    include_dashboard=True, dashboard_port=int(sys.argv[1]), num_cpus=2, log_to_driver=False, _temp_dir=own
)
if own is not None:
    # By this a submitted job finds its own cluster. Else it takes any that runs on this machine.
    Path(own, "ray_current_cluster").write_text(context.address_info["gcs_address"])
print("logs:", context.address_info["session_dir"] + "/logs", flush=True)
print("ready", flush=True)
signal.pause()
"""

READY = "ready"
"""The last word of what ``cluster_command`` prints when its cluster is there."""


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def cluster_command(port: int, *own: str) -> list[str]:
    """A process that has a Ray cluster of two CPUs, with its dashboard at ``port``, until it is told to end.

    Ray's files are in the folder ``own``, where one is named; a long path has no room for its sockets.
    """
    return [sys.executable, "-c", _CODE, str(port), *own]


def with_token() -> dict[str, str]:
    """The environment of a program that talks to such a cluster: Ray has written the token down."""
    return os.environ | {"RAY_AUTH_MODE": "token"}


def submit_command(address: str, *options: str) -> list[str]:
    """``ray job submit``; run it ``with_token``."""
    return [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", address, *options]


@contextmanager
def job_cluster(place: Path, seconds: float = 240) -> Iterator[str]:
    """The address of a cluster that takes jobs; its agent, which starts them, comes up well after the dashboard."""
    port, log = free_port(), place / "cluster.log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = tempfile.mkdtemp(prefix="ray-")
    with log.open("wb") as output:
        process = subprocess.Popen(
            cluster_command(port, own), env=clean, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    address, late = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    try:
        while True:
            said = log.read_text()
            if said.endswith(f"{READY}\n"):
                trial = submit_command(address, "--no-wait", "--", "true")
                tried = subprocess.run(trial, env=with_token(), capture_output=True, text=True, timeout=120)
                if tried.returncode == 0:
                    break
                said += tried.stdout + tried.stderr
            assert process.poll() is None and time.monotonic() < late, said[-2000:] + _agent_said(said)
            time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(own, ignore_errors=True)


def _agent_said(said: str) -> str:
    """The end of the log of a cluster's agent, by what the cluster's process printed."""
    agent = [Path(line[6:]) / "dashboard_agent.log" for line in said.splitlines() if line.startswith("logs: ")]
    return "".join(path.read_text()[-4000:] for path in agent if path.exists())
