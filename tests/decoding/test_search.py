"""Search against brute force over models merged apart in float64, a plain beam search, and a chain of known values."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import BASE, Tiny, guided, ids
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tiny_tokenizer
from torch import nn
from transformers import LlamaConfig

from mage_ray.decoding.engine import Busy, Engine
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.decoding.search import Strategy, asearch, beam_search, best_of, search
from mage_ray.decoding.seeds import derived_seed
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.adapter import Adapter, Factors
from mage_ray.merging.bank import AdapterBank


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return tiny.engine(rows=48, kept=1000, decode=text_of)


TOKENIZER = make_tiny_tokenizer()


def text_of(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=True))


def ranked(prompt: str = "hello", strength: float = 1.3, **sampling: object) -> Request:
    settings = {"max_new_tokens": 12, "seed": 7} | sampling
    return Request(ids(prompt), guided(strength, valued=True), Sampling(**settings))  # type: ignore[arg-type]


def value_of(tiny: Tiny, request: Request, answer: Sequence[int]) -> float:
    """G summed over an answer's tokens, from whole forwards of models merged apart, in float64."""
    rows_RTV = tiny.rows(request.plan, [*request.prompt, *answer])
    start = len(request.prompt) - 1
    return sum(
        v * float(row_TV[start + t, token])
        for v, row_TV in zip(request.plan.values, rows_RTV, strict=True)
        for t, token in enumerate(answer)
    )


def test_derived_seeds_are_the_documented_hash() -> None:
    assert derived_seed(7, 0, 0) == 7
    first = hashlib.sha256(b"7/0/3").digest()[:8]
    assert derived_seed(7, 0, 3) == int.from_bytes(first, "big") % 2**63


@given(st.sets(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 99), st.integers(0, 99)), max_size=50))
def test_derived_seeds_are_seeds_and_differ(paths: set[tuple[int, int, int]]) -> None:
    seeds = [derived_seed(*path) for path in paths if any(path[1:])]
    assert len(set(seeds)) == len(seeds)
    for seed in seeds:
        Sampling(seed=seed)


@pytest.mark.parametrize("strength", [0.0, 1.3])
def test_best_of_is_the_argmax_over_the_seeds_run_alone(tiny: Tiny, engine: Engine, strength: float) -> None:
    winners = set()
    for seed in range(4):
        request = ranked(strength=strength, seed=seed)
        seeds = [seed, *(derived_seed(seed, 0, i) for i in (1, 2, 3))]
        alone = [engine.generate([replace(request, sampling=replace(request.sampling, seed=s))])[0] for s in seeds]
        values = [value_of(tiny, request, one.ids) for one in alone]
        best = search(engine, best_of(request, 4))
        assert best.ids == alone[int(np.argmax(values))].ids
        assert best.value == pytest.approx(max(values), abs=2e-4)
        assert best.text == text_of(best.ids)
        winners.add(int(np.argmax(values)))
    assert len(winners) > 1


def test_at_strength_0_the_candidates_are_the_bases_own(engine: Engine) -> None:
    request = ranked(strength=0.0)
    base = replace(request, plan=Plan.of([(BASE, 1.0)], candidates=12))
    assert search(engine, best_of(request, 1)).ids == engine.generate([base])[0].ids


def test_speculation_ranks_at_strength_0_without_a_rejection(tiny: Tiny, engine: Engine) -> None:
    request = ranked(strength=0.0, max_new_tokens=20)
    proposing = replace(request, plan=request.plan.at(Cadence(speculate=5)))
    best = search(engine, best_of(proposing, 6))
    assert best.value == pytest.approx(value_of(tiny, request, best.ids), abs=3e-4)
    steps = Fed(engine)
    search(engine, best_of(proposing, 1))
    assert steps.guide_calls <= math.ceil(20 / 5)


