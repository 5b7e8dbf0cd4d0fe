"""Rows of a runner in another process: the same calls, as messages over a channel.

``serve`` is the loop of that process. What needs no answer is only sent, and the other end does it in order; where one
of these fails, the next answer says so.

Legend: N rows asked for, C candidates, V vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mage_ray.decoding.channel import Channel, Lost, Message
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Row
from mage_ray.decoding.runner import LiveRow, RowRunner
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.value_head import Kind

_KEPT_FEEDS = 2
"""Outputs of that many forwards stay for questions: a step asks about its last one, or its last two."""


@dataclass(frozen=True)
class Facts:
    """What must be known of a runner to check requests for it without asking."""

    rows: int
    length: int
    heads: Mapping[str, Kind | None]
    """Of each expert of its bank, by its name, the kind of its value head."""

    @classmethod
    def of(cls, runner: RowRunner) -> Facts:
        """A runner's."""
        return cls(runner.rows, runner.length, runner.heads)


class RemoteRunner:
    """A RowRunner at the other end of a channel, as far as an engine's steps need one."""

    def __init__(self, channel: Channel) -> None:
        """Raises Lost when nobody answers."""
        self._channel = channel
        self._lost: str | None = None
        self.waited = 0.0
        """Seconds spent waiting for its answers, since it began."""
        self._numbers = itertools.count()
        self._feeds = itertools.count()
        facts = self._ask({"do": "facts"}).what["facts"]
        self.facts = Facts(facts["rows"], facts["length"], facts["heads"])
        self.rows, self.length = self.facts.rows, self.facts.length
        self.live = 0

    @property
    def free(self) -> int:
        """Rows that could be started now."""
        return self.rows - self.live

    def check(self, row: Row) -> None:
        """As ``RowRunner.check``."""
        row.check(self.facts.heads)

    def start(self, row: Row, goal: Sequence[int] = ()) -> LiveRow:
        """As ``RowRunner.start``."""
        self.check(row)
        if not self.free:
            raise FieldError("rows", self.live + 1, f"at most {self.rows} at once")
        started = LiveRow(row, next(self._numbers), goal)
        asked = {"do": "start", "row": started.place, "of": asdict(row), "goal": list(goal)}
        started.tokens = list(goal[: self._ask(asked).what["held"]])
        self.live += 1
        return started

    def catch_up(self, row: LiveRow) -> None:
        """As ``RowRunner.catch_up``."""
        held = self._ask({"do": "catch_up", "row": row.place}).what["held"]
        row.tokens = list(row.goal[:held]) if held > len(row.tokens) else row.tokens

    def adopt(self, row: LiveRow, other: Row) -> None:
        """As ``RowRunner.adopt``."""
        self.check(other)
        row.row, row.exact = other, False
        self._tell({"do": "adopt", "row": row.place, "of": asdict(other)})

    def branch(self, row: LiveRow, other: Row) -> LiveRow:
        """As ``RowRunner.branch``."""
        started = LiveRow(other, next(self._numbers), row.goal, list(row.tokens), exact=False)
        self._tell({"do": "branch", "row": row.place, "to": started.place, "of": asdict(other)})
        self.live += 1
        return started

    def rewind(self, row: LiveRow, length: int) -> None:
        """As ``RowRunner.rewind``."""
        if len(row.tokens) > length:
            del row.tokens[length:]
            self._tell({"do": "rewind", "row": row.place, "length": length})

    def end(self, row: LiveRow, wipe: bool = False) -> None:
        """As ``RowRunner.end``; one that is gone holds no rows."""
        self.live -= 1
        with suppress(Lost):
            self._tell({"do": "end", "row": row.place, "wipe": wipe})

    def feed(self, rows: Sequence[LiveRow], tokens: Sequence[Sequence[int]], keep: int) -> int:
        """Send a forward on its way; its number, for questions about its outputs."""
        number = next(self._feeds)
        places = [row.place for row in rows]
        fed = [list(own) for own in tokens]
        self._tell({"do": "feed", "rows": places, "tokens": fed, "keep": keep, "number": number})
        for row, own in zip(rows, fed, strict=True):
            row.tokens.extend(own)
        return number

    def scores(self, feed: int, rows: Sequence[int], ids_NC: torch.Tensor | None, whole: bool = False) -> torch.Tensor:
        """Scores of rows of a forward's outputs, [N, C] or [N, V]; with ``whole`` a policy's log-probabilities."""
        ids = None if ids_NC is None else ids_NC.tolist()
        answer = self._ask({"do": "scores", "feed": feed, "rows": list(rows), "ids": ids, "whole": whole})
        assert answer.floats is not None
        return answer.floats

    def look(self, rows: Sequence[tuple[LiveRow, Sequence[int]]], ids_NC: torch.Tensor) -> torch.Tensor:
        """As ``RowRunner.look``."""
        missing = [list(history[len(row.tokens) :]) for row, history in rows]
        places = [row.place for row, _ in rows]
        answer = self._ask({"do": "look", "rows": places, "missing": missing, "ids": ids_NC.tolist()})
        for (row, _), own in zip(rows, missing, strict=True):
            row.tokens.extend(own)
        assert answer.floats is not None
        return answer.floats

    def take(self, row: LiveRow, place: int, token: int) -> None:
        """As ``RowRunner.take``."""
        self._tell({"do": "take", "row": row.place, "place": place, "token": token})
        row.tokens.append(token)

    def close(self) -> None:
        """Let the other end leave its loop."""
        self._tell({"do": "close"})

    def _tell(self, what: Mapping[str, Any]) -> None:
        if self._lost is not None:  # it was waited for once
            raise Lost(self._lost)
        try:
            self._channel.send(Message(what))
        except Lost as lost:
            self._lost = str(lost)  # not itself: its traceback would hold on to the process group
            raise

    def _ask(self, what: Mapping[str, Any]) -> Message:
        self._tell(what)
        began = time.perf_counter()
        try:
            answer = self._channel.receive()
        except Lost as lost:
            self._lost = str(lost)
            raise
        self.waited += time.perf_counter() - began
        if "error" in answer.what:
            raise UserError(f"a runner in another process failed: {answer.what['error']}")
        return answer


