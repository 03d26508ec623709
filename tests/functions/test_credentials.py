# SPDX-License-Identifier: Apache-2.0
"""`Credentials` and their cache: asked for once at a time, kept until near expiry, never shown."""

from __future__ import annotations

import asyncio
import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from tests.support import PATIENCE, wait_until

import nsbox

pytestmark = pytest.mark.static

WAITING = 30 * PATIENCE


def keys(seconds: float = 3600, name: str = "AK") -> nsbox.Credentials:
    return nsbox.Credentials(
        access_key_id=name,
        secret_access_key="SECRET",
        session_token="TOKEN",
        expires_at=datetime.now(UTC) + timedelta(seconds=seconds),
    )


class Provider:
    """Gives what it was told to, in turn; the last one for ever; waits for its gate."""

    def __init__(self, *given: object) -> None:
        self.given = list(given)
        self.roles: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, role: str) -> Any:
        self.roles.append(role)
        assert self.gate.wait(WAITING)
        answer = self.given.pop(0) if len(self.given) > 1 else self.given[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


# -- values --------------------------------------------------------------------------------------


def test_no_secret_is_shown() -> None:
    assert "SECRET" not in repr(keys())
    assert "TOKEN" not in repr(keys())
    with pytest.raises(nsbox.ConfigError, match="secret_access_key") as caught:
        nsbox.Credentials(access_key_id="AK", secret_access_key="SECRET\0")
    assert "SECRET" not in str(caught.value)


def test_names_of_sts() -> None:
    when = datetime.now(UTC) + timedelta(hours=1)
    told: dict[str, object] = {
        "AccessKeyId": "AK",
        "SecretAccessKey": "SECRET",
        "SessionToken": "TOKEN",
        "Expiration": when,
    }
    expected = nsbox.Credentials(
        access_key_id="AK", secret_access_key="SECRET", session_token="TOKEN", expires_at=when
    )
    assert nsbox.Credentials.of(told) == expected
    assert nsbox.Credentials.of({**told, "Expiration": when.isoformat()}) == expected
    assert nsbox.Credentials.of(expected) is expected
    ours = {"access_key_id": "AK", "secret_access_key": "SECRET"}
    found = nsbox.Credentials.of(ours).variables()
    assert found == {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SECRET"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"AccessKeyId": "AK"}, "'SecretAccessKey' is missing"),
        ({}, "'access_key_id' is missing"),
        ({"access_key_id": "", "secret_access_key": "S"}, "access_key_id must be"),
        ({"access_key_id": "A", "secret_access_key": 7}, "secret_access_key must be"),
        ({"access_key_id": "A", "secret_access_key": "\xfc"}, "secret_access_key must be"),
        ({"AccessKeyId": "A", "SecretAccessKey": "S", "Expiration": "soon"}, "Expiration is no"),
        (
            {"AccessKeyId": "A", "SecretAccessKey": "S", "Expiration": datetime(2040, 1, 1)},
            "time zone",
        ),
        ({"AccessKeyId": "A", "SecretAccessKey": "S", "SessionToken": "x" * 20_000}, "20002 bytes"),
        ("AK:SECRET", "got str"),
    ],
)
def test_what_is_none(value: object, words: str) -> None:
    with pytest.raises(nsbox.ConfigError, match=words):
        nsbox.Credentials.of(value)


# -- the cache -----------------------------------------------------------------------------------


def test_kept_for_each_role_until_near_expiry() -> None:
    provider = Provider(keys(3600, "1"), keys(3600, "2"), keys(200, "3"), keys(3600, "4"))
    cache = nsbox.CredentialCache(provider, margin=300)
    assert [cache("a").access_key_id for _ in range(3)] == ["1"] * 3
    assert [cache("b").access_key_id for _ in range(3)] == ["2"] * 3
    assert provider.roles == ["a", "b"]
    # Good for less than the margin: used, and asked for again next time.
    assert [cache("c").access_key_id for _ in range(3)] == ["3", "4", "4"]
    assert provider.roles == ["a", "b", "c", "c"]


