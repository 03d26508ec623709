# SPDX-License-Identifier: Apache-2.0
"""`Command`: what is to be run, checked before anything is made for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nsbox.errors import ConfigError
from nsbox.supervisor.process import DEVNULL, PIPE, Streams
from nsbox.supervisor.streams import NAMES, descriptor_of
from nsbox.values.config import Word, check_argv, check_environment, check_text, parse_seconds


class Command:
    """A command line and its options, checked before anything is made for it.

    Attributes:
        argv: Its words; the program is the first.
        env: Variables over those of the environment.
        cwd: Working directory inside; None: that of the Config.
        streams: stdin, stdout and stderr: `PIPE`, `DEVNULL`, None, a file or a descriptor.
        cpu_time: Seconds of CPU time; None: those of the Config.
        input: What is written to stdin.
        timeout: Seconds of wall-clock time, or None.
    """

    __slots__ = ("argv", "cpu_time", "cwd", "env", "input", "streams", "timeout")

    def __init__(
        self,
        argv: Sequence[Word],
        env: Mapping[str, str] | None,
        cwd: str | None,
        streams: Streams,
        cpu_time: float | None,
    ) -> None:
        """Take what `ExecutionEnvironment.popen` takes.

        Raises:
            ConfigError: A value is wrong.
        """
        self.argv = check_argv(argv)
        self.env = {} if env is None else check_environment(env)
        self.cwd = None if cwd is None else check_text(cwd, "cwd")
        if self.cwd is not None and not self.cwd.startswith("/"):
            raise ConfigError(f"cwd: must be absolute, got {cwd!r}")
        for name, stream in zip(NAMES, streams, strict=True):
            if stream not in (None, PIPE, DEVNULL):
                descriptor_of(stream, name)
        self.streams = streams
        self.cpu_time = None if cpu_time is None else parse_seconds(cpu_time, "cpu_time")
        self.input = b""
        self.timeout: float | None = None

    @classmethod
    def captured(
        cls,
        argv: Sequence[Word],
        input: bytes | None,
        timeout: float | None,
        env: Mapping[str, str] | None,
        cwd: str | None,
        streams: Streams,
        cpu_time: float | None,
    ) -> Command:
        """Take what `ExecutionEnvironment.run` takes: None of `streams` is its default there."""
        stdin, stdout, stderr = streams
        if input is not None and stdin is not None:
            raise ConfigError("input and stdin: give one of them")
        if input is not None and not isinstance(input, bytes | bytearray | memoryview):
            raise ConfigError(f"input: must be bytes, got {type(input).__name__}; encode it")
        for name, stream in zip(NAMES, streams, strict=True):
            if stream == PIPE and not isinstance(stream, bool):
                raise ConfigError(f"{name}: PIPE is for popen; run captures what it is not given")
        if input:
            stdin = PIPE
        filled = (
            DEVNULL if stdin is None else stdin,
            PIPE if stdout is None else stdout,
            PIPE if stderr is None else stderr,
        )
        command = cls(argv, env, cwd, filled, cpu_time)
        command.input = bytes(input or b"")
        command.timeout = None if timeout is None else parse_seconds(timeout, "timeout")
        return command
