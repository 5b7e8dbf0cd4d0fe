"""Several machines on one: network namespaces with addresses, processes, /tmp and home folders of their own.

They share the programs that are installed, the kernel and its clock, and nothing else. Root makes them with iproute2.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

PROJECT = Path(__file__).resolve().parents[1]
_OWN = ("/tmp", "/root", "/var/tmp", "/dev/shm")
"""Folders that each node has for itself, empty at first, but for what is installed there."""
_GCS, _DASHBOARD = 6379, 8265


@functools.cache
def cannot() -> str:
    """Why there can be no nodes here; empty where there can."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return "network namespaces want root, iproute2 and util-linux"
    tried = subprocess.run(["unshare", "--net", "--mount", "--pid", "true"], capture_output=True, text=True)
    return "" if tried.returncode == 0 else f"network namespaces are not allowed here: {tried.stderr.strip()}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _script() -> str:
    """What a node's first process does: it hides what the others have, and waits."""
    installed = {str(PROJECT), sys.prefix, sys.base_prefix}
    lines = ["set -e", "mount -t proc proc /proc", "mkdir -p /mnt", "mount -t tmpfs tmpfs /mnt"]
    kept = {path: f"/mnt/{i}" for i, path in enumerate(sorted(installed)) if path.startswith(_OWN)}
    lines += [f"mkdir {held}; mount --bind {path} {held}" for path, held in kept.items()]
    lines += [f"mount -t tmpfs tmpfs {place}" for place in _OWN]
    lines += [f"mkdir -p {path}; mount --bind {held} {path}" for path, held in kept.items()]
    return "\n".join([*lines, "echo up", "exec sleep infinity"])


class Node:
    """One of the machines, from its making until it is killed."""

    def __init__(self, network: Network, number: int) -> None:
        self.address = f"{network.prefix}.{number}"
        self.log = network.place / f"node-{number}.log"
        self._network, self._name = network, f"{network.name}n{number}"
        self._link = f"{network.name}v{number}"
        _ip("netns", "add", self._name)
        _ip("link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self._name)
        _ip("link", "set", self._link, "master", network.name, "up")
        for arguments in (["addr", "add", f"{self.address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-n", self._name, *arguments)
        _ip("-n", self._name, "link", "set", "lo", "up")
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        self._first = subprocess.Popen(
            ["ip", "netns", "exec", self._name, *own, "sh", "-c", _script()],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._first.stdout is not None and self._first.stdout.readline() == b"up\n"
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self._inside = int(children.read_text().split()[0])

    def command(self, *arguments: str) -> list[str]:
        """A command on this machine, as another one runs it."""
        return ["nsenter", f"--target={self._inside}", "--net", "--mount", "--pid", *arguments]

    def run(self, *arguments: str, seconds: float = 120, **more: str) -> str:
        """What a command on it prints. Raises AssertionError where it fails."""
        environment = self._network.environment | more
        done = subprocess.run(
            self.command(*arguments), env=environment, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def start(self, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        """A process on it, which writes into its log."""
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self.command(*arguments),
                env=self._network.environment | more,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def cut(self) -> None:
        """Take its cable out."""
        _ip("link", "set", self._link, "down")

    def mend(self) -> None:
        """And put it in again."""
        _ip("link", "set", self._link, "up")

    def kill(self) -> None:
        """Switch it off: all its processes end at once, without a word. What it had on its disks is gone."""
        if self._first.poll() is None:
            os.kill(self._inside, 9)  # the first of its process namespace, with which all others end
            self._first.wait(30)
        subprocess.run(["ip", "link", "del", self._link], capture_output=True)
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True)


class Network:
    """A switch, to which nodes and this process are connected."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.name = f"mr{token_hex(3)}"
        self.prefix = f"10.{int(token_hex(1), 16)}.{int(token_hex(1), 16)}"
        self.address = f"{self.prefix}.254"
        """This process's own."""
        self.environment = {
            "PATH": os.pathsep.join(
                [str(Path(sys.executable).parent), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"]
            ),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.nodes: list[Node] = []
        _ip("link", "add", self.name, "type", "bridge")
        _ip("addr", "add", f"{self.address}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")

    def add(self) -> Node:
        """One more machine."""
        node = Node(self, len(self.nodes) + 1)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        for node in self.nodes:
            node.kill()
        _ip("link", "del", self.name)


class RayCluster:
    """A Ray cluster over the nodes of a network, with token authentication; its head is the first of them."""

    def __init__(self, network: Network, cpus: Sequence[int]) -> None:
        self.network = network
        token = token_hex(32)
        self.client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        """What programs need that talk to it."""
        network.environment |= self.client
        self.head = network.add()
        self.url = f"http://{self.head.address}:{_DASHBOARD}"
        dashboard = [f"--dashboard-host={self.head.address}", f"--dashboard-port={_DASHBOARD}"]
        self._start(self.head, cpus[0], "--head", f"--port={_GCS}", *dashboard)
        self.workers = [self.add(count) for count in cpus[1:]]

    def add(self, cpus: int = 1, *options: str) -> Node:
        """One more worker."""
        node = self.network.add()
        self._start(node, cpus, f"--address={self.head.address}:{_GCS}", *options)
        return node

    def _start(self, node: Node, cpus: int, *options: str) -> None:
        node.start(
            "ray",
            "start",
            "--block",
            f"--node-ip-address={node.address}",
            f"--num-cpus={cpus}",
            "--object-store-memory=200000000",
            "--disable-usage-stats",
            *options,
        )

    def wait(self, nodes: int, seconds: float = 240) -> None:
        """Until so many nodes are alive and jobs are taken. Raises AssertionError."""
        late = time.monotonic() + seconds
        code = (
            "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
            "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        )
        said = ""
        while f"alive {nodes}\n" not in said:
            assert time.monotonic() < late, said + self.head.log.read_text()[-3000:]
            try:
                said = self.head.run("python", "-c", code)
            except AssertionError as error:
                said = str(error)
            time.sleep(1)
        while self.submit("--no-wait", "--", "true").wait() != 0:
            assert time.monotonic() < late, self.head.log.read_text()[-3000:]
            time.sleep(1)

    def job(self, verb: str, *arguments: str) -> str:
        """What ``ray job stop`` and its like print, run on this machine."""
        command = [str(Path(sys.executable).with_name("ray")), "job", verb, "--address", self.url, *arguments]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    def submit(self, *options: str, cwd: Path | None = None, **more: str) -> subprocess.Popen[str]:
        """``ray job submit`` from this machine, which is none of the cluster's."""
        command = [str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", self.url, *options]
        return subprocess.Popen(
            command,
            env=self._environment() | more,
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def _environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | self.client


@contextmanager
def network(place: Path) -> Iterator[Network]:
    """A network without nodes; their logs are in ``place``."""
    made = Network(place)
    try:
        yield made
    finally:
        made.close()


def ray_cluster(on: Network, cpus: Sequence[int]) -> RayCluster:
    """A cluster of a node for each of ``cpus``, up and taking jobs; it ends with its network."""
    cluster = RayCluster(on, cpus)
    cluster.wait(len(cpus))
    return cluster
