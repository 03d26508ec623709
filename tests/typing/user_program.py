# SPDX-License-Identifier: Apache-2.0
"""A program as users write it, which type checkers read and nobody runs.

scripts/check reads it with ``mypy --strict`` and pyright, against the installed package. A line
with ``type: ignore`` must be an error to both: where it is none, the comment is reported.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

import asyncio
from pathlib import Path
from typing import assert_type

import nsbox


def commands() -> None:
    result = nsbox.run(["true"], timeout=5, seccomp="strict", network="none", tmp_size="64M")
    assert_type(result, nsbox.Result)
    assert_type(result.exit_code, int | None)
    assert_type(result.stdout, bytes)
    try:
        result.check()
    except nsbox.CommandFailed as failed:
        assert_type(failed.result, nsbox.Result)
    nsbox.run(["true"], limts=nsbox.Limits())  # type: ignore[call-arg]
    nsbox.run(["true"], network="bridge")  # type: ignore[arg-type]
    nsbox.run(["true"], seccomp="lax")  # type: ignore[arg-type]
    nsbox.run("true", timeout="5")  # type: ignore[arg-type]


def values() -> None:
    limits = nsbox.Limits(memory_max="256M", pids_max=None, io_max=[], output_max="1M")
    assert_type(limits.memory_max, int | None)
    assert_type(limits.output_max + 1, int)
    nsbox.Limits(memory="256M")  # type: ignore[call-arg]
    config = nsbox.Config(
        limits=limits,
        mounts=[nsbox.Mount.bind(Path("/usr"), "/data")],
        env={"A": "1"},
        seccomp=nsbox.SeccompPolicy.strict(),
        allow_missing=["cgroup.memory"],
    )
    assert_type(config.seccomp, nsbox.SeccompPolicy)
    assert_type(config.tmp_size, int)
    assert_type(config.mounts, tuple[nsbox.Mount, ...])
    assert_type(config.replace(cwd=Path("/tmp"), rootfs=None), nsbox.Config)
    config.replace(memory_max=1)  # type: ignore[call-arg]
    config.cwd = "/"  # type: ignore[misc]


def functions() -> None:
    function = nsbox.Function(
        "app.handler", code=Path("code"), reuse="reset", limits=nsbox.Limits()
    )
    version = function.replace(timeout=10, tenant="acme").publish()
    assert_type(version, nsbox.FunctionVersion)
    nsbox.Function("app.handler", reuse="again")  # type: ignore[arg-type]
    function.replace(time_out=10)  # type: ignore[call-arg]
    with nsbox.ExecutionEnvironment(version) as env:
        assert_type(env, nsbox.ExecutionEnvironment)
        env.invoke({"any": ["JSON", 1, None]}, request_id="1", on_log=lambda name, data: None)
        env.invoke({}, request="1")  # type: ignore[call-arg]
        try:
            env.invoke_bytes(b"{}")
        except nsbox.FunctionError as error:
            assert_type(error.invocation, nsbox.Invocation | None)
    with nsbox.ExecutionEnvironment(user_id=1001) as env, env.popen(["cat"]) as process:
        assert_type(process.wait(1), nsbox.Result)


def pools() -> None:
    with nsbox.WarmPool(nsbox.Function("app.handler"), max_environments=2) as pool:
        assert_type(pool, nsbox.WarmPool)
        future = pool.submit({"a": 1})
        future.result(5)
        pool.invoke({}, tmeout=1)  # type: ignore[call-arg]


async def loops() -> None:
    async with nsbox.AsyncWarmPool(nsbox.Function("app.handler")) as pool:
        assert_type(pool, nsbox.AsyncWarmPool)
        await asyncio.gather(pool.invoke(1), pool.invoke(2, timeout=1))