class Fed:
    """Counts what an engine's runner is fed from here on."""

    def __init__(self, engine: Engine) -> None:
        self.tokens = self.guide_calls = 0
        runner, feed = engine.runner, RowRunner.feed

        def counted(rows: Sequence, tokens: Sequence[Sequence[int]], keep: int = 1) -> torch.Tensor:
            self.tokens += sum(map(len, tokens))
            self.guide_calls += keep > 1
            return feed(runner, rows, tokens, keep)

        runner.feed = counted  # type: ignore[method-assign]


def plain_beam_search(
    tiny: Tiny, engine: Engine, request: Request, width: int, expansions: int, chunk: int
) -> tuple[list[int], float]:
    """Chunk-level beam search written out: a request at a time, values from float64 whole forwards, no bookkeeping."""
    limit, sampling = request.sampling.max_new_tokens, request.sampling

    def ended(answer: list[int]) -> bool:
        return len(answer) == limit or (bool(answer) and answer[-1] == 258)

    beams: list[list[int]] = [[]]
    turn = 0
    while not all(ended(beam) for beam in beams):
        pool = [beam for beam in beams if ended(beam)]
        number = 0
        for beam in beams:
            if ended(beam):
                continue
            for _ in range(width * expansions if turn == 0 else expansions):
                seed = sampling.seed if turn == number == 0 else derived_seed(sampling.seed, turn, number)
                how = replace(sampling, max_new_tokens=min(chunk, limit - len(beam)), seed=seed)
                [more] = engine.generate([Request((*request.prompt, *beam), request.plan, how)])
                answer = [*beam, *more.ids]
                if answer not in pool:
                    pool.append(answer)
                number += 1
        values = [value_of(tiny, request, answer) for answer in pool]
        beams = [pool[i] for i in np.argsort([-v for v in values], kind="stable")[:width]]
        turn += 1
    return beams[0], value_of(tiny, request, beams[0])


@pytest.mark.parametrize(
    ("width", "expansions", "chunk", "strength"), [(1, 3, 4, 1.3), (2, 2, 5, 0.0), (3, 2, 1, 0.7), (4, 1, 7, 1.3)]
)
def test_beam_search_is_the_plain_one(
    tiny: Tiny, engine: Engine, width: int, expansions: int, chunk: int, strength: float
) -> None:
    for seed in (0, 1) if chunk > 1 else (0,):
        request = ranked(strength=strength, seed=seed)
        expected, value = plain_beam_search(tiny, engine, request, width, expansions, chunk)
        best = search(engine, beam_search(request, width, expansions, chunk, decode=text_of))
        assert list(best.ids) == expected
        assert best.value == pytest.approx(value, abs=2e-4)
        drawn = tiny.drawn(request.plan, request.prompt, best.ids)
        np.testing.assert_allclose(best.logprobs, drawn.numpy(), atol=2e-4)
        assert best.guided == len(best.ids)
        assert best.finished == ("stop" if best.ids[-1] == 258 else "length")
        assert best.text == text_of(best.ids)


def test_beams_that_stop_early_are_carried_on(tiny: Tiny) -> None:
    """With many stop tokens, answers of several lengths compete."""
    many = tiny.engine(stop=range(0, 260, 3))
    finished = []
    for seed in range(5):
        request = ranked(seed=seed, max_new_tokens=9)
        best = search(many, beam_search(request, 2, 3, 2))
        ends = [token % 3 == 0 for token in best.ids]
        assert not any(ends[:-1])
        assert best.finished == ("stop" if ends[-1] else "length")
        assert best.value == pytest.approx(value_of(tiny, request, best.ids), abs=2e-4)
        finished.append((best.finished, len(best.ids)))
    assert len(set(finished)) > 1


def test_one_beam_of_whole_answers_is_best_of(engine: Engine) -> None:
    for width, expansions in ((1, 6), (3, 2)):
        one = search(engine, beam_search(ranked(), width, expansions, 12, decode=text_of))
        assert one == search(engine, best_of(ranked(), 6))


