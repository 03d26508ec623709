# SPDX-License-Identifier: Apache-2.0
"""``nsbox top``: the live environments of this user and what they do now, again and again."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final

import click

from nsbox.cli.ps import (
    code_of,
    cpu_seconds,
    duration,
    format_rows,
    live_environments,
    megabytes,
    printable,
)
from nsbox.cli.terminal import RawMode, is_foreground, window_size

_TITLES: Final = ("ID", "STATE", "CPU%", "MEMORY", "PROCS", "AGE", "CODE", "LAUNCHER", "HOST")
_LEAVE: Final = (b"q", b"Q", b"\x03", b"\x04")  # q, Ctrl-C, Ctrl-D
# ECMA-48 and xterm: another screen without a cursor, and back; home; the rest of the line, and of
# the screen, blank.
_ENTER_SCREEN: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE_SCREEN: Final = "\x1b[?25h\x1b[?1049l"
_HOME, _END_LINE, _END_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_STDIN, _STDOUT = 0, 1
_SHORTEST: Final = 0.05
_LONGEST: Final = 3600.0


@click.command("top")
@click.option(
    "--interval",
    type=click.FloatRange(_SHORTEST, _LONGEST),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a sample is.",
)
@click.option("--once", is_flag=True, help="Print one sample and exit.")
def top_command(interval: float, once: bool) -> int:
    """Show the live environments of this user, busiest first; as root, of all users.

    CPU% is of one processor, and rates are of the last sample; what was born and ended within one
    is not seen. CODE is the digest of a function's code, where the host shows it (as root). At a
    terminal it is refreshed in place until q or Ctrl-C; otherwise samples are printed one after
    another.
    """
    if not interval <= _LONGEST:  # nor a NaN, which click lets through
        raise click.BadParameter("is no number of seconds", param_hint="--interval")
    sampler = Sampler()
    with _screen(is_terminal=not once and os.isatty(_STDOUT)) as screen:
        if screen.is_terminal:
            screen.show(sampler.sample())
        while screen.pause(max(_SHORTEST, sampler.taken + interval - time.monotonic())):
            screen.show(sampler.sample())
            if once:
                break
    return 0


class Sampler:
    """What is known of the last sample, for the rates of the next.

    Attributes:
        taken: When it was begun, by time.monotonic(): beside thousands a look takes a while.
    """

    def __init__(self) -> None:
        """Take the first one."""
        self.taken = time.monotonic()
        found = list(cpu_seconds())
        self._cpu = {env_id: seconds for env_id, _, seconds in found}
        # While the first interval goes by: a mountinfo is as long as all else that is read.
        self._codes = {env_id: code_of(pid) for env_id, pid, _ in found}

    def _add_codes(self, found: list[dict[str, Any]]) -> None:
        # A standby one gets its code when it is taken: asked again.
        codes = {one["id"]: self._codes.get(one["id"]) or code_of(one["pid"]) for one in found}
        for one in found:
            one["code"] = codes[one["id"]]
        self._codes = codes

    def sample(self) -> list[str]:
        """Return the lines of a new sample: totals, a blank one, titles, environments."""
        taken = time.monotonic()
        found = list(live_environments())
        cpu = {one["id"]: one["cpu_seconds"] for one in found}
        self._add_codes(found)
        seconds = max(taken - self.taken, 1e-3)
        for one in found:
            before = self._cpu.get(one["id"], 0.0)
            share = (one["cpu_seconds"] - before) / min(seconds, max(one["age_seconds"], 1e-3))
            one["cpu_percent"] = max(0.0, 100 * share)
        born, ended = len(cpu.keys() - self._cpu.keys()), len(self._cpu.keys() - cpu.keys())
        self.taken, self._cpu = taken, cpu
        found.sort(key=lambda one: (-one["cpu_percent"], -one["memory_bytes"], one["id"]))
        frozen = sum(one["state"] == "frozen" for one in found)
        totals = (
            f"{len(found)} environments, {frozen} frozen; "
            f"{sum(one['processes'] for one in found)} processes; "
            f"{sum(one['cpu_percent'] for one in found):.1f}% CPU; "
            f"{megabytes(sum(one['memory_bytes'] for one in found))}; "
            f"{born / seconds:.1f} born/s, {ended / seconds:.1f} ended/s"
        )
        return [totals, "", *format_rows([list(_TITLES), *map(_cells, found)])]


def _cells(one: dict[str, Any]) -> list[str]:
    return [
        one["id"],
        one["state"],
        f"{one['cpu_percent']:.1f}",
        megabytes(one["memory_bytes"]),
        str(one["processes"]),
        duration(one["age_seconds"]),
        one["code"] or "-",
        str(one["launcher_pid"]),
        f"{one['host_pid']} {printable(one['host_program'])}",
    ]


class _Screen:
    """Where samples are shown, and what is typed meanwhile."""

    def __init__(self, *, is_terminal: bool, has_keys: bool) -> None:
        self.is_terminal = is_terminal
        self._has_keys = has_keys
        self._is_first = True

    def pause(self, seconds: float) -> bool:
        """Wait that long; False when the user wants to leave."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not self._has_keys:
                time.sleep(left)
            elif select.select([_STDIN], [], [], left)[0]:
                key = os.read(_STDIN, 1)
                if not key:
                    self._has_keys = False  # the terminal has hung up, or sent an end of file
                if key in _LEAVE:
                    return False
        return True

    def show(self, lines: list[str]) -> None:
        """Show a sample in the place of the last one, or after it."""
        if not self.is_terminal:
            if not self._is_first:
                lines = ["", *lines]
            self._is_first = False
            click.echo("\n".join(lines))
            return
        rows, columns = window_size(_STDOUT)
        # In raw mode a line feed alone does not return; a full last line would scroll.
        shown = [line[: columns - 1] + _END_LINE for line in lines[: rows - 1]]
        click.echo(_HOME + "\r\n".join(shown) + _END_SCREEN, nl=False, color=True)


@contextlib.contextmanager
def _screen(*, is_terminal: bool) -> Iterator[_Screen]:
    """Enter the terminal's other screen, if it is one; it is left however this ends."""
    if not is_terminal:
        with contextlib.suppress(KeyboardInterrupt):
            yield _Screen(is_terminal=False, has_keys=False)
        return
    has_keys = os.isatty(_STDIN) and is_foreground(_STDIN)
    ended_by: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        ended_by.append(number)
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, leave) for number in numbers}
    try:
        with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
            stack.callback(_write, _LEAVE_SCREEN)
            if has_keys:
                stack.enter_context(RawMode(_STDIN))
            _write(_ENTER_SCREEN)
            yield _Screen(is_terminal=True, has_keys=has_keys)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ended_by:
        os.kill(os.getpid(), ended_by[0])  # die of it, as anybody would


def _write(words: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that has hung up has nothing to restore
        sys.stdout.write(words)
        sys.stdout.flush()
