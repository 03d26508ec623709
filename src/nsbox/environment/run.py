# SPDX-License-Identifier: Apache-2.0
"""`run`: one command in an environment of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

from nsbox.environment.environment import ExecutionEnvironment, check_directory, check_run
from nsbox.supervisor.process import DEVNULL, PIPE, Stream
from nsbox.supervisor.streams import NAMES, descriptor_of
from nsbox.values.config import (
    Config,
    RunFields,
    Word,
    check_argv,
    check_environment,
    parse_seconds,
)
from nsbox.values.result import Result


class _BriefEnvironment(ExecutionEnvironment):
    """Lives for one command, and has room where no other is born any more (`protocol.scarcity`)."""

    _is_brief = True


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
    check_argv(argv)
    check_run(input, stdin, timeout)
    check_environment(env)
    check_directory(cwd)
    if cpu_time is not None:
        parse_seconds(cpu_time, "cpu_time")
    for name, stream in zip(NAMES, (stdin, stdout, stderr), strict=True):
        if stream not in (None, PIPE, DEVNULL):
            descriptor_of(stream, name)
    environment = _BriefEnvironment(config, **fields)
    try:
        return environment.run(
            argv, input=input, timeout=timeout, env=env, cwd=cwd, stdin=stdin, stdout=stdout,
            stderr=stderr, cpu_time=cpu_time, check=check,
        )  # fmt: skip
    finally:
        environment.close(wait=False)
