# SPDX-License-Identifier: Apache-2.0
"""How messages go between host and launcher: one JSON object a datagram, with descriptors.

`nsbox.launcher.messages` has them. Both ends are trusted. What comes from inside an environment has
its own, fixed-size frames (`nsbox.guest.protocol`).
"""

from __future__ import annotations

import os
import select
import socket
from _socket import MSG_CTRUNC, MSG_TRUNC, getdefaulttimeout, socketpair
from _socket import socket as Socket
from itertools import starmap
from resource import RLIMIT_NOFILE, getrlimit
from select import PIPE_BUF

from nsbox.errors import SyscallError
from nsbox.launcher.messages import Message, decode, encode
from nsbox.linux.descriptors import (
    MOST_FDS,
    close_all,
    receive_bytes,
    receive_message,
    send_bytes,
)
from nsbox.linux.owned import Descriptor, Inbox
from nsbox.values import json_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

STANDBY_LIFE = 60.0
"""Seconds after which the launcher ends a standby environment that nobody has claimed."""
KEPT_FREE = 256
"""Descriptors that births leave free, or a quarter of the limit of open files if that is less."""
SMALL = 64 << 10
"""Bytes that requests about an environment that was born have at most, and all answers."""
_KIND = (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0)
LARGEST = 160 << 10
"""Bytes of one message; below the kernel's default send buffer (net.core.wmem_default)."""


def scarcity(newest: Sequence[int], *, is_brief: bool) -> tuple[int, int] | None:
    """Return how many descriptors this process has open, and its limit; None: there is room.

    Args:
        newest: What was just opened: each has the lowest number that was free (open(2)).
        is_brief: It is for an environment of one command, which may take half of what is kept free.
    """
    limit = getrlimit(RLIMIT_NOFILE)[0]
    kept = min(KEPT_FREE, limit // 4)
    count = max(newest) + 1
    return (count, limit) if limit - count < (kept // 2 if is_brief else kept) else None


def raw_pair(kind: int = socket.SOCK_SEQPACKET) -> tuple[Socket, Socket]:
    """Return a connected pair of Unix sockets, close-on-exec, of which one is to be given away.

    Both wait. O_NONBLOCK, which a default timeout of the host program (`socket.setdefaulttimeout`)
    or sockets in place of Python's (gevent) set, would be set for the other process, too.

    Raises:
        SyscallError: This process has no room for them.
    """
    # The C half's: Python's own would ask the kernel what they are.
    try:
        ours, theirs = socketpair(socket.AF_UNIX, kind)
    except OSError as error:
        raise SyscallError("socketpair", error.errno or 0) from error
    if getdefaulttimeout() is not None:
        ours.setblocking(True)
        theirs.setblocking(True)
    return ours, theirs


def pair() -> tuple[Socket, Socket]:
    """Return a `raw_pair`, its first of this process's kind of sockets (gevent): it may wait."""
    ours, theirs = raw_pair()
    return ours if _kind() is Socket else _kind()(*_KIND, ours.detach()), theirs


def _kind() -> type[Socket]:
    # Python's own only wraps what is in C, which can be had in one call.
    return Socket if issubclass(socket.socket, Socket) else socket.socket


def adopt(end: Descriptor) -> Socket:
    """Return the socket of a `pair`'s first that was received."""
    (adopted,) = starmap(Socket, ((*_KIND, end.number),))
    end.number = -1  # no interrupt has come in between
    if (kind := _kind()) is not Socket:
        adopted = kind(*_KIND, adopted.detach())
    if adopted.gettimeout() is not None:
        adopted.settimeout(None)
    return adopted


def send(channel: Socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message.

    Raises:
        ValueError: The message is larger than `LARGEST`.
        OSError: The other end is gone.
    """
    data = json_text.encode(encode(message))
    if len(data) > LARGEST:
        raise ValueError(f"a message of {len(data)} bytes is over the limit of {LARGEST}")
    send_bytes(channel, data, fds)


def receive(channel: Socket, *, is_small: bool = False) -> tuple[Message, list[int]] | None:
    """Return the next message and its descriptors, or None when the other end is gone.

    With `is_small`, that it has at most `SMALL` bytes, it is one call less.

    Raises:
        LauncherError: It is no message of this version of nsbox.
    """
    try:
        if is_small:
            data, fds = receive_bytes(channel, SMALL, MOST_FDS)
        else:
            data, fds = receive_message(channel)
    except ConnectionError:
        return None
    if not data:
        close_all(fds)
        return None
    try:
        return decode(json_text.decode(data.decode())), fds
    except BaseException:
        close_all(fds)
        raise


def hear(channel: Socket) -> tuple[Message, list[Descriptor]] | None:
    """Do as `receive` with `is_small`, where interrupts come; descriptors are `Inbox.ends`."""
    inbox = Inbox()
    try:
        inbox.receive(channel, SMALL, MOST_FDS)
        data, parts, flags, _ = inbox[0]
        if flags & (MSG_TRUNC | MSG_CTRUNC):
            inbox.check(MOST_FDS)
        if data:
            return decode(json_text.decode(data.decode())), inbox.ends if parts else []
    except ConnectionError:
        pass
    except BaseException:
        inbox.close()
        raise
    inbox.close()
    return None


def read(pipe: int) -> Message | None:
    """Return the only message of a pipe; None: who was to write it is gone."""
    data = os.read(pipe, SMALL)
    if len(data) >= PIPE_BUF:  # it may come in parts
        while part := os.read(pipe, SMALL):
            data += part
    return decode(json_text.decode(data.decode())) if data else None


def answer(host: int, message: Message, fd: int = -1) -> OSError | None:
    """Send an answer on a socket's descriptor, with an `fd` if there is one to be sent.

    Returns why it was not sent: the host has closed its end, or takes no descriptor.
    """
    try:
        if fd < 0:  # no object of Python's, which would ask the kernel what it is
            os.write(host, json_text.encode(encode(message)))
            return None
        channel = Socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, host)
        try:
            send(channel, message, [fd])
        finally:
            channel.detach()
    except OSError as error:
        return error
    return None


def reply(host: int, message: Message) -> bool:
    """Send the only answer there will be, if somebody waits for one, and close the descriptor.

    Returns whether it is sent.
    """
    if host < 0:
        return False
    is_sent = answer(host, message) is None
    os.close(host)
    return is_sent


def is_readable(fd: int, timeout: float) -> bool:
    """Whether there is something to read, or the end, within `timeout` seconds.

    Raises:
        SyscallError: ENOMEM.
    """
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        return bool(poll.poll(timeout * 1000))
    except OSError as error:
        raise SyscallError("poll", error.errno or 0) from error
