"""One draw for each of a batch of requests: group those that combine alike, add up their rows, draw.

Legend: Q requests, R rows of the outputs, V vocabulary, C candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.request import Sampling
from mage_ray.decoding.sampling import Combination, guided_logprobs, sample


@dataclass(frozen=True)
class Draw:
    """One token to draw: the rows of the outputs that make it up, their weights, and how it is drawn.

    ``values`` weigh the same rows for the guide's score of the drawn token; empty where nobody asks for it. ``looks``
    says whether any of the rows looks ahead at the candidates.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    candidates: int | None
    sampling: Sampling
    values: tuple[float, ...] = ()
    looks: bool = False


@dataclass(frozen=True)
class Drawn:
    """The token, its log-probability at temperature 1, the guide's score of it; ``broken`` by numbers not finite.

    ``place`` is the token's number among the candidates.
    """

    token: int
    logprob: float
    value: float = 0.0
    broken: bool = False
    place: int = 0


class Drawer:
    """Draws batch after batch; what a batch of the same requests needs is prepared once."""

    def __init__(self) -> None:
        self._asked: list[Draw] = []
        self._groups: list[_Group] = []

    def draw(self, asked: list[Draw], outputs: Outputs, uniforms: Sequence[float]) -> list[Drawn]:
        """One token for each, by its uniform number in [0, 1)."""
        if asked != self._asked:
            self._asked, self._groups = asked, _grouped(asked, outputs.device)
        # In one go, for those that are looked at one by one below.
        if scored := [row for draw in asked if draw.values for row in draw.rows if outputs.is_policy(row)]:
            outputs.logits(scored)
        drawn: list[Drawn] = [Drawn(0, 0.0)] * len(asked)
        for group in self._groups:
            logprobs_QC, ids_QC = guided_logprobs(outputs, group.how)
            uniform_Q = torch.tensor([uniforms[i] for i in group.members], dtype=torch.float64, device=outputs.device)
            index_Q1 = sample(logprobs_QC, group.temperature_Q, group.top_p_Q, uniform_Q)[:, None]
            ids = (index_Q1 if ids_QC is None else ids_QC.gather(1, index_Q1))[:, 0].tolist()
            logprobs = logprobs_QC.gather(1, index_Q1)[:, 0].tolist()
            for q, (i, token, logprob) in enumerate(zip(group.members, ids, logprobs, strict=True)):
                draw, place = asked[i], int(index_Q1[q, 0])
                own = None if ids_QC is None else ids_QC[q : q + 1]
                drawn[i] = Drawn(
                    token,
                    logprob,
                    guide_score(outputs, draw, token, place, own, logprobs_QC[q].isfinite()) if draw.values else 0.0,
                    math.isnan(logprob) and broken(outputs, draw.rows, own),
                    place,
                )
        return drawn


def guide_score(
    outputs: Outputs, draw: Draw, token: int, place: int, ids_1C: torch.Tensor | None, allowed_C: torch.Tensor
) -> float:
    """The guide's score of one token, ``sum_r values[r] * S_r(token)`` (docs/method.md).

    ``S_r`` is a policy's log-probability over the whole vocabulary, or a value less its mean over the candidates.
    """
    score = 0.0
    for row, value in zip(draw.rows, draw.values, strict=True):
        if value == 0:
            continue
        logprob = outputs.logprob(row, token)
        if logprob is not None:
            score += value * logprob
        else:
            value_C = outputs.scores([row], ids_1C)[0].double()
            score += value * float(value_C[place] - value_C[allowed_C].mean())
    return score


def broken(outputs: Outputs, rows: Sequence[int], ids_1C: torch.Tensor | None) -> bool:
    """Whether any score of these rows is NaN or plus infinity; minus infinity rules a token out, which is allowed."""
    for row in rows:
        scores_NC = outputs.logits([row]) if outputs.is_policy(row) else outputs.scores([row], ids_1C)
        if bool((scores_NC.isnan() | scores_NC.isposinf()).any()):
            return True
    return False


@dataclass(frozen=True)
class _Group:
    """Draws whose candidates are chosen alike, so that they combine in one go; ``members`` are their numbers."""

    members: list[int]
    how: Combination
    temperature_Q: torch.Tensor
    top_p_Q: torch.Tensor


def _grouped(asked: Sequence[Draw], device: torch.device) -> list[_Group]:
    # Rows that look ahead are not to look at more candidates than their own request has.
    by_kind: dict[object, list[int]] = {}
    for i, draw in enumerate(asked):
        by_kind.setdefault(draw.candidates if draw.looks or draw.candidates is None else "some", []).append(i)
    return [_group([asked[i] for i in members], members, device) for members in by_kind.values()]


def _group(draws: Sequence[Draw], members: list[int], device: torch.device) -> _Group:
    rows = [row for draw in draws for row in draw.rows]
    weights = [draw.weights for draw in draws]
    return _Group(
        members=members,
        how=combination(rows, weights, [draw.candidates for draw in draws], device),
        temperature_Q=torch.tensor([draw.sampling.temperature for draw in draws], device=device),
        top_p_Q=torch.tensor([draw.sampling.top_p for draw in draws], device=device),
    )


def combination(
    rows: Sequence[int],
    weights: Sequence[Sequence[float]],
    candidates: Sequence[int | None],
    device: torch.device,
) -> Combination:
    """How ``rows`` of the outputs add up: as many of them for each request as it has ``weights``.

    ``candidates`` are given for all requests or for none.
    """
    starts = list(itertools.accumulate((len(own) for own in weights), initial=0))[:-1]
    limits = [limit for limit in candidates if limit is not None]
    return Combination(
        rows=tuple(rows),
        request_R=torch.tensor([q for q, own in enumerate(weights) for _ in own], device=device),
        weight_R=torch.tensor([w for own in weights for w in own], device=device),
        bases=tuple(rows[start] for start in starts),
        candidates_Q=torch.tensor(limits, device=device) if limits else None,
        plain=all(tuple(own) == (1.0,) for own in weights),
    )
