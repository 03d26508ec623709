# SPDX-License-Identifier: Apache-2.0
"""`run`: one command in an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from nsbox.environment.environment import Command, ExecutionEnvironment
from nsbox.supervisor.process import Stream
from nsbox.values.config import Config, RunFields, Word
from nsbox.values.result import Result


class _BriefEnvironment(ExecutionEnvironment):
    """Lives for one command, and has room where no other is born any more (`protocol.scarcity`)."""

    _is_brief = True

    def run_once(self, command: Command, *, check: bool) -> Result:
        """Run its one command; see `ExecutionEnvironment.run`."""
        return self._run(command, check=check)


def run(
    argv: Sequence[Word],
    *,
    config: Config | None = None,
    input: bytes | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    cpu_time: float | None = None,
    check: bool = False,
    **fields: Unpack[RunFields],
) -> Result:
    """Run one command in a fresh environment of its own and return its `Result`.

    Takes what `ExecutionEnvironment.run` takes, and the fields of `Config`: ``limits=``,
    ``mounts=``, ``tmp_size=``, ``network=``, ``seccomp=``, ``rootfs=``, ``allow_missing=``...
    The environment is dead when this returns, and removed soon after.

    Raises:
        As `ExecutionEnvironment` and `ExecutionEnvironment.run`.
    """
    streams = (stdin, stdout, stderr)
    command = Command.captured(argv, input, timeout, env, cwd, streams, cpu_time)
    environment = _BriefEnvironment(config, **fields)
    try:
        return environment.run_once(command, check=check)
    finally:
        environment.close(wait=False)
