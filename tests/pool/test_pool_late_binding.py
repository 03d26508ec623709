# SPDX-License-Identifier: Apache-2.0
"""What comes with one call through a pool: variables, files, and credentials from a provider."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import nsbox

pytestmark = pytest.mark.needs("userns")

HANDLER = """
import os
def handler(event, context):
    names = ("WORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    path = "/tmp/in/x"
    return [os.environ.get(name) for name in names] + [
        open(path).read() if os.path.exists(path) else None, context.log_stream_name[-8:]]
"""
Publish = Callable[..., nsbox.FunctionVersion]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    (tmp_path / "app.py").write_text(HANDLER)

    def make(**fields: object) -> nsbox.FunctionVersion:
        return nsbox.Function("app.handler", code=tmp_path, **fields).publish()  # type: ignore[arg-type]

    return make


class Provider:
    """Credentials named after their role, and how often each was asked for."""

    def __init__(self, seconds: float = 3600) -> None:
        self.roles: list[str] = []
        self.threads: set[threading.Thread] = set()
        self._seconds = seconds

    def __call__(self, role: str) -> dict[str, object]:
        self.roles.append(role)
        self.threads.add(threading.current_thread())
        if role == "none":
            raise LookupError("no such role")
        return {
            "AccessKeyId": f"AK-{role}",
            "SecretAccessKey": f"SK-{role}",
            "SessionToken": f"ST-{role}",
            "Expiration": datetime.now(UTC) + timedelta(seconds=self._seconds),
        }


def told(role: str) -> list[str]:
    return [f"AK-{role}", f"SK-{role}", f"ST-{role}"]


@pytest.mark.parametrize("reuse", ["keep", "reset", "never"])
def test_nothing_of_a_call_is_left_for_the_next(publish: Publish, reuse: str) -> None:
    own = nsbox.Credentials(access_key_id="A", secret_access_key="S", session_token="T")
    with nsbox.WarmPool(publish(reuse=reuse), max_environments=1) as pool:
        found = pool.invoke({}, env={"WORD": "w"}, files={"in/x": b"f"}, credentials=own)
        assert found[:5] == ["w", "A", "S", "T", "f"]
        assert pool.invoke({})[:5] == [None] * 5
        found = pool.invoke_bytes(b"{}", env={"WORD": "b"}, files={"in/x": b"g"}).json()
        assert found[:5] == ["b", None, None, None, "g"]
        assert pool.submit({}, env={"WORD": "s"}).result()[0] == "s"
        assert [answer[0] for answer in pool.map([{}, {}], env={"WORD": "m"})] == ["m", "m"]
        assert pool.invoke({})[:5] == [None] * 5


def test_a_provider_is_asked_once_for_each_role(publish: Publish) -> None:
    provider = Provider()
    version = publish(name="reader")
    with nsbox.WarmPool(version, credentials=provider, acquire_timeout=None) as pool:
        with ThreadPoolExecutor(8) as threads:
            roles = [None, "a", "b"] * 8
            found = list(threads.map(lambda role: pool.invoke({}, role=role), roles))
        assert [item[1:4] for item in found] == [told(role or "reader") for role in roles]
        assert sorted(provider.roles) == ["a", "b", "reader"]
        own = nsbox.Credentials(access_key_id="A", secret_access_key="S")
        assert pool.invoke({}, credentials=own)[1:4] == ["A", "S", None]
        assert pool.invoke({}, credentials=Provider(), role="c")[1:4] == told("c")
        with pytest.raises(nsbox.CredentialsError, match=r"'none'.*no such role"):
            pool.invoke({}, role="none")
        stats = pool.stats()
        assert stats["Calls"] == stats["Invocations"] == 26
        assert stats["Errors"] == 0


def test_a_provider_on_a_loop(publish: Publish) -> None:
    provider = Provider()

    async def main() -> None:
        settings = {"credentials": provider, "acquire_timeout": None}
        async with nsbox.AsyncWarmPool(publish(), **settings) as pool:  # type: ignore[call-overload]
            calls = [pool.invoke({}, role=role, files={"in/x": b"f"}) for role in ["a", "b"] * 8]
            found = await asyncio.gather(*calls)
            assert [item[1:5] for item in found] == [[*told(r), "f"] for r in ["a", "b"] * 8]
            assert sorted(provider.roles) == ["a", "b"]
            assert threading.current_thread() not in provider.threads
            with pytest.raises(nsbox.CredentialsError, match="no such role"):
                await pool.invoke({}, role="none")
            assert [item[1] async for item in pool.map([{}] * 3, role="a")] == ["AK-a"] * 3

    asyncio.run(main())


def test_a_call_with_wrong_values_leaves_no_doubt(publish: Publish) -> None:
    with nsbox.WarmPool(publish(tmp_size="1M"), max_environments=1) as pool:
        first = pool.invoke({})[5]
        with pytest.raises(nsbox.ConfigError, match="reserved"):
            pool.invoke({}, env={"AWS_REGION": "x"})
        with pytest.raises(nsbox.ConfigError, match="relative"):
            pool.submit({}, files={"/x": b""}).result()
        assert pool.invoke({})[5] == first
        with pytest.raises(nsbox.SyscallError, match="ENOSPC"):
            pool.invoke({}, files={"x": b"", "y": bytes(2 << 20)})
        assert pool.invoke({})[5] != first, "with half of its files it serves nobody"
        with pytest.raises(TypeError, match="word"):
            pool.invoke_bytes(b"{}", word="w")  # type: ignore[call-arg]


def test_wrong_providers(publish: Publish) -> None:
    for wrong in (7, {"AccessKeyId": "AK"}):
        with pytest.raises(nsbox.ConfigError, match="credentials: a pool takes a function"):
            nsbox.WarmPool(publish(), credentials=wrong)  # type: ignore[call-overload]
