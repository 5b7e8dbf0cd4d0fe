"""One step of the requests that are ready: which rows run, in which forward, and what is drawn from them.

All rows that run at every token share the first forward. Guides that a cadence leaves out are brought in by a second
one, where they catch up on the tokens that they missed, or check what the base has proposed.

Legend: R rows of the outputs, N proposals, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mage_ray.decoding.drawing import Draw, Drawer, Drawn
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.request import FinishReason, Token
from mage_ray.decoding.rows import Rows
from mage_ray.decoding.runner import LiveRow
from mage_ray.decoding.sampling import entropy
from mage_ray.decoding.scheduler import Proposal, Running
from mage_ray.decoding.seeds import ACCEPT, REPLACE
from mage_ray.decoding.speculation import verify
from mage_ray.errors import FieldError

_At = dict[LiveRow, tuple[int, ...]]
"""Which rows of the outputs are a live row's, for the positions that are drawn or checked now."""


class Step:
    """Steps over the rows of one runner. ``stop`` holds the token ids that end a request."""

    def __init__(self, runner: Rows, stop: frozenset[int]) -> None:
        self._runner, self._stop = runner, stop
        self._drawer, self._proposer = Drawer(), Drawer()

    @torch.inference_mode()
    def run(self, ready: Sequence[Running]) -> list[tuple[Running, Token]]:
        """The tokens that the requests get in this step, in order: one each, or any number where the base proposes."""
        if not ready:
            return []
        first = sorted((row for r in ready for row in r.eager_rows), key=lambda row: (row.row.home, row.place))
        self._runner.arrange(first)
        owner = {row: r for r in ready for row in r.eager_rows}
        outputs = self._runner.feed(first, [[_next(owner[row])] for row in first])
        at: _At = {row: (i,) for i, row in enumerate(first)}
        looks = Looks(self._runner)

        proposing = [r for r in ready if not r.plan.eager and r.plan.cadence.speculate]
        lazy = [r for r in ready if not r.plan.eager and not r.plan.cadence.speculate]
        self._propose(proposing, outputs, at)
        checking = [r for r in proposing if self._proposed(r)]
        alone = self._certain(lazy, outputs, at)
        guided = [r for r in lazy if r not in alone]
        if checking or guided:
            outputs = self._guide(guided, checking, outputs, at)
        for r in [*(r for r in ready if r.plan.eager), *guided]:
            at |= {row: (looks.add(outputs, row, r.history),) for row in r.rows if row.looks}

        tokens: list[tuple[Running, Token]] = []
        drawing = [r for r in ready if r.plan.eager] + lazy
        asked = [_base_draw(r, at) if r in alone else _draw(r, at) for r in drawing]
        uniforms = [r.uniform() for r in drawing]
        for r, drawn in zip(drawing, self._drawer.draw(asked, outputs, uniforms) if asked else [], strict=True):
            tokens.append((r, self._token(r, drawn, r not in alone)))
            looks.take([row for row in r.rows if row.looks and row in at], drawn)
        for r in checking:
            tokens += [(r, token) for token in self._check(r, outputs, at)]
        return tokens

    def _propose(self, proposing: list[Running], outputs: Outputs, at: _At) -> None:
        if not proposing:
            return
        asked = [_base_draw(r, at) for r in proposing]
        drawn = self._proposer.draw(asked, outputs, [r.uniform(ahead=len(r.proposals)) for r in proposing])
        for r, draw, d in zip(proposing, asked, drawn, strict=True):
            r.proposals.append(Proposal(d.token, outputs.alone(draw.rows[0])))

    def _proposed(self, r: Running) -> bool:
        """Whether the base has proposed all that it may before the guide has its say."""
        count = len(r.proposals)
        return count >= min(r.plan.cadence.speculate, r.turn) or r.proposals[-1].token in self._stop

    def _certain(self, lazy: list[Running], outputs: Outputs, at: _At) -> set[Running]:
        """Those whose cadence leaves this token to the base alone."""
        alone = {r for r in lazy if r.generated % r.plan.cadence.every != 0}
        gated = [r for r in lazy if r.plan.cadence.entropy > 0 and r not in alone]
        if gated:
            nats = entropy(outputs.logits([at[r.rows[0]][0] for r in gated])).tolist()
            alone |= {r for r, h in zip(gated, nats, strict=True) if h < r.plan.cadence.entropy}
        return alone

    def _guide(
        self,
        guided: list[Running],
        checking: list[Running],
        outputs: Outputs,
        at: _At,
    ) -> Outputs:
        """Run the guides of these requests over all that they missed; what they give joins the first forward's."""
        rows: list[LiveRow] = []
        tokens: list[list[int]] = []
        needed: list[int] = []
        for r in [*guided, *checking]:
            sequence = r.history + [p.token for p in r.proposals[:-1]]
            for row in r.rows[1:]:
                if row.looks:
                    continue
                rows.append(row)
                tokens.append(sequence[len(row.tokens) :])
                needed.append(max(1, len(r.proposals)))
        if not rows:
            return outputs
        longest = max(map(len, tokens))
        keep = max(longest - len(t) + n for t, n in zip(tokens, needed, strict=True))
        more = self._runner.feed(rows, tokens, keep)
        for i, (row, t, n) in enumerate(zip(rows, tokens, needed, strict=True)):
            begin = len(outputs) + i * keep + len(t) - n - (longest - keep)
            at[row] = tuple(range(begin, begin + n))
        return outputs.then(more)

    def _check(self, r: Running, outputs: Outputs, at: _At) -> list[Token]:
        """The tokens that stand of what the base has proposed, and the one that replaces the first that doesn't."""
        count = len(r.proposals)
        both = r.proposals[0].base
        for later in [*(p.base for p in r.proposals[1:]), outputs]:
            both = both.then(later)
        rows = [(n, *(count + at[row][n] for row in r.rows[1:])) for n in range(count)]
        proposed = [p.token for p in r.proposals]
        uniforms = [r.uniform(use, n) for n in range(count) for use in (ACCEPT, REPLACE)]
        r.proposals = []
        tokens = []
        for drawn in verify(r.plan, r.request.sampling, proposed, both, rows, uniforms):
            tokens.append(self._token(r, drawn, guided=True))
            if tokens[-1].finished is not None:
                break
        for row in r.rows:
            self._runner.rewind(row, len(r.history) - 1)
        return tokens

    def _token(self, r: Running, drawn: Drawn, guided: bool) -> Token:
        """Put a drawn token to the request's history, and see whether it is the last."""
        if drawn.broken:
            error = FieldError("plan", "logits that are not finite", "rows whose coefficients keep them finite")
            return Token.end("error", r.rest(), error)
        if math.isnan(drawn.logprob):
            return Token.end("vetoed", r.rest())
        r.history.append(drawn.token)
        r.generated += 1
        finished: FinishReason | None = "stop" if drawn.token in self._stop else None
        text = r.text.add(drawn.token) if r.text is not None and finished is None else ""
        if finished is None and r.text is not None and r.text.stopped:
            finished = "stop"
        elif finished is None and r.room == 0:
            finished = "length"
        if finished is not None:
            text += r.rest()
            if r.text is not None and r.text.stopped:
                finished = "stop"
        return Token(drawn.token, drawn.logprob, finished, text, guided, drawn.value, plan=r.plan)


