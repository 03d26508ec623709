# SPDX-License-Identifier: Apache-2.0
"""Sending what surely needs no wait (send(2)), without letting go of the interpreter's lock.

A thread that lets go of it for a call of three microseconds queues for it afterwards: with eight
threads that costs more than all the rest of what they do.
"""

from __future__ import annotations

from ctypes import c_char_p, c_int, c_ulong

from nsbox.linux.binding import bind

AT_ONCE = 0x4040  # MSG_DONTWAIT | MSG_NOSIGNAL (linux/socket.h)

send = bind("send", c_int, c_char_p, c_ulong, c_int, keep_gil=True)
"""send(2), of a descriptor, bytes, their number and `AT_ONCE`; -1 when it takes none now."""
