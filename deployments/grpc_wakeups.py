"""gRPC's asyncio side, made to hand over all that has come when its event loop gets round to it.

A thread of gRPC's puts events into a queue and writes a byte to a socket for each; the loop that it wakes takes all
events, but reads one byte. When a turn of a busy loop brings several events, unread bytes pile up until the socket is
full (at 278 here: each takes a buffer of its own), the thread waits to write, and from then on every turn of the loop
reads one byte and gets one event. Between a Router and its engines, whose calls are Serve's, over gRPC, the last words
of calls then came seconds late and for as long as the load lasted, and what the Router held grew until it refused
requests that engines had room for.

Here the socket is read empty. An event is queued before its byte is written, so none is left without a byte.

Source: `src/python/grpcio/grpc/_cython/_cygrpc/aio/completion_queue.pyx.pxi` (gRPC 1.85; as old as 1.32).
"""

from __future__ import annotations

import logging
import socket
from types import SimpleNamespace

logger = logging.getLogger("ray.serve.groundswell")

_ALL = 65536


class _ReadEmpty(socket.socket):
    """A socket that is always read empty, however little is asked for."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        try:
            return super().recv(max(size, _ALL), flags)
        except BlockingIOError:  # the loop of another thread was quicker
            return b""


def _socketpair() -> tuple[socket.socket, socket.socket]:
    reading, writing = socket.socketpair()
    return _ReadEmpty(fileno=reading.detach()), writing


def install() -> None:
    """Have gRPC's event queue, which a process makes with its first server or channel, read its socket empty.

    Serve makes a replica's server right after it has imported the class of the replica, so the modules of those classes
    call this as they are imported. Later it has no effect.
    """
    from grpc._cython import cygrpc  # type: ignore[import-untyped]

    if hasattr(cygrpc, "socket"):
        cygrpc.socket = SimpleNamespace(socketpair=_socketpair)
    else:
        logger.warning("This version of gRPC makes its event queue in another way: its wake-ups stay as they are")
