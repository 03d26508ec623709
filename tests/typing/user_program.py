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
    with nsbox.WarmPool(nsbox.Function("app.handler"), max_environments=2, reuse="keep") as pool:
        assert_type(pool, nsbox.WarmPool[nsbox.Function])
        future = pool.submit({"a": 1})
        future.result(5)
        pool.invoke({}, tmeout=1)  # type: ignore[call-arg]
        assert_type(pool.invoke_bytes(b"{}", tenant="acme"), nsbox.Invocation)
        assert_type(pool.publish(nsbox.Function("app.other")), nsbox.FunctionVersion)
        with pool.acquire():  # type: ignore[misc]
            pass
        takes_any(pool)
        numbers(pool.stats())
    with nsbox.WarmPool(nsbox.Config(), reuse="reset", provisioned=1) as commands:
        assert_type(commands, nsbox.WarmPool[nsbox.Config])
        with commands.acquire(timeout=1) as env:
            assert_type(env, nsbox.ExecutionEnvironment)
        commands.provision(2)
        commands.invoke({})  # type: ignore[misc]
        commands.submit({})  # type: ignore[misc]
        commands.map([{}])  # type: ignore[misc]
        commands.publish(nsbox.Function("app.handler"))  # type: ignore[misc]
        takes_any(commands)
    with nsbox.WarmPool(max_environments=4, memory_budget="4G") as shared:
        orders = shared.function(nsbox.Function("app.handler"), reserved=1)
        assert_type(orders, nsbox.PoolFunction)
        orders.invoke({})
        orders.acquire()  # type: ignore[misc]
        shared.invoke({})  # type: ignore[misc]
    nsbox.WarmPool(nsbox.Function("app.handler"), reuse="reset")  # type: ignore[call-overload]
    nsbox.WarmPool(reuse="again")  # type: ignore[call-overload]
    nsbox.WarmPool(max_enviroments=1)  # type: ignore[call-overload]
    nsbox.WarmPool("app.handler")  # type: ignore[call-overload]


def takes_any(pool: nsbox.WarmPool) -> None:
    """Take a pool as programs annotated it before it told what it is of."""
    pool.invoke({})
    with pool.acquire() as env:
        assert_type(env, nsbox.ExecutionEnvironment)


def takes_handle(function: nsbox.PoolFunction) -> None:
    function.invoke({})


def makes_either(source: nsbox.Function | nsbox.Config, debug: bool) -> None:
    with nsbox.WarmPool(source, max_environments=8 if debug else 2) as pool:
        assert_type(pool, nsbox.WarmPool[nsbox.Function] | nsbox.WarmPool[nsbox.Config])
        assert_type(pool.stats(), nsbox.PoolStats)


class MyPool(nsbox.WarmPool[nsbox.Function]):
    """A pool of one's own."""

    def __init__(self, function: nsbox.Function) -> None:
        super().__init__(function, max_environments=2)

    def twice(self, event: object) -> None:
        takes_handle(self)
        self.invoke(event)
        self.acquire()  # type: ignore[misc]


def watched(event: nsbox.PoolEvent, pool: nsbox.WarmPool) -> None:
    if event.kind == "retired" and event.reason is nsbox.Retirement.PRESSURE:
        print(pool.snapshot().count("idle"))
    if event.kind == "retierd":  # type: ignore[comparison-overlap]
        print(event)
    pool.snapshot().count("idel")  # type: ignore[arg-type]
    try:
        pool.invoke({})
    except nsbox.Throttled as refused:
        assert_type(refused.retry_after, float | None)
        if refused.reason == "reserved":
            raise
        if refused.reason == "fully":  # type: ignore[comparison-overlap]
            raise


def numbers(stats: nsbox.PoolStats) -> None:
    assert_type(stats.calls, int)
    assert_type(stats.duration_seconds, float)
    assert_type(stats["Calls"], float)
    assert_type(stats + stats, nsbox.PoolStats)
    mapping: dict[str, float] = stats
    print(mapping)
    print(stats.cals)  # type: ignore[attr-defined]
    stats.calls = 1  # type: ignore[misc]


async def loops() -> None:
    async with nsbox.AsyncWarmPool(nsbox.Function("app.handler"), freeze_after=None) as pool:
        assert_type(pool, nsbox.AsyncWarmPool[nsbox.Function])
        await asyncio.gather(pool.invoke(1), pool.invoke(2, timeout=1))
        assert_type(await pool.invoke_bytes(b"1"), nsbox.Invocation)
        async for answer in pool.map([1, 2], tenant="acme"):
            print(answer)
        await pool.submit(1)
        await pool.provision(1)
        assert_type(pool.pool, nsbox.WarmPool[nsbox.Function])
        assert_type(pool.max_environments, int)
        other = await pool.function(nsbox.Function("app.other"), provisioned=1)
        assert_type(other, nsbox.PoolFunction)
        await other.invoke_async({})
        async with pool.acquire():  # type: ignore[misc]
            pass
        await pool.function(nsbox.Function("app.other"), provisoned=1)  # type: ignore[call-arg]
    async with nsbox.AsyncWarmPool(nsbox.Config(), reuse="never") as commands:
        assert_type(commands, nsbox.AsyncWarmPool[nsbox.Config])
        async with commands.acquire() as env:
            assert_type(env, nsbox.ExecutionEnvironment)
        await commands.invoke({})  # type: ignore[misc]
    nsbox.AsyncWarmPool(nsbox.Function("app.handler"), reuse="never")  # type: ignore[call-overload]
    nsbox.AsyncWarmPool(max_enviroments=1)  # type: ignore[call-overload]
    nsbox.AsyncWarmPool(nsbox.Config(), max_waiting="10")  # type: ignore[call-overload]
