# SPDX-License-Identifier: Apache-2.0
"""Several functions in one pool, a memory budget, freezing, pressure, ends in order, standby."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.pool.conftest import managed_of
from tests.support import PATIENCE, SLOW_MACHINE, wait_until

import nsbox
from nsbox.pool import pressure
from nsbox.pool.manager import PoolSlot
from nsbox.pool.pressure import Pressure
from nsbox.supervisor import standby
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]
Reason = nsbox.Retirement
BROKEN = ("import os, sys, time", "raise ImportError('broken')")


class Events(list[nsbox.PoolEvent]):
    """What a pool has told."""

    def of(self, kind: str) -> list[nsbox.PoolEvent]:
        return [event for event in self if event.kind == kind]

    def reasons(self, kind: str = "retired") -> list[Reason | None]:
        return [event.reason for event in self.of(kind)]


@pytest.fixture
def events() -> Events:
    return Events()


def named(make: Make, name: str, **fields: object) -> nsbox.FunctionVersion:
    return make(name=name, **fields)


def until(pool: nsbox.WarmPool | nsbox.PoolFunction, name: str, value: float) -> None:
    wait_until(lambda: pool.stats()[name] == value, f"{name} is {value}", 20)


# -- several functions ---------------------------------------------------------------------------


def test_functions_of_one_pool_are_called_apart(make: Make, events: Events) -> None:
    with nsbox.WarmPool(max_environments=3, on_event=events.append) as pool:
        one = pool.function(named(make, "one"))
        two = pool.function(make(("VERSION = 1", "VERSION = 2"), name="two"))
        assert [one.invoke({})["calls"], one.invoke({})["calls"]] == [1, 2]
        assert two.invoke({})["version"] == 2
        assert two.invoke_bytes(b"{}").json()["calls"] == 2
        assert two.submit({}).result()["calls"] == 3
        assert asyncio.run(two.invoke_async({}))["calls"] == 4
        assert one.publish(make(("VERSION = 1", "VERSION = 3"), name="one")).name == "one"
        assert one.invoke({})["version"] == 3
        assert two.invoke({})["calls"] == 5
        with pool.acquire() as env:
            assert env.run(["true"]).ok
        numbers = [one.stats()["Calls"], two.stats()["Calls"], pool.stats()["Calls"]]
        assert numbers == [3, 5, 9]
        own = {
            name: value - one.stats()[name] - two.stats()[name]
            for name, value in pool.stats().items()
        }
        assert min(own.values()) > -0.001, "the sum of all"
        for name in ("Calls", "Invocations", "Births", "Environments", "Idle"):
            assert own[name] == 1, "the acquired one"
        with pytest.raises(nsbox.PoolError, match="of a Config"):
            pool.invoke({})  # type: ignore[misc]
        with pytest.raises(nsbox.PoolError, match="of a function"), one.acquire():  # type: ignore[misc]
            pass
    assert Counter(event.function for event in events.of("created")) == {"one": 2, "two": 1, "": 1}
    with pytest.raises(nsbox.PoolClosed):
        one.invoke({})
    with pytest.raises(nsbox.PoolClosed):
        pool.function(make())


def test_reserved_is_a_guarantee_and_a_limit(make: Make) -> None:
    with nsbox.WarmPool(max_environments=2, acquire_timeout=0.02) as pool:
        busy = pool.function(named(make, "busy"))
        safe = pool.function(named(make, "safe"), reserved=1)
        long = {"sleep": 3600}
        burst = [busy.submit(long, timeout=900) for _ in range(5)]
        wait_until(lambda: busy.stats()["ConcurrentExecutions"] == 1, "the burst runs", 20)
        assert safe.invoke({})["calls"] == 1, "its place is its own"
        running = safe.submit(long, timeout=900)
        until(safe, "ConcurrentExecutions", 1)
        with pytest.raises(nsbox.PoolTimeout):
            safe.invoke({})
        assert pool.stats()["Environments"] == 2
        pool.close(drain=False)
        for future in [*burst, running]:
            with pytest.raises(nsbox.PoolError):
                future.result()


def test_nothing_reserved_throttles_all(make: Make) -> None:
    with nsbox.WarmPool(max_environments=1) as pool:
        none = pool.function(make(), reserved=0)
        with pytest.raises(nsbox.Throttled, match="no place") as info:
            none.invoke({})
        assert info.value.reason == "reserved"
        assert info.value.retry_after is None, "never"
        assert none.stats()["Throttles"] == none.stats()["Calls"] == 1
        all_of_it = pool.function(make(), reserved=1)
        assert all_of_it.invoke({})["calls"] == 1
        with pytest.raises(nsbox.Throttled), pool.acquire():
            pass
        for settings in ({}, {"reserved": 1}):
            with pytest.raises(nsbox.ConfigError, match="max_environments: 1 are too few"):
                pool.function(make(), **settings)


def test_a_burst_of_one_function_does_not_starve_another(make: Make) -> None:
    settings = {"max_environments": 2, "acquire_timeout": None, "max_waiting": 500}
    with nsbox.WarmPool(**settings) as pool:  # type: ignore[call-overload]
        greedy, modest = pool.function(named(make, "greedy")), pool.function(named(make, "modest"))
        burst = [greedy.submit({"sleep": 0.05}) for _ in range(400)]
        wait_until(lambda: greedy.stats()["ConcurrentExecutions"] == 2, "the burst runs", 20)
        assert [modest.invoke({"echo": n})["echo"] for n in range(3)] == [0, 1, 2]
        assert not burst[-1].done()
        pool.close(drain=False)
        for future in burst:
            assert future.exception() is None or isinstance(future.exception(), nsbox.PoolError)


def test_places_are_set_aside_later(make: Make, events: Events) -> None:
    with nsbox.WarmPool(make(), max_environments=2, on_event=events.append) as pool:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda _: pool.invoke({"sleep": 0.2}), range(2)))
        assert pool.stats()["Idle"] == 2
        other = pool.function(named(make, "other"), reserved=1, provisioned=1)
        assert events.reasons() == [Reason.DEMAND]
        assert (pool.stats()["Environments"], other.stats()["Idle"]) == (2, 1)
        assert other.invoke({})["calls"] == 1


def test_a_function_that_does_not_start_takes_no_place(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=2) as pool:
        for reserved in (None, 1):
            with pytest.raises(nsbox.FunctionError, match="broken"):
                pool.function(make(BROKEN), reserved=reserved, provisioned=1)
        other = pool.function(make(), reserved=1)
        assert other.invoke({})["calls"] == pool.invoke({})["calls"] == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"reserved": -1}, "reserved: must be a number from 0"),
        ({"provisioned": True}, "provisioned: must be a number"),
        ({"reserved": 1, "provisioned": 2}, "provisioned: 2 is more than the 1 that are reserved"),
        ({"reserved": 9}, "max_environments: 2 are too few for 9 reserved"),
        ({"provisioned": 3}, "give at least 3"),
    ],
)
def test_wrong_settings_of_a_function(make: Make, settings: dict[str, int], match: str) -> None:
    with nsbox.WarmPool(max_environments=2) as pool:
        with pytest.raises(nsbox.ConfigError, match=match):
            pool.function(make(), **settings)
        with pytest.raises(nsbox.ConfigError, match="function: must be a function"):
            pool.function("app.handler")  # type: ignore[arg-type]


def test_how_many_are_kept_ready_can_be_changed(make: Make, events: Events) -> None:
    with nsbox.WarmPool(make(), max_environments=3, on_event=events.append) as pool:
        assert pool.invoke({})["calls"] == 1
        pool.provision(2)
        until(pool, "Idle", 3)
        assert events.reasons("created") == [Reason.DEMAND, Reason.PROVISIONED, Reason.PROVISIONED]
        pool.provision(1)
        until(pool, "Environments", 2)
        assert events.reasons() == [Reason.PROVISIONED]
        with pytest.raises(nsbox.ConfigError, match="max_environments: 3 are too few"):
            pool.provision(4)
        assert pool.snapshot().functions[0].provisioned == 1


def test_the_function_is_told_how_it_was_initialised(make: Make) -> None:
    change = ("VERSION = 1", 'VERSION = os.environ["AWS_LAMBDA_INITIALIZATION_TYPE"]')
    with nsbox.WarmPool(make(change), provisioned=1) as pool:
        assert pool.invoke({})["version"] == "provisioned-concurrency"
    with nsbox.WarmPool(make(change)) as pool:
        assert pool.invoke({})["version"] == "on-demand"


# -- the memory budget ---------------------------------------------------------------------------


def test_births_wait_for_memory(events: Events) -> None:
    settings = {"memory_budget": "1G", "acquire_timeout": 0.02}  # 512 MiB each
    with nsbox.WarmPool(**settings) as pool, pool.acquire(), pool.acquire():  # type: ignore[call-overload]
        with pytest.raises(nsbox.PoolTimeout), pool.acquire():
            pass
        assert pool.stats()["Environments"] == 2


def test_idle_ones_give_their_memory_the_coldest_first(make: Make, events: Events) -> None:
    limits = {"allow_missing": {"cgroup.memory"}}
    small = nsbox.Limits(memory_max="128M")
    with nsbox.WarmPool(
        make(limits=small, **limits), memory_budget="384M", on_event=events.append
    ) as pool:
        for tenant in ("a", "b", "c"):
            pool.invoke({}, tenant=tenant)
        assert pool.stats()["Environments"] == 3
        large = pool.function(make(name="large", limits=nsbox.Limits(memory_max="256M"), **limits))
        assert large.invoke({})["calls"] == 1
        gone = [(event.tenant, event.reason) for event in events.of("retired")]
        assert gone == [("a", Reason.DEMAND), ("b", Reason.DEMAND)]
        assert pool.invoke({}, tenant="c")["calls"] == 2
        with pytest.raises(nsbox.ConfigError, match=r"memory_budget: .* are too few"):
            pool.function(make(limits=nsbox.Limits(memory_max="512M"), **limits))
        with pytest.raises(nsbox.ConfigError, match=r"memory_budget: .* are too few"):
            pool.function(make(limits=small, **limits), reserved=2)
        with pytest.raises(nsbox.ConfigError, match=r"memory_budget: .* are too few"):
            pool.publish(make(("VERSION = 1", "VERSION = 2")))  # 512 MiB
        assert pool.invoke({}, tenant="c")["calls"] == 3


def test_a_source_without_a_limit_has_no_place_in_a_budget(make: Make) -> None:
    unlimited = nsbox.Config(limits=nsbox.Limits(memory_max=None))
    for source, budget in ((unlimited, "1G"), (nsbox.Config(), "256M"), (make(), "256M")):
        with pytest.raises(nsbox.ConfigError, match="memory_budget"):
            nsbox.WarmPool(source, memory_budget=budget)
    throttled = pytest.raises(nsbox.Throttled, match="no place")
    with nsbox.WarmPool(memory_budget="256M") as pool, throttled, pool.acquire():
        pass


# -- freezing ------------------------------------------------------------------------------------


def test_idle_ones_are_frozen_and_thawed_for_the_next_call(make: Make, events: Events) -> None:
    with nsbox.WarmPool(make(), freeze_after=0.02, on_event=events.append) as pool:
        first = pool.invoke({})
        wait_until(lambda: events.of("frozen"), "it is frozen", 20)
        assert pool.snapshot().count("frozen") == 1
        assert pool.invoke({}) == first | {"calls": 2}
        wait_until(lambda: len(events.of("frozen")) == 2, "it is frozen again", 20)
        assert asyncio.run(pool.invoke_async({})) == first | {"calls": 3}
    kinds = [event.kind for event in events]
    assert kinds[:8] == [
        "created", "initialised", "invoked", "frozen", "thawed", "invoked", "frozen", "thawed",
    ]  # fmt: skip


def test_acquire_thaws(events: Events) -> None:
    with nsbox.WarmPool(freeze_after=0.01, on_event=events.append) as pool:
        for count in (1, 2, 3):
            with pool.acquire() as env:
                assert env.run(["true"]).ok
            wait_until(lambda: len(events.of("frozen")) == count, "it is frozen", 20)  # noqa: B023
        assert pool.stats()["Births"] == 1


def test_nothing_is_frozen_where_it_is_not_to_be(make: Make, events: Events) -> None:
    with nsbox.WarmPool(
        make(), freeze_after=None, idle_timeout=0.1, on_event=events.append
    ) as pool:
        pool.invoke({})
        until(pool, "Environments", 0)
    assert not events.of("frozen")


def test_a_frozen_one_that_dies_is_seen_at_once(
    make: Make, events: Events, slots: list[PoolSlot]
) -> None:
    with nsbox.WarmPool(make(), freeze_after=0.01, on_event=events.append) as pool:
        pool.invoke({})
        wait_until(lambda: events.of("frozen"), "it is frozen", 20)
        managed_of(slots[0]).send_kill()
        pool.invoke({})
        assert pool.stats()["Births"] == 2


def test_more_than_are_frozen_at_once(events: Events) -> None:
    with nsbox.WarmPool(
        max_environments=12, provisioned=12, freeze_after=0.001, on_event=events.append
    ):
        wait_until(lambda: len({e.environment for e in events.of("frozen")}) == 12, "all are", 30)


def test_the_death_of_the_launcher_is_survived_by_a_pool_of_frozen_ones(
    make: Make, events: Events
) -> None:
    with nsbox.WarmPool(
        make(), provisioned=2, max_environments=2, freeze_after=0.01, on_event=events.append
    ) as pool:
        wait_until(lambda: len(events.of("frozen")) == 2, "they are frozen", 20)
        os.kill(get_launcher().pid, signal.SIGKILL)
        wait_until(lambda: len(events.of("retired")) == 2, "their end is seen", 20)
        wait_until(lambda: len(events.of("initialised")) == 4, "the pool fills again", 20)
        assert pool.invoke({"echo": 1})["echo"] == 1


def test_freezing_never_gets_in_the_way_of_a_call(make: Make, events: Events) -> None:
    """Pauses about as long as it takes until the freezer comes: each may be the faster one."""
    with nsbox.WarmPool(
        make(), max_environments=3, freeze_after=0.003, acquire_timeout=None, on_event=events.append
    ) as pool:
        rest = threading.Event()

        def call(n: int) -> object:
            rest.wait(0.001 * (n % 7))
            return pool.invoke({"echo": n}, timeout=30 * PATIENCE)["echo"]

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(call, range(240))) == list(range(240))
        stats = pool.stats()
        assert (stats["Calls"], stats["Errors"], stats["Throttles"]) == (240, 0, 0)
        assert stats["Births"] <= 3, [e for e in events if e.kind == "retired"]
    state: dict[str, bool] = {}
    for event in events:
        if event.kind in ("frozen", "thawed"):
            assert state.get(event.environment, False) is (event.kind == "thawed")
            state[event.environment] = event.kind == "frozen"
        elif event.kind == "invoked":
            assert not state.get(event.environment, False)
    assert events.of("frozen")


# -- memory pressure -----------------------------------------------------------------------------


def test_idle_ones_go_when_memory_is_short(
    make: Make, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "LOOK_SECONDS", 0.02)
    with nsbox.WarmPool(
        make(), provisioned=1, max_environments=4, min_available=1.0, on_event=events.append
    ) as pool:
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda n: pool.invoke({"sleep": 0.3}, tenant=f"t{n}"), range(3)))
        until(pool, "Environments", 1)
        assert events.reasons() == [Reason.PRESSURE] * 3
        assert not any(event.provisioned for event in events.of("retired"))
        assert pool.invoke({})["calls"] == 1


def test_it_can_be_switched_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(pressure.Pressure, "__init__", looks.append)
    with nsbox.WarmPool(make(), min_available=None) as pool:
        pool.invoke({})
    assert looks == []
    for value in (0, 1.5, True, "5%"):
        with pytest.raises(nsbox.ConfigError, match="min_available: must be a share"):
            nsbox.WarmPool(min_available=value)  # type: ignore[arg-type]


@pytest.mark.needs("cgroup.memory")
def test_the_kernel_tells_of_pressure(
    make: Make, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that reads more than its memory holds waits for it: that is pressure."""
    probe = Pressure(0.5, stall=1)
    has_triggers, available = bool(probe.triggers), probe.available()
    probe.close()
    if not has_triggers:
        pytest.skip("this kernel tells this user nothing of pressure (PSI)")
    monkeypatch.setattr(pressure.Pressure.__init__, "__kwdefaults__", {"stall": 1})
    alarms: list[bool] = []
    is_alarming = Pressure.is_alarming

    def note(own: Pressure) -> bool:
        alarms.append(is_alarming(own))
        return alarms[-1]

    monkeypatch.setattr(Pressure, "is_alarming", note)
    script = "while :; do cat /usr/bin/* /usr/lib/*/*.so* > /dev/null 2>&1; done"
    limits = nsbox.Limits(memory_max="32M")
    with nsbox.ExecutionEnvironment(limits=limits, tmp_size="16M") as env:
        # More is available than there has to be; after an alarm that is too little, or enough.
        for share, is_believed in ((0.75, True), (0.25, False)):
            alarms.clear()
            with nsbox.WarmPool(
                make(), min_available=share * available, on_event=events.append
            ) as pool:
                pool.invoke({})
                with env.popen(["sh", "-c", script], stdin=nsbox.DEVNULL):
                    wait_until(lambda: alarms, "the alarm", 30)
                    assert alarms[0] is is_believed
                    if is_believed:
                        until(pool, "Environments", 0)
    assert events.reasons() == [Reason.PRESSURE, Reason.CLOSE]


