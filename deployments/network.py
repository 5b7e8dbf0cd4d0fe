"""The addresses that a gang's members meet at: one address each, and never all of a machine's."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import psutil

from mage_ray.errors import UserError


def interface_of(address: str) -> str:
    """The network interface that has an address. Raises UserError when none has."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    raise UserError(f"address: got {address}, allowed: one of this machine's")


def listen(address: str, size: int, patience: timedelta = timedelta(seconds=60)) -> tuple[Any, int]:
    """A store for ``size`` processes that listens on this address alone, and its port."""
    import torch.distributed as dist

    # Given only a port, the store would listen on every address of the machine.
    listener = socket.create_server((address, 0))
    port: int = listener.getsockname()[1]
    store = dist.TCPStore(
        address, port, size, True, patience, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port
