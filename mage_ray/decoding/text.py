"""From tokens to text as they come: whole characters only, and nothing that a stop string may yet take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""The text of tokens, special ones left out."""

_UNFINISHED = "�"
"""What decoding shows in place of a character of which only some bytes are there yet."""


class TextStream:
    """The text of one answer, piece by piece; ``stopped`` once a stop string has appeared, which ends it there."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._ids: list[int] = []
        # Tokens from _context on are decoded again with each new one, since a token's text depends on those before
        # it; those up to _shown have been passed on.
        self._context = self._shown = 0
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What the token adds to the text that is safe to show."""
        self._ids.append(token)
        return self._released(self._new())

    def end(self) -> str:
        """What was held back, when no more tokens will come; a stop string may be in it."""
        if self.stopped:
            return ""
        text = self._released(self._new(whole=True))
        rest, self._held = self._held, ""
        return text + rest

    def _new(self, whole: bool = False) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not whole):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _released(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many last characters of the text are the first ones of the stop string, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