@dataclass(frozen=True, eq=False)
class RemoteScorer:
    """The scores of a forward's rows that run elsewhere; ``places`` maps rows of the outputs to theirs.

    ``valued`` are those that are a value model's.
    """

    runner: RemoteRunner
    feed: int
    places: Mapping[int, int]
    valued: frozenset[int] = frozenset()

    def __call__(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        """[N, C], or [N, V] of all tokens."""
        return self.runner.scores(self.feed, [self.places[row] for row in rows], ids_NC)

    def logprob(self, row: int, token: int) -> float | None:
        """A policy's log-probability of a token, over the whole vocabulary."""
        if row in self.valued:
            return None
        whole = self.runner.scores(self.feed, [self.places[row]], torch.tensor([[token]]), whole=True)
        return float(whole[0, 0])


def serve(runner: RowRunner, channel: Channel) -> None:
    """Do what the other end of the channel says, until it says ``close``. Raises Lost when it is gone."""
    Server(runner, channel).run()


class Server:
    """A runner's rows and latest outputs by the numbers that the other end knows them by."""

    def __init__(self, runner: RowRunner, channel: Channel) -> None:
        self._runner, self._channel = runner, channel
        self._rows: dict[int, LiveRow] = {}
        self._outputs: dict[int, Outputs] = {}
        self._failed: str | None = None

    def run(self) -> None:
        """The loop."""
        calls: dict[str, Callable[[Mapping[str, Any]], Message | None]] = {
            "facts": self._facts,
            "start": self._start,
            "catch_up": self._catch_up,
            "adopt": self._adopt,
            "branch": self._branch,
            "rewind": self._rewind,
            "end": self._end,
            "feed": self._feed,
            "scores": self._scores,
            "look": self._look,
            "take": self._take,
        }
        asked = {"facts", "start", "catch_up", "scores", "look"}
        while (what := self._channel.receive().what)["do"] != "close":
            answer = None
            if self._failed is None:
                try:
                    answer = calls[what["do"]](what)
                except Exception as error:
                    self._failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if what["do"] in asked:
                self._channel.send(answer or Message({"error": self._failed}))

    def _facts(self, what: Mapping[str, Any]) -> Message:
        return Message({"facts": asdict(Facts.of(self._runner))})

    def _start(self, what: Mapping[str, Any]) -> Message:
        row = self._runner.start(_row(what["of"]), tuple(what["goal"]))
        self._rows[what["row"]] = row
        return Message({"held": len(row.tokens)})

    def _catch_up(self, what: Mapping[str, Any]) -> Message:
        row = self._rows[what["row"]]
        self._runner.catch_up(row)
        return Message({"held": len(row.tokens)})

    def _adopt(self, what: Mapping[str, Any]) -> None:
        self._runner.adopt(self._rows[what["row"]], _row(what["of"]))

    def _branch(self, what: Mapping[str, Any]) -> None:
        self._rows[what["to"]] = self._runner.branch(self._rows[what["row"]], _row(what["of"]))

    def _rewind(self, what: Mapping[str, Any]) -> None:
        self._runner.rewind(self._rows[what["row"]], what["length"])

    def _end(self, what: Mapping[str, Any]) -> None:
        self._runner.end(self._rows.pop(what["row"]), what["wipe"])

    def _feed(self, what: Mapping[str, Any]) -> None:
        rows = [self._rows[number] for number in what["rows"]]
        if what["keep"]:
            self._runner.arrange(rows)
        self._outputs[what["number"]] = self._runner.feed(rows, what["tokens"], what["keep"])
        for old in list(self._outputs)[:-_KEPT_FEEDS]:
            del self._outputs[old]

    @torch.inference_mode()
    def _scores(self, what: Mapping[str, Any]) -> Message:
        outputs, device = self._outputs[what["feed"]], self._runner.model.device
        ids_NC = None if what["ids"] is None else torch.tensor(what["ids"], device=device)
        if not what["whole"]:
            return Message({}, outputs.scores(what["rows"], ids_NC))
        logprobs_NV = outputs.logits(what["rows"]).double().log_softmax(-1)
        return Message({}, logprobs_NV if ids_NC is None else logprobs_NV.gather(1, ids_NC))

    def _look(self, what: Mapping[str, Any]) -> Message:
        rows = [self._rows[number] for number in what["rows"]]
        asked = [(row, [*row.tokens, *missing]) for row, missing in zip(rows, what["missing"], strict=True)]
        ids_NC = torch.tensor(what["ids"], device=self._runner.model.device)
        return Message({}, self._runner.look(asked, ids_NC))

    def _take(self, what: Mapping[str, Any]) -> None:
        self._runner.take(self._rows[what["row"]], what["place"], what["token"])


def _row(of: Mapping[str, Any]) -> Row:
    return Row(tuple(of["coefficients"]), of["head"], of["home"])
