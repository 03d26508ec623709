# SPDX-License-Identifier: Apache-2.0
"""`Process`: a running command, as its users see it."""

from __future__ import annotations

from typing import NoReturn, Self

from nsbox.errors import refuse_pickling
from nsbox.supervisor.process import RunningCommand
from nsbox.values.result import Result


class Process:
    """A command that runs in an environment; made by `ExecutionEnvironment.popen`.

    Attributes:
        argv: Its command line.
        pid: Its process id inside the environment.
        stdin, stdout, stderr: Unbuffered binary files where a pipe was asked for, else None.
    """

    def __init__(self, command: RunningCommand) -> None:
        self._command = command
        self.argv, self.pid = command.argv, command.pid
        self.stdin, self.stdout, self.stderr = command.stdin, command.stdout, command.stderr

    @property
    def tty(self) -> int:
        """Descriptor of the terminal's master end when one was asked for, else -1.

        It is owned by this object, until `close`.
        """
        return self._command.tty

    def poll(self) -> Result | None:
        """Return the result when the command is over, else None. Does not wait."""
        return self._command.poll()

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end; output of pipes is the caller's to read meanwhile.

        Raises:
            TimeoutError: It is not over after `timeout` seconds; it goes on running.
            EnvironmentDied: The environment ended under it.
            ConfigError: `timeout` is no number.
        """
        return self._command.wait(timeout)

    def kill(self) -> None:
        """SIGKILL the command and everything it started. The outcome will be KILLED."""
        self._command.kill()

    def send_signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the command's own process.

        Args:
            number: Which.
            group: To all of its process group, as a terminal sends Ctrl-C: what it has started
                gets it, too, but for what has made itself a group of its own.

        Raises:
            ConfigError: `number` is no signal.
            SyscallError: PID 1, which sends it, has not read those before.
        """
        self._command.send_signal(number, group=group)

    def close(self) -> None:
        """Kill the command if it still runs, and close the pipes and the terminal."""
        self._command.close()

    def __reduce__(self) -> NoReturn:
        refuse_pickling("a process", "send its Result")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
