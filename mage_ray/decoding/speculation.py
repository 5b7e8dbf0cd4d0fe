"""Speculative guidance: the base proposes, the guide checks, and what comes out is distributed as if it had guided.

The rule is that of speculative sampling (Leviathan et al., arXiv:2211.17192, algorithm 1), with the base as the draft
and the guided distribution as the target.

Legend: N proposals, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mage_ray.decoding.drawing import Draw, Drawn, broken, combination, guide_score
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Sampling
from mage_ray.decoding.sampling import distribution, guided_logprobs, invert


def verify(
    plan: Plan,
    sampling: Sampling,
    proposed: Sequence[int],
    outputs: Outputs,
    rows: Sequence[tuple[int, ...]],
    uniforms: Sequence[float],
) -> list[Drawn]:
    """The tokens that stand: accepted proposals and, where one was rejected, the token in its place.

    The proposals were drawn from the plan's base alone, with the plan's candidates and the same sampling. ``rows[n]``
    are the plan's rows in the outputs where proposal n was drawn; ``uniforms`` 2N numbers in [0, 1).
    """
    count = len(proposed)
    device = outputs.device
    temperature_N = torch.full((count,), sampling.temperature, device=device)
    top_p_N = torch.full((count,), sampling.top_p, device=device)
    limits = [plan.candidates] * count
    target = combination([row for own in rows for row in own], [plan.weights] * count, limits, device)
    draft = combination([own[0] for own in rows], [(1.0,)] * count, limits, device)
    logprobs_NC, ids_NC = guided_logprobs(outputs, target)
    base_NC, _ = guided_logprobs(outputs, draft)
    target_NC = _normalised(distribution(logprobs_NC, temperature_N, top_p_N))
    draft_NC = _normalised(distribution(base_NC, temperature_N, top_p_N))
    drawn = []
    for n, token in enumerate(proposed):
        own = None if ids_NC is None else ids_NC[n : n + 1]
        index = token if own is None else int((own[0] == token).nonzero())
        accepted = accepts(float(target_NC[n, index]), float(draft_NC[n, index]), uniforms[2 * n])
        if not accepted:
            left_C = residual(target_NC[n], draft_NC[n])
            index = int(invert(left_C[None], torch.tensor([uniforms[2 * n + 1]], dtype=torch.float64, device=device)))
            token = index if own is None else int(own[0, index])
        logprob = float(logprobs_NC[n, index])
        draw = Draw(rows[n], plan.weights, plan.candidates, sampling, plan.values if plan.valued else ())
        score = guide_score(outputs, draw, token, index, own, logprobs_NC[n].isfinite()) if draw.values else 0.0
        drawn.append(Drawn(token, logprob, score, math.isnan(logprob) and broken(outputs, rows[n], own), index))
        if not accepted or math.isnan(logprob):
            break
    return drawn


def accepts(target: float, draft: float, uniform: float) -> bool:
    """Whether a token of these two probabilities stands: with probability ``min(1, target / draft)``."""
    return uniform * draft < target


def residual(target_C: torch.Tensor, draft_C: torch.Tensor) -> torch.Tensor:
    """What a rejected proposal's replacement is drawn from, up to a factor: ``max(target - draft, 0)``."""
    left_C = (target_C - draft_C).clamp_min(0)
    # Equal but for rounding: a rejection was rounding, too, and the target itself is as right.
    return left_C if float(left_C.sum()) > 0 else target_C


def _normalised(probs_NC: torch.Tensor) -> torch.Tensor:
    return probs_NC / probs_NC.sum(-1, keepdim=True)