def test_the_limit_of_the_own_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 100\n")
    monkeypatch.setattr(pressure, "_own_directories", lambda: [str(tmp_path)])
    own = Pressure(0.1)
    try:
        assert own.available() == pytest.approx(0.2)
        assert not own.is_low()
        (tmp_path / "memory.current").write_text("1050\n")
        assert own.is_low()
        (tmp_path / "memory.max").write_text("max\n")
        assert own.available() > 0
    finally:
        own.close()


# -- ends in order -------------------------------------------------------------------------------


def writes_to(out: Path) -> dict[str, object]:
    # Anybody may write there, and no file system needs to support idmapped mounts.
    mounts = [nsbox.Mount.bind(out, "/out", rw=True)]
    return {"mounts": mounts, "allow_missing": {"idmapped_mounts"}}


POLITE = (
    "calls = 0",
    "import signal\n"
    "def bye(*_):\n"
    "    open('/out/' + os.urandom(8).hex(), 'w').close()\n"
    "    sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, bye)\n"
    "calls = 0",
)
ENDS: dict[str, tuple[Reason, dict[str, object]]] = {
    "idle": (Reason.IDLE, {"idle_timeout": 0.02}),
    "age": (Reason.LIFETIME, {"max_lifetime": 0.02}),
    "calls": (Reason.INVOCATIONS, {"max_invocations": 1}),
    "frozen": (Reason.IDLE, {"idle_timeout": 0.5, "freeze_after": 0.01}),
    "pressure": (Reason.PRESSURE, {"min_available": 1.0}),
    "publish": (Reason.VERSION, {}),
    "demand": (Reason.DEMAND, {"max_environments": 1}),
    "close": (Reason.CLOSE, {}),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_healthy_one_is_told_of_its_end(
    make: Make, out: Path, events: Events, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pressure, "LOOK_SECONDS", 0.02)
    reason, settings = ENDS[how]
    polite = make(POLITE, **writes_to(out))
    settings = {"shutdown_grace": 60.0, "on_event": events.append, **settings}
    with nsbox.WarmPool(polite, **settings) as pool:  # type: ignore[call-overload]
        assert pool.invoke({})["calls"] == 1
        if how == "publish":
            pool.publish(make())
        elif how == "demand":
            assert pool.invoke({}, tenant="a")["calls"] == 1
            assert len(list(out.iterdir())) == 1, "before the other was born"
        if how not in ("close", "demand"):
            until(pool, "Environments", 0)
    assert events.reasons()[0] is reason
    assert len(list(out.iterdir())) == len(events.reasons())


def test_one_in_doubt_is_not_asked(make: Make, out: Path) -> None:
    with nsbox.WarmPool(make(POLITE, **writes_to(out)), shutdown_grace=60.0) as pool:
        with pytest.raises(nsbox.InvokeTimeout):
            pool.invoke({"sleep": 60}, timeout=0.05)
        pool.invoke({})
        pool.close(drain=False)
    with nsbox.WarmPool(make(POLITE, **writes_to(out)), shutdown_grace=0) as pool:
        pool.invoke({})
    assert not list(out.iterdir())


def test_nobody_waits_for_one_that_does_not_end(make: Make, events: Events) -> None:
    """Its place stays taken until its time is over, and it is killed then."""
    stubborn = (
        "calls = 0",
        "import signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\ncalls = 0",
    )
    settings = {"max_environments": 2, "shutdown_grace": 0.2 * PATIENCE, "on_event": events.append}
    with nsbox.WarmPool(make(stubborn), max_invocations=1, **settings) as pool:  # type: ignore[call-overload]
        for _ in range(4):
            assert pool.invoke({})["calls"] == 1
            assert pool.stats()["Environments"] <= 2
        until(pool, "Environments", 0)
    assert events.reasons() == [Reason.INVOCATIONS] * 4


def test_many_end_in_order_at_once(make: Make, events: Events) -> None:
    """With hardly any time: the end and the end of the time race each other."""
    settings = {"max_invocations": 1, "acquire_timeout": None, "on_event": events.append}
    count = 9 if SLOW_MACHINE else 18
    for grace in (1e-6, 1e-3, 5.0):
        with nsbox.WarmPool(make(), shutdown_grace=grace, max_environments=3, **settings) as pool:  # type: ignore[call-overload]
            with ThreadPoolExecutor(3) as threads:
                answers = threads.map(lambda n: pool.invoke({"echo": n})["echo"], range(count))
                assert list(answers) == list(range(count))
            until(pool, "Environments", 0)
    assert events.reasons() == [Reason.INVOCATIONS] * 3 * count


# -- standby environments ------------------------------------------------------------------------


def test_standby_environments_of_its_kinds_are_kept_as_long_as_the_pool(make: Make) -> None:
    def ready() -> set[str]:
        return {link.env_id for kind in get_launcher().companions.values() for link in kind}

    assert ready() == set()
    with nsbox.WarmPool(make(), standby=2) as pool:
        wait_until(lambda: len(ready()) == 2, "they are asked for")
        before = ready()
        assert pool.invoke({})["log"] in before
        wait_until(lambda: len(ready()) == 2, "it is replaced")
        pool.function(make(tmp_size="32M"))
        wait_until(lambda: len(ready()) == 4, "two of the other kind")
    assert ready() == set()
    assert not standby._Setting.wishes
    with pytest.raises(nsbox.ConfigError, match="standby: must be a number up to 64"):
        nsbox.WarmPool(standby=65)
