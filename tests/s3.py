"""A real S3 API server on loopback, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from clusters import free_port

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class S3:
    """A running server: ``environment`` is what its clients need."""

    endpoint: str
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def requests(self, method: str, ending: str) -> int:
        """How many requests of a method it has had for paths of that ending."""
        return sum(self.clients(method, ending).values())

    def clients(self, method: str, ending: str) -> Counter[str]:
        """By address, who has made how many of those requests."""
        lines = self.log.read_text(errors="replace").splitlines()
        return Counter(line.split()[0] for line in lines if f'"{method} ' in line and f"{ending} HTTP" in line)


@contextmanager
def s3_server(place: Path, host: str = "127.0.0.1", *prefix: str, bucket: str = "bucket") -> Iterator[S3]:
    """One with an empty bucket; ``prefix`` is put before its command."""
    port, log = free_port(), place / "s3.log"
    command = [*prefix, str(Path(sys.executable).with_name("moto_server")), "-H", host, "-p", str(port)]
    server = S3(f"http://{host}:{port}", log)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | CREDENTIALS)
    try:
        late = time.monotonic() + 60
        while True:
            try:
                made = urllib.request.Request(f"{server.endpoint}/{bucket}", method="PUT")
                urllib.request.urlopen(made, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < late, log.read_text()[-2000:]
                time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait(30)
