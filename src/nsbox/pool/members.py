# SPDX-License-Identifier: Apache-2.0
"""What a pool asks its environments for besides what users do: their ends, and what they know."""

from __future__ import annotations

from collections.abc import Callable

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.functions.call import Answer
from nsbox.functions.left_running import known
from nsbox.values.invocation import LeftRunning


def heard_nothing(env: ExecutionEnvironment) -> bool:
    """Whether nothing of its last invocation, which has failed, has reached the function."""
    return env._invocations is not None and env._invocations.is_unsent


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
    if env._invocations is not None and env._invocations.sweep is not None:
        env._invocations.sweep.on_kill = tell


def left_running_of_last(env: ExecutionEnvironment) -> LeftRunning | None:
    """Return what its last invocation has left running, as far as that is known."""
    calls = env._invocations
    last = None if calls is None else calls._last
    if calls is not None and isinstance(last, Answer):
        return known(calls._link, calls._version, last._call)
    return None if last is None else last.left_running  # type: ignore[union-attr]
