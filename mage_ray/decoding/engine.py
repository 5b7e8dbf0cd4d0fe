"""The loop: feed every row its token, combine the rows of each request, draw, and go on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mage_ray.decoding.request import FinishReason, Generation, Request, Token
from mage_ray.decoding.runner import RowRunner
from mage_ray.decoding.sampling import Combination, guided_logprobs, sample
from mage_ray.decoding.scheduler import Running, Scheduler
from mage_ray.errors import FieldError


class Engine:
    """Decodes any mix of plans in one batch over one runner. ``stop`` holds the token ids that end a request.

    Not for use from several threads: one call runs at a time.
    """

    def __init__(self, runner: RowRunner, stop: Sequence[int]) -> None:
        self.runner = runner
        self._stop = frozenset(stop)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """All requests, in order. Raises as ``events``."""
        tokens: list[list[Token]] = [[] for _ in requests]
        for index, token in self.events(requests):
            tokens[index].append(token)
        return [Generation.of(drawn) for drawn in tokens]

    def stream(self, request: Request) -> Iterator[Token]:
        """The tokens of one request, as they are drawn. Raises as ``events``."""
        for _, token in self.events([request]):
            yield token

    def events(self, requests: Sequence[Request]) -> Iterator[tuple[int, Token]]:
        """Every token of every request as (index of the request, token), as they are drawn.

        A request's tokens depend on itself alone, up to the rounding of a batched forward. Closing the iterator ends
        all requests and frees their rows. Raises FieldError, before anything runs, for a request that can't fit.
        """
        for index, request in enumerate(requests):
            self._check(request, f"requests.{index}" if len(requests) > 1 else "request")
        scheduler = Scheduler(self.runner, requests)
        groups: list[_Group] = []
        changed = False
        try:
            while True:
                changed |= scheduler.admit()
                if not scheduler.running:
                    return
                if changed:
                    groups = _grouped(scheduler.running, self.runner.model.device)
                    changed = False
                logits_RV = self.runner.step(scheduler.tokens())
                ended = []
                for group in groups:
                    for running, token in zip(group.running, self._draw(group, logits_RV), strict=True):
                        running.next = token.id
                        if token.finished:
                            ended.append(running)
                        yield running.index, token
                if ended:
                    scheduler.finish(ended)
                    changed = True
        finally:
            scheduler.finish(scheduler.running)

    def _check(self, request: Request, field: str) -> None:
        if not request.prompt:
            raise FieldError(f"{field}.prompt", "no tokens", "1 or more")
        length = len(request.prompt) + request.sampling.max_new_tokens
        if length > self.runner.length:
            what = f"{len(request.prompt)} tokens and {request.sampling.max_new_tokens} new ones"
            raise FieldError(f"{field}.prompt", what, f"at most {self.runner.length} together")
        if len(request.plan.rows) > self.runner.rows:
            raise FieldError(f"{field}.plan", f"{len(request.plan.rows)} rows", f"at most {self.runner.rows}")

    def _draw(self, group: _Group, logits_RV: torch.Tensor) -> list[Token]:
        logprobs_QC, ids_QC = guided_logprobs(logits_RV[group.rows_R], group.how)
        uniform_Q = torch.stack([torch.rand((), generator=r.dice, dtype=torch.float64) for r in group.running])
        drawn_Q1 = sample(logprobs_QC, group.temperature_Q, group.top_p_Q, uniform_Q.to(logits_RV.device))[:, None]
        ids = (drawn_Q1 if ids_QC is None else ids_QC.gather(1, drawn_Q1))[:, 0].tolist()
        tokens = []
        logprobs = logprobs_QC.gather(1, drawn_Q1)[:, 0].tolist()
        for running, token, logprob in zip(group.running, ids, logprobs, strict=True):
            running.generated += 1
            tokens.append(Token(token, logprob, self._finished(running, token, logprob)))
        return tokens

    def _finished(self, running: Running, token: int, logprob: float) -> FinishReason | None:
        if math.isnan(logprob):
            return "vetoed"
        if token in self._stop:
            return "stop"
        return "length" if running.generated == running.request.sampling.max_new_tokens else None


@dataclass(frozen=True)
class _Group:
    """Running requests whose candidates are chosen alike, so that they combine and draw in one go."""

    running: list[Running]
    rows_R: torch.Tensor
    how: Combination
    temperature_Q: torch.Tensor
    top_p_Q: torch.Tensor


def _grouped(running: Sequence[Running], device: torch.device) -> list[_Group]:
    whole = [r for r in running if r.request.plan.candidates is None]
    some = [r for r in running if r.request.plan.candidates is not None]
    return [_group(members, device) for members in (whole, some) if members]


def _group(running: list[Running], device: torch.device) -> _Group:
    plans = [r.request.plan for r in running]
    sampling = [r.request.sampling for r in running]
    starts = [0, *itertools.accumulate(len(plan.rows) for plan in plans)]
    how = Combination(
        request_R=torch.tensor([q for q, plan in enumerate(plans) for _ in plan.rows], device=device),
        weight_R=torch.tensor([w for plan in plans for w in plan.weights], device=device),
        base_Q=torch.tensor(starts[:-1], device=device),
        candidates_Q=None
        if plans[0].candidates is None
        else torch.tensor([plan.candidates for plan in plans], device=device),
        plain=all(plan.weights == (1.0,) for plan in plans),
    )
    return _Group(
        running=running,
        rows_R=torch.tensor([row for r in running for row in r.rows], device=device),
        how=how,
        temperature_Q=torch.tensor([s.temperature for s in sampling], device=device),
        top_p_Q=torch.tensor([s.top_p for s in sampling], device=device),
    )
