# SPDX-License-Identifier: Apache-2.0
"""Window sizes of terminals (ioctl_tty(2))."""

from __future__ import annotations

import fcntl
import struct
import termios

_SIZE = struct.Struct("HHHH")


def set_window_size(fd: int, rows: int, columns: int) -> None:
    """Set the size of the terminal `fd`."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _SIZE.pack(rows, columns, 0, 0))


def window_size(fd: int) -> tuple[int, int]:
    """Return rows and columns of the terminal `fd`."""
    rows, columns, _, _ = _SIZE.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_SIZE.size)))
    return rows, columns
