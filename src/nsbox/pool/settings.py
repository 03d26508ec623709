# SPDX-License-Identifier: Apache-2.0
"""The settings of a pool, checked before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

from nsbox.errors import ConfigError
from nsbox.functions.credentials import CredentialCache, Provider, check_credentials
from nsbox.pool.events import PoolEvent
from nsbox.supervisor.standby import MOST
from nsbox.values.config import parse_seconds, parse_size


class PoolSettings(TypedDict, total=False):
    """What pools take, by its names, but for their source and `reuse`; type checkers read it."""

    provisioned: int
    max_environments: int
    standby: int
    memory_budget: int | str | None
    acquire_timeout: float | None
    max_waiting: int
    idle_timeout: float
    freeze_after: float | None
    max_lifetime: float
    max_invocations: int | None
    shutdown_grace: float
    min_available: float | None
    credentials: Provider | None
    on_event: Callable[[PoolEvent], object] | None
    blank: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `WarmPool` takes, checked, except what it takes for its function.

    Attributes:
        max_environments: The most at a time.
        standby: Environments born ahead of need.
        memory_budget: Bytes that the memory limits of all may sum up to; None: any.
        acquire_timeout: Seconds that a call may wait for an environment; None: any.
        max_waiting: Calls that may wait.
        idle_timeout: Seconds after which an idle environment is closed.
        freeze_after: Seconds after which an idle environment is frozen; None: never.
        max_lifetime: Seconds after which an environment takes no more calls.
        max_invocations: Calls after which it takes no more; None: any.
        shutdown_grace: Seconds from SIGTERM to the end.
        min_available: Share of the host's memory below which idle ones are closed; None: any.
        reuse: Of a Config: ``"keep"``, ``"reset"`` or ``"never"``.
        credentials: The provider's, by role; None: there is none.
        on_event: Called with each `PoolEvent`; None: nothing is.
    """

    max_environments: int
    standby: int
    memory_budget: int | None
    acquire_timeout: float | None
    max_waiting: int
    idle_timeout: float
    freeze_after: float | None
    max_lifetime: float
    max_invocations: int | None
    shutdown_grace: float
    min_available: float | None
    reuse: str
    credentials: CredentialCache | None
    on_event: Callable[[PoolEvent], object] | None


def check_settings(
    *,
    max_environments: object,
    standby: object,
    memory_budget: int | str | None,
    acquire_timeout: object,
    max_waiting: object,
    idle_timeout: object,
    freeze_after: object,
    max_lifetime: object,
    max_invocations: object,
    shutdown_grace: object,
    min_available: object,
    reuse: str,
    credentials: Provider | None,
    on_event: Callable[[PoolEvent], object] | None,
) -> Settings:
    """Return the settings; ConfigError names the one that is wrong."""
    if reuse not in ("keep", "reset", "never"):
        raise ConfigError(f"reuse: must be 'keep', 'reset' or 'never', got {reuse!r}")
    if min_available is not None and (
        isinstance(min_available, bool)
        or not isinstance(min_available, int | float)
        or not 0 < min_available <= 1
    ):
        raise ConfigError(
            f"min_available: must be a share of the memory, above 0 and up to 1, got "
            f"{min_available!r}; None: do not look"
        )
    if check_count(standby, "standby", 0) > MOST:
        raise ConfigError(f"standby: must be a number up to {MOST}, got {standby!r}")
    return Settings(
        max_environments=check_count(max_environments, "max_environments", 1),
        standby=check_count(standby, "standby", 0),
        memory_budget=None if memory_budget is None else parse_size(memory_budget, "memory_budget"),
        acquire_timeout=None
        if acquire_timeout is None
        else _seconds(acquire_timeout, "acquire_timeout"),
        max_waiting=check_count(max_waiting, "max_waiting", 0),
        idle_timeout=parse_seconds(idle_timeout, "idle_timeout"),
        freeze_after=None if freeze_after is None else parse_seconds(freeze_after, "freeze_after"),
        max_lifetime=parse_seconds(max_lifetime, "max_lifetime"),
        max_invocations=(
            None if max_invocations is None else check_count(max_invocations, "max_invocations", 1)
        ),
        shutdown_grace=_seconds(shutdown_grace, "shutdown_grace"),
        min_available=None if min_available is None else float(min_available),
        reuse=reuse,
        credentials=check_credentials(credentials),
        on_event=on_event,
    )


def check_count(value: object, what: str, least: int) -> int:
    """Return `value` as a number from `least`; ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{what}: must be a number from {least}, got {value!r}")
    return value


def _seconds(value: object, what: str) -> float:
    """Return `value` as seconds, which may be none at all."""
    is_zero = value == 0 and not isinstance(value, bool)
    return 0.0 if is_zero else parse_seconds(value, what)
