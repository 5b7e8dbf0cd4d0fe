"""RowRunner: the rows of a backbone, each in its KV slot, and what they are fed.

Legend: R rows, B rows of one forward, K experts, E hidden size, V vocabulary, T tokens, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from mage_ray.decoding.backbone import Backbone
from mage_ray.decoding.graphs import StepGraphs
from mage_ray.decoding.outputs import Outputs, Raw, Scorer, VocabularyScorer
from mage_ray.decoding.plan import Row
from mage_ray.decoding.prefixes import PrefixStore, common_length
from mage_ray.decoding.slots import KVSlots
from mage_ray.errors import FieldError
from mage_ray.merging.bank import AdapterBank

PREFILL_TOKENS = 2048
"""Padded tokens in one forward at most: enough to fill the cores, few enough to bound memory."""


@dataclass(eq=False)
class LiveRow:
    """A row that holds a slot. ``tokens`` are those whose keys and values are in it; ``goal`` what it was started for.

    ``place`` is the slot's number; the runner may move a row to another one between forwards.
    """

    row: Row
    place: int
    goal: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    exact: bool = True
    """Whether its own coefficients made all that it holds."""
    searched: int = 0
    """How many sequences had been kept when it last looked among them."""

    @property
    def looks(self) -> bool:
        """Whether it is fed candidates, to look at each, and not the last token, to look at what may follow."""
        return self.row.head == "scalar"


@dataclass(frozen=True)
class Memory:
    """What the rows of a runner take, in bytes: ``total`` is stated up front and never exceeded."""

    rows: int
    length: int
    per_position: int
    kept_positions: int

    @property
    def total(self) -> int:
        return (self.rows * KVSlots.capacity(self.length) + self.kept_positions) * self.per_position


class RowRunner:
    """Runs rows of one backbone. The model belongs to the runner from here on: the bank is built into it.

    ``rows`` rows of up to ``length`` tokens at once, fewer rows where their keys and values would take more than
    ``memory`` bytes. Prompts of ended rows are kept for later rows of equal coefficients, up to ``kept`` tokens in all
    (None: as many as eight rows hold; 0: none).

    With ``fixed`` shapes (the default on a GPU) a step runs at a few sizes alone, each captured once as a CUDA graph;
    on a CPU the same fixed-shape step runs uncaptured.

    Raises FieldError when the bank doesn't fit the model, when ``length`` is more than the model can hold, when not
    even one row fits into ``memory``, or when the model's attention can't be given a mask of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        bank: AdapterBank | None,
        rows: int,
        length: int,
        *,
        memory: int | None = None,
        kept: int | None = None,
        fixed: bool | None = None,
    ) -> None:
        config = model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise FieldError("length", length, f"at most {limit} tokens, this model's max_position_embeddings")
        fixed = model.device.type == "cuda" if fixed is None else fixed
        # Shapes are fixed when all rows go through the head.
        bank = bank or AdapterBank([])
        self._backbone = Backbone(model, bank, length, whole=fixed)
        self.model = model
        self.length = length
        self.experts = self._backbone.experts
        self.heads = {expert.name: None if expert.head is None else expert.head.kind for expert in bank.experts}
        self._live: list[LiveRow] = []
        kept = 8 * length if kept is None else kept
        per_position = self._backbone.bytes_per_position
        if memory is not None and per_position:
            fitting = (memory // per_position - kept) // KVSlots.capacity(length)
            if fitting < 1:
                needed = Memory(1, length, per_position, kept).total
                raise FieldError(
                    "memory", memory, f"at least {needed} bytes, for one row of {length} and the kept ones"
                )
            rows = min(rows, fitting)
        self.rows = rows
        self.memory = Memory(rows, length, per_position, kept)
        self._kept = PrefixStore(kept)
        self._slots = KVSlots(self._backbone.layers, rows, length, fixed)
        self._coefficients_RK = torch.zeros(rows, self.experts, device=model.device, dtype=model.dtype)
        self._graphs = StepGraphs(self._run, rows, length, model.device) if fixed else None

    @property
    def live(self) -> int:
        """Rows that hold a slot now."""
        return len(self._live)

    @property
    def free(self) -> int:
        """Rows that could be started now."""
        return self.rows - len(self._live)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether these could be started now."""
        return len(rows) <= self.free

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether these could ever be started, with nothing beside them."""
        return len(rows) <= self.rows

    def none(self) -> Outputs:
        """Outputs of no rows."""
        return Outputs(self._backbone.nothing, self._backbone.head)

    def check(self, row: Row) -> None:
        """Raises FieldError when a row has coefficients for another bank, or mixes experts without its kind of head."""
        row.check(self.heads)

    @torch.inference_mode()
    def start(self, row: Row, goal: Sequence[int] = ()) -> LiveRow:
        """Give a row a slot, with as much of ``goal[:-1]`` as rows of equal coefficients have computed or left behind.

        Raises FieldError when no slot is free or the row has coefficients for another bank.
        """
        self.check(row)
        if not self.free:
            raise FieldError("rows", self.live + 1, f"at most {self.rows} at once")
        started = LiveRow(row, self.live, goal)
        self._coefficients_RK[started.place] = torch.tensor(row.coefficients, dtype=self.model.dtype)
        self._live.append(started)
        self.catch_up(started)
        return started

    @torch.inference_mode()
    def catch_up(self, row: LiveRow) -> None:
        """Copy into a row what rows of equal coefficients hold, or have left behind, of its goal.

        All but the goal's last token at most.
        """
        wanted = row.goal[:-1]
        others = [other for other in self._live if other is not row and other.exact and other.row == row.row]
        common, source = max(
            ((common_length(other.tokens, wanted), other) for other in others),
            key=lambda pair: pair[0],
            default=(0, row),
        )
        if common > len(row.tokens):
            self._slots.copy(source.place, row.place, common)
            row.tokens = list(wanted[:common])
        if row.searched == self._kept.added:
            return
        row.searched = self._kept.added
        kept = self._kept.find(row.row, wanted)
        if kept is not None and kept.common > len(row.tokens):
            self._slots.write(row.place, kept.parts, kept.common)
            row.tokens = list(wanted[: kept.common])

    @torch.inference_mode()
    def adopt(self, row: LiveRow, other: Row) -> None:
        """The row goes on under other coefficients, from keys and values that the old ones made (approximate)."""
        self.check(other)
        row.row, row.exact = other, False
        self._coefficients_RK[row.place] = torch.tensor(other.coefficients, dtype=self.model.dtype)

    @torch.inference_mode()
    def branch(self, row: LiveRow, other: Row) -> LiveRow:
        """A new row of other coefficients that goes on from a copy of this row's keys and values (approximate)."""
        started = self.start(other)
        self._slots.copy(row.place, started.place, len(row.tokens))
        started.goal, started.tokens, started.exact = row.goal, list(row.tokens), False
        return started

    def rewind(self, row: LiveRow, length: int) -> None:
        """Forget all but the first ``length`` tokens of a row."""
        del row.tokens[length:]

    @torch.inference_mode()
    def end(self, row: LiveRow, wipe: bool = False) -> None:
        """Free a row's slot. What it holds is kept for later rows; with ``wipe``, or where not finite, wiped out.

        A row that ``clear`` has ended stays so: its owner may not know.
        """
        if row.place >= self.live or self._live[row.place] is not row:
            return
        if wipe or not self._slots.finite(row.place, len(row.tokens)):
            self._slots.wipe(row.place)
        elif row.exact and row.tokens:
            self._kept.add(row.row, row.tokens, lambda: self._slots.read(row.place, len(row.tokens)))
        last = self._live[-1]
        self._swap(row, last)
        self._live.pop()

    def clear(self) -> None:
        """End all rows, whatever state they are in."""
        for row in list(self._live):
            self.end(row, wipe=True)

    def forget(self) -> None:
        """Let go of what ended rows have left behind, so that the next ones compute their prompts themselves."""
        self._kept.clear()

    @torch.inference_mode()
    def arrange(self, first: Sequence[LiveRow]) -> None:
        """Move these rows to the first slots, so that a forward of them reads one stretch of memory."""
        for place, row in enumerate(first):
            self._swap(row, self._live[place])

    @torch.inference_mode()
    def feed(self, rows: Sequence[LiveRow], tokens: Sequence[Sequence[int]], keep: int = 1) -> Outputs:
        """Feed each row its tokens, one or more; what comes after the last ``keep`` columns, B * keep rows.

        Shorter rows are padded at the end. ``keep = 0`` is for their keys and values alone: no rows. Raises FieldError
        when a row has no positions left.
        """
        ends = [len(row.tokens) + len(fed) for row, fed in zip(rows, tokens, strict=True)]
        visible = max(ends)
        if visible > self.length:
            raise FieldError("rows", f"one of {visible} tokens", f"rows that end within {self.length} tokens")
        places = [row.place for row in rows]
        longest = max(map(len, tokens))
        starts = [len(row.tokens) for row in rows]
        if self._graphs is not None and longest == 1 and keep == 1 and places == list(range(len(rows))):
            raw = self._graphs.run([fed[0] for fed in tokens], starts)
        else:
            raw = self._run(*self._padded(places, tokens, starts, longest, visible), visible, keep)
        for row, fed in zip(rows, tokens, strict=True):
            row.tokens.extend(fed)
        return Outputs(raw, self._backbone.head, self._scorers(rows, raw, keep))

    @torch.inference_mode()
    def look(self, rows: Sequence[tuple[LiveRow, Sequence[int]]], ids_NC: torch.Tensor) -> torch.Tensor:
        """The value of each candidate as the next token of a row whose tokens are the ones given, [N, C].

        All in one forward, in which a row's candidates share a position and don't see each other. What a row lacks of
        its tokens is fed on the way. ``take`` says which candidate it goes on from.
        """
        assert self._backbone.values is not None
        device, count = self.model.device, ids_NC.shape[1]
        lacking = [list(history[len(row.tokens) :]) for row, history in rows]
        longest, visible = max(map(len, lacking)), max(len(history) for _, history in rows) + count
        if visible > self.length:
            raise FieldError("rows", f"one of {visible} tokens", f"rows that end within {self.length} tokens")
        padding = self._slots.padding(visible)
        position, seen, written = [], [], []
        for (row, history), missing in zip(rows, lacking, strict=True):
            begin, end, idle = len(row.tokens), len(history), longest - len(missing)
            position.append([0] * idle + [*range(begin, end)] + [end] * count)
            seen.append([1] * idle + [*range(begin + 1, end + 1)] + [end] * count)
            written.append([padding] * idle + [*range(begin, end + count)])
        fed_Nt = torch.tensor([[0] * (longest - len(missing)) + missing for missing in lacking], device=device)
        input_NT = torch.cat([fed_Nt.to(ids_NC.dtype), ids_NC], dim=1)
        place_N = torch.tensor([row.place for row, _ in rows], device=device)
        position_NT, seen_NT, written_NT = (torch.tensor(t, device=device) for t in (position, seen, written))
        raw = self._run(place_N, place_N, input_NT, position_NT, written_NT, visible, count, seen_NT)
        assert raw.hidden_RE is not None
        for (row, _), missing in zip(rows, lacking, strict=True):
            row.tokens.extend(missing)
        coefficients_RK = self._coefficients_RK[place_N].repeat_interleave(count, 0)
        return self._backbone.values.scalar(raw.hidden_RE, coefficients_RK).view(len(rows), count)

    @torch.inference_mode()
    def take(self, row: LiveRow, place: int, token: int) -> None:
        """A row that has looked goes on from one of its candidates; the others are forgotten."""
        self._slots.move(row.place, len(row.tokens) + place, len(row.tokens))
        row.tokens.append(token)

    @torch.inference_mode()
    def score(self, row: Row, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence the log-probabilities of ``tokens[start:]``, each given all before it; float32, on the CPU.

        All run under one row, in one batch: it needs a free row for each while it runs.
        """
        scores = [torch.empty(0)] * len(tokens)
        some = [i for i, (t, start) in enumerate(zip(tokens, starts, strict=True)) if len(t) > start]
        with self._fed(row, [tokens[i][:-1] for i in some], [starts[i] for i in some]) as (outputs, places):
            for own, i in zip(places, some, strict=True):
                targets = torch.tensor(tokens[i][starts[i] :], device=self.model.device, dtype=torch.long)
                logits_tV = outputs.logits(own).float()
                scores[i] = (logits_tV.gather(1, targets[:, None])[:, 0] - logits_tV.logsumexp(-1)).cpu()
        return scores

    @torch.inference_mode()
    def values(self, row: Row, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[torch.Tensor]:
        """For each sequence ``V`` after its first ``start`` tokens, and after each further one; float32, on the CPU.

        As ``score`` in all else. Raises FieldError for rows whose experts have no value head.
        """
        self.check(Row(row.coefficients, "scalar"))
        heads = self._backbone.values
        assert heads is not None
        coefficients_1K = torch.tensor([row.coefficients], device=self.model.device, dtype=self.model.dtype)
        with self._fed(row, tokens, starts) as (outputs, places):
            hidden_RE = outputs.raw.hidden_RE
            assert hidden_RE is not None
            return [heads.scalar(hidden_RE[list(own)], coefficients_1K).float().cpu() for own in places]

    @contextmanager
    def _fed(
        self, row: Row, tokens: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Iterator[tuple[Outputs, list[range]]]:
        """Feed whole sequences under one row; the outputs, and which are those from each one's ``start`` on."""
        rows: list[LiveRow] = []
        try:
            for sequence, start in zip(tokens, starts, strict=True):
                rows.append(self.start(row, sequence[:start]))
                # One after the other where prompts differ: a shared beginning is computed once.
                if left := sequence[len(rows[-1].tokens) : start - 1]:
                    self.feed([rows[-1]], [left], keep=0)
            fed = [sequence[start - 1 :] for sequence, start in zip(tokens, starts, strict=True)]
            longest = max(map(len, fed), default=0)
            outputs = self.feed(rows, fed, keep=longest) if rows else Outputs.of(torch.empty(0, 0))
            yield outputs, [range(b * longest, b * longest + len(own)) for b, own in enumerate(fed)]
        finally:
            for started in rows:
                self.end(started)

    def _swap(self, one: LiveRow, other: LiveRow) -> None:
        if one is other:
            return
        self._slots.swap(one.place, other.place, (len(one.tokens), len(other.tokens)))
        places = [one.place, other.place]
        self._coefficients_RK[places] = self._coefficients_RK[places[::-1]]
        one.place, other.place = other.place, one.place
        self._live[one.place], self._live[other.place] = one, other

    def _padded(
        self, places: list[int], tokens: Sequence[Sequence[int]], starts: list[int], longest: int, visible: int
    ) -> tuple[slice | torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(slots, place_B, input_BT, position_BT, written_BT) of a forward of any shape."""
        device = self.model.device
        place_B = torch.tensor(places, device=device)
        start_B1 = torch.tensor(starts, device=device)[:, None]
        in_order = places == list(range(places[0], places[0] + len(places)))
        slots = slice(places[0], places[0] + len(places)) if in_order else place_B
        input_BT = torch.tensor([[*t, *[0] * (longest - len(t))] for t in tokens], device=device)
        offset_T = torch.arange(longest, device=device)
        position_BT = start_B1 + offset_T
        if all(len(t) == longest for t in tokens):
            return slots, place_B, input_BT, position_BT, position_BT
        real_BT = offset_T < torch.tensor([len(t) for t in tokens], device=device)[:, None]
        return (
            slots,
            place_B,
            input_BT,
            torch.where(real_BT, position_BT, 0),
            torch.where(real_BT, position_BT, self._slots.padding(visible)),
        )

    def _run(
        self,
        slots: slice | torch.Tensor,
        place_B: torch.Tensor,
        input_BT: torch.Tensor,
        position_BT: torch.Tensor,
        written_BT: torch.Tensor,
        visible: int,
        keep: int,
        seen_BT: torch.Tensor | None = None,
    ) -> Raw:
        """The backbone's forward over these slots."""
        own = (self._slots, slots, place_B, self._coefficients_RK[slots])
        return self._backbone.run(*own, input_BT, position_BT, written_BT, visible, keep, seen_BT)

    def _scorers(self, rows: Sequence[LiveRow], raw: Raw, keep: int) -> dict[int, Scorer]:
        """Who scores the rows of a forward that are a vocabulary head's."""
        which = [b for b, row in enumerate(rows) if row.row.head == "vocabulary"] if keep else []
        if not which:
            return {}
        assert self._backbone.values is not None and raw.hidden_RE is not None
        coefficients_BK = self._coefficients_RK[[row.place for row in rows]]
        scorer = VocabularyScorer(self._backbone.values, raw.hidden_RE, coefficients_BK.repeat_interleave(keep, 0))
        return {b * keep + t: scorer for b in which for t in range(keep)}
