"""RowRunner: a model, a bank and KV slots; the only place where a forward happens.

Legend: R live rows, K experts, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from mage_ray.decoding.plan import Row
from mage_ray.decoding.slots import KVSlots
from mage_ray.errors import FieldError
from mage_ray.merging.bank import AdapterBank

_PREFILL_TOKENS = 2048
"""Padded tokens in one prefill forward: enough to fill the cores, few enough to bound memory."""


class RowRunner:
    """Runs rows of one backbone. The model belongs to the runner from here on: the bank is built into it.

    Live rows are numbered 0 … R-1, densely; ``admit`` adds rows at the end, ``drop`` moves the last ones into the gaps.

    Raises FieldError when the bank doesn't fit the model, or when ``length`` is more than the model or its sliding
    window can hold.
    """

    def __init__(self, model: PreTrainedModel, bank: AdapterBank | None, rows: int, length: int) -> None:
        config = model.config.get_text_config()
        for name in ("max_position_embeddings", "sliding_window"):
            limit = getattr(config, name, None)
            if limit is not None and length > limit:
                raise FieldError("length", length, f"at most {limit} tokens, this model's {name}")
        self.model = model.eval()
        self.rows, self.length = rows, length
        self._mix = bank.install(model) if bank is not None and len(bank) else None
        self._experts = len(bank) if bank is not None else 0
        self._slots = KVSlots(config.num_hidden_layers, rows, length)
        self._coefficients_RK = torch.zeros(rows, self._experts, device=model.device, dtype=model.dtype)
        self._used_R = torch.zeros(rows, dtype=torch.long, device=model.device)
        self.live = 0

    @torch.inference_mode()
    def admit(self, rows: Sequence[Row], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Start a row for each (row, prompt) pair and return its number.

        All of a prompt but its last token is computed here, once for equal pairs; the last token is the first that
        ``step`` feeds. Raises FieldError when a row has coefficients for another bank or a prompt is empty or too long.
        """
        if self.live + len(rows) > self.rows:
            raise FieldError("rows", self.live + len(rows), f"at most {self.rows} at once")
        for row, prompt in zip(rows, prompts, strict=True):
            if len(row.coefficients) != self._experts:
                raise FieldError(
                    "coefficients", list(row.coefficients), f"{self._experts} numbers, one for each expert"
                )
            if not 0 < len(prompt) <= self.length:
                raise FieldError("prompt", f"{len(prompt)} tokens", f"1 to {self.length}")
        same: dict[tuple[Row, tuple[int, ...]], list[int]] = {}
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            same.setdefault((row, tuple(prompt)), []).append(i)
        # By length, so that a forward pads little.
        distinct = sorted(same, key=lambda pair: len(pair[1]))
        number = dict(zip(distinct, range(self.live, self.live + len(distinct)), strict=True))
        for (row, prompt), slot in number.items():
            self._start(slot, row, len(prompt) - 1)
        self._prefill(self.live, [prompt[:-1] for _, prompt in distinct])
        self.live += len(distinct)
        numbers = [0] * len(rows)
        for pair, owners in same.items():
            numbers[owners[0]] = number[pair]
            for owner in owners[1:]:
                self._start(self.live, pair[0], len(pair[1]) - 1)
                self._slots.copy(number[pair], self.live, len(pair[1]) - 1)
                numbers[owner] = self.live
                self.live += 1
        return numbers

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Feed one token to every live row; the logits after it, [R, V].

        Raises FieldError when the number of tokens isn't R or a row has no position left.
        """
        if len(tokens) != self.live:
            raise FieldError("tokens", len(tokens), f"{self.live}, one for each live row")
        if self.live == 0:
            raise FieldError("rows", 0, "1 or more to step")
        if int(self._used_R[: self.live].max()) >= self.length:
            raise FieldError("rows", f"one of {self.length} tokens", f"rows that end within {self.length} tokens")
        return self._forward(0, [[token] for token in tokens])

    @torch.inference_mode()
    def drop(self, numbers: Sequence[int]) -> dict[int, int]:
        """End rows. Returns the new number of every row that moved, so that live rows stay dense."""
        moved: dict[int, int] = {}
        where: dict[int, int] = {}  # present place -> number at the time of the call
        for gone in sorted(set(numbers), reverse=True):
            last = self.live - 1
            if gone != last:
                self._slots.copy(last, gone, int(self._used_R[last]))
                self._used_R[gone] = self._used_R[last]
                self._coefficients_RK[gone] = self._coefficients_RK[last]
                original = where.pop(last, last)
                where[gone] = original
                moved[original] = gone
            self.live -= 1
        return moved

    @torch.inference_mode()
    def score(self, row: Row, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence the log-probabilities of ``tokens[start:]``, each given all before it; float32, on the CPU.

        All run under one row, in one batch: it needs a free row for each while it runs.
        """
        numbers = self.admit([row] * len(tokens), [t[:start] for t, start in zip(tokens, starts, strict=True)])
        first = min(numbers, default=self.live)
        order = sorted(range(len(tokens)), key=lambda i: numbers[i])
        try:
            fed = [list(tokens[i][starts[i] - 1 : -1]) for i in order]
            if not any(fed):
                return [torch.empty(0) for _ in tokens]
            longest = max(map(len, fed))
            logits_BTV = self._forward(first, fed, keep=longest).unflatten(0, (len(fed), longest))
            scores: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
            for logits_TV, i in zip(logits_BTV, order, strict=True):
                targets = torch.tensor(tokens[i][starts[i] :], device=logits_TV.device, dtype=torch.long)
                logits_tV = logits_TV[: len(targets)].float()
                scores[i] = (logits_tV.gather(1, targets[:, None])[:, 0] - logits_tV.logsumexp(-1)).cpu()
            return scores
        finally:
            self.drop(numbers)

    def _start(self, slot: int, row: Row, used: int) -> None:
        self._coefficients_RK[slot] = torch.tensor(row.coefficients, dtype=self.model.dtype)
        self._used_R[slot] = used

    def _prefill(self, first: int, prompts: Sequence[Sequence[int]]) -> None:
        """Compute the prompts (sorted by length) of the rows from ``first`` on."""
        begin = 0
        while begin < len(prompts):
            end = begin + 1
            while end < len(prompts) and len(prompts[end]) * (end + 1 - begin) <= _PREFILL_TOKENS:
                end += 1
            if prompts[end - 1]:
                self._used_R[first + begin : first + end] = 0
                self._forward(first + begin, prompts[begin:end])
            begin = end

    @torch.inference_mode()
    def _forward(self, first: int, tokens: Sequence[Sequence[int]], keep: int = 1) -> torch.Tensor:
        """One forward of rows ``first …``; the logits of the last ``keep`` columns, flattened to [B * keep, V]."""
        device = self.model.device
        rows = slice(first, first + len(tokens))
        lengths_B = torch.tensor([len(t) for t in tokens], device=device)
        longest = max(len(t) for t in tokens)
        input_BT = torch.tensor([[*t, *[0] * (longest - len(t))] for t in tokens], device=device)
        position_BT, seen_B1TL = self._slots.open(first, self._used_R[rows], lengths_B)
        inputs = {
            "input_ids": input_BT,
            "position_ids": position_BT,
            "attention_mask": seen_B1TL,
            "past_key_values": self._slots,
            "use_cache": True,
            "logits_to_keep": keep,
        }
        if self._mix is None:
            logits_BTV = self.model(**inputs).logits
        else:
            with self._mix.rows(self._coefficients_RK[rows]):
                logits_BTV = self.model(**inputs).logits
        self._used_R[rows] += lengths_B
        return logits_BTV.flatten(0, 1)
