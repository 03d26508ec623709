# SPDX-License-Identifier: Apache-2.0
"""Temporary credentials for invocations, and a cache that asks for them when it must.

They are kept in the host program and sent to the environment of an invocation alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from nsbox.errors import ConfigError, CredentialsError
from nsbox.values.config import check_text, parse_seconds

_log: Final = logging.getLogger("nsbox.credentials")
_BYTES_MAX: Final = 16 << 10  # of all three; tokens of AWS STS have some 2 KB
_FIELDS: Final = ("access_key_id", "secret_access_key", "session_token", "expires_at")
# What AWS STS, and so boto3, calls them.
_STS_NAMES: Final = ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Temporary credentials; their repr shows no secret.

    Args:
        access_key_id: For AWS_ACCESS_KEY_ID.
        secret_access_key: For AWS_SECRET_ACCESS_KEY.
        session_token: For AWS_SESSION_TOKEN; empty: there is none.
        expires_at: Until when they are good, with a time zone. None: they are used once.

    Raises:
        ConfigError: A value is wrong. It is not quoted.
    """

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str = field(default="", repr=False)
    expires_at: datetime | None = None

    def __post_init__(self) -> None:
        size = 0
        for name in _FIELDS[:3]:
            value = getattr(self, name)
            # Not by check_text, which quotes the value.
            is_text = isinstance(value, str) and "\0" not in value and value.isascii()
            if not is_text or (not value and name != "session_token"):
                raise ConfigError(f"credentials: {name} must be ASCII text (not shown)")
            size += len(value)
        if size > _BYTES_MAX:
            raise ConfigError(f"credentials: {size} bytes, more than {_BYTES_MAX}")
        when = self.expires_at
        if when is not None and (not isinstance(when, datetime) or when.tzinfo is None):
            raise ConfigError(
                "credentials: expires_at must be a datetime with a time zone, "
                f"got {type(when).__name__}"
            )

    @classmethod
    def of(cls, value: object) -> Credentials:
        """Return `value`, or what a mapping with these fields' or AWS STS' names says.

        Raises:
            ConfigError: It is neither.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"credentials: must be Credentials or a mapping, got {type(value).__name__}"
            )
        names = _STS_NAMES if _STS_NAMES[0] in value else _FIELDS
        found = {
            ours: value[name] for ours, name in zip(_FIELDS, names, strict=True) if name in value
        }
        for ours, name in zip(_FIELDS[:2], names, strict=False):
            if ours not in found:
                raise ConfigError(f"credentials: {name!r} is missing; give {', '.join(names)}")
        if isinstance(found.get("expires_at"), str):
            try:
                found["expires_at"] = datetime.fromisoformat(found["expires_at"])
            except ValueError as error:
                raise ConfigError(f"credentials: {names[3]} is no time: {error}") from error
        return cls(**found)

    def variables(self) -> dict[str, str]:
        """Return the environment variables that tell them."""
        token = {"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {}
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            **token,
        }

    def seconds_left(self) -> float:
        """Return for how many seconds they are good."""
        if self.expires_at is None:
            return 0.0
        return (self.expires_at - datetime.now(UTC)).total_seconds()


Provider = Callable[[str], "Credentials | Mapping[str, Any]"]
"""From the name of a role to credentials, or to a mapping with the names of AWS STS."""


class CredentialCache:
    """A provider that keeps what another one gives, for each role until near its expiry.

    It may be used from many threads and event loops: for each role one call asks, and the others
    wait for its answer. When asking fails while the old ones are good, those are used.
    """

    def __init__(self, provider: Provider, *, margin: float = 300.0) -> None:
        """Take what is asked.

        Args:
            provider: Called with the name of a role, in the thread of whoever needs it first, or
                on an asyncio loop in a thread of its own.
            margin: Seconds before their expiry at which credentials are asked for anew.

        Raises:
            ConfigError: A value is wrong.
        """
        if not callable(provider):
            raise ConfigError(f"credentials: {provider!r} cannot be called with a role")
        self._provider = provider
        self._margin = parse_seconds(margin, "margin")
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[float, Credentials]] = {}
        self._asked: dict[str, Future[Credentials]] = {}

    def __call__(self, role: str) -> Credentials:
        """Return credentials for a role.

        Raises:
            CredentialsError: There are none: the provider raised, or gave what is none or expired.
        """
        kept, answer, is_first = self._look(role)
        if kept is not None:
            return kept
        if is_first:
            self._ask(role, answer)
        return answer.result()

    async def get(self, role: str) -> Credentials:
        """Do as a call, on the running asyncio loop, which waits in no thread for others."""
        kept, answer, is_first = self._look(role)
        if kept is not None:
            return kept
        if is_first:
            # Not the loop's executor: a task that is cancelled would take the question with it.
            thread = threading.Thread(target=self._ask, args=(role, answer), daemon=True)
            try:
                thread.start()
            except BaseException as error:
                self._fail(role, answer, error)
                raise
        import asyncio  # as in `nsbox.environment.functions`

        return await asyncio.wrap_future(answer)

    def _look(self, role: str) -> tuple[Credentials | None, Future[Credentials], bool]:
        """Return what is kept; else where the answer will be, and whether the caller asks."""
        name = check_text(role, "role")
        with self._lock:
            until, kept = self._kept.get(name, _NONE)
            if kept is not None and until - time.monotonic() > self._margin:
                return kept, _NO_ANSWER, False
            answer = self._asked.get(name)
            if answer is not None:
                return None, answer, False
            answer = self._asked[name] = Future()
        answer.set_running_or_notify_cancel()  # one that waits and is cancelled cancels no other
        return None, answer, True

    def _ask(self, role: str, answer: Future[Credentials]) -> None:
        try:
            given = Credentials.of(self._provider(role))
            left = given.seconds_left()
            if given.expires_at is not None and left <= 0:
                raise ConfigError(f"they have expired at {given.expires_at.isoformat()}")
        except BaseException as error:
            self._fail(role, answer, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._end(role, (time.monotonic() + left, given))
            answer.set_result(given)

    def _fail(self, role: str, answer: Future[Credentials], error: BaseException) -> None:
        failure = CredentialsError(role, f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        old = self._end(role, None)
        if old is None:
            answer.set_exception(failure)
        else:
            _log.warning("%s; the old ones are used until they expire", failure)
            answer.set_result(old)

    def _end(self, role: str, given: tuple[float, Credentials] | None) -> Credentials | None:
        """Note what the provider gave; return what is good for the role now."""
        now = time.monotonic()
        with self._lock:
            del self._asked[role]
            if given is not None:
                self._kept[role] = given
            self._kept = {name: item for name, item in self._kept.items() if item[0] > now}
            return self._kept.get(role, _NONE)[1]


_NONE: Final[tuple[float, Credentials | None]] = (0.0, None)
_NO_ANSWER: Final[Future[Credentials]] = Future()


def resolve(value: object, role: str) -> Credentials | None:
    """Return the credentials that an invocation was given by value or by provider.

    Raises:
        ConfigError: They are none.
        CredentialsError: The provider has none.
    """
    if value is None:
        return None
    if callable(value):
        provider = value if isinstance(value, CredentialCache) else CredentialCache(value)
        return provider(role)
    return Credentials.of(value)


async def resolve_async(value: object, role: str) -> Credentials | None:
    """Do as `resolve`; a provider is asked in a thread."""
    if callable(value):
        provider = value if isinstance(value, CredentialCache) else CredentialCache(value)
        return await provider.get(role)
    return resolve(value, role)


def check_credentials(value: object) -> CredentialCache | None:
    """Return the cache of a provider, or None; ConfigError for what is no provider."""
    if value is None or isinstance(value, CredentialCache):
        return value
    if not callable(value):
        raise ConfigError(
            f"credentials: a pool takes a function from roles to credentials, got "
            f"{type(value).__name__}; give values to each call"
        )
    return CredentialCache(value)