def test_a_continuation_computes_nothing_anew(tiny: Tiny) -> None:
    """Three rows; 4 chunks of 3 tokens after a prompt of 20: the prompt once for each row, then new tokens alone."""
    engine = tiny.engine(rows=24, kept=24 * 40, stop=[])
    request = replace(ranked(), prompt=tuple(range(20)))
    fed = Fed(engine)
    search(engine, beam_search(request, 2, 3, 3))
    assert fed.tokens == 3 * 19 + 4 * (2 * 3 * 3 * 3)


def test_characters_that_lie_across_chunks_come_out_whole(engine: Engine) -> None:
    """Bytes are the tiny tokenizer's tokens: a random answer splits characters at every border of chunks of one."""
    request = ranked("é", max_new_tokens=24, temperature=2.0)
    best = search(engine, beam_search(request, 2, 2, 1, decode=text_of))
    assert best.text == text_of(best.ids)
    assert search(engine, beam_search(request, 2, 2, 1)).text == ""


def test_search_is_deterministic_and_leaves_nothing(engine: Engine) -> None:
    for strategy in (lambda: best_of(ranked(), 5), lambda: beam_search(ranked(), 2, 2, 3)):
        first = search(engine, strategy())
        assert engine.runner.live == 0
        assert search(engine, strategy()) == first
    assert search(engine, best_of(ranked(seed=8), 5)).ids != search(engine, best_of(ranked(seed=7), 5)).ids


def test_more_candidates_never_have_a_lower_value(engine: Engine) -> None:
    """Samples are nested, so for best-of this holds for every seed; for beams on the average over seeds."""
    seeds = range(10)
    values = np.array([[search(engine, best_of(ranked(seed=s), n)).value for n in (1, 2, 4, 8)] for s in seeds])
    assert (np.diff(values, axis=1) >= 0).all()
    assert values[:, -1].mean() > values[:, 0].mean() + 1
    wider = ((1, 1), (2, 2), (4, 4))
    beams = np.array([[search(engine, beam_search(ranked(seed=s), w, k, 3)).value for w, k in wider] for s in seeds])
    gains = np.diff(beams, axis=1)
    # More than two standard errors above nothing, so that luck with the seeds doesn't decide.
    assert (gains.mean(0) > 2 * gains.std(0, ddof=1) / len(seeds) ** 0.5).all()


def test_searches_run_side_by_side_in_an_event_loop(engine: Engine) -> None:
    def strategies() -> list[Strategy]:
        return [best_of(ranked(), 4), beam_search(ranked("abc"), 2, 2, 5, text_of), best_of(ranked("z", 0.0), 3)]

    async def together() -> list[Generation]:
        return list(await asyncio.gather(*(asearch(engine, one) for one in strategies())))

    for one, other in zip(asyncio.run(together()), [search(engine, s) for s in strategies()], strict=True):
        assert (one.ids, one.text, one.finished) == (other.ids, other.text, other.finished)
        assert one.value == pytest.approx(other.value, abs=2e-4)
    assert engine.runner.live == 0


async def drained(engine: Engine) -> None:
    for _ in range(400):
        if engine.runner.live == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{engine.runner.live} rows still run")


def test_a_cancelled_search_cancels_its_candidates(engine: Engine) -> None:
    async def leave() -> None:
        task = asyncio.create_task(asearch(engine, best_of(ranked(max_new_tokens=150), 8)))
        while engine.runner.live == 0:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await drained(engine)

    asyncio.run(leave())


def test_a_refused_candidate_cancels_the_others(tiny: Tiny) -> None:
    engine = tiny.engine(rows=6, waiting=3)

    async def crowd() -> None:
        with pytest.raises(Busy, match="queue"):
            await asearch(engine, best_of(ranked(max_new_tokens=150), 8))
        await drained(engine)
        assert (await asearch(engine, best_of(ranked(), 2))).finished in ("stop", "length")

    asyncio.run(crowd())


