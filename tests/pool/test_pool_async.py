# SPDX-License-Identifier: Apache-2.0
"""Pools on an asyncio loop: no thread for a warm call, and cancellation that leaves nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
from tests.support import PATIENCE, SLOW_MACHINE, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]


async def until(pool: nsbox.AsyncWarmPool, name: str, value: float) -> None:
    await asyncio.to_thread(wait_until, lambda: pool.stats()[name] == value, name, 20)


def test_many_tasks_get_their_own_answers(make: Make) -> None:
    count = 30 if SLOW_MACHINE else 60

    async def main() -> None:
        settings = {"max_environments": 3, "acquire_timeout": None, "provisioned": 1}
        async with nsbox.AsyncWarmPool(make(), **settings) as pool:  # type: ignore[call-overload]
            calls = (pool.invoke({"echo": n}, tenant=(None, "a")[n % 2]) for n in range(count))
            answers = await asyncio.gather(*calls)
            assert [answer["echo"] for answer in answers] == list(range(count))
            assert [answer["tenant"] for answer in answers] == [None, "a"] * (count // 2)
            assert len({(answer["log"], answer["calls"]) for answer in answers}) == count
            stats = pool.stats()
            assert stats["Calls"] == stats["Invocations"] == count
            assert stats["Errors"] == stats["Throttles"] == 0

    asyncio.run(main())


def test_the_rest_of_what_threads_have(make: Make) -> None:
    """Bytes, futures, provisioning, the calls of another function's handle, and the end."""

    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=2, acquire_timeout=None) as pool:
            assert pool.max_environments == 2
            invocation = await pool.invoke_bytes(b'{"echo": 1}', tenant="a")
            assert invocation.json()["tenant"] == "a"
            futures = [pool.submit({"echo": n}) for n in range(3)]
            assert [(await future)["echo"] for future in futures] == [0, 1, 2]
            with pytest.raises(nsbox.ConfigError, match="provisioned"):
                await pool.provision(3)
            other = await pool.function(make(), reserved=1)
            answers = [answer["echo"] async for answer in other.map_async([{"echo": 1}] * 3)]
            assert answers == [1] * 3
            assert (await other.invoke_bytes_async(b"{}")).status == ""
            assert other.stats().invocations == 4
            await pool.shutdown()
            with pytest.raises(nsbox.PoolClosed):
                await pool.submit({})

    asyncio.run(main())


def test_a_close_that_is_cancelled_waits_for_no_call(make: Make) -> None:
    """As by Ctrl-C, or a time limit: calls that were let end, in threads too, are killed."""

    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            future = pool.submit({"sleep": 3600}, timeout=900)
            await until(pool, "ConcurrentExecutions", 1)
            closing = asyncio.create_task(pool.close())
            await asyncio.sleep(0.05)  # most likely it lets the call end by now
            closing.cancel()
            with pytest.raises(nsbox.PoolClosed):
                await future
            with pytest.raises(asyncio.CancelledError):
                await closing
            await until(pool, "Environments", 0)

    asyncio.run(main())


def test_a_warm_call_starts_no_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1, acquire_timeout=None) as pool:
            await pool.invoke({})
            started: list[object] = []
            start = threading.Thread.start

            def note(thread: threading.Thread) -> None:
                started.append(thread)
                start(thread)

            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", note)
                await asyncio.gather(*(pool.invoke({}) for _ in range(20)))
            assert not started

    asyncio.run(main())


