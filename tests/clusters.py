"""A Ray cluster of a process's own, so that nothing that other tests have left in this one reaches it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CODE = """
import ray, signal, sys
context = ray.init(include_dashboard=True, dashboard_port=int(sys.argv[1]), num_cpus=2, log_to_driver=False)
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


def cluster_command(port: int) -> list[str]:
    """A process that has a Ray cluster of two CPUs, with its dashboard at ``port``, until it is told to end."""
    return [sys.executable, "-c", _CODE, str(port)]


@contextmanager
def job_cluster(place: Path, seconds: float = 240) -> Iterator[str]:
    """The address of a cluster that takes jobs; its agent, which starts them, comes up well after the dashboard."""
    from ray.job_submission import JobSubmissionClient

    port, log = free_port(), place / "cluster.log"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            cluster_command(port), env=clean, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    late = time.monotonic() + seconds
    try:
        while True:
            assert process.poll() is None and time.monotonic() < late, _said(log)
            try:
                JobSubmissionClient(f"http://127.0.0.1:{port}").submit_job(entrypoint="true")
                break
            except (RuntimeError, ConnectionError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _said(log: Path) -> str:
    """What the cluster's process printed, and the end of its agent's log."""
    text = log.read_text()
    agent = [Path(line[6:]) / "dashboard_agent.log" for line in text.splitlines() if line.startswith("logs: ")]
    return text[-2000:] + "".join(path.read_text()[-4000:] for path in agent if path.exists())
