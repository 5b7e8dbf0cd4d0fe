"""Seeds for the parts of one piece of work, so that the whole can be reproduced from a single seed."""

from __future__ import annotations

import hashlib


def derived_seed(seed: int, *path: int) -> int:
    """The seed, 0 to 2^63 - 1, of the part at ``path``, numbers from 0; the first part of all has ``seed`` itself.

    For any other path it is the first 8 bytes of SHA-256 over ``"seed/path[0]/path[1]..."`` in decimal, read as a
    big-endian number whose top bit is dropped (derived; any good hash would do).
    """
    if not any(path):
        return seed
    digest = hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()
    return int.from_bytes(digest[:8], "big") & (2**63 - 1)
