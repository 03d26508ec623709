# SPDX-License-Identifier: Apache-2.0
"""Bytes with descriptors over Unix sockets (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import array
import errno
import os
import socket

from nsbox.linux import calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_FDS = 16
"""Descriptors one message may carry."""


def send_bytes(channel: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send raw bytes with descriptors."""
    if fds:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
        channel.sendmsg([data], [rights])
    else:
        channel.send(data)


def receive_bytes(channel: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """Return up to `size` raw bytes and the descriptors that came with them (close-on-exec).

    Raises:
        ConnectionError: There were more bytes or descriptors than there may be.
        OSError: EMFILE, this process has no room for the descriptors, which are lost.
    """
    data, ancillary, flags, _ = channel.recvmsg(
        size, socket.CMSG_SPACE(MOST_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    received = list(fds)
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        close_all(received)
        if not flags & socket.MSG_TRUNC and len(received) < MOST_FDS:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise ConnectionError("a message was cut off")
    return data, received


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)


def gaps(kept: Sequence[int]) -> list[tuple[int, int]]:
    """Return the ranges (first, last) of all descriptor numbers that are not in `kept`."""
    ordered = sorted(kept)
    pairs = zip([-1, *ordered], [*ordered, 1 << 32], strict=True)
    return [(low + 1, high - 1) for low, high in pairs if high - low > 1]


def close_all_but(kept: Sequence[int]) -> None:
    """Close every descriptor of this process but `kept`."""
    for first, last in gaps(kept):
        calls.close_range(first, last)
