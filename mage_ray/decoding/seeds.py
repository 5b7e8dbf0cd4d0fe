"""Seeds for the parts of one piece of work, and the numbers a request draws by: all reproducible from a single seed."""

from __future__ import annotations

import hashlib
import struct

DRAW, ACCEPT, REPLACE = range(3)
"""What a random number of a token is for: to draw it, or propose it; to accept what was proposed; to replace it."""


def derived_seed(seed: int, *path: int) -> int:
    """The seed, 0 to 2^63 - 1, of the part at ``path``, numbers from 0; the first part of all has ``seed`` itself.

    For any other path it is the first 8 bytes of SHA-256 over ``"seed/path[0]/path[1]..."`` in decimal, read as a
    big-endian number whose top bit is dropped (derived; any good hash would do).
    """
    if not any(path):
        return seed
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)


def uniform(seed: int, position: int, use: int = DRAW) -> float:
    """The number in [0, 1) by which the token at ``position`` of an answer is drawn, of 53 bits.

    It depends on nothing else: an answer that is taken up in its middle goes on as it would have, speculation
    included, since a proposal's numbers are those of its position and not of its turn. BLAKE2b over the three numbers
    (derived; any good hash would do).
    """
    digest = hashlib.blake2b(struct.pack("<qqq", seed, position, use), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) / 2**53
