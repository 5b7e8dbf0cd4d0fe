"""Real processes killed and stopped under a real server: answers go on as if nothing had been."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from servers import PROMPT, Serving, answers, serving, until

from mage_ray.folder import StudyFolder

pytestmark = pytest.mark.slow

PATIENCE = 4
"""Seconds, as the server under test has it."""
TOKENS = 240


@pytest.fixture(scope="module")
def split(study: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A base and two guides in three processes."""
    place = tmp_path_factory.mktemp("split")
    options = ("topology=split", "guides=2", "cpus=1", f"patience={PATIENCE}", "length=400", "max_tokens=300")
    with serving(study.path, place, *options, "--cluster-cpus", "3") as started:
        yield started


def text(client: OpenAI, seed: int, on_token: int = -1, then: object = None, method: str = "mage-i-e") -> str:
    """A streamed answer; ``then`` is called once so many chunks have come."""
    chunks = client.chat.completions.create(
        model="tiny",
        messages=PROMPT,  # type: ignore[arg-type]
        max_tokens=TOKENS,
        temperature=1.0,
        seed=seed,
        stream=True,
        extra_body={"method": method, "preference": {"positive": 0.4, "short": 0.6}},
    )
    pieces = []
    for n, chunk in enumerate(chunks):
        pieces.append(chunk.choices[0].delta.content or "")
        if n == on_token and callable(then):
            then()
    return "".join(pieces)


def long_seed(client: OpenAI) -> int:
    """One whose answer is long enough to be disturbed."""
    return next(seed for seed in range(50) if len(text(client, seed)) > 100)


@pytest.mark.parametrize(
    ("who", "what"),
    [
        ("guide", signal.SIGKILL),
        ("base", signal.SIGKILL),
        ("guide", signal.SIGSTOP),
        ("base", signal.SIGSTOP),
    ],
)
def test_a_lost_worker_changes_no_token(split: Serving, who: str, what: signal.Signals) -> None:
    client = split.client()
    seed = long_seed(client)
    want = {s: text(client, s) for s in range(seed, seed + 3)}
    rebuilds = split.metric("rebuilds_total")
    workers = split.actors("RowWorker")
    assert len(workers) == 3
    # Not by their age: those that were made anew are younger.
    [leader] = [worker for worker in workers if has_store(worker.pid)]
    victim = leader if who == "base" else next(worker for worker in workers if worker != leader)
    got: dict[int, str] = {}
    hit = threading.Event()

    def disturb() -> None:
        if not hit.is_set():
            hit.set()
            os.kill(victim.pid, what)

    threads = [
        threading.Thread(target=lambda s=s: got.update({s: text(split.client(), s, 12, disturb)}))  # type: ignore[misc]
        for s in want
    ]
    for thread in threads:
        thread.start()
    assert hit.wait(60)
    began = time.monotonic()
    until(lambda: split.metric("rebuilds_total") > rebuilds, 60, "the loss")
    noticed = time.monotonic() - began
    assert split.get("/v1/objectives").status_code == 200  # whoever is gone by now
    for thread in threads:
        thread.join(180)
    assert got == want
    # A dead one before its silence would tell; a silent one when the patience is over, and a call to it has had half of
    # that again.
    assert noticed < (PATIENCE if what == signal.SIGKILL else 1.5 * PATIENCE + 5)
    print(f"{who} {what.name}: noticed after {noticed:.1f} s, all answered after {time.monotonic() - began:.1f} s")
    until(lambda: len(split.actors("RowWorker")) == 3, 60, "as many workers as before")
    assert text(client, seed) == want[seed]


def has_store(pid: int) -> bool:
    """Whether a store of torch.distributed listens in this process, as in the one that leads a gang."""
    return any("tcpstore" in name.read_text() for name in Path(f"/proc/{pid}/task").glob("*/comm"))


def test_a_killed_replica_is_replaced(split: Serving) -> None:
    client = split.client()
    want = text(client, 3)
    [replica] = split.actors("ServeReplica")
    replica.kill()
    until(lambda: answers(split), 120, "a new replica")
    assert text(client, 3) == want
    until(lambda: len(split.actors("RowWorker")) == 3, 60, "the old replica's workers gone")
