# SPDX-License-Identifier: Apache-2.0
"""Tasks that are cancelled at each await of what a pool does on a loop: its places come back."""

from __future__ import annotations

import asyncio
import gc
import itertools
import types
from collections import Counter
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from tests.pool.test_all_interrupts import left, present
from tests.support import PATIENCE, wait_until

import nsbox

Make = Callable[..., nsbox.FunctionVersion]
Work = Callable[[], Coroutine[Any, Any, object]]


@types.coroutine
def _until(steps: Any, number: int, *, is_late: bool) -> Generator[Any, Any, int]:
    """Let `steps` wait `number` - 1 times, and cancel them then; return how often they have waited.

    As a task does: what is waited for is cancelled, or, if it `is_late`, was done just before.
    """
    seen, advance, value = 0, steps.send, None
    while True:
        try:
            future = advance(value)
        except StopIteration:
            return seen
        seen += 1
        if seen == number and not is_late:
            future.cancel()
        advance, value = steps.send, None
        try:
            yield future
            if seen == number:
                raise asyncio.CancelledError
        except asyncio.CancelledError as error:
            advance, value = steps.throw, error


async def cancelled_at_each_await(work: Work, check: Work) -> int:
    """Cancel `work` where it waits, `check` afterwards, and return where it waits last."""
    for number in itertools.count(1):
        for is_late in (False, True):
            seen = number
            with suppress(asyncio.CancelledError):
                seen = await _until(work(), number, is_late=is_late)
            await check()
        if seen < number:
            return seen
    raise AssertionError


async def invoke(pool: nsbox.WarmPool[Any], **options: Any) -> None:
    call: Any = pool.invoke_async
    assert (await call({"echo": 1}, **options))["echo"] == 1


async def replace(pool: nsbox.WarmPool[Any], tenants: Any) -> None:
    """Another environment is closed before one is born."""
    await invoke(pool, tenant=f"tenant-{next(tenants) % 2}")


async def wait(pool: nsbox.WarmPool[Any]) -> None:
    """In the queue."""
    call: Any = pool.invoke_async
    first = asyncio.ensure_future(call({"sleep": 0.01}))
    try:
        await asyncio.sleep(0.001)
        await invoke(pool)
    finally:
        await first


async def lease(pool: nsbox.WarmPool[Any]) -> None:
    acquire: Any = pool.acquire_async
    async with acquire() as env:
        assert env.state is nsbox.State.READY


ONE: dict[str, Any] = {
    "max_environments": 1, "acquire_timeout": 2.0 * PATIENCE, "shutdown_grace": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["warm", "cold", "reset", "replace", "files", "wait", "lease"])
def test_a_cancelled_task_gives_its_place_back(make: Make, name: str) -> None:
    reuse = {"cold": "never", "reset": "reset"}.get(name, "keep")
    settings = ONE | ({"reuse": "reset"} if name == "lease" else {})
    create: Any = nsbox.WarmPool
    with create(nsbox.Config() if name == "lease" else make(reuse=reuse), **settings) as pool:
        work = {
            "replace": partial(replace, pool, itertools.count()),
            "files": partial(invoke, pool, files={"a": b"1"}, env={"A": "1"}),
            "wait": partial(wait, pool),
            "lease": partial(lease, pool),
        }.get(name, partial(invoke, pool))

        async def check() -> None:
            await work()
            stats = pool.stats()
            assert stats["Calls"] == stats["Invocations"] + stats["Throttles"]
            assert stats["Waiting"] == stats["ConcurrentExecutions"] == 0

        async def main() -> None:
            await check()
            before = present()
            await cancelled_at_each_await(work, check)
            assert not await asyncio.to_thread(left, before + Counter(threads=1))

        asyncio.run(main())


def test_a_cancelled_function_has_no_places(make: Make) -> None:
    version = make()
    pools: list[nsbox.AsyncWarmPool[Any]] = []
    added: list[nsbox.PoolFunction[Any]] = []

    async def begin() -> None:
        pools.append(nsbox.AsyncWarmPool(version, **ONE | {"max_environments": 3}))
        await pools[0].__aenter__()

    async def work() -> None:
        added.append(await pools[0].function(version, reserved=2, provisioned=1))

    async def check() -> None:
        for _ in range(100):  # what was under way is undone by and by
            if added:
                break
            try:
                added.append(await pools[0].function(version, reserved=2))
            except nsbox.ConfigError:
                await asyncio.sleep(0.02 * PATIENCE)
        assert (await added.pop().invoke_async({"echo": 1}))["echo"] == 1
        await pools.pop().close()
        await begin()

    async def main() -> None:
        await begin()
        await cancelled_at_each_await(work, check)
        await pools.pop().close()

    asyncio.run(main())


def test_a_pool_that_is_dropped_ends(make: Make) -> None:
    """Once nobody has one of its functions either; what it leaves is looked for afterwards."""
    create: Any = nsbox.WarmPool
    version = make()
    pool = create(version, **ONE | {"max_environments": 2})
    function = pool.function(version, reserved=1)
    del pool
    gc.collect()
    assert function.invoke({"echo": 1})["echo"] == 1
    before = present()
    with pytest.warns(ResourceWarning, match="was not closed"):
        del function  # the last
    wait_until(lambda: not present()["environments"], "its environment has ended")
    assert present()["descriptors"] < before["descriptors"]
