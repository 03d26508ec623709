# SPDX-License-Identifier: Apache-2.0
"""Descriptors that no interrupt loses: each has an owner from the call on that has returned it.

An interrupt comes where Python code calls something, and before what that returns is kept. None
comes within one call of the interpreter's own, of which `starmap` makes one.
"""

from __future__ import annotations

import os
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC
from functools import partial
from itertools import chain, starmap
from struct import Struct

from nsbox.linux.descriptors import check_whole

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Callable

_ITEM = Struct("i")
_CALL = ((),)  # what `starmap` gives a call without arguments


class Descriptor:
    """A descriptor that is closed when this is dropped; no interrupt comes before it is kept.

    For what `as_file` cannot have, which is directories. Its number is what a with statement gets.

    Attributes:
        number: The descriptor, or -1.
    """

    number = -1
    _close = staticmethod(os.close)  # while the interpreter ends, too

    def __init__(
        self, make: Callable[..., int] | None = None, *arguments: object, **named: object
    ) -> None:
        """Keep what `make` returns, if it is given."""
        if make is not None:
            (self.number,) = starmap(partial(make, *arguments, **named), _CALL)

    def fileno(self) -> int:
        """Return `number`."""
        return self.number

    def close(self) -> None:
        """Close it; may be called again."""
        number, self.number = self.number, -1
        if number >= 0:
            self._close(number)

    def __enter__(self) -> int:
        return self.number

    def __exit__(self, *_: object) -> None:
        self.close()

    __del__ = close


class Inbox(list["tuple[bytes, list[tuple[int, int, bytes]], int, object]"]):
    """What recvmsg(2) has said, call by call. No interrupt loses anything of it before `close`."""

    _ends: tuple[Descriptor, ...] = ()  # of the first so many descriptors

    @property
    def data(self) -> bytes:
        """The bytes of all that came."""
        return b"".join([data for data, _, _, _ in self])

    @property
    def ends(self) -> list[Descriptor]:
        """The descriptors of all that came."""
        numbers: list[int] = []
        for _, parts, _, _ in self:
            for _, _, content in parts:
                numbers += chain.from_iterable(_ITEM.iter_unpack(content))
        for number in numbers[len(self._ends) :]:
            end = Descriptor.__new__(Descriptor)
            self._ends += (end,)
            end.number = number
        return list(self._ends)

    def receive(self, channel: Socket, size: int, most_fds: int) -> None:
        """Receive up to `size` bytes; `check` is next. Raises OSError as recvmsg(2)."""
        space = CMSG_SPACE(most_fds * _ITEM.size)
        # Within one call of the interpreter's own.
        self += map(channel.recvmsg, (size,), (space,), (MSG_CMSG_CLOEXEC,))

    def check(self, most_fds: int) -> None:
        """Raise as `receive_bytes` when the last that came was cut off."""
        check_whole(self[-1][2], len(self.ends), most_fds)

    def close(self) -> None:
        """Drop what came, and close its descriptors."""
        for end in self.ends:
            end.close()
        self.clear()
        self._ends = ()
