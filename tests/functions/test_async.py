# SPDX-License-Identifier: Apache-2.0
"""Invocations on an asyncio loop, natively."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.functions.conftest import MakeFunction
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox import State

ECHO = """
def handler(event, context):
    return event
"""
SLEEPER = """
import os, time
def handler(event, context):
    print("begun", flush=True)
    os.system("sleep 1000 &")
    time.sleep(1000)
"""


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_invocations_in_turn(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(
        """
        def handler(event, context):
            print("said", event)
            if event == "raise":
                raise ValueError(event)
            return event
        """,
        reuse=reuse,
        timeout=30,
    )
    seen: list[tuple[str, bytes]] = []

    async def main() -> None:
        assert await env.invoke_async({"x": 1}) == {"x": 1}
        invocation = await env.invoke_bytes_async(b'{"x": 1}', request_id="r")
        assert (invocation.json(), invocation.request_id) == ({"x": 1}, "r")
        with pytest.raises(nsbox.FunctionError, match="ValueError: raise"):
            await env.invoke_async("raise")
        answer = await env.invoke_async("logged", on_log=lambda *item: seen.append(item))
        assert answer == "logged"
        large = "x" * 6_000_000
        assert await env.invoke_async(large) == large

    threads = threading.active_count()
    asyncio.run(main())
    assert threading.active_count() == threads
    assert seen == [("stdout", b"said logged\n")]


def test_loops_one_after_another_and_calls_between(make_function: MakeFunction) -> None:
    env = make_function(ECHO)
    for number in range(3):
        assert asyncio.run(env.invoke_async(number)) == number
        assert env.invoke(-number) == -number

    async def main() -> None:
        assert await env.invoke_async("a") == "a"
        assert env.invoke("b") == "b"
        assert await env.invoke_async("c") == "c"

    asyncio.run(main())


def test_many_environments_on_one_loop(make_function: MakeFunction) -> None:
    """Each waits until all have begun: they can only all answer when they run at once."""
    envs = [make_function(SLEEP_UNTIL, timeout=60 * PATIENCE) for _ in range(8)]
    begun = 0

    async def main() -> list[object]:
        def count(_: str, __: bytes) -> None:
            nonlocal begun
            begun += 1
            if begun == len(envs):
                for env in envs:
                    env.write_file("/tmp/go", b"")

        return list(await asyncio.gather(*(env.invoke_async(1, on_log=count) for env in envs)))

    assert asyncio.run(main()) == ["gone"] * 8


SLEEP_UNTIL = """
import os, time
def handler(event, context):
    print("begun", flush=True)
    while not os.path.exists("/tmp/go"):
        time.sleep(0.005)
    return "gone"
"""


@pytest.mark.parametrize("reuse", ["keep", "reset", "never"])
def test_a_timeout(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(SLEEPER, reuse=reuse)

    async def main() -> None:
        with pytest.raises(nsbox.InvokeTimeout) as caught:
            await env.invoke_async(1, timeout=0.5)
        assert caught.value.invocation is not None
        assert caught.value.invocation.stdout == b"begun\n"

    asyncio.run(main())
    wait_until(lambda: env.state in (State.DEAD, State.CLOSED), "it is killed")


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_a_cancelled_one_is_killed(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(SLEEPER, reuse=reuse, timeout=60 * PATIENCE)

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(env.invoke_async(1, on_log=lambda *_: begun.set()))
        await asyncio.wait_for(begun.wait(), 30 * PATIENCE)
        with pytest.raises(nsbox.EnvironmentStateError, match="busy"):
            await env.invoke_async(2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        wait_until(lambda: env.state is State.DEAD, "it is killed")
        with pytest.raises((nsbox.EnvironmentStateError, nsbox.EnvironmentDied)):
            await env.invoke_async(3)

    asyncio.run(main())


def test_a_close_beside_an_invocation_on_the_loop(make_function: MakeFunction) -> None:
    env = make_function(SLEEPER, timeout=60 * PATIENCE)

    async def main() -> None:
        begun = asyncio.Event()
        task = asyncio.create_task(env.invoke_async(1, on_log=lambda *_: begun.set()))
        await asyncio.wait_for(begun.wait(), 30 * PATIENCE)
        env.close()
        with pytest.raises(nsbox.InvokeError):
            await asyncio.wait_for(task, 30 * PATIENCE)

    asyncio.run(main())
    assert env.state is State.CLOSED


def test_ends_without_an_answer(make_function: MakeFunction) -> None:
    source = "import os\ndef handler(event, context): exec(event)"
    for event, error in (
        ("os._exit(3)", nsbox.FunctionError),
        ("os.write(3, b'x' * 64); os.pause()", nsbox.EnvironmentDied),
    ):
        env = make_function(source)
        with pytest.raises(error):
            asyncio.run(env.invoke_async(event))
        wait_until(lambda: env.state is State.DEAD, "it is killed")  # noqa: B023 - called at once
    with pytest.raises(nsbox.FunctionError, match="ImportModuleError"):
        asyncio.run(make_function("import not_there").invoke_async(1))


def test_a_plain_program() -> None:
    version = nsbox.Function(command=["cat"]).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert asyncio.run(env.invoke_async([1])) == [1]