class Looks:
    """The rows that look ahead in one step: all their candidates run in one forward, when they are known."""

    def __init__(self, runner: Rows) -> None:
        self._runner = runner
        self._rows: dict[int, tuple[LiveRow, Sequence[int]]] = {}
        self._seen: dict[int, torch.Tensor] = {}

    def add(self, outputs: Outputs, row: LiveRow, history: Sequence[int]) -> int:
        """The number among the outputs of a row that looks ahead from ``history``."""
        number = outputs.add(self)
        self._rows[number] = row, history
        return number

    def __call__(self, rows: Sequence[int], ids_NC: torch.Tensor | None) -> torch.Tensor:
        """The values of these candidates, [N, C]."""
        assert ids_NC is not None  # a plan sees to it
        places = [n for n, row in enumerate(rows) if row not in self._seen]
        if places:
            values_NC = self._runner.look([self._rows[rows[n]] for n in places], ids_NC[places])
            self._seen.update({rows[n]: values_C for n, values_C in zip(places, values_NC, strict=True)})
        return torch.stack([self._seen[row] for row in rows])

    def logprob(self, row: int, token: int) -> None:
        """Values are none."""

    def take(self, rows: Sequence[LiveRow], drawn: Drawn) -> None:
        """These rows go on from the candidate that was drawn."""
        for row in rows:
            self._runner.take(row, drawn.place, drawn.token)


def _next(r: Running) -> int:
    return r.proposals[-1].token if r.proposals else r.history[-1]


def _draw(r: Running, at: _At) -> Draw:
    rows = tuple(at[row][0] for row in r.rows)
    values = r.plan.values if r.plan.valued else ()
    return Draw(rows, r.plan.weights, r.plan.candidates, r.request.sampling, values, r.plan.ahead > 0)


def _base_draw(r: Running, at: _At) -> Draw:
    return Draw(at[r.rows[0]], (1.0,), r.plan.candidates, r.request.sampling)
