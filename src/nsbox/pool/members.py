# SPDX-License-Identifier: Apache-2.0
"""What a pool asks its environments for besides what users do: their ends, and what they know."""

from __future__ import annotations

from collections.abc import Callable

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.values.invocation import LeftRunning


def heard_nothing(env: ExecutionEnvironment) -> bool:
    """Whether nothing of its last invocation, which has failed, has reached the function."""
    return env._session is not None and env._session.is_unsent


def death_descriptor(env: ExecutionEnvironment) -> int:
    """Return what is readable once its PID 1 has ended; it is the environment's until it is closed.

    Raises:
        EnvironmentDied: It has ended.
    """
    link = env._live_link()
    return link.fileno()


def is_closed(env: ExecutionEnvironment) -> bool:
    """Whether whoever had it has closed it."""
    return env._link is None


def send_kill(env: ExecutionEnvironment) -> None:
    """SIGKILL its PID 1, unless it is closed; who waits for an answer sees that."""
    if (link := env._link) is not None:
        link.send_kill()


def on_kill_of_left_running(env: ExecutionEnvironment, tell: Callable[[], object]) -> None:
    """Have `tell` called when an invocation has left processes running that were killed."""
    if env._session is not None:
        env._session.on_kill = tell


def left_running_of_last(env: ExecutionEnvironment) -> LeftRunning | None:
    """Return what its last invocation has left running, as far as that is known."""
    return None if env._session is None else env._session.left_running_of_last()
