"""Ray for jobs: connect to the cluster that is there or start one here, and run shards with visible progress."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mage_ray.errors import FieldError, UserError

if TYPE_CHECKING:
    from mage_ray.folder import StudyFolder

Progress = Callable[[int, int], None]
"""Told how many items are done, and of how many."""


_log = logging.getLogger("mage_ray")

_PUBLISHED_EVERY = 2.0
"""Seconds between two times that a worker publishes what it has made."""
_STARTS = 2
"""How often a cluster of our own is started: Ray gives its processes half a minute, which a busy machine may not."""


@contextmanager
def connected(cpus: int | None = None) -> Iterator[None]:
    """Within it, Ray is there: the cluster that ``RAY_ADDRESS`` or a submitted job names, or one of this machine's own.

    A cluster that is started here listens on loopback only and ends with the block; it has ``cpus`` to give out,
    those of the machine unless given.
    """
    ours = "RAY_ADDRESS" not in os.environ
    if ours and "ray" not in sys.modules:
        # Else Ray takes the machine's own address for 127.0.0.1, and listens there; it reads this on import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = (
        {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cpus} if ours else {}
    )
    # A worker finds programs (ninja, for one) where this process would.
    scripts = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([scripts, *os.environ.get("PATH", "").split(os.pathsep)])
    for left in reversed(range(_STARTS if ours else 1)):
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, configure_logging=False, **local)
            end_as_interrupted()  # Ray has set a handler of its own
            break
        except Exception as error:
            ray.shutdown()
            if not left:
                raise
            _log.warning("Ray did not start, trying once more: %s", " ".join(str(error).split())[:200])
    try:
        yield
    finally:
        ray.shutdown()


def end_as_interrupted() -> None:
    """Have SIGTERM do what Ctrl-C does: what is under way is kept. In other threads than the main one, nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def run_shards(
    work: Callable[..., Iterator[int]],
    shards: Sequence[Any],
    common: Sequence[Any],
    *,
    folder: StudyFolder,
    reads: Sequence[Path] = (),
    writes: Path,
    workers: int,
    gpus_per_worker: float,
    labels: Mapping[str, str],
    on_progress: Callable[[int], None],
) -> None:
    """Deal ``shards`` to ``workers`` Ray tasks ``work(*common, [its shards])``.

    They share the CPUs of the nodes that have the ``labels``. Of ``folder`` a task finds on its node what it ``reads``,
    and what it ``writes`` is here in the end. ``work`` yields how many items it has finished since it last did;
    ``on_progress`` is told. A task whose worker died is started again, so ``work`` must skip what is already done.
    Raises the UserError that a task raised, or UserError when a task died for good.
    """
    import ray

    if not shards:
        return
    workers = min(workers, len(shards))
    cpus = equal_cpus(workers, labels)
    task: Any = ray.remote(_on_node).options(
        num_cpus=cpus,
        num_gpus=gpus_per_worker,
        label_selector=dict(labels),
        max_retries=3,
        num_returns="streaming",
    )
    dealt = [list(shards[i::workers]) for i in range(workers)]
    folder.publish(*reads)
    needs = [folder.name_of(place) for place in reads]
    streams: list[Any] = [
        task.remote(work, cpus, folder, needs, folder.name_of(writes), *common, share) for share in dealt
    ]
    try:
        follow(streams, on_progress)
        folder.fetch(writes)
    finally:
        for stream in streams:
            ray.cancel(stream, force=True)


def nodes_with(labels: Mapping[str, str]) -> list[dict[str, float]]:
    """The resources of each node of the cluster that has these labels. Raises UserError where none has."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [node["Resources"] for node in alive if labels.items() <= node["Labels"].items()]
    if not found:
        wanted = ", ".join(f"{name}={value}" for name, value in labels.items())
        raise FieldError("cluster", wanted, f"what a node of the cluster has, of {len(alive)}")
    return found


def equal_cpus(workers: int, labels: Mapping[str, str]) -> int:
    """CPUs for each of so many workers, each on one node that has the labels: an equal part."""
    own = [node.get("CPU", 0) for node in nodes_with(labels)]
    # More than the largest has would wait for ever.
    return max(1, int(min(max(own), sum(own) // workers)))


def follow(streams: list[Any], on_progress: Callable[[int], None]) -> None:
    """Tell ``on_progress`` each number that these streaming tasks yield; those that have ended leave the list.

    Raises the UserError that a task raised, or UserError when a task died for good.
    """
    import ray

    try:
        while streams:
            ready, _ = ray.wait(streams, num_returns=1)
            for stream in cast(Any, ready):
                try:
                    on_progress(int(ray.get(next(stream))))
                except StopIteration:
                    streams.remove(stream)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, UserError) else error) from None
    except ray.exceptions.RayError as error:
        raise UserError(f"a worker was lost: {' '.join(str(error).split())[:200]}") from None


def counted(progress: Progress | None, done: int, total: int) -> Callable[[int], None]:
    """An ``on_progress`` that adds up; it tells ``progress`` at once where the work begins."""

    def advance(count: int) -> None:
        nonlocal done
        # A worker that died is done again: never more than all.
        done = min(done + count, total)
        if progress is not None:
            progress(done, total)

    advance(0)
    return advance


def _on_node(
    work: Callable[..., Iterator[int]], cpus: int, folder: StudyFolder, reads: Sequence[str], writes: str, *given: Any
) -> Iterator[int]:
    import torch

    torch.set_num_threads(cpus)
    folder.fetch(*(folder.at(name) for name in (*reads, writes)))
    published = time.monotonic()
    for count in work(*given):
        yield count
        if time.monotonic() > published + _PUBLISHED_EVERY:
            folder.publish(folder.at(writes))
            published = time.monotonic()
    folder.publish(folder.at(writes))