START, TRAP, PATH, END, GOOD, BAD, BROKEN, MUTE = range(8)


class Chain(nn.Module):
    """The next token depends on the last one alone: row ``a`` of ``base`` are the logits after token a.

    After BROKEN they are NaN, after MUTE every token is ruled out.
    """

    def __init__(self, base: torch.Tensor) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=8, num_hidden_layers=1, max_position_embeddings=64)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight.data = base.T.contiguous()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 1, **_: object) -> object:
        logits = self.head(nn.functional.one_hot(input_ids, 8).float())
        logits = torch.where((input_ids == BROKEN)[..., None], torch.nan, logits)
        logits = torch.where((input_ids == MUTE)[..., None], -torch.inf, logits)
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def chain(likely: dict[int, dict[int, float]], guide: dict[int, dict[int, float]]) -> Engine:
    """An engine over a Chain: the base's logits, with -30 for a token that isn't named, and what the guide adds."""
    base, more = torch.full((8, 8), -30.0), torch.zeros(8, 8)
    for table, given_ in ((base, likely), (more, guide)):
        for last, row in given_.items():
            for token, logit in row.items():
                table[last, token] = logit
    expert = Adapter("guide", {"head": Factors(torch.eye(8), more.T.contiguous(), 1.0)})
    return Engine(RowRunner(Chain(base), AdapterBank([expert]), rows=32, length=64), stop=[END])  # type: ignore[arg-type]


def chain_request(seed: int = 0, new: int = 6, strength: float = 0.0) -> Request:
    plan = Plan.guided((0.0,), [((1.0,), 1.0), ((0.0,), -1.0)], strength, candidates=8, valued=True)
    return Request((START,), plan, Sampling(new, seed=seed))


# The guide likes the trap at first sight, though all that follows it is bad; the other way leads to good.
LIKELY = {
    START: {TRAP: 0.0, PATH: 0.0},
    TRAP: {BAD: 0.0},
    PATH: {GOOD: 0.0, BAD: 0.0},
    BAD: {END: 0.0},
    GOOD: {END: 0.0},
}
GUIDE = {START: {TRAP: 1.0}, TRAP: {BAD: -20.0, END: 25.0}, PATH: {GOOD: 3.0}}


def known_value(path: Sequence[int]) -> float:
    def logprobs(row: dict[int, float]) -> np.ndarray:
        logits = np.array([row.get(token, -30.0) for token in range(8)])
        return logits - np.log(np.exp(logits).sum())

    total = 0.0
    for last, token in zip([START, *path], path, strict=False):
        base = LIKELY[last]
        more = {t: base.get(t, -30.0) + GUIDE.get(last, {}).get(t, 0.0) for t in range(8)}
        total += logprobs(more)[token] - logprobs(base)[token]
    return total


