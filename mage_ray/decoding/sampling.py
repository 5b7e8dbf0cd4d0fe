"""Combine rows into guided log-probabilities, and sample from them. Pure functions on tensors.

Legend: Q requests, R rows of all requests, V vocabulary, C candidates (C = V where all tokens are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mage_ray.decoding.outputs import Outputs


@dataclass(frozen=True)
class Combination:
    """How the rows of a batch add up to requests.

    ``rows`` of the outputs take part, ``request_R`` is the request that each belongs to, ``weight_R`` its weight,
    ``bases`` the row that chooses each request's candidates, ``candidates_Q`` how many, None for the whole vocabulary.
    """

    rows: tuple[int, ...]
    request_R: torch.Tensor
    weight_R: torch.Tensor
    bases: tuple[int, ...]
    candidates_Q: torch.Tensor | None
    plain: bool = False
    """Whether every request is one row of weight 1: nothing to add up then."""

    def __len__(self) -> int:
        return len(self.bases)


def guided_logprobs(outputs: Outputs, how: Combination) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``sum_r weight_r S_r(a)``, normalised over each request's candidates (docs/method.md).

    ``S_r`` is a row's log-probability, or a value model's value. Returns log-probabilities [Q, C] in the scores' dtype
    (float32 at least) and the candidates' token ids [Q, C], None when all tokens are candidates, in which case C = V. A
    token that any row of positive weight rules out (-inf) stays ruled out, whatever the others say.
    """
    if how.candidates_Q is None:
        return _weighted_sum(_precise(outputs.scores(how.rows)), how).log_softmax(-1), None
    base_QV = outputs.logits(how.bases)
    ids_QC = base_QV.topk(min(int(how.candidates_Q.max()), base_QV.shape[1]), dim=-1).indices
    # In the order of token ids, so that a draw doesn't depend on how many candidates a neighbour has, or on the base's
    # ranking where all tokens are candidates.
    ids_QC, rank_QC = ids_QC.sort(dim=-1)
    logits_RC = base_QV.gather(1, ids_QC) if how.plain else outputs.scores(how.rows, ids_QC[how.request_R])
    scores_QC = _weighted_sum(_precise(logits_RC), how)
    return scores_QC.masked_fill(rank_QC >= how.candidates_Q[:, None], -torch.inf).log_softmax(-1), ids_QC


def _precise(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _weighted_sum(logits_RC: torch.Tensor, how: Combination) -> torch.Tensor:
    """Each request's weighted sum of its rows' scores, [Q, C].

    A row's log-probabilities are its logits less a constant, and constants go when the sum is normalised: rows need no
    normalising of their own, and values no centring.
    """
    if how.plain:
        return logits_RC
    zeros_QC = logits_RC.new_zeros(len(how), logits_RC.shape[1])
    scores_QC = zeros_QC.index_add(0, how.request_R, logits_RC * how.weight_R[:, None])
    if bool(scores_QC.sum().isfinite()):
        return scores_QC
    # -inf times a weight of either sign would decide the sum; who may rule a token out is told apart instead.
    ruled_out_RC = (logits_RC.isneginf() & (how.weight_R > 0)[:, None]).to(logits_RC.dtype)
    bounded_RC = logits_RC.clamp_min(torch.finfo(logits_RC.dtype).min / 1e6)
    scores_QC = zeros_QC.index_add(0, how.request_R, bounded_RC * how.weight_R[:, None])
    return scores_QC.masked_fill(zeros_QC.index_add(0, how.request_R, ruled_out_RC) > 0, -torch.inf)


def sample(
    logprobs_QC: torch.Tensor, temperature_Q: torch.Tensor, top_p_Q: torch.Tensor, uniform_Q: torch.Tensor
) -> torch.Tensor:
    """The index in C that each request draws, [Q], by inverting ``distribution`` at ``uniform_Q`` in [0, 1).

    A request's draw depends on its own row and number alone.
    """
    if not bool((temperature_Q > 0).any()):
        return logprobs_QC.argmax(-1)
    return invert(distribution(logprobs_QC, temperature_Q, top_p_Q), uniform_Q)


def distribution(logprobs_QC: torch.Tensor, temperature_Q: torch.Tensor, top_p_Q: torch.Tensor) -> torch.Tensor:
    """What each request draws from, [Q, C]; up to a factor, where ``top_p`` leaves tokens out.

    Temperature 0 is all on the most likely token. ``top_p`` keeps the smallest set of most likely tokens whose
    probability, at that temperature, reaches it.
    """
    warm_Q = temperature_Q > 0
    if bool((temperature_Q == 1).all()):
        probs_QC = logprobs_QC.exp()
    else:
        probs_QC = (logprobs_QC / torch.where(warm_Q, temperature_Q, 1.0)[:, None]).softmax(-1)
    if bool((top_p_Q < 1).any()):
        probs_QC = torch.where(_nucleus(probs_QC, top_p_Q), probs_QC, 0.0)
    if bool(warm_Q.all()):
        return probs_QC
    greedy_QC = torch.zeros_like(probs_QC).scatter_(1, logprobs_QC.argmax(-1, keepdim=True), 1.0)
    return torch.where(warm_Q[:, None], probs_QC, greedy_QC)


def invert(probs_QC: torch.Tensor, uniform_Q: torch.Tensor) -> torch.Tensor:
    """The index in C at which the cumulative distribution passes ``uniform_Q``, [Q]; probabilities up to a factor."""
    cumulative_QC = probs_QC.cumsum(-1)
    target_Q1 = uniform_Q.to(cumulative_QC)[:, None] * cumulative_QC[:, -1:]
    drawn_Q1 = torch.searchsorted(cumulative_QC, target_Q1, right=True)
    # A uniform next to 1 may round up to the total: the last token that has any probability is meant.
    last_Q1 = probs_QC.shape[1] - 1 - (probs_QC > 0).flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.minimum(drawn_Q1, last_Q1)[:, 0]


def entropy(logits_QV: torch.Tensor) -> torch.Tensor:
    """The entropy of each next-token distribution, [Q], in nats."""
    logprobs_QV = _precise(logits_QV).log_softmax(-1)
    return -(logprobs_QV.exp() * logprobs_QV.clamp_min(torch.finfo(logprobs_QV.dtype).min)).sum(-1)


def _nucleus(probs_QC: torch.Tensor, top_p_Q: torch.Tensor) -> torch.Tensor:
    """Which tokens are in the smallest most likely set that reaches top_p, [Q, C]; where that is 1, all are."""
    sorted_QC, order_QC = probs_QC.sort(dim=-1, descending=True, stable=True)
    before_QC = sorted_QC.cumsum(-1) - sorted_QC
    kept_QC = (before_QC < top_p_Q[:, None]) | (top_p_Q >= 1)[:, None]
    return torch.empty_like(kept_QC).scatter_(1, order_QC, kept_QC)
