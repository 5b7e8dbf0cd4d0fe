"""What a forward gives: for each row what comes before the head, and as many of its logits as somebody asks for.

Of a guide or a reference only the candidates count, and the head is often the model's largest product.

Legend: R rows of the outputs, N rows asked for, E hidden size, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding


@dataclass(frozen=True)
class Head:
    """``logits = project(hidden)``; ``weight_VE`` where single tokens' logits are products with its rows, or None."""

    project: Callable[[torch.Tensor], torch.Tensor]
    weight_VE: torch.Tensor | None


class Outputs:
    """The rows of one forward, or of several. Without a head, ``hidden_RE`` are the logits themselves."""

    def __init__(self, hidden_RE: torch.Tensor, head: Head | None = None) -> None:
        self.hidden_RE = hidden_RE
        self._head = head
        self._made: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.hidden_RE)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.hidden_RE.device

    def then(self, later: Outputs) -> Outputs:
        """These rows, and behind them those of a later forward of the same model."""
        both = Outputs(torch.cat([self.hidden_RE, later.hidden_RE]), self._head)
        both._made = self._made | {len(self) + row: logits_V for row, logits_V in later._made.items()}
        return both

    def logits(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The logits of these rows, [N, V]; of all by default. Computed once, however often they are asked for."""
        rows = range(len(self)) if rows is None else rows
        if self._head is None:
            return self._hidden(rows)
        missing = [row for row in dict.fromkeys(rows) if row not in self._made]
        if missing:
            logits_NV = self._head.project(self._hidden(missing))
            self._made.update(zip(missing, logits_NV, strict=True))
            if missing == list(rows):
                return logits_NV
        return torch.stack([self._made[row] for row in rows])

    def at(self, rows: Sequence[int], ids_NC: torch.Tensor) -> torch.Tensor:
        """The logits of some tokens of each of these rows, [N, C]."""
        head = self._head
        # From some number on, one product over the vocabulary is less work than looking each token up.
        if head is None or head.weight_VE is None or ids_NC.numel() * 4 > len(head.weight_VE):
            return self.logits(rows).gather(1, ids_NC)
        return (embedding(ids_NC, head.weight_VE) @ self._hidden(rows)[:, :, None])[:, :, 0]

    def _hidden(self, rows: Sequence[int]) -> torch.Tensor:
        return self.hidden_RE if list(rows) == list(range(len(self))) else self.hidden_RE[list(rows)]
