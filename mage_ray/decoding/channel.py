"""What rows in other processes are told, and what they answer: short messages between two ranks, in order.

A message is a JSON header and perhaps an array of float32. It travels over torch.distributed, in one piece where it is
short: gloo between CPUs, nccl between GPUs. Neither end runs anything that it is sent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from mage_ray.errors import UserError

FOREVER = timedelta(days=365)
_PIECE = 8192
"""Bytes of a message's first piece, which tells how long the rest is."""
_LENGTHS = struct.Struct("<qq")


class Lost(UserError):
    """The other end is gone, or has not answered in time."""


@dataclass(frozen=True)
class Message:
    """``what`` says what it is about; ``floats`` is a float32 array of the shape that ``what["shape"]`` gives."""

    what: Mapping[str, Any]
    floats: torch.Tensor | None = None

    def pack(self) -> bytes:
        """As bytes."""
        what = dict(self.what)
        body = b""
        if self.floats is not None:
            what["shape"] = list(self.floats.shape)
            body = self.floats.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
        header = json.dumps(what, separators=(",", ":")).encode()
        return _LENGTHS.pack(len(header), len(body)) + header + body

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """The message in these bytes, which may be followed by others."""
        header, body = _LENGTHS.unpack_from(data)
        begin = _LENGTHS.size
        what = json.loads(data[begin : begin + header])
        if "shape" not in what:
            return cls(what)
        floats = np.frombuffer(data, np.float32, body // 4, begin + header).reshape(what["shape"])
        return cls(what, torch.from_numpy(floats.copy()))


class Channel(Protocol):
    """Both ends' view of the wire."""

    def send(self, message: Message) -> None:
        """Returns when the message is on its way. Raises Lost."""

    def receive(self) -> Message:
        """The next message. Raises Lost."""


class RankChannel:
    """A channel to another rank of the default process group. ``patience`` bounds the wait for an answer."""

    def __init__(self, other: int, device: torch.device | None = None, patience: timedelta = FOREVER) -> None:
        self._other, self.patience = other, patience
        self._device = device or torch.device("cpu")

    def send(self, message: Message) -> None:
        data = message.pack()
        first = data[:_PIECE].ljust(_PIECE, b"\0")
        self._put(first)
        if len(data) > _PIECE:
            self._put(data[_PIECE:])

    def receive(self) -> Message:
        data = self._get(_PIECE)
        header, body = _LENGTHS.unpack_from(data)
        left = _LENGTHS.size + header + body - _PIECE
        return Message.unpack(data + self._get(left) if left > 0 else data)

    def _put(self, data: bytes) -> None:
        piece = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device)
        self._wait(lambda: dist.isend(piece, self._other))

    def _get(self, length: int) -> bytes:
        piece = torch.empty(length, dtype=torch.uint8, device=self._device)
        self._wait(lambda: dist.irecv(piece, self._other))
        return piece.cpu().numpy().tobytes()

    def _wait(self, start: Any) -> None:
        try:
            work = start()
            if work is None or not work.wait(self.patience):
                raise Lost(f"rank {self._other}: gone, allowed: one that answers")
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise Lost(f"rank {self._other}: gone or too slow ({reason}), allowed: one that answers") from None
