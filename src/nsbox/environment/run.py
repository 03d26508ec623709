# SPDX-License-Identifier: Apache-2.0
"""`run`: one command in an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from nsbox.environment.command import Command
from nsbox.environment.managed import ManagedEnvironment
from nsbox.supervisor.process import Stream
from nsbox.values.config import Config, RunFields, Word
from nsbox.values.result import Result


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
    environment = ManagedEnvironment(config, fields, is_brief=True)
    try:
        result = environment.run(command)
    finally:
        environment.close(wait=False)
    return result.check() if check else result
