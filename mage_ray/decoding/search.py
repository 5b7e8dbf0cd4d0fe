"""Search on top of sampling: draw several answers, or pieces of them, and keep what the guide scores highest.

A *strategy* asks for rounds of requests and is told what became of them; ``search`` and ``asearch`` run it on an
engine. Candidates are ranked by ``Generation.value``: the guide's score G summed over the tokens, in nats, without
normalising by length. With a guide of strength 0 (``Plan.guided(..., 0, valued=True)``) they are drawn from the base
alone and the guide only ranks; ``Cadence(speculate=m)`` then runs it once every m tokens at no loss.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.request import FinishReason, Generation, Request, Token
from mage_ray.decoding.seeds import derived_seed
from mage_ray.decoding.stream import Stream
from mage_ray.decoding.text import Decode, TextStream
from mage_ray.errors import FieldError, UserError

Strategy = Generator[list[Request], list[Generation], Generation]
"""Yields the requests of a round, is sent their generations in the same order, and returns the best answer.

It raises UserError when no candidate is left."""

_PROPER: tuple[FinishReason, ...] = ("stop", "length")
"""How a candidate ends that counts."""


def search(engine: Engine, strategy: Strategy) -> Generation:
    """The answer that a strategy comes to, each round one batch. Raises what the strategy raises."""
    try:
        requests = next(strategy)
        while True:
            requests = strategy.send(engine.generate(requests))
    except StopIteration as end:
        answer: Generation = end.value
        return answer


@dataclass(frozen=True)
class Found:
    """What the strategy at ``place`` has come to, and all generations that were drawn for it."""

    place: int
    answer: Generation
    drawn: tuple[Generation, ...]


@dataclass(eq=False)
class _Search:
    """A strategy under way: the requests of its round, and what has been drawn for it before."""

    place: int
    strategy: Strategy
    requests: list[Request]
    drawn: tuple[Generation, ...] = ()

    def told(self, generations: list[Generation]) -> Found | None:
        """What became of the round; None where another one follows. Raises what the strategy raises."""
        self.drawn += tuple(generations)
        try:
            self.requests = self.strategy.send(generations)
        except StopIteration as end:
            return Found(self.place, end.value, self.drawn)
        return None


def search_all(engine: Engine, strategies: Sequence[Strategy], at_once: int | None = None) -> Iterator[Found]:
    """The answer of each strategy, as they come.

    ``at_once`` of them (None: all) are under way at a time, and their rounds are one batch. Few at a time leave the
    runner room to keep what the next round goes on from. Raises what a strategy raises.
    """
    waiting = deque(enumerate(strategies))
    under_way: list[_Search] = []
    while waiting or under_way:
        while waiting and (at_once is None or len(under_way) < at_once):
            place, strategy = waiting.popleft()
            under_way.append(_Search(place, strategy, next(strategy)))
        asked = [(one, request) for one in under_way for request in one.requests]
        tokens: list[list[Token]] = [[] for _ in asked]
        of: dict[_Search, list[int]] = {one: [] for one in under_way}
        for index, (one, _) in enumerate(asked):
            of[one].append(index)
        left = {one: len(indices) for one, indices in of.items()}
        under_way = []
        for index, token in engine.events([request for _, request in asked]):
            one = asked[index][0]
            tokens[index].append(token)
            left[one] -= token.finished is not None
            if token.finished is None or left[one]:
                continue
            if (found := one.told([Generation.of(tokens[i]) for i in of[one]])) is not None:
                yield found
            else:
                under_way.append(one)


async def asearch(engine: Engine, strategy: Strategy) -> Generation:
    """``search`` from within an event loop, beside whatever else the engine runs.

    When it is cancelled, or the engine refuses a request (Busy, for one), all that it has submitted is cancelled.
    """
    try:
        requests = next(strategy)
        while True:
            requests = strategy.send(await _together(engine, requests))
    except StopIteration as end:
        answer: Generation = end.value
        return answer


async def _together(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    streams: list[Stream] = []
    try:
        for request in requests:
            streams.append(engine.submit(request))
        return await asyncio.gather(*map(_result, streams))
    finally:
        for stream in streams:
            stream.cancel()


async def _result(stream: Stream) -> Generation:
    """As ``Engine.generate`` has it: what goes wrong with one candidate is its own end, not the round's."""
    try:
        return await stream.result()
    except UserError as error:
        return Generation((), (), "error", error=error)


def drawn_once(request: Request) -> Strategy:
    """One draw of a request as it is. Raises its error, where it ends with one."""
    [answer] = yield [request]
    return answer.require()


def best_of(request: Request, n: int) -> Strategy:
    """The best of ``n`` samples of one request; the first of equals.

    Sample i has the seed ``derived_seed(request.sampling.seed, 0, i)``: the first is the request itself, and the n
    samples are among any larger number of them. Samples that end "vetoed", "cancelled" or "error" don't count. Raises
    FieldError for a plan whose values aren't kept for every token, or a number that isn't allowed.
    """
    _check_ranked(request)
    _check_counts(request, n, n=n)
    return _best_of(request, n)


def _best_of(request: Request, n: int) -> Strategy:
    sampling = request.sampling
    samples = yield [_part(request, (), sampling.max_new_tokens, derived_seed(sampling.seed, 0, i)) for i in range(n)]
    usable = [sample for sample in samples if sample.finished in _PROPER]
    if not usable:
        raise _failure(samples)
    return max(usable, key=lambda sample: _rank(sample.value))


