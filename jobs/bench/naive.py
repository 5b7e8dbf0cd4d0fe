"""What every arm's tokens are held against: whole forwards of separately merged models, and the plan's formula.

A greedy continuation is right when each of its tokens is the best one after all tokens before it. One forward over
prompt and continuation, without any cache, scores every position given exactly the tokens before it. So it judges as a
loop would that runs the whole sequence again for every token, at the cost of that loop's last turn.

Legend: Q requests of one plan, S tokens of prompt and continuation, T new tokens, V vocabulary, C candidates, E hidden
size, P tokens of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rivals import MergedHead, MergedModels
from setting import BenchError, Prompt
from transformers import PreTrainedModel

from mage_ray.decoding.plan import Plan, Row

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

        The score is ``sum_r w_r S_r`` on the most likely tokens of the first row (docs/method.md), ``S_r`` a
        policy's log-probability or a value model's value; what it lacks of a constant for each state changes no choice.
        """
        device = self._models.reference.device
        made_QT = torch.tensor(made, device=device)
        whole_QS = torch.cat([torch.tensor(prompts, device=device), made_QT], dim=1)
        base_QTV = self._logprobs(plan.rows[0], whole_QS, made_QT.shape[1])
        inside_QTC = torch.arange(base_QTV.shape[-1], device=device).expand(base_QTV.shape)
        if plan.candidates is not None and plan.candidates < base_QTV.shape[-1]:
            inside_QTC = base_QTV.topk(plan.candidates, dim=-1).indices
        scores_QTC = plan.weights[0] * base_QTV.gather(-1, inside_QTC)
        for row, weight in zip(plan.rows[1:], plan.weights[1:], strict=True):
            scores_QTC += weight * self._scores(row, whole_QS, inside_QTC)
        mine_QTC = inside_QTC == made_QT[..., None]
        return scores_QTC.amax(-1) - scores_QTC.masked_fill(~mine_QTC, -torch.inf).amax(-1)

    def _logprobs(self, row: Row, whole_QS: torch.Tensor, length: int) -> torch.Tensor:
        model = self._models.of(row)
        logits_QTV = model(input_ids=whole_QS[:, :-1], use_cache=False, logits_to_keep=length).logits
        return logits_QTV.float().log_softmax(-1)

    def _scores(self, row: Row, whole_QS: torch.Tensor, ids_QTC: torch.Tensor) -> torch.Tensor:
        """What a row has to say of some next tokens at each of the last T positions, [Q, T, C]."""
        length = ids_QTC.shape[1]
        if row.head is None:
            return self._logprobs(row, whole_QS, length).gather(-1, ids_QTC)
        model, head = self._models.of(row), self._models.head_of(row)
        if row.head == "scalar":
            pairs = zip(whole_QS, ids_QTC, strict=True)
            return torch.stack([_value(head, _states_behind(model, whole_S, ids_TC)) for whole_S, ids_TC in pairs])
        hidden_QTE = model.base_model(input_ids=whole_QS[:, :-1], use_cache=False).last_hidden_state[:, -length:]
        assert head.matrix_EE is not None
        more_QTE = hidden_QTE.double() @ head.matrix_EE.t()
        embedding_QTCE = model.get_input_embeddings()(ids_QTC).double()
        return ((embedding_QTCE @ more_QTE[..., None])[..., 0] + _value(head, hidden_QTE)[..., None]).float()


def _value(head: MergedHead, hidden_XE: torch.Tensor) -> torch.Tensor:
    """``V`` of each state, [X]."""
    return (hidden_XE.double() @ head.weight_E + head.bias).float()


def _states_behind(model: PreTrainedModel, whole_S: torch.Tensor, ids_TC: torch.Tensor) -> torch.Tensor:
    """The last hidden state of each candidate behind the tokens before its position, [T, C, E]: what it would be alone.

    One forward without a cache over the sequence and, behind it, all candidates of all positions: each is at its own
    position, and sees the tokens before that and itself.
    """
    (length, count), device = ids_TC.shape, ids_TC.device
    known_S = whole_S[:-1]
    # The t-th new token comes behind the prompt and t more.
    before_T = torch.arange(len(known_S) - length + 1, len(known_S) + 1, device=device)
    before_P = torch.cat([torch.arange(len(known_S), device=device), before_T.repeat_interleave(count)])
    place_P = torch.arange(len(before_P), device=device)
    seen_PP = (place_P < before_P[:, None]) | (place_P == place_P[:, None])
    dtype = model.dtype
    mask_PP = torch.zeros(seen_PP.shape, device=device, dtype=dtype).masked_fill(~seen_PP, torch.finfo(dtype).min)
    hidden_PE = model.base_model(
        input_ids=torch.cat([known_S, ids_TC.flatten()])[None],
        attention_mask=mask_PP[None, None],
        position_ids=before_P[None],
        use_cache=False,
    ).last_hidden_state[0]
    return hidden_PE[len(known_S) :].view(length, count, -1)
