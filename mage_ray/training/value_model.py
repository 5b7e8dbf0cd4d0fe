"""A value model in training: LoRA on the backbone and a head, and the loss over an answer's prefixes.

Legend: B answers, T positions, E hidden size, r rank of a vocabulary head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TrainedHead(nn.Module):
    """A value head. At first ``V = 0`` and ``Q = V``; ``down`` is random, and equal for equal seeds."""

    def __init__(self, size: int, rank: int | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(1))  # DeepSpeed broadcasts no scalars
        if rank is not None:
            self.down = nn.Parameter(torch.randn(rank, size) / size**0.5)
            self.up = nn.Parameter(torch.zeros(size, rank))

    def forward(self, hidden_BTE: torch.Tensor, next_BTE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``V`` of each position, [B, T], and what ``Q`` of the token at the next one is more than it, [B, T - 1].

        In float32, whatever the backbone computes in: rewards of answers that differ little lie close together.
        """
        with torch.autocast(hidden_BTE.device.type, enabled=False):
            hidden_BTE = hidden_BTE.float()
            # DeepSpeed holds all weights in the type that it computes in.
            value_BT = hidden_BTE @ self.weight.float() + self.bias.float()
            if not hasattr(self, "down"):
                return value_BT, None
            more_BTE = (hidden_BTE[:, :-1] @ self.down.float().t()) @ self.up.float().t()
            return value_BT, (more_BTE * next_BTE[:, 1:].float()).sum(-1)


class ValueModel(nn.Module):
    """A PEFT model and a head; its forward is the loss.

    The scalar part of the head, ``V(s)``, learns the target of each state. A vocabulary head learns besides, by
    ``Q(s, a) = V(s) + e_a . up down h``, the target of the state that the answer's own next token led to.

    Every state of a run counts alike, however its answers are dealt out to batches and workers: dividing by a batch's
    own number of states would give those of short answers more weight, and ``V`` would lean to their rewards.
    """

    def __init__(self, backbone: Any, size: int, rank: int | None, lam: float | None, tokens: float) -> None:
        """``rank`` of the vocabulary head, None for a scalar one; ``lam`` of TD(lambda), None for final rewards.

        ``tokens``: how many an answer of the run has, on average.
        """
        super().__init__()
        self.backbone = backbone
        self.head = TrainedHead(size, rank)
        self.lam = lam
        self.tokens = tokens

    @property
    def peft_config(self) -> Any:
        """The backbone's."""
        return self.backbone.peft_config

    @property
    def config(self) -> Any:
        """The backbone's: ZeRO-3's buffers are made for its hidden size."""
        return self.backbone.config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: torch.Tensor, reward: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Half the mean squared error over states. ``answer`` [B, T] marks the answer's tokens, at the end."""
        whole = self.backbone.get_base_model()
        position_BT = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_BT}
        hidden_BTE = whole.base_model(**inputs, use_cache=False).last_hidden_state
        value_BT, more_BT = self.head(hidden_BTE, whole.get_input_embeddings()(input_ids))
        answer_BT = answer.bool()
        # A token's state is the one after it, so the prompt's last token stands for the empty answer.
        state_BT = answer_BT | answer_BT.roll(-1, 1)
        target_BT = targets(value_BT.detach(), reward.float(), self.lam)
        loss = squared(value_BT, target_BT, state_BT) / (self.tokens + 1)
        if more_BT is not None:
            loss = loss + squared(value_BT[:, :-1] + more_BT, target_BT[:, 1:], answer_BT[:, 1:]) / self.tokens
        return {"loss": loss}


def targets(value_BT: torch.Tensor, reward_B: torch.Tensor, lam: float | None) -> torch.Tensor:
    """What ``V`` should be after each token, [B, T]: the final reward, or TD(lambda)'s return with ``value_BT``.

    The reward comes with the last token, undiscounted: ``G_S = r`` and
    ``G_t = (1 - lambda) V(s_{t+1}) + lambda G_{t+1}``, with r in place of the last state's value (VAS). Answers
    end with the last position; what is before their prompt's last token is of no use.
    """
    if lam is None:
        return reward_B[:, None].expand_as(value_BT)
    returns = [reward_B]
    following_B = reward_B
    for t in range(value_BT.shape[1] - 2, -1, -1):
        returns.append((1 - lam) * following_B + lam * returns[-1])
        following_B = value_BT[:, t]
    return torch.stack(returns[::-1], dim=1)


def squared(value_BT: torch.Tensor, target_BT: torch.Tensor, where_BT: torch.Tensor) -> torch.Tensor:
    """Half the squared errors over an answer's positions ``where_BT``, added up; their mean over the answers."""
    return 0.5 * ((value_BT - target_BT).square() * where_BT).sum(-1).mean()
