"""A value model in training: LoRA on the backbone and a head, and the loss over an answer's prefixes.

Legend: B answers, T positions, S states of an answer (its prompt, and each of its prefixes), E hidden size, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mage_ray.merging.value_head import ValueHead

BACKBONE, HEAD = "backbone.", "head."
"""What the names of a ValueModel's parameters begin with."""


class ValueModel(nn.Module):
    """A PEFT model and a head; its forward is the loss.

    The scalar part of the head, ``V(s)``, learns the target of each state. A vocabulary head learns besides, by
    ``Q(s, a) = V(s) + e_a . up down h``, the target of the state that the answer's own next token led to.

    The head starts at V = 0 and Q = V, with ``down`` random but equal for equal seeds (METHOD.md section 5).
    """

    def __init__(self, backbone: Any, rank: int | None, lam: float | None) -> None:
        """``rank`` of the vocabulary head, None for a scalar one; ``lam`` of TD(lambda), None for final rewards."""
        super().__init__()
        self.backbone = backbone
        self.lam = lam
        size = backbone.get_input_embeddings().weight.shape[-1]
        if hasattr(backbone.get_input_embeddings().weight, "ds_shape"):  # ZeRO-3 holds a part of it
            size = backbone.get_input_embeddings().weight.ds_shape[-1]
        self.head = nn.Module()
        self.head.weight = nn.Parameter(torch.zeros(size))
        self.head.bias = nn.Parameter(torch.zeros(1))
        if rank is not None:
            self.head.down = nn.Parameter(torch.randn(rank, size) / size**0.5)
            self.head.up = nn.Parameter(torch.zeros(size, rank))

    @property
    def peft_config(self) -> Any:
        """The backbone's."""
        return self.backbone.peft_config

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: torch.Tensor, reward: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The mean over states of half the squared errors. ``answer`` [B, T] marks the answer's tokens, at the end."""
        whole = self.backbone.get_base_model()
        hidden_BTE = whole.base_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        value_BT = hidden_BTE @ self.head.weight.float() + self.head.bias.float()
        # A token's state is the one after it, so the prompt's last token stands for the empty answer.
        state_BT = answer.bool() | answer.roll(-1, 1).bool()
        target_BT = targets(value_BT.detach(), answer.bool(), reward.float(), self.lam)
        loss = squared(value_BT, target_BT, state_BT)
        if hasattr(self.head, "down"):
            moved_BTr = hidden_BTE[:, :-1] @ self.head.down.float().t()
            next_BTE = whole.get_input_embeddings()(input_ids[:, 1:]).float()
            advantage_BT = ((moved_BTr @ self.head.up.float().t()) * next_BTE).sum(-1)
            loss = loss + squared(value_BT[:, :-1] + advantage_BT, target_BT[:, 1:], answer.bool()[:, 1:])
        return {"loss": loss}


def targets(value_BT: torch.Tensor, answer_BT: torch.Tensor, reward_B: torch.Tensor, lam: float | None) -> torch.Tensor:
    """What ``V`` should be after each token, [B, T]: the final reward, or TD(lambda)'s return with ``value_BT``.

    The reward comes with the last token, undiscounted: ``G_S = r`` and
    ``G_t = (1 - lambda) V(s_{t+1}) + lambda G_{t+1}``, with r in place of the last state's value (VAS; METHOD.md
    section 5). Answers end with the last position; what is before their prompt's last token is of no use.
    """
    if lam is None:
        return reward_B[:, None].expand_as(value_BT)
    returns = [reward_B]
    following = reward_B
    for t in range(value_BT.shape[1] - 2, -1, -1):
        returns.append((1 - lam) * following + lam * returns[-1])
        following = value_BT[:, t]
    return torch.stack(returns[::-1], dim=1)


def squared(value_BT: torch.Tensor, target_BT: torch.Tensor, where_BT: torch.Tensor) -> torch.Tensor:
    """Half the mean squared error over the positions ``where_BT``."""
    count = where_BT.sum().clamp_min(1)
    return 0.5 * ((value_BT - target_BT).square() * where_BT).sum() / count


def head_of(weights: dict[str, torch.Tensor]) -> ValueHead:
    """The head in a ValueModel's trainable parameters, by their names."""
    own = {name.removeprefix(HEAD): tensor for name, tensor in weights.items() if name.startswith(HEAD)}
    return ValueHead(own["weight"], float(own["bias"]), own.get("down"), own.get("up"))
