# SPDX-License-Identifier: Apache-2.0
"""README's web service when it is full: 429, and when to come again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support import wait_until

README = Path(__file__).resolve().parents[2] / "README.md"


def service(**changes: str) -> dict[str, Any]:
    """Run the example without its client, with some words changed; return its names."""
    code = README.read_text().partition("from fastapi import FastAPI")
    text = code[0].rpartition("```python\n")[2] + code[1] + code[2].partition("```\n")[0]
    text = text.partition("async def try_it")[0]
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(text, "<example>", "exec"), names)  # noqa: S102
    return names


@pytest.mark.needs("userns")
def test_a_full_service_says_when_to_come_again() -> None:
    slow = "import time\ndef handler(event, context): return time.sleep(event)"
    names = service(
        **{
            '"def handler(event, context): return sorted(event)"': repr(slow),
            "code=place.name": "code=place.name, timeout=900",
            "provisioned=1, max_waiting=100": "max_waiting=0, max_environments=1",
        }
    )
    app = names["app"]

    async def main() -> None:
        transport = httpx.ASGITransport(app=app)
        async with (
            names["lifespan"](app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            pool = app.state.pool
            await client.post("/sort", json=0)  # so that the next one needs no birth
            first = asyncio.ensure_future(client.post("/sort", json=800))
            await asyncio.to_thread(
                wait_until, lambda: pool.stats()["ConcurrentExecutions"] == 1, "it runs", 20
            )
            answer = await client.post("/sort", json=0)
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert "busy" in answer.json()["error"]
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            # The call that nobody waits for was killed, and its place is free.
            answer = await client.post("/sort", json=0)
            assert (answer.status_code, answer.json()) == (200, None)
            assert pool.stats()["Throttles"] == 1

    asyncio.run(main())
    names["place"].cleanup()
