# SPDX-License-Identifier: Apache-2.0
"""What workers of frameworks do with nsbox: a run, an environment of a function, both pools."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

import nsbox

EXPECTED = ["run", "environment", "pool", "loop"]


@contextlib.contextmanager
def function() -> Iterator[nsbox.Function]:
    """An echo."""
    with tempfile.TemporaryDirectory() as place:
        pathlib.Path(place, "app.py").write_text("def handler(event, context): return event")
        yield nsbox.Function("app.handler", code=place)


def everything(*_: object) -> list[str]:
    """Return `EXPECTED`."""
    with function() as echo:
        return [*blocking(echo), asyncio.run(in_loop(echo))]


def blocking(echo: nsbox.Function) -> list[str]:
    """Return what does without a loop."""
    answers = [nsbox.run(["echo", "run"], timeout=30).check().text().strip()]
    with nsbox.ExecutionEnvironment(echo.publish()) as env:
        answers.append(env.invoke("environment"))
    with nsbox.WarmPool(echo, max_environments=2) as pool:
        answers.append(pool.invoke("pool"))
    return answers


async def in_loop(echo: nsbox.Function) -> str:
    """Return the answer of an `AsyncWarmPool` on the running loop."""
    # With -X dev a step of 0.1 s is warned of, which any is on a busy machine.
    asyncio.get_running_loop().slow_callback_duration = 60
    async with nsbox.AsyncWarmPool(echo, max_environments=2) as pool:
        return str(await pool.invoke("loop"))
