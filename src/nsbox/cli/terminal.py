# SPDX-License-Identifier: Apache-2.0
"""Terminals (termios(3), ioctl_tty(2), pty(7)): sizes, raw mode, and who is in the foreground."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import termios
from contextlib import suppress
from typing import Final

_SIZE: Final = struct.Struct("HHHH")
_LFLAG, _CC = 3, 6
_TIOCSIG: Final = 0x40045436  # asm-generic/ioctls.h
_DEFAULT_SIZE: Final = (24, 80)


def set_window_size(fd: int, rows: int, columns: int) -> None:
    """Set the size of the terminal `fd`."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, _SIZE.pack(rows, columns, 0, 0))


def window_size(fd: int) -> tuple[int, int]:
    """Return rows and columns of the terminal `fd`; 24 by 80 where it does not know them."""
    rows, columns, _, _ = _SIZE.unpack(fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(_SIZE.size)))
    return (rows, columns) if rows and columns else _DEFAULT_SIZE


def signal_foreground(master: int, number: int) -> bool:
    """Send a signal to the foreground of the terminal behind `master`, as its keys do.

    False when it is none of those that keys send (SIGINT, SIGQUIT, SIGTSTP).
    """
    try:
        fcntl.ioctl(master, _TIOCSIG, number)
    except OSError:
        return False
    return True


def is_foreground(fd: int) -> bool:
    """Whether this process may use the terminal `fd` without being stopped for it.

    True also for a terminal that is not the controlling one: job control does not apply there.
    """
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError as error:
        return error.errno == errno.ENOTTY and os.isatty(fd)


class RawMode:
    """The terminal `fd` in raw mode while entered: every byte comes through as it is typed.

    `restore` and `resume` may be called any number of times; leaving restores.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd)

    def resume(self) -> None:
        """Go to raw mode (cfmakeraw(3)); what was typed ahead is kept."""
        self._saved = termios.tcgetattr(self._fd)
        iflag, oflag, cflag, lflag, ispeed, ospeed, characters = self._saved
        iflag &= ~(
            termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
            | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
        )  # fmt: skip
        oflag &= ~termios.OPOST
        lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        one = list(characters)
        one[termios.VMIN], one[termios.VTIME] = 1, 0
        self._set([iflag, oflag, cflag, lflag, ispeed, ospeed, one])

    def restore(self) -> None:
        """Set the terminal as it was found."""
        self._set(self._saved)

    def _set(self, attributes: list[object]) -> None:
        # It fails when the terminal has hung up: then there is nothing left to set.
        with suppress(termios.error):
            # Not TCSADRAIN: it would wait for ever for a terminal that is held up by Ctrl-S.
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)  # type: ignore[arg-type]

    def __enter__(self) -> RawMode:
        self.resume()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def suspend_byte(master: int, pid_inside: int) -> bytes:
    """Return the byte that should suspend the whole sandbox now, or b"" when none should.

    It is the suspend character (Ctrl-Z) of the terminal behind `master`, while that turns it into
    a signal, and the foreground belongs to the command itself (`pid_inside`, in its own pid
    namespace) which does not ignore SIGTSTP. Otherwise a shell with job control is at work inside,
    and the byte is for it.
    """
    try:
        attributes = termios.tcgetattr(master)  # of the terminal, not of this end of it
        group = os.tcgetpgrp(master)
        with open(f"/proc/{group}/status", "rb") as file:
            status = dict(line.split(b":", 1) for line in file.read().splitlines() if b":" in line)
    except (OSError, termios.error):
        return b""
    character = attributes[_CC][termios.VSUSP]
    if not attributes[_LFLAG] & termios.ISIG or character == b"\0":
        return b""
    if int(status.get(b"NSpid", b"0").split()[-1]) != pid_inside:
        return b""
    if int(status.get(b"SigIgn", b"0"), 16) >> (signal.SIGTSTP - 1) & 1:
        return b""
    return bytes(character)
