"""What a forward gives: for each row its last hidden state, and as many of its scores as somebody asks for.

A policy's row scores tokens by its logits, a value model's by its values. Of a guide or a reference only the candidates
count, and the head is often the model's largest product.

Legend: R rows of the outputs, N rows asked for, E hidden size, V vocabulary, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import embedding

from mage_ray.merging.value_head import ValueHeads


@dataclass(frozen=True)
class Head:
    """``logits = project(hidden)``; ``weight_VE`` where single tokens' logits are products with its rows, or None."""

    project: Callable[[torch.Tensor], torch.Tensor]
    weight_VE: torch.Tensor | None


@dataclass(frozen=True)
class Raw:
    """What the model itself gave: last hidden states [R, E] where they are needed, logits [R, V] where it made them."""

    hidden_RE: torch.Tensor | None
    logits_RV: torch.Tensor | None

    def first(self, count: int) -> Raw:
        """The first rows alone."""
        hidden_RE = None if self.hidden_RE is None else self.hidden_RE[:count]
        return Raw(hidden_RE, None if self.logits_RV is None else self.logits_RV[:count])


class Scorer(Protocol):
    """Scores of rows that aren't a policy's."""

    def __call__(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        """The scores of some tokens of each row, [N, C], or of the whole vocabulary, [N, V]."""

    def logprob(self, row: int, token: int) -> float | None:
        """The log-probability of a token, over the whole vocabulary, by a row that is a policy's; else None."""


class Outputs:
    """The rows of one forward, or of several.

    Their logits are those that the forward made, or come from its hidden states by ``head``. ``scorers`` says which
    rows have other scores.
    """

    def __init__(self, raw: Raw, head: Head | None = None, scorers: dict[int, Scorer] | None = None) -> None:
        self.raw = raw
        self._head = head
        self._scorers = scorers or {}
        self._made: dict[int, torch.Tensor] = {}
        self._added = 0

    @classmethod
    def of(cls, logits_RV: torch.Tensor) -> Outputs:
        """Rows of which nothing but the logits is known."""
        return cls(Raw(None, logits_RV))

    def __len__(self) -> int:
        return len(self._any) + self._added

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._any.device

    @property
    def _any(self) -> torch.Tensor:
        tensor = self.raw.logits_RV if self.raw.hidden_RE is None else self.raw.hidden_RE
        assert tensor is not None
        return tensor

    def alone(self, row: int) -> Outputs:
        """One row, copied, so that it outlives the others."""
        raw = Raw(*(None if t is None else t[row : row + 1].clone() for t in (self.raw.hidden_RE, self.raw.logits_RV)))
        one = Outputs(raw, self._head)
        one._made = {0: self._made[row].clone()} if row in self._made else {}
        return one

    def then(self, later: Outputs) -> Outputs:
        """These rows, and behind them those of a later forward of the same model. Before any are added."""
        pairs = zip((self.raw.hidden_RE, self.raw.logits_RV), (later.raw.hidden_RE, later.raw.logits_RV), strict=True)
        raw = Raw(*(None if a is None or b is None else torch.cat([a, b]) for a, b in pairs))
        moved = _moved(later._scorers, {len(self) + row: row for row in range(len(later))})
        both = Outputs(raw, self._head, self._scorers | moved)
        both._made = self._made | {len(self) + row: logits_V for row, logits_V in later._made.items()}
        return both

    def spread(self, sources: Sequence[int | None], scorers: Mapping[int, Scorer]) -> Outputs:
        """Rows taken from these, or blank where the source is None; ``scorers`` have the scores of those. New rows."""
        blank = len(self)
        index = [blank if source is None else source for source in sources]
        parts = (self.raw.hidden_RE, self.raw.logits_RV)
        raw = Raw(
            *(None if part is None else torch.cat([part, part.new_zeros(1, part.shape[1])])[index] for part in parts)
        )
        own = {row: source for row, source in enumerate(sources) if source is not None}
        return Outputs(raw, self._head, _moved(self._scorers, own) | dict(scorers))

    def add(self, scorer: Scorer) -> int:
        """A row that no forward has run yet: ``scorer`` runs it when it is known which tokens are candidates."""
        self._added += 1
        self._scorers[len(self) - 1] = scorer
        return len(self) - 1

    def logits(self, rows: Sequence[int] | None = None) -> torch.Tensor:
        """The logits of these policies' rows, [N, V]; of all by default. Computed once, however often asked for."""
        rows = range(len(self)) if rows is None else rows
        if self.raw.logits_RV is not None:
            return taken(self.raw.logits_RV, rows)
        assert self._head is not None and self.raw.hidden_RE is not None
        missing = [row for row in dict.fromkeys(rows) if row not in self._made]
        if missing:
            logits_NV = self._head.project(taken(self.raw.hidden_RE, missing))
            self._made.update(zip(missing, logits_NV, strict=True))
            if missing == list(rows):
                return logits_NV
        return torch.stack([self._made[row] for row in rows])

    def scores(self, rows: Sequence[int], ids_NC: torch.Tensor | None = None) -> torch.Tensor:
        """The scores of some tokens of each of these rows, [N, C], or of all tokens, [N, V]."""
        by_scorer: dict[Scorer | None, list[int]] = {}
        for n, row in enumerate(rows):
            by_scorer.setdefault(self._scorers.get(row), []).append(n)
        if by_scorer.keys() <= {None}:
            return self._policy_scores(rows, ids_NC)
        parts = []
        for scorer, places in by_scorer.items():
            own, ids = [rows[n] for n in places], None if ids_NC is None else ids_NC[places]
            parts.append(self._policy_scores(own, ids) if scorer is None else scorer(own, ids))
        scores = parts[0].new_empty(len(rows), parts[0].shape[1])
        for places, part in zip(by_scorer.values(), parts, strict=True):
            scores[places] = part
        return scores

    def is_policy(self, row: int) -> bool:
        """Whether a row's scores are logits that are at hand."""
        return row not in self._scorers

    def logprob(self, row: int, token: int) -> float | None:
        """A policy's log-probability of a token over the whole vocabulary; None for a value model's row."""
        if self.is_policy(row):
            logits_V = self.logits([row])[0].double()
            return float(logits_V[token] - logits_V.logsumexp(-1))
        return self._scorers[row].logprob(row, token)

    def _policy_scores(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        if ids_NC is None:
            return self.logits(rows)
        head = self._head
        # From some number on, one product over the vocabulary is less work than looking each token up.
        hidden_RE = self.raw.hidden_RE
        if head is None or hidden_RE is None or head.weight_VE is None or ids_NC.numel() * 4 > len(head.weight_VE):
            return self.logits(rows).gather(1, ids_NC)
        return (embedding(ids_NC, head.weight_VE) @ taken(hidden_RE, rows)[:, :, None])[:, :, 0]


def _moved(scorers: Mapping[int, Scorer], places: Mapping[int, int]) -> dict[int, Scorer]:
    """The scorers of rows that have moved, one for each that there was, so that each is still asked once."""
    moved = {id(scorer): _Moved(scorer, places) for scorer in scorers.values()}
    return {now: moved[id(scorers[before])] for now, before in places.items() if before in scorers}


@dataclass(frozen=True, eq=False)
class _Moved:
    """A scorer whose rows have moved; ``places`` maps where they are now to where they were."""

    scorer: Scorer
    places: Mapping[int, int]

    def __call__(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        return self.scorer([self.places[row] for row in rows], ids_NC)

    def logprob(self, row: int, token: int) -> float | None:
        """Of a policy's row."""
        return self.scorer.logprob(self.places[row], token)


@dataclass(frozen=True, eq=False)
class VocabularyScorer:
    """The values of rows with a vocabulary head, from their hidden states."""

    heads: ValueHeads
    hidden_RE: torch.Tensor
    coefficients_RK: torch.Tensor

    def __call__(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        """[N, C], or [N, V] of all tokens."""
        own = list(rows)
        return self.heads.vocabulary(self.hidden_RE[own], self.coefficients_RK[own], ids_NC)

    def logprob(self, row: int, token: int) -> None:
        """Values are none."""


def taken(tensor_RX: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a tensor, [N, X]."""
    return tensor_RX if list(rows) == list(range(len(tensor_RX))) else tensor_RX[list(rows)]
