# SPDX-License-Identifier: Apache-2.0
"""Bytes with descriptors over Unix sockets (unix(7), SCM_RIGHTS)."""

from __future__ import annotations

import errno
import os
from _io import FileIO

# The C half of `socket`, as in `calls`.
from _socket import (
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_CTRUNC,
    MSG_PEEK,
    MSG_TRUNC,
    SCM_RIGHTS,
    SOL_SOCKET,
)
from _thread import allocate_lock
from itertools import chain, starmap
from resource import RLIMIT_NOFILE, getrlimit, setrlimit
from struct import calcsize, pack, unpack

from nsbox.errors import SyscallError
from nsbox.linux import calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable, Sequence

MOST_FDS = 253
"""Descriptors one message may carry (unix(7), SCM_MAX_FD)."""
MOST_FDS_FROM_INSIDE = 16
"""As many as are taken from a peer that is not trusted, unless said otherwise."""
_ITEM_SIZE = calcsize("i")


def send_bytes(channel: Socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send raw bytes with descriptors.

    Raises:
        OSError: ETOOMANYREFS, other processes of this user have too many descriptors in flight.
    """
    if not fds:
        channel.send(data)
        return
    rights = (SOL_SOCKET, SCM_RIGHTS, pack(f"{len(fds)}i", *fds))
    try:
        channel.sendmsg([data], [rights])
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        _send_above_soft_limit(channel, data, rights)


def _send_above_soft_limit(channel: Socket, data: bytes, rights: tuple[int, int, bytes]) -> None:
    """Send with the hard limit of open files in force for this one call.

    The kernel compares what all processes of a user have in flight, guests with the user's own id
    included, with the soft limit of who sends (unix(7)); guests have a hard limit of their own.
    """
    is_mine = _limit_lock.acquire(timeout=1.0)  # a fork may have copied it while it was held
    try:
        soft, hard = getrlimit(RLIMIT_NOFILE)
        try:
            setrlimit(RLIMIT_NOFILE, (hard, hard))
            channel.sendmsg([data], [rights])
        finally:
            setrlimit(RLIMIT_NOFILE, (soft, hard))
    except OSError as error:
        if error.errno != errno.ETOOMANYREFS:
            raise
        text = (
            f"user {os.getuid()} has over {hard} descriptors in messages that nobody has read "
            "(unix(7)), and that is the hard limit of open files here (RLIMIT_NOFILE): end what "
            "does not read them, or raise the limit above the open_files of all environments"
        )
        raise OSError(error.errno, text) from None
    finally:
        if is_mine:
            _limit_lock.release()


_limit_lock = allocate_lock()


def receive_bytes(
    channel: Socket, size: int, most_fds: int = MOST_FDS_FROM_INSIDE
) -> tuple[bytes, list[int]]:
    """Return up to `size` raw bytes and the descriptors that came with them (close-on-exec).

    Raises:
        ConnectionError: There were more bytes or descriptors than there may be.
        OSError: EMFILE, this process has no room for the descriptors, which are lost.
    """
    space = CMSG_SPACE(most_fds * _ITEM_SIZE)
    try:
        data, ancillary, flags, _ = channel.recvmsg(size, space, MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # the peer left something unread: told once, before its last word
        data, ancillary, flags, _ = channel.recvmsg(size, space, MSG_CMSG_CLOEXEC)
    received: list[int] = []
    for level, kind, content in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            count = len(content) // _ITEM_SIZE
            received += unpack(f"{count}i", content[: count * _ITEM_SIZE])
    if flags & (MSG_TRUNC | MSG_CTRUNC):
        close_all(received)
        check_whole(flags, len(received), most_fds)
    return data, received


def check_whole(flags: int, count: int, most_fds: int) -> None:
    """Raise as `receive_bytes` when recvmsg(2) says that something was cut off."""
    if flags & (MSG_TRUNC | MSG_CTRUNC):
        if not flags & MSG_TRUNC and count < most_fds:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        raise ConnectionError("a message was cut off")


def receive_message(channel: Socket) -> tuple[bytes, list[int]]:
    """Return the next datagram, whatever its size, and its descriptors. For trusted peers."""
    # A buffer for the largest would be mapped and unmapped each time (malloc(3), M_MMAP_THRESHOLD).
    try:
        size = channel.recv_into(bytearray(1), 1, MSG_PEEK | MSG_TRUNC)
    except ConnectionResetError:  # as above
        size = channel.recv_into(bytearray(1), 1, MSG_PEEK | MSG_TRUNC)
    return receive_bytes(channel, max(size, 1), MOST_FDS)


def as_file(make: Callable[..., int], *arguments: object) -> FileIO:
    """Return the descriptor that `make` returns as a file, which is closed when it is dropped.

    A number that a call returns is lost when an interrupt comes before it is kept. None comes
    within one call of the interpreter's own.

    Raises:
        SyscallError: With the name of `make`.
    """
    try:
        (file,) = map(FileIO, map(make, *zip(arguments, strict=False)), ["r+"])
    except OSError as error:
        raise SyscallError(make.__name__, error.errno or 0) from error
    return file


def pipe_files() -> tuple[FileIO, FileIO]:
    """Return the two ends of a pipe, to read from and to write to, as `as_file` does."""
    try:
        read, write = map(FileIO, chain.from_iterable(starmap(os.pipe, [()])), ["rb", "wb"])
    except OSError as error:
        raise SyscallError("pipe2", error.errno or 0) from error
    return read, write


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
