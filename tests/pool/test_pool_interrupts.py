# SPDX-License-Identifier: Apache-2.0
"""An interrupt at each place of what a pool does: the place comes back, and nothing is left."""

from __future__ import annotations

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from tests.interrupts import interrupt_at_each_place
from tests.support import PATIENCE

import nsbox

Make = Callable[..., nsbox.FunctionVersion]
# What an interrupt lets go of is closed as the last reference to it goes, which Python tells.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning",
    # One that comes in a __del__ goes no further.
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
STRIDE = 7
"""Of so many places of a birth one is tried, where not all are."""


def close(pool: nsbox.WarmPool, *, drain: bool = True) -> None:
    """Close it; a place that is lost is waited for for 10 s, or for ever."""
    closing = threading.Thread(target=pool.close, kwargs={"drain": drain}, daemon=True)
    closing.start()
    closing.join(5.0 * PATIENCE)
    assert not closing.is_alive(), "the pool does not close"


def check(pool: nsbox.WarmPool, use: Callable[[nsbox.WarmPool], object]) -> None:
    """Its only place is to be had, and nothing is counted that is not there."""
    use(pool)
    stats = pool.stats()
    assert stats["Environments"] == stats["Idle"] == 1
    assert stats["Calls"] == stats["Invocations"] + stats["Throttles"]
    assert stats["Waiting"] == stats["ConcurrentExecutions"] == 0


def call(pool: nsbox.WarmPool) -> None:
    assert pool.invoke({"echo": 1})["echo"] == 1


def lease(pool: nsbox.WarmPool) -> None:
    with pool.acquire() as env:
        assert env.state.value == "ready"


def submit(pool: nsbox.WarmPool) -> None:
    assert pool.submit({"echo": 1}).result(5)["echo"] == 1


SETTINGS: dict[str, Any] = {
    "max_environments": 1, "acquire_timeout": 2.0, "shutdown_grace": 0.0, "freeze_after": None,
}  # fmt: skip


@pytest.mark.parametrize("use", [call, submit, lease])
def test_a_warm_call_that_is_interrupted_gives_its_place_back(
    make: Make, use: Callable[[nsbox.WarmPool], None]
) -> None:
    source = nsbox.Config() if use is lease else make()
    with nsbox.WarmPool(source, **SETTINGS) as pool:
        use(pool)
        count = interrupt_at_each_place(lambda: partial(use, pool), lambda: check(pool, use))
        assert count > 5
        close(pool)


def test_a_birth_that_makes_room_loses_nothing_when_it_is_interrupted(make: Make) -> None:
    """What had to go for it goes, and its end is told as its birth was; the call is counted."""
    events: deque[nsbox.PoolEvent] = deque()
    tenants = itertools.cycle(["red", "blue"])
    with nsbox.WarmPool(make(), on_event=events.append, **SETTINGS) as pool:

        def prepare() -> Callable[[], object]:
            return partial(pool.invoke, {"echo": 1}, tenant=next(tenants))

        def look() -> None:
            stats = pool.stats()
            assert stats["Calls"] == stats["Invocations"] + stats["Throttles"]
            assert stats["Environments"] <= 1
            counts = Counter(event.kind for event in events)
            assert counts["created"] - counts["retired"] == stats["Environments"]

        prepare()()
        # The one that has to go is closed in its first third.
        interrupt_at_each_place(prepare, look, STRIDE)
        close(pool)
    kinds = Counter(event.kind for event in events)
    assert kinds["created"] == kinds["retired"]


@pytest.mark.parametrize("drain", [True, False])
def test_a_close_that_is_interrupted_comes_to_its_end(drain: bool) -> None:
    pools: list[nsbox.WarmPool] = []

    def prepare() -> Callable[[], object]:
        pools.append(nsbox.WarmPool(**SETTINGS))
        lease(pools[0])
        return partial(pools[0].close, drain=drain)

    interrupt_at_each_place(prepare, lambda: close(pools.pop()), STRIDE)
