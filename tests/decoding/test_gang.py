"""Rows in other processes: the same tokens as in one, for every kind of plan, and what happens when one is gone."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from engines import BASE, GUIDE, ZERO, Tiny, guided, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mage_ray.decoding.channel import Lost, Message, RankChannel
from mage_ray.decoding.engine import Engine
from mage_ray.decoding.gang import Gang
from mage_ray.decoding.plan import Cadence, Plan, Row
from mage_ray.decoding.remote import RemoteRunner, serve
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.decoding.runner import RowRunner
from mage_ray.decoding.search import best_of, search
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.value_head import ValueHead


@dataclass
class Pipe:
    """A channel within one process; what passes is packed all the same."""

    outgoing: queue.Queue[bytes]
    incoming: queue.Queue[bytes]

    def send(self, message: Message) -> None:
        self.outgoing.put(message.pack())

    def receive(self) -> Message:
        return Message.unpack(self.incoming.get(timeout=60))


class Valued(Tiny):
    """Adapters 1 to 3 are value models, too."""

    def __init__(self, model: Path, place: Path) -> None:
        super().__init__(model, place)
        dice = torch.Generator().manual_seed(9)
        for k in (1, 2, 3):
            low = [torch.randn(shape, generator=dice) * 0.4 for shape in ((2, 32), (32, 2))]
            self.adapters[k] = replace(
                self.adapters[k], head=ValueHead(torch.randn(32, generator=dice) * 0.3, 0.1 * k, *low)
            )

    def runner(self, rows: int = 40) -> RowRunner:
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        return RowRunner(model, AdapterBank(self.adapters), rows, 200)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Valued:
    place = tmp_path_factory.mktemp("gang")
    return Valued(make_tiny_model(place / "model"), place)


@contextmanager
def gang(tiny: Valued, others: int, rows: int = 40) -> Iterator[Gang]:
    """A gang whose other runners are in threads of this process."""
    remotes, threads = [], []
    for _ in range(others):
        there, back = queue.Queue[bytes](), queue.Queue[bytes]()
        threads.append(Thread(target=serve, args=(tiny.runner(rows), Pipe(back, there)), daemon=True))
        threads[-1].start()
        remotes.append(RemoteRunner(Pipe(there, back)))
    made = Gang(tiny.runner(rows), remotes)
    try:
        yield made
    finally:
        made.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


SCALAR, VOCABULARY = Row((0.0, 0.5, 0.5, 0.0), "scalar"), Row((0.0, 0.2, 0.0, 0.8), "vocabulary")
PLANS = {
    "guided": guided(),
    "whole vocabulary": guided(candidates=None),
    "one row": Plan.of([(BASE, 1.0)]),
    "ensemble": Plan.guided(BASE, [(GUIDE, 0.6), ((0.0, 1.0, 0.0, 0.0), 0.4), (ZERO, -1.0)], 1.2, 9),
    "base is guide": Plan.guided(BASE, [(BASE, 1.0), (ZERO, -1.0)], 0.7, 9),
    "every third": guided().at(Cadence(every=3)),
    "uncertain": guided().at(Cadence(entropy=4.0)),
    "speculative": guided().at(Cadence(speculate=3)),
    "scored": guided(valued=True),
    "scored at 0": guided(0.0, valued=True),
    "V": Plan.guided(BASE, [(SCALAR, 1.0)], 2.0, 7),
    "Q": Plan.guided(BASE, [(VOCABULARY, 1.0)], 2.0, 7),
    "all kinds": Plan.guided(
        BASE, [(SCALAR, 1.0), (VOCABULARY, -0.5), (GUIDE, 1.0), (ZERO, -1.0)], 1.0, 7, valued=True
    ),
    "V, now and then": Plan.guided(BASE, [(SCALAR, 1.0)], 2.0, 7).at(Cadence(every=2)),
}


def requests(plans: list[Plan], temperature: float) -> list[Request]:
    texts = ("a day", "hello there, you", "x", "some longer prompt than the others have")
    return [Request(ids(texts[i % 4]), plan, Sampling(9 + i % 5, temperature, seed=i)) for i, plan in enumerate(plans)]


def assert_same(got: list[Generation], want: list[Generation]) -> None:
    for one, other in zip(got, want, strict=True):
        assert one.ids == other.ids and one.finished == other.finished and one.guided == other.guided
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert one.value == pytest.approx(other.value, abs=1e-3)


@pytest.mark.parametrize("others", [1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_one_runner(tiny: Valued, others: int, temperature: float) -> None:
    asked = requests(list(PLANS.values()), temperature)
    alone = Engine(tiny.runner(), [258]).generate(asked)
    with gang(tiny, others) as runners:
        moved = [replace(r, plan=r.plan.placed(lambda i: 0 if i == 0 else 1 + (i - 1) % others)) for r in asked]
        engine = Engine(runners, [258])
        assert_same(engine.generate(moved), alone)
        # Again, from prompts that are known by now; and with some of the rows at home.
        assert_same(engine.generate(moved), alone)
        mixed = [replace(r, plan=r.plan.placed(lambda i: i % 2)) for r in asked]
        assert_same(engine.generate([*mixed, *asked]), [*alone, *alone])


def test_a_plan_changes_between_runners(tiny: Valued) -> None:
    first, second = guided(1.0), guided(2.0, base=(0.0, 1.0, 0.0, 0.0))
    request = requests([first], 0.0)[0]

    def changed(engine: Engine, *plans: Plan) -> tuple[int, ...]:
        tokens: list[Token] = []
        running = engine._add(replace(request, plan=plans[0]), tokens.append)
        for _ in range(4):
            engine.step()
        engine.change(running, plans[1])
        while engine.step():
            pass
        return tuple(token.id for token in tokens)

    away = [plan.placed(lambda i: min(i, 1)) for plan in (first, second)]
    want = changed(Engine(tiny.runner(), [258]), first, second)
    with gang(tiny, 1) as runners:
        for plans in ((away[0], away[1]), (away[0], second), (first, away[1])):
            assert changed(Engine(runners, [258]), *plans) == want


def test_a_search_ranks_by_a_guide_elsewhere(tiny: Valued) -> None:
    [request] = requests([guided(0.0, valued=True)], 1.0)
    want = search(Engine(tiny.runner(), [258]), best_of(request, 4))
    with gang(tiny, 1) as runners:
        moved = replace(request, plan=request.plan.placed(lambda i: min(i, 1)))
        got = search(Engine(runners, [258]), best_of(moved, 4))
    assert got.ids == want.ids and got.value == pytest.approx(want.value, abs=1e-3)


def test_slots_are_counted_where_they_are(tiny: Valued) -> None:
    with gang(tiny, 1, rows=3) as runners:
        engine = Engine(runners, [258])
        moved = [replace(r, plan=r.plan.placed(lambda i: min(i, 1))) for r in requests([guided()] * 5, 0.0)]
        want = Engine(tiny.runner(), [258]).generate(requests([guided()] * 5, 0.0))
        # One request at a time fits there: three rows, two of them each.
        assert_same(engine.generate(moved), want)
        running = engine._add(moved[0], lambda token: None)
        for _ in range(3):
            engine.step()
        held = len(running.rows[0].tokens)
        assert held > len(moved[0].prompt) and engine.load.tokens == {0: held, 1: 2 * held}
        engine.cancel(running)
        assert runners.fits([Row(ZERO)] * 3) and runners.fits([Row(ZERO, home=1)] * 3)
        [answer] = engine.generate([replace(moved[0], plan=Plan.of([(BASE, 1.0)]).placed(lambda i: 0))])
        assert answer.error is None
        wide = Plan.guided(BASE, [(GUIDE, 1.0), (ZERO, -0.5), ((1.0, 0, 0, 0), 0.2), ((0, 1.0, 0, 0), 0.3)], 1.0, 5)
        [answer] = engine.generate([replace(moved[0], plan=wide.placed(lambda i: min(i, 1)))])
        assert (isinstance(answer.error, FieldError) and "4 rows" in str(answer.error)) or "5 rows" in str(answer.error)


def test_rows_that_fit_no_runner_are_refused(tiny: Valued) -> None:
    with gang(tiny, 1) as runners:
        for row, message in (
            (Row(ZERO, home=2), "a row at 2"),
            (Row((1.0,), home=1), "4 numbers"),
            (Row((1.0, 0.0, 0.0, 0.0), "scalar", home=1), "no value head"),
        ):
            with pytest.raises(FieldError, match=message):
                runners.check(row)
    with pytest.raises(FieldError, match="the base at 1"):
        guided().placed(lambda i: 1)


def test_a_failure_elsewhere_is_told_and_not_hidden(tiny: Valued) -> None:
    with gang(tiny, 1) as runners:
        row = runners.start(Row(ZERO, home=1))
        runners.feed([row], [[1] * 300], keep=0)  # longer than its slots
        with pytest.raises(UserError, match="a runner in another process failed: FieldError: rows: got one of 300"):
            runners.start(Row(ZERO, home=1))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(max_size=8), st.lists(st.integers(-(2**40), 2**40), max_size=9000), max_size=3),
    st.one_of(st.none(), st.lists(st.floats(width=32, allow_nan=False), max_size=40)),
)
def test_messages_arrive_as_they_were(what: dict[str, Any], floats: list[float] | None) -> None:
    what.pop("shape", None)
    sent = Message(what, None if floats is None else torch.tensor(floats, dtype=torch.float32)[None])
    got = Message.unpack(sent.pack() + b"\0" * 5)
    assert {k: v for k, v in got.what.items() if k != "shape"} == what
    assert (got.floats is None) == (floats is None)
    if floats is not None:
        assert got.floats is not None and torch.equal(got.floats, sent.floats)  # type: ignore[arg-type]


def _guide(rank: int, store: str, tiny: Valued) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    serve(tiny.runner(), RankChannel(0))


@pytest.mark.slow
def test_over_gloo_between_processes_and_when_one_of_them_stops(tiny: Valued, tmp_path: Path) -> None:
    import torch.distributed as dist

    asked = requests(list(PLANS.values()), 0.0)
    want = Engine(tiny.runner(), [258]).generate(asked)
    process = multiprocessing.get_context("spawn").Process(target=_guide, args=(1, str(tmp_path / "store"), tiny))
    process.start()
    try:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=2)
        patience = timedelta(seconds=3)
        channel = RankChannel(1, patience=timedelta(seconds=60))  # It has yet to start.
        runners = Gang(tiny.runner(), [RemoteRunner(channel)])
        channel.patience = patience
        engine = Engine(runners, [258])
        moved = [replace(r, plan=r.plan.placed(lambda i: min(i, 1))) for r in asked]
        assert_same(engine.generate(moved), want)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Lost, match="rank 1: gone or too slow"):
            engine.generate(moved[:1])
        assert time.monotonic() - began < 3 * patience.total_seconds()
    finally:
        process.kill()
        process.join()
        dist.destroy_process_group()
