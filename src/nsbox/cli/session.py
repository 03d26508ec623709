# SPDX-License-Identifier: Apache-2.0
"""One command at the user's terminal or in the user's pipeline: streams, signals, suspension.

A terminal of the host is never handed in: whoever holds one can type into it (TIOCSTI, ioctl_tty
(2)) once its session ends. Either the command gets a terminal of the environment's own, or pipes.
What is no terminal `nsbox.supervisor.streams` hands in, or relays.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import FrameType
from typing import Final

from nsbox.cli.relay import Pump, open_sink
from nsbox.cli.terminal import (
    RawMode,
    is_foreground,
    set_window_size,
    signal_foreground,
    suspend_byte,
    window_size,
)
from nsbox.environment.command import Command
from nsbox.environment.managed import ManagedEnvironment
from nsbox.errors import NsboxError
from nsbox.supervisor.process import PIPE, RunningCommand
from nsbox.values.result import Outcome, Result

_FORWARDED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# Of a terminal's keys, and of its end: they are for a whole process group (termios(3)).
_TO_THE_GROUP: Final = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_ASK_AGAIN: Final = 50  # milliseconds between two looks at who has the terminal
_DRAIN_DEADLINE: Final = 1.0  # seconds without a byte after which a closed stream counts as ended


class Session:
    """Runs one command to its end with the streams and signals of this process."""

    def __init__(
        self,
        environment: ManagedEnvironment,
        *,
        timeout: float | None = None,
        output_max: int | None = None,
        suspend: bool = True,
    ) -> None:
        """Prepare.

        Args:
            environment: Where to run.
            timeout: Wall-clock seconds; time spent suspended does not count.
            output_max: Bytes of each output stream; None relays only what must be relayed.
            suspend: Whether Ctrl-Z at the terminal suspends the sandbox. Else it is passed in.
        """
        self._environment = environment
        self._timeout = timeout
        self._output_max = output_max
        self._suspend = suspend
        self._deadline: float | None = None
        self._raw: RawMode | None = None
        self._resize: Callable[[], None] | None = None
        self._inputs: list[Pump] = []
        self._outputs: dict[str, Pump] = {}
        self._interrupts = 0
        self._terminated = False

    def run(self, argv: tuple[str, ...], cwd: str | None = None) -> Result:
        """Start the command, relay until it is over, and return its result."""
        with ExitStack() as stack:
            wake = self._take_signals(stack)
            if self._has_terminal():
                process = self._start_with_terminal(argv, cwd, stack)
            else:
                process = self._start_with_streams(argv, cwd, stack)
            for pump in (*self._inputs, *self._outputs.values()):
                stack.callback(pump.close)
            if self._timeout is not None:
                self._deadline = time.monotonic() + self._timeout
            result = self._relay(process, wake)
            result = self._drain(process, result, wake)
        return result

    # -- the start -----------------------------------------------------------------------------

    @staticmethod
    def _has_terminal() -> bool:
        # Not in the background, where raw mode would stop us (SIGTTOU); and not when the output
        # goes elsewhere: a terminal would add carriage returns to what a pipe or file gets.
        return os.isatty(0) and os.isatty(1) and is_foreground(0)

    def _start_with_terminal(
        self, argv: tuple[str, ...], cwd: str | None, stack: ExitStack
    ) -> RunningCommand:
        streams = (None, None, None if os.isatty(2) else 2)
        command = Command(argv, _terminal_variables(), cwd, streams, None)
        process = self._environment.start(command, window_size(0), announced=True)
        stack.enter_context(process)
        master = process.tty
        os.set_blocking(master, False)

        def resize() -> None:
            with suppress(OSError):  # one of the two may have hung up
                set_window_size(master, *window_size(0))

        def transform(data: bytes) -> bytes:
            return self._watch_for_suspend(process, data)

        self._resize = resize
        self._raw = stack.enter_context(RawMode(0))
        self._inputs.append(
            Pump(os.dup(0), os.dup(master), transform=transform if self._suspend else None)
        )
        self._outputs["terminal"] = Pump(
            os.dup(master), open_sink(1), patient=True, limit=self._output_max
        )
        return process

    def _start_with_streams(
        self, argv: tuple[str, ...], cwd: str | None, stack: ExitStack
    ) -> RunningCommand:
        is_limited = self._output_max is not None
        stdin, stdout, stderr = (
            PIPE if os.isatty(number) or (number and is_limited) else number for number in range(3)
        )
        command = Command(argv, None, cwd, (stdin, stdout, stderr), None)
        process = self._environment.start(command, announced=True)
        stack.enter_context(process)
        for name, number, stream in (("stdout", 1, process.stdout), ("stderr", 2, process.stderr)):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
                self._outputs[name] = Pump(
                    os.dup(stream.fileno()), open_sink(number), limit=self._output_max
                )
                stream.close()
        if process.stdin is not None:
            sink = os.dup(process.stdin.fileno())
            os.set_blocking(sink, False)
            process.stdin.close()
            process.stdin = None
            self._inputs.append(Pump(os.dup(0), sink, may_read=lambda: is_foreground(0)))
        return process

    # -- the loop ------------------------------------------------------------------------------

    def _relay(self, process: RunningCommand, wake: int) -> Result:
        while True:
            result = process.poll()
            if result is not None:
                return result
            self._enforce(process)
            pumps = (*self._inputs, *self._outputs.values())
            poller = select.poll()
            poller.register(wake, select.POLLIN)
            process.register(poller)
            for pump in pumps:
                pump.register(poller)
            waits = [process.poll_milliseconds(self._deadline)]
            if any(pump.waits for pump in pumps):
                waits.append(_ASK_AGAIN)
            ready = dict(poller.poll(min((w for w in waits if w is not None), default=None)))
            for pump in pumps:
                pump.step(ready)
            if wake in ready:
                for number in os.read(wake, 64):
                    self._on_signal(process, signal.Signals(number))

    def _enforce(self, process: RunningCommand) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            process.kill_with_verdict(Outcome.TIMED_OUT, f"not over after {self._timeout:g} s")
        if self._output_max is not None:
            for name, pump in self._outputs.items():
                if pump.total > self._output_max:
                    process.kill_with_verdict(
                        Outcome.OUTPUT_LIMIT,
                        f"{name} is over {self._output_max} bytes",
                    )

    def _drain(self, process: RunningCommand, result: Result, wake: int) -> Result:
        """Write what the command has written: all of it is in the kernel's buffers by now."""
        for pump in self._inputs:
            pump.close()
        deadline = time.monotonic() + _DRAIN_DEADLINE
        while not self._terminated:
            poller = select.poll()
            poller.register(wake, select.POLLIN)
            pumps = [pump for pump in self._outputs.values() if pump.open]
            if not pumps:
                break
            total = sum(pump.total for pump in pumps)
            for pump in pumps:
                pump.patient = False
                pump.register(poller)
            ready = dict(poller.poll(_ASK_AGAIN))
            for pump in pumps:
                pump.step(ready)
            if wake in ready and set(os.read(wake, 64)) & {*_FORWARDED}:
                break  # the reader is stuck, and the user has enough of it
            if ready or sum(pump.total for pump in pumps) > total:
                deadline = time.monotonic() + _DRAIN_DEADLINE
            elif time.monotonic() > deadline and not any(pump.has_data for pump in pumps):
                break  # held open from elsewhere: nothing more will come from the command
        if self._output_max is not None:
            over = any(pump.total > self._output_max for pump in self._outputs.values())
            if over and result.outcome is Outcome.EXITED:
                from dataclasses import replace

                evidence = f"an output stream is over {self._output_max} bytes"
                return replace(result, outcome=Outcome.OUTPUT_LIMIT, evidence=evidence)
        return result

    # -- signals -------------------------------------------------------------------------------

    def _take_signals(self, stack: ExitStack) -> int:
        """Have signals written to a pipe from here on; return its reading end."""
        wake, wake_write = os.pipe()
        for fd in (wake, wake_write):
            os.set_blocking(fd, False)
            stack.callback(os.close, fd)
        before = signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        stack.callback(signal.set_wakeup_fd, before)
        for number in (*_FORWARDED, signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1), and a shell's `&`
                stack.callback(signal.signal, number, signal.signal(number, _note))
        return wake

    def _on_signal(self, process: RunningCommand, number: signal.Signals) -> None:
        if number is signal.SIGWINCH:
            if self._resize is not None:
                self._resize()
        elif number is signal.SIGTSTP:
            self._stop(os.getpid())
        elif number is signal.SIGCONT:
            # After a SIGSTOP, which gives no warning: the shell has set the terminal its way.
            self._take_terminal_back()
        elif number in _FORWARDED:
            self._interrupts += number is signal.SIGINT
            if self._interrupts > 1:
                process.kill()
            elif process.tty < 0 or not signal_foreground(process.tty, number):
                process.send_signal(number, group=number in _TO_THE_GROUP)

    # -- suspension ----------------------------------------------------------------------------

    def _watch_for_suspend(self, process: RunningCommand, data: bytes) -> bytes:
        character = suspend_byte(process.tty, process.pid)
        if not character or character not in data:
            return data
        # To the whole job, as the terminal would have sent it: `nsbox run ... | less`.
        self._stop(0)
        return data.replace(character, b"")

    def _stop(self, target: int) -> None:
        """Freeze the sandbox and stop as any program stops, until the user's shell continues us.

        SIGTSTP with its default action, not SIGSTOP: the kernel does not stop a process group
        that nobody is there to continue.
        """
        began = time.monotonic()
        if self._raw is not None:
            self._raw.restore()
        with suppress(NsboxError):  # when it has just ended there is nothing to freeze
            self._environment.freeze()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            os.kill(target, signal.SIGTSTP)  # returns when we are continued
        finally:
            signal.signal(signal.SIGTSTP, handler)
            self._take_terminal_back()
            with suppress(NsboxError):
                self._environment.thaw()
        if self._deadline is not None:
            self._deadline += time.monotonic() - began

    def _take_terminal_back(self) -> None:
        if self._raw is not None and is_foreground(0):
            self._raw.resume()
        if self._resize is not None:
            self._resize()


def _note(_number: int, _frame: FrameType | None) -> None:
    """Let a signal do no more than write to the wake-up pipe."""


def _terminal_variables() -> dict[str, str]:
    """Return TERM, without which no program can use its terminal: a name, and nothing else."""
    name = os.environ.get("TERM", "")
    plain = name.replace("-", "").replace(".", "").replace("_", "").replace("+", "")
    return {"TERM": name} if plain.isalnum() and plain.isascii() and len(name) < 64 else {}