def beam_search(request: Request, width: int, expansions: int, chunk: int, decode: Decode | None = None) -> Strategy:
    """Chunk-level beam search guided by the value (weak-to-strong search, arXiv:2405.19262).

    Each of ``width`` beams is continued ``expansions`` times by up to ``chunk`` tokens; of these and the beams that
    have ended, the ``width`` with the highest value since the prompt go on, until all of those have ended. The first
    round draws ``width * expansions`` times from the prompt. Equal sequences count once, and of equal values the first
    one goes on. ``chunk = 1`` is token-level; with ``chunk = max_new_tokens`` this is ``best_of`` all first draws.

    Draw i of round t has the seed ``derived_seed(request.sampling.seed, t, i)``. A continuation is a request whose
    prompt includes its beam, and computes nothing anew where the runner still keeps that (RowRunner's ``kept``: a
    round leaves ``width * expansions`` sequences for each row of the plan). The answer's text is made by ``decode``;
    it is empty without.

    Raises FieldError as ``best_of`` does, and for stop strings: one may begin in a chunk and end in the next, and the
    value up to there isn't known.
    """
    _check_ranked(request)
    _check_counts(request, width * expansions, width=width, expansions=expansions, chunk=chunk)
    if request.sampling.stop:
        raise FieldError("stop", list(request.sampling.stop), "none in a beam search, which ends at stop tokens alone")
    return _beam_search(request, width, expansions, chunk, decode)


@dataclass(frozen=True)
class _Beam:
    """An answer so far; ``finished`` is set once it has ended."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    value: float = 0.0
    guided: int = 0
    finished: FinishReason | None = None

    def then(self, more: Generation, limit: int) -> _Beam:
        """This beam and a continuation. That has ended the answer only at a stop token or at ``limit`` tokens."""
        ids = self.ids + more.ids
        ended = more.finished == "stop" or len(ids) == limit
        return _Beam(
            ids,
            self.logprobs + more.logprobs,
            self.value + more.value,
            self.guided + more.guided,
            more.finished if ended else None,
        )


def _beam_search(request: Request, width: int, expansions: int, chunk: int, decode: Decode | None) -> Strategy:
    limit, seed = request.sampling.max_new_tokens, request.sampling.seed
    beams, times, turn = [_Beam()], width * expansions, 0
    while going := [beam for beam in beams if beam.finished is None]:
        drawn = [beam for beam in going for _ in range(times)]
        continuations = yield [
            _part(request, beam.ids, min(chunk, limit - len(beam.ids)), derived_seed(seed, turn, i))
            for i, beam in enumerate(drawn)
        ]
        ended = [beam for beam in beams if beam.finished is not None]
        new = [b.then(c, limit) for b, c in zip(drawn, continuations, strict=True) if c.finished in _PROPER]
        if not (ended or new):
            raise _failure(continuations)
        distinct: dict[tuple[int, ...], _Beam] = {}
        for beam in [*ended, *new]:
            distinct.setdefault(beam.ids, beam)
        beams = sorted(distinct.values(), key=lambda beam: -_rank(beam.value))[:width]
        times, turn = expansions, turn + 1
    best = beams[0]
    assert best.finished is not None
    return Generation(best.ids, best.logprobs, best.finished, _text(best, decode), best.value, best.guided)


def _part(request: Request, before: tuple[int, ...], tokens: int, seed: int) -> Request:
    """The request to draw up to ``tokens`` more after ``before``, a beginning of its answer."""
    sampling = replace(request.sampling, max_new_tokens=tokens, seed=seed)
    return replace(request, prompt=request.prompt + before, sampling=sampling)


def _failure(drawn: Sequence[Generation]) -> UserError:
    """Why there is no candidate: the first error, where there is one."""
    errors = [one.error for one in drawn if one.error is not None]
    ends = ", ".join(sorted({one.finished for one in drawn}))
    none = FieldError("plan", f"candidates that all ended {ends}", "rows that leave some token possible")
    return errors[0] if errors else none


def _rank(value: float) -> float:
    # What the guide and its reference both rule out has no value at all (-inf + inf).
    return -math.inf if math.isnan(value) else value


def _text(beam: _Beam, decode: Decode | None) -> str:
    """The text as the engine would have given it, of the whole: a character may lie across two chunks."""
    if decode is None:
        return ""
    stream = TextStream(decode)
    shown = beam.ids[:-1] if beam.finished == "stop" else beam.ids
    return "".join([*map(stream.add, shown), stream.end()])


def _check_ranked(request: Request) -> None:
    """Raises FieldError for a plan whose generations have no value to rank by."""
    plan = request.plan
    if not (plan.valued and plan.values):
        raise FieldError(
            "plan", "one without values", "a guided one with valued=True, whose guide ranks the candidates"
        )
    if plan.cadence.every > 1 or plan.cadence.entropy > 0:
        raise FieldError("cadence", plan.cadence, "one that scores every token (speculate does), for a fair ranking")


def _check_counts(request: Request, candidates: int, **counts: int) -> None:
    for field, count in counts.items():
        if count < 1:
            raise FieldError(field, count, "1 or more")
    if candidates > 1 and request.sampling.temperature == 0:
        raise FieldError("temperature", 0, f"above 0, since {candidates} greedy candidates would be the same")