def test_one_asks_and_all_others_wait_for_it() -> None:
    provider = Provider(keys())
    provider.gate.clear()
    cache = nsbox.CredentialCache(provider)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(cache("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()

    async def main() -> list[nsbox.Credentials]:
        tasks = [asyncio.ensure_future(cache.get("a")) for _ in range(8)]
        await asyncio.sleep(0)
        tasks[0].cancel()  # one that gives up takes nobody with it
        provider.gate.set()
        return await asyncio.gather(*tasks[1:])

    wait_until(lambda: provider.roles, "one asks")
    found += asyncio.run(main())
    for thread in threads:
        thread.join()
    assert found == [found[0]] * 15
    assert provider.roles == ["a"]


def test_a_task_that_asks_and_is_cancelled_leaves_the_answer_to_the_others() -> None:
    provider = Provider(keys())
    provider.gate.clear()
    cache = nsbox.CredentialCache(provider)

    async def main() -> nsbox.Credentials:
        first, second = (asyncio.ensure_future(cache.get("a")) for _ in range(2))
        await asyncio.to_thread(wait_until, lambda: provider.roles, "the first asks")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        provider.gate.set()
        return await second

    assert asyncio.run(main()).access_key_id == "AK"
    assert provider.roles == ["a"]


def test_a_failure_is_everybodys_and_is_not_kept() -> None:
    provider = Provider(OSError("unreachable"), keys())
    provider.gate.clear()
    cache = nsbox.CredentialCache(provider)

    async def main() -> list[object]:
        tasks = [asyncio.ensure_future(cache.get("a")) for _ in range(3)]
        await asyncio.to_thread(wait_until, lambda: provider.roles, "one asks")
        provider.gate.set()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    errors = asyncio.run(main())
    assert [str(error) for error in errors] == [
        "no credentials for the role 'a': OSError: unreachable"
    ] * 3
    assert isinstance(errors[0], nsbox.CredentialsError)
    assert isinstance(errors[0].__cause__, OSError)
    assert provider.roles == ["a"]
    assert cache("a").access_key_id == "AK"


def test_old_ones_are_used_while_they_are_good(caplog: pytest.LogCaptureFixture) -> None:
    provider = Provider(keys(200, "old"), OSError("unreachable"))
    cache = nsbox.CredentialCache(provider, margin=300)
    assert [cache("a").access_key_id for _ in range(3)] == ["old"] * 3
    assert len(provider.roles) == 3
    assert "unreachable" in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (keys(-1), "have expired at"),
        (None, "got NoneType"),
        ({"AccessKeyId": "AK"}, "'SecretAccessKey' is missing"),
    ],
)
def test_a_provider_that_gives_none(given: object, words: str) -> None:
    with pytest.raises(nsbox.CredentialsError, match=f"role 'a'.*{words}"):
        nsbox.CredentialCache(Provider(given))("a")


def test_without_an_expiry_they_are_asked_for_each_time() -> None:
    once = nsbox.Credentials(access_key_id="AK", secret_access_key="S")
    provider = Provider(once)
    cache = nsbox.CredentialCache(provider)
    assert [cache("a"), cache("a")] == [once, once]
    assert provider.roles == ["a", "a"]


def test_wrong_settings() -> None:
    for wrong in (7, None, keys()):
        with pytest.raises(nsbox.ConfigError, match="cannot be called"):
            nsbox.CredentialCache(wrong)  # type: ignore[arg-type]
    with pytest.raises(nsbox.ConfigError, match="margin"):
        nsbox.CredentialCache(Provider(keys()), margin=-1)
    with pytest.raises(nsbox.ConfigError, match="role"):
        nsbox.CredentialCache(Provider(keys()))(7)  # type: ignore[arg-type]
