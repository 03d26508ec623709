# SPDX-License-Identifier: Apache-2.0
"""Pumps: bytes from one descriptor to another, never waiting for either."""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable
from typing import Final

CHUNK: Final = 1 << 16
_SURE_TO_FIT: Final = 256  # what a terminal that polls as writable has room for (n_tty.c)
_HANGUP_PAUSE: Final = 0.05


def open_sink(fd: int) -> int:
    """Return a descriptor for what `fd` writes to that does not make the writer wait.

    O_NONBLOCK belongs to the open file, which the user's shell shares: so the terminal or pipe is
    opened once more. Where that is refused (a terminal of another user, after su) it is a plain
    duplicate.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            return os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:
            pass
    return os.dup(fd)


class Pump:
    """One direction of a relay. It owns both descriptors, and closes them when it is through.

    Attributes:
        total: Bytes read so far.
        patient: As given; may be changed.
    """

    def __init__(
        self,
        source: int,
        sink: int,
        *,
        transform: Callable[[bytes], bytes] | None = None,
        may_read: Callable[[], bool] | None = None,
        patient: bool = False,
        limit: int | None = None,
    ) -> None:
        """Make a pump.

        Args:
            source: Where to read. Only read when it is ready, so it may be a blocking one.
            sink: Where to write.
            transform: What to do with the bytes of each read before they are written.
            may_read: Asked before each wait whether reading is allowed now.
            patient: Go on after an end of input: the master of a terminal reads as ended while
                nobody has the other side open, which somebody may do again (pty(7)).
            limit: Bytes to pass on at most; what is read after them is dropped.
        """
        self._source = source
        self._sink = sink
        self._transform = transform
        self._may_read = may_read
        self._limit = limit
        self._pause_end = 0.0
        self.patient = patient
        self._piece = _SURE_TO_FIT if os.get_blocking(sink) else CHUNK
        self._data = memoryview(b"")
        self.total = 0

    @property
    def open(self) -> bool:
        """Whether there is more to read, or to write."""
        return self._source >= 0 or bool(self._data)

    @property
    def has_data(self) -> bool:
        """Whether there are bytes that were read and not yet written."""
        return bool(self._data)

    @property
    def waits(self) -> bool:
        """Whether reading is not allowed just now, so that it must be asked again."""
        if self._source < 0:
            return False
        if self._pause_end and self.patient:
            return time.monotonic() < self._pause_end
        return self._may_read is not None and not self._may_read()

    def register(self, poller: select.poll) -> None:
        """Register what this pump waits for: room for what it has, else something to read."""
        if self._data:
            poller.register(self._sink, select.POLLOUT)
        elif self._source >= 0 and not self.waits:
            poller.register(self._source, select.POLLIN)

    def step(self, ready: dict[int, int]) -> None:
        """Read or write once, if the descriptor is among `ready`."""
        if self._data:
            if self._sink in ready:
                self._write()
        elif self._source in ready:
            self._read()

    def _read(self) -> None:
        try:
            data = os.read(self._source, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""  # EIO: the other end of a terminal is closed (pty(7))
        if not data:
            if self.patient:
                self._pause_end = time.monotonic() + _HANGUP_PAUSE
            else:
                self.end_source()
            return
        before, self.total = self.total, self.total + len(data)
        if self._limit is not None:
            data = data[: max(0, self._limit - before)]
        self._data = memoryview(data if self._transform is None else self._transform(data))
        if self._data:
            self._write()

    def _write(self) -> None:
        try:
            self._data = self._data[os.write(self._sink, self._data[: self._piece]) :]
        except BlockingIOError:
            return
        except OSError:
            # Nobody reads it: the writer at the other end of the source is to notice that.
            self.close()
            return
        if not self._data and self._source < 0:
            self.close()

    def end_source(self) -> None:
        """Read no more; the sink is closed when it has everything."""
        if self._source >= 0:
            os.close(self._source)
            self._source = -1
        if not self._data:
            self.close()

    def close(self) -> None:
        """Close both ends; what was not written is lost."""
        self._data = memoryview(b"")
        for fd in (self._source, self._sink):
            if fd >= 0:
                os.close(fd)
        self._source = self._sink = -1
