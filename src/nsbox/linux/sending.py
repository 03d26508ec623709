# SPDX-License-Identifier: Apache-2.0
"""Sending what surely needs no wait (send(2)), without letting go of the interpreter's lock.

A thread that lets go of it for a call of three microseconds queues for it afterwards: with eight
threads that costs more than all the rest of what they do.
"""

from __future__ import annotations

from ctypes import c_char_p, c_int, c_ulong

from nsbox.linux.binding import bind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket

_MSG_DONTWAIT = 0x40  # linux/socket.h
_MSG_NOSIGNAL = 0x4000

_send = bind("send", c_int, c_char_p, c_ulong, c_int, keep_gil=True)


def send_at_once(channel: Socket, data: bytes) -> int:
    """send(2): return how many bytes the socket takes now; none, too, when it is of no use."""
    sent = _send(channel.fileno(), data, len(data), _MSG_DONTWAIT | _MSG_NOSIGNAL)
    return max(0, sent)
