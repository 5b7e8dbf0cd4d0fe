"""What every arm's tokens are held against: whole forwards of separately merged models, and the plan's formula.

A greedy continuation is right when each of its tokens is the best one after all tokens before it. One forward over
prompt and continuation, without any cache, scores every position given exactly the tokens before it. So it judges as a
loop would that runs the whole sequence again for every token, at the cost of that loop's last turn.

Legend: Q requests of one plan, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rivals import MergedModels
from setting import BenchError, Prompt

from mage_ray.decoding.plan import Plan

TOLERANCE = 1e-3
"""Nats by which a chosen token may fall short of the best one: a tie, as far as float32 can tell."""


@dataclass(frozen=True)
class Agreement:
    """Of ``tokens`` tokens, ``others`` were not the naive reference's choice, by at most ``shortfall`` nats each."""

    tokens: int = 0
    others: int = 0
    shortfall: float = 0.0

    def __add__(self, more: Agreement) -> Agreement:
        return Agreement(self.tokens + more.tokens, self.others + more.others, max(self.shortfall, more.shortfall))


class NaiveReference:
    """Judges continuations. ``exact``: whether to refuse tokens that fall short by more than ``TOLERANCE``."""

    def __init__(self, models: MergedModels, exact: bool = True) -> None:
        self._models = models
        self._exact = exact

    def check(
        self, arm: str, plans: Sequence[Plan], prompts: Sequence[Prompt], made: Sequence[Sequence[int]], length: int
    ) -> Agreement:
        """Raises BenchError for a request without ``length`` tokens or, if exact, a token that isn't the best one."""
        if [len(tokens) for tokens in made] != [length] * len(plans):
            raise BenchError(f"{arm}: made {[len(tokens) for tokens in made]} tokens, {length} each were asked for")
        total = Agreement()
        for plan in dict.fromkeys(plans):
            mine = [i for i, other in enumerate(plans) if other == plan]
            short_QT = self.shortfall(plan, [prompts[i] for i in mine], [made[i] for i in mine])
            if self._exact and float(short_QT.max()) > TOLERANCE:
                q, t = divmod(int((short_QT > TOLERANCE).flatten().int().argmax()), length)
                raise BenchError(
                    f"{arm}: token {t} of request {mine[q]} is {made[mine[q]][t]}, which falls short of the naive "
                    f"reference's choice by {float(short_QT[q, t]):.3g} nats (ties within {TOLERANCE} are allowed)"
                )
            total += Agreement(short_QT.numel(), int((short_QT > 0).sum()), float(short_QT.max()))
        return total

    @torch.inference_mode()
    def shortfall(self, plan: Plan, prompts: Sequence[Prompt], made: Sequence[Sequence[int]]) -> torch.Tensor:
        """By how much each token's score is below the best one's, in nats, [Q, T]; infinite outside the candidates.

        The score is ``sum_r w_r log pi_r`` on the most likely tokens of the first row (METHOD.md section 3).
        """
        device = self._models.reference.device
        made_QT = torch.tensor(made, device=device)
        whole_QS = torch.cat([torch.tensor(prompts, device=device), made_QT], dim=1)
        base_QTV = scores_QTV = None
        for row, weight in zip(plan.rows, plan.weights, strict=True):
            model = self._models.of(row)
            logits_QTV = model(input_ids=whole_QS[:, :-1], use_cache=False, logits_to_keep=made_QT.shape[1]).logits
            logprobs_QTV = logits_QTV.float().log_softmax(-1)
            base_QTV = logprobs_QTV if base_QTV is None else base_QTV
            scores_QTV = weight * logprobs_QTV if scores_QTV is None else scores_QTV + weight * logprobs_QTV
        assert base_QTV is not None and scores_QTV is not None
        if plan.candidates is not None and plan.candidates < scores_QTV.shape[-1]:
            inside_QTC = base_QTV.topk(plan.candidates, dim=-1).indices
            allowed_QTV = torch.zeros_like(scores_QTV, dtype=torch.bool).scatter_(-1, inside_QTC, True)
            scores_QTV = scores_QTV.masked_fill(~allowed_QTV, -torch.inf)
        return scores_QTV.amax(-1) - scores_QTV.gather(-1, made_QT[..., None])[..., 0]
