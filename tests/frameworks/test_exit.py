# SPDX-License-Identifier: Apache-2.0
"""The end of an interpreter that is still using nsbox: it is quick, clean, and says nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from tests.support import PATIENCE, host_program

pytestmark = pytest.mark.needs("userns")


def run_to_end(code: str, *arguments: str) -> str:
    """Run a program outside to its good end; return what is on stderr."""
    program = host_program(code, *arguments, stderr=subprocess.PIPE)
    _, told = program.communicate(timeout=60 * PATIENCE)
    assert program.returncode == 0, told.decode()
    return told.decode()


def code_of(directory: Path) -> str:
    (directory / "app.py").write_text(
        "import time\ndef handler(event, context): return time.sleep(event)\n"
    )
    return str(directory)


def test_daemon_threads_in_calls(tmp_path: Path) -> None:
    """What ends their calls is no news; what is their own is printed as ever."""
    told = run_to_end(
        """
        import asyncio, sys, threading, time, warnings, nsbox
        warnings.simplefilter("ignore", ResourceWarning)
        fn = nsbox.Function("app.handler", code=sys.argv[1], timeout=900)
        pool = nsbox.WarmPool(fn, max_environments=4, provisioned=4)
        commands = nsbox.WarmPool(max_environments=1)
        env = nsbox.ExecutionEnvironment(fn.publish())
        process = nsbox.ExecutionEnvironment().popen(["sleep", "3600"])
        inside = set()
        def acquire():
            with commands.acquire() as one:
                one.run(["sleep", "3600"])
        def own():
            try:
                pool.invoke(3600)
            except nsbox.PoolClosed:
                raise KeyError("own") from None
        for call in (lambda: pool.invoke(3600), lambda: list(pool.map([3600])), acquire, own,
                     lambda: asyncio.run(pool.invoke_async(3600)), process.wait,
                     lambda: env.invoke(3600)):
            threading.Thread(target=call, daemon=True).start()
        while pool.stats()["ConcurrentExecutions"] < 4:
            time.sleep(0.01)
        while commands.stats()["Environments"] < 1:
            time.sleep(0.01)
        """,
        code_of(tmp_path),
    )
    # The interpreter may end before that thread is on again.
    assert told == "" or told.splitlines()[-1] == "KeyError: 'own'", told
    assert "nsbox.errors" not in told


def test_tasks_of_a_loop_that_was_left(tmp_path: Path) -> None:
    """As Ctrl-C leaves it in a program without `asyncio.run`: their leases never come back."""
    told = run_to_end(
        """
        import asyncio, sys, nsbox
        from nsbox.pool import pool as pools
        pools.RETURN_DEADLINE, pools.EXIT_DEADLINE = 3600.0, 0.1  # not waited for the former
        fn = nsbox.Function("app.handler", code=sys.argv[1], timeout=900)
        async def main():
            async with nsbox.AsyncWarmPool(fn) as pool:
                asyncio.get_running_loop().call_later(0.01, interrupt, pool)
                await pool.invoke(3600)
        def interrupt(pool):
            if pool.stats().births:
                raise KeyboardInterrupt
            asyncio.get_running_loop().call_later(0.01, interrupt, pool)
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(main())
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
        """,
        code_of(tmp_path),
    )
    assert told.startswith("interrupted\n")


def test_environments_that_were_not_closed(tmp_path: Path) -> None:
    told = run_to_end(
        """
        import sys, warnings, nsbox
        warnings.simplefilter("ignore", ResourceWarning)
        version = nsbox.Function("app.handler", code=sys.argv[1]).publish()
        born, initialised, used, kept = [nsbox.ExecutionEnvironment(version) for _ in range(4)]
        commands, unused = nsbox.ExecutionEnvironment(), nsbox.ExecutionEnvironment()
        initialised.init()
        used.invoke(0)
        commands.run(["true"])
        kept.itself = [kept]
        sys.kept = kept
        """,
        code_of(tmp_path),
    )
    assert told == ""


def test_a_forgotten_environment_is_closed_where_warnings_are_errors() -> None:
    told = run_to_end(
        """
        import gc, os, select, nsbox
        env = nsbox.ExecutionEnvironment()
        end = os.pidfd_open(env.pid)
        del env
        gc.collect()
        poll = select.poll()
        poll.register(end, select.POLLIN)
        assert poll.poll(20_000)
        """
    )
    assert told.count("> was not closed\n") == 1