def test_beams_find_what_greed_by_token_misses() -> None:
    engine = chain(LIKELY, GUIDE)
    trap, good = (TRAP, BAD, END), (PATH, GOOD, END)
    assert known_value(trap[:1]) > known_value(good[:1])
    assert known_value(trap) < known_value(good) - 5
    greedy_plan = chain_request(strength=0.5).plan
    [greedy] = engine.generate([Request((START,), greedy_plan, Sampling(6, 0.0))])
    assert greedy.ids == trap
    for seed in range(5):
        narrow = search(engine, beam_search(chain_request(seed), 1, 12, 1))
        assert (narrow.ids, narrow.finished) == (trap, "stop")
        assert narrow.value == pytest.approx(known_value(trap), abs=1e-3)
        for width, chunk in ((2, 1), (1, 2), (1, 6)):
            found = search(engine, beam_search(chain_request(seed), width, 12 // width, chunk))
            assert (found.ids, found.finished) == (good, "stop")
            assert found.value == pytest.approx(known_value(good), abs=1e-3)


def test_equal_values_go_to_the_first() -> None:
    engine = chain({START: {TRAP: 0.0, PATH: 0.0}, TRAP: {END: 0.0}, PATH: {END: 0.0}}, {MUTE: {MUTE: 1.0}})
    firsts = set()
    for seed in range(8):
        request = chain_request(seed)
        [first] = engine.generate([request])
        assert search(engine, best_of(request, 5)) == first
        firsts.add(first.ids)
    assert len(firsts) == 2


@pytest.mark.parametrize("bad", [BROKEN, MUTE])
def test_candidates_that_fail_are_left_out(bad: int) -> None:
    engine = chain({START: {bad: 1.0, PATH: 0.0}, PATH: {END: 0.0}}, {START: {bad: 9.0}})
    for strategy in (best_of(chain_request(), 12), beam_search(chain_request(), 2, 6, 1)):
        assert search(engine, strategy).ids == (PATH, END)
    assert asyncio.run(asearch(engine, best_of(chain_request(), 12))).ids == (PATH, END)
    assert engine.runner.live == 0


@pytest.mark.parametrize(("bad", "message"), [(BROKEN, "not finite"), (MUTE, "all ended vetoed")])
def test_a_search_whose_candidates_all_fail_raises_the_first_error(bad: int, message: str) -> None:
    engine = chain({START: {bad: 0.0}}, {START: {bad: 1.0}})
    for strategy in (best_of(chain_request(), 3), beam_search(chain_request(), 2, 2, 1)):
        with pytest.raises(UserError, match=message):
            search(engine, strategy)
    with pytest.raises(UserError, match=message):
        asyncio.run(asearch(engine, best_of(chain_request(), 3)))


def test_what_cannot_run_raises_the_engines_word(engine: Engine) -> None:
    with pytest.raises(FieldError, match="at most 200 together"):
        search(engine, best_of(ranked(max_new_tokens=300), 2))
    with pytest.raises(FieldError, match="at most 200 together"):
        asyncio.run(asearch(engine, best_of(ranked(max_new_tokens=300), 2)))


def test_best_of_keeps_to_stop_strings(engine: Engine) -> None:
    whole = search(engine, best_of(ranked(), 4))
    cut = search(engine, best_of(ranked(stop=(whole.text[3],)), 4))
    assert whole.text[3] not in cut.text


GOOD_REQUEST = ranked()


@pytest.mark.parametrize(
    ("request_", "arguments", "field"),
    [
        (replace(GOOD_REQUEST, plan=guided(1.3)), (2, 2, 2), "plan: got one without values"),
        (replace(GOOD_REQUEST, plan=Plan.of([(BASE, 1.0)])), (2, 2, 2), "plan: got one without values"),
        (replace(GOOD_REQUEST, plan=GOOD_REQUEST.plan.at(Cadence(every=2))), (2, 2, 2), "cadence"),
        (replace(GOOD_REQUEST, plan=GOOD_REQUEST.plan.at(Cadence(entropy=1.0))), (2, 2, 2), "cadence"),
        (ranked(temperature=0.0), (2, 2, 2), "temperature"),
        (ranked(temperature=0.0), (2, 1, 2), "temperature"),
        (ranked(stop=("x",)), (2, 2, 2), "stop"),
        (GOOD_REQUEST, (0, 2, 2), "width"),
        (GOOD_REQUEST, (2, 0, 2), "expansions"),
        (GOOD_REQUEST, (2, 2, 0), "chunk"),
    ],
)
def test_unusable_searches_are_refused_at_once(request_: Request, arguments: tuple[int, int, int], field: str) -> None:
    with pytest.raises(FieldError, match=field):
        beam_search(request_, *arguments)
    if not request_.sampling.stop and min(arguments) > 0:
        with pytest.raises(FieldError, match=field):
            best_of(request_, 2)


def test_counts_of_best_of() -> None:
    with pytest.raises(FieldError, match="n: got 0"):
        best_of(GOOD_REQUEST, 0)
    best_of(ranked(temperature=0.0), 1)