def test_cancelled_while_it_runs(make: Make) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            first = await pool.invoke({})
            task = asyncio.create_task(pool.invoke({"sleep": 3600}, timeout=900))
            await until(pool, "ConcurrentExecutions", 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            second = await pool.invoke({})
            assert second["log"] != first["log"]
            stats = pool.stats()
            assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (3, 3, 1)
            assert stats["Environments"] == 1

    asyncio.run(main())


def test_cancelled_while_it_waits_or_is_born(make: Make) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            born = asyncio.create_task(pool.invoke({}))
            await asyncio.sleep(0)  # the birth has begun
            waits = asyncio.create_task(pool.invoke({}))
            await until(pool, "Waiting", 1)
            for task in (waits, born):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            await until(pool, "Idle", 1)
            assert (await pool.invoke({"echo": 1}))["echo"] == 1
            stats = pool.stats()
            assert (stats["Calls"], stats["Errors"], stats["Throttles"]) == (3, 1, 1)
            assert stats["Births"] == 1

    asyncio.run(main())


def test_cancelled_while_it_is_born_in_anothers_place(make: Make) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            await pool.invoke({}, tenant="a")
            task = asyncio.create_task(pool.invoke({}, tenant="b"))
            await asyncio.sleep(0)  # the birth has begun
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(pool, "Idle", 1)
            assert (await pool.invoke({}, tenant="b"))["tenant"] == "b"
            stats = pool.stats()
            assert (stats["Calls"], stats["Errors"], stats["Births"]) == (3, 1, 2)


def test_several_functions(make: Make) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(max_environments=2, freeze_after=0.005) as pool:
            one = await pool.function(make(name="one"), reserved=1)
            two = await pool.function(make(name="two"))
            calls = [
                function.invoke_async({"echo": n}) for n in range(20) for function in (one, two)
            ]
            answers = await asyncio.gather(*calls)
            assert [answer["echo"] for answer in answers] == [n for n in range(20) for _ in "ab"]
            assert len({answer["log"] for answer in answers}) == 2
            assert one.stats()["Calls"] == two.stats()["Calls"] == 20

    asyncio.run(main())


def test_waiting_times_out(make: Make) -> None:
    async def main() -> None:
        settings = {"max_environments": 1, "acquire_timeout": 0.01}
        async with nsbox.AsyncWarmPool(make(), **settings) as pool:  # type: ignore[call-overload]
            await pool.invoke({})
            task = asyncio.create_task(pool.invoke({"sleep": 3600}, timeout=900))
            await until(pool, "ConcurrentExecutions", 1)
            with pytest.raises(nsbox.PoolTimeout):
                await pool.invoke({})
            await pool.close(drain=False)
            with pytest.raises(nsbox.PoolClosed):
                await task
            stats = pool.stats()
            assert (stats["Calls"], stats["Errors"], stats["Throttles"]) == (3, 1, 1)

    asyncio.run(main())


def test_a_failed_start_is_told(make: Make) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(
            make(("import os, sys, time", "raise ImportError('broken')"))
        ) as pool:
            with pytest.raises(nsbox.FunctionError, match="broken"):
                await pool.invoke({})
            assert await pool.publish(make()) == make()
            assert (await pool.invoke({}))["calls"] == 1
            assert pool.pool.invoke({})["calls"] == 2

    asyncio.run(main())
    with pytest.raises(nsbox.PoolError, match="enter the pool"):
        _ = nsbox.AsyncWarmPool(make()).pool


def test_threads_and_several_loops_at_once(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=2, acquire_timeout=None) as pool:
        found: list[object] = []

        async def several() -> None:
            calls = (pool.invoke_async({"echo": n}) for n in range(20))
            found.extend(answer["echo"] for answer in await asyncio.gather(*calls))

        def one_by_one() -> None:
            found.extend(pool.invoke({"echo": n})["echo"] for n in range(20))

        threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(2)]
        threads.append(threading.Thread(target=one_by_one))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(map(str, found)) == sorted(str(n) for n in range(20) for _ in range(3))
        stats = pool.stats()
        assert stats["Calls"] == stats["Invocations"] == 60
        assert stats["Errors"] == 0


def test_a_loop_that_ends_without_its_calls_keeps_nothing(make: Make) -> None:
    """It closes with a call in the queue, which is not even cancelled: the lease goes on."""
    with nsbox.WarmPool(make(), max_environments=1, acquire_timeout=None) as pool:
        busy = pool.submit({"sleep": 0.3 * PATIENCE})
        wait_until(lambda: pool.snapshot().count("busy") == 1, "it runs")
        loop = asyncio.new_event_loop()
        task = loop.create_task(pool.invoke_async({}))
        loop.run_until_complete(asyncio.sleep(0))
        assert pool.stats()["Waiting"] == 1
        loop.close()
        busy.result()
        assert pool.invoke({"echo": 1})["echo"] == 1
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (3, 3, 1)
        # Python tells of a task that was forgotten; this one was, on purpose.
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        task.get_coro().close()


def test_a_pool_whose_making_is_cancelled_is_closed(make: Make) -> None:
    told: list[str] = []
    born, cancelled = threading.Event(), threading.Event()

    def note(event: nsbox.PoolEvent) -> None:
        told.append(event.kind)
        born.set()
        cancelled.wait(30)

    async def main() -> None:
        pool = nsbox.AsyncWarmPool(make(), provisioned=1, on_event=note)
        entering = asyncio.create_task(pool.__aenter__())
        await asyncio.to_thread(born.wait)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        cancelled.set()
        with pytest.raises(nsbox.PoolError, match="enter the pool first"):
            _ = pool.pool

    asyncio.run(main())  # waits for the threads of its loop
    assert told[-1] == "retired"
    assert not [thread for thread in threading.enumerate() if thread.name == "nsbox-pool"]
