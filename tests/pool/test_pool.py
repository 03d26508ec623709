# SPDX-License-Identifier: Apache-2.0
"""`WarmPool` with real environments: leases, waiting, versions, deaths, and numbers that add up."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import psutil
import pytest
from tests.support import PATIENCE, host_program, wait_until

import nsbox
from nsbox.pool import function as pool_function
from nsbox.pool.manager import PoolSlot
from nsbox.store import integrity
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]
BROKEN = ("import os, sys, time", "raise ImportError('broken')")


def check_sums(pool: nsbox.WarmPool, calls: int) -> dict[str, float]:
    stats = pool.stats()
    assert stats["ConcurrentExecutions"] == 0
    assert stats["Waiting"] == 0
    assert stats["Calls"] == stats["Invocations"] + stats["Throttles"] == calls, stats
    return stats


class Holder:
    """Calls that are inside their environment until they are let go."""

    def __init__(self, pool: nsbox.WarmPool) -> None:
        self._pool = pool
        self._gate = threading.Event()
        self._threads: list[threading.Thread] = []

    def hold(self) -> None:
        inside = threading.Event()

        def body() -> None:
            with self._pool.acquire():
                inside.set()
                self._gate.wait(30 * PATIENCE)

        self._threads.append(threading.Thread(target=body))
        self._threads[-1].start()
        assert inside.wait(30 * PATIENCE)

    def let_go(self) -> None:
        self._gate.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def commands() -> Iterator[nsbox.WarmPool]:
    with nsbox.WarmPool(max_environments=1) as pool:
        yield pool


# -- leases -----------------------------------------------------------------------------------


def invoke_noting(pool: nsbox.WarmPool) -> list[CodeType]:
    """Make a call, and return the functions of Python that it has passed in this thread."""
    passed: list[CodeType] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            passed.append(frame.f_code)

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        answer = pool.invoke({"echo": 1})
    finally:
        sys.setprofile(profiler)
    assert answer["echo"] == 1
    return passed


@pytest.mark.needs("json")
def test_a_warm_call_passes_few_functions(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1) as pool:
        for _ in range(3):
            pool.invoke({"echo": 1})
        passed = invoke_noting(pool)
    names = [code.co_qualname for code in passed]
    assert len(names) <= 20, names
    assert len({code.co_filename for code in passed}) <= 8, names


@pytest.mark.needs("json")
def test_a_cold_call_passes_few_functions_from_the_birth_to_the_end(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_SETTLED", 0)  # two seconds in which files are read again
    with nsbox.WarmPool(make(reuse="never"), max_environments=1) as pool:
        pool.invoke({"echo": 1})  # what all environments of a version have in common is made
        names = [code.co_qualname for code in invoke_noting(pool)]
        check_sums(pool, 2)
    assert len(names) <= 250, names


def test_one_environment_serves_one_call_after_another(make: Make) -> None:
    with nsbox.WarmPool(make()) as pool:
        answers = [pool.invoke({"echo": n}) for n in range(5)]
        assert [answer["echo"] for answer in answers] == list(range(5))
        assert [answer["calls"] for answer in answers] == [1, 2, 3, 4, 5]
        assert len({answer["log"] for answer in answers}) == 1
        stats = check_sums(pool, 5)
        assert (stats["Births"], stats["Errors"], stats["Environments"]) == (1, 0, 1)
        assert pool.invoke_bytes(b"{}").json()["calls"] == 6


def test_many_threads_get_their_own_answers_and_never_share(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=3, acquire_timeout=None) as pool:
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(lambda n: pool.invoke({"echo": n}), range(120)))
        assert [answer["echo"] for answer in answers] == list(range(120))
        # Each environment has counted its own calls, one by one.
        assert len({(answer["log"], answer["calls"]) for answer in answers}) == 120
        assert len({answer["log"] for answer in answers}) <= 3
        assert check_sums(pool, 120)["Births"] <= 3


def test_tenants_never_share(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=2, acquire_timeout=None) as pool:
        tenants = [None, "a", "b", "c"] * 8
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda t: pool.invoke({}, tenant=t), tenants))
        assert [answer["tenant"] for answer in answers] == tenants
        owners: dict[str, set[str | None]] = {}
        for answer in answers:
            owners.setdefault(answer["log"], set()).add(answer["tenant"])
        assert all(len(served) == 1 for served in owners.values())
        with pytest.raises(nsbox.ConfigError, match="tenant"):
            pool.invoke({}, tenant="\0")
        check_sums(pool, 32)


def test_versions_of_more_tenants_than_are_kept(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_function, "_TENANTS_KEPT", 3)
    with nsbox.WarmPool(make(), max_environments=2) as pool:
        tenants = [None, "a", "b", "c", "d", "a", None]
        assert [pool.invoke({}, tenant=tenant)["tenant"] for tenant in tenants] == tenants
        check_sums(pool, len(tenants))


def test_a_tenants_version_stays_its_own(make: Make) -> None:
    version = make(tenant="a")
    assert version.for_tenant("a") is version
    with pytest.raises(nsbox.ConfigError, match="of 'a', and not of 'b'"):
        version.for_tenant("b")
    shared = make()
    own = shared.for_tenant("b")
    assert own.key == (shared.digest, "b")
    assert own.function.tenant == "b"
    assert shared.function.tenant is None


def test_a_lease_is_ended_once(commands: nsbox.WarmPool) -> None:
    first, second = commands.acquire(), commands.acquire()
    env = first.__enter__()
    assert [one.state for one in commands.snapshot().environments] == ["busy"]
    first.__exit__(None, None, None)
    with pytest.raises(nsbox.EnvironmentStateError, match="this lease is over"):
        first.__exit__(None, None, None)
    assert second.__enter__().id == env.id
    with pytest.raises(nsbox.EnvironmentStateError, match="this lease is over"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def test_files_stay_with_keep_and_go_with_never() -> None:
    for reuse, kept in (("keep", True), ("never", False)):
        with nsbox.WarmPool(reuse=reuse) as pool:  # type: ignore[call-overload]
            with pool.acquire() as env:
                env.write_file("/tmp/x", b"1")
            with pool.acquire() as env:
                assert env.run(["test", "-e", "/tmp/x"]).ok is kept


def test_an_exception_in_the_body_destroys_the_environment(commands: nsbox.WarmPool) -> None:
    with pytest.raises(KeyError), commands.acquire() as env:
        raise KeyError
    assert env.state is nsbox.State.CLOSED
    with commands.acquire() as other:
        assert other.id != env.id
    assert check_sums(commands, 2)["Errors"] == 1


def test_reset_and_never_of_a_function(make: Make) -> None:
    for reuse, environments in (("reset", 1), ("never", 3)):
        with nsbox.WarmPool(make(reuse=reuse)) as pool:
            answers = [pool.invoke({}) for _ in range(3)]
            assert [answer["calls"] for answer in answers] == [1, 1, 1]
            assert len({answer["log"] for answer in answers}) == environments


def test_wrong_settings_and_uses(commands: nsbox.WarmPool, make: Make) -> None:
    for settings in (
        {"provisioned": -1}, {"max_environments": 0}, {"provisioned": 9}, {"max_waiting": -1},
        {"idle_timeout": 0}, {"acquire_timeout": -1}, {"max_invocations": 0}, {"reuse": "often"},
    ):  # fmt: skip
        with pytest.raises(nsbox.ConfigError, match=next(iter(settings))):
            nsbox.WarmPool(**settings)
    with pytest.raises(nsbox.PoolError, match="of a Config: use acquire"):
        commands.invoke({})
    with nsbox.WarmPool(make()) as pool:
        with pytest.raises(nsbox.PoolError, match="of a function: use invoke"), pool.acquire():  # type: ignore[misc]
            pass
        with pytest.raises(nsbox.ConfigError, match="no JSON value"):
            pool.invoke({1, 2})
        assert pool.invoke({})["calls"] == 1, "nothing was sent: it is as it was"


# -- when all are busy ---------------------------------------------------------------------------


def test_nothing_is_born_for_what_is_refused(make: Make) -> None:
    cases: list[tuple[Any, Any]] = [
        ("\ud800", {}), ({1}, {}), (float("nan"), {}),
        ({}, {"timeout": -1}), ({}, {"env": {"A=": ""}}), ({}, {"files": {"../x": b""}}),
    ]  # fmt: skip

    async def on_a_loop(event: object, options: Any) -> None:
        with pytest.raises(nsbox.ConfigError):
            await pool.invoke_async(event, **options)

    with nsbox.WarmPool(make(), max_environments=1) as pool:
        for event, options in cases:
            with pytest.raises(nsbox.ConfigError):
                pool.invoke(event, **options)
            with pytest.raises(nsbox.ConfigError):
                pool.submit(event, **options).result(30 * PATIENCE)
            with pytest.raises(nsbox.ConfigError):
                list(pool.map([event], **options))
            if isinstance(event, str | dict):
                with pytest.raises(nsbox.ConfigError):
                    pool.invoke_bytes(json.dumps(event).encode(), **options)
            asyncio.run(on_a_loop(event, options))
        stats = pool.stats()
        assert (stats["Births"], stats["Invocations"]) == (0, 0)


def test_waiting_times_out(commands: nsbox.WarmPool) -> None:
    with commands.acquire():
        for error in (nsbox.PoolTimeout, TimeoutError):
            with pytest.raises(error), commands.acquire(timeout=0.01):
                pass
    stats = check_sums(commands, 3)
    assert (stats["Throttles"], stats["Invocations"]) == (2, 1)


def test_too_many_waiting_are_throttled() -> None:
    with nsbox.WarmPool(max_environments=1, max_waiting=0) as pool:
        with pool.acquire():
            with pytest.raises(nsbox.Throttled) as info, pool.acquire():
                pass
            assert info.value.reason == "full"
            assert info.value.retry_after is not None
            assert info.value.retry_after > 0
        with pool.acquire() as env:
            assert env.run(["true"]).ok
        assert check_sums(pool, 3)["Throttles"] == 1


def test_the_queue_is_fair(commands: nsbox.WarmPool) -> None:
    holder = Holder(commands)
    holder.hold()
    order: list[int] = []

    def call(n: int) -> None:
        with commands.acquire(timeout=30 * PATIENCE):
            order.append(n)

    threads = []
    for n in range(6):
        threads.append(threading.Thread(target=call, args=(n,)))
        threads[-1].start()
        wait_until(lambda: commands.stats()["Waiting"] == n + 1, "it waits")  # noqa: B023
    holder.let_go()
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    assert check_sums(commands, 7)["Births"] == 1


# -- failures ------------------------------------------------------------------------------------


def test_what_is_in_doubt_is_destroyed_and_the_rest_is_not(make: Make) -> None:
    events: list[nsbox.PoolEvent] = []
    with nsbox.WarmPool(make(), on_event=events.append) as pool:
        first = pool.invoke({})["log"]
        with pytest.raises(nsbox.FunctionError, match="asked for"):
            pool.invoke({"raise": True})
        assert pool.invoke({})["log"] == first
        with pytest.raises(nsbox.FunctionError, match="exit status 3"):
            pool.invoke({"exit": True})
        second = pool.invoke({})["log"]
        with pytest.raises(nsbox.InvokeTimeout):
            pool.invoke({"sleep": 60}, timeout=0.05)
        third = pool.invoke({})["log"]
        assert len({first, second, third}) == 3
        assert check_sums(pool, 7)["Errors"] == 3
    kinds = [event.kind for event in events if event.environment == first]
    assert kinds == ["created", "initialised", *["invoked"] * 4, "retired"]
    reasons = [event.reason for event in events if event.kind == "retired"]
    failure, close = nsbox.Retirement.FAILURE, nsbox.Retirement.CLOSE
    assert reasons == [failure, failure, close]
    errors = [event.error for event in events if event.kind == "invoked"]
    assert errors == ["", "FunctionError", "", "FunctionError", "", "InvokeTimeout", ""]


def test_a_plain_program_that_fails_keeps_its_environment() -> None:
    command = ["/bin/sh", "-c", "read a; test $a != 1 && echo $a"]
    version = nsbox.Function(command=command, timeout=30 * PATIENCE).publish()
    with nsbox.WarmPool(version) as pool:
        assert pool.invoke(0) == 0
        with pytest.raises(nsbox.FunctionError, match="exit status 1"):
            pool.invoke(1)
        assert pool.invoke(2) == 2
        assert check_sums(pool, 3)["Births"] == 1


def test_death_of_an_idle_one_is_seen_at_once_and_a_provisioned_one_replaced(make: Make) -> None:
    retired: list[nsbox.PoolEvent] = []
    # Not frozen: v1's freezer holds up even a kill.
    with nsbox.WarmPool(make(), provisioned=1, freeze_after=None, on_event=retired.append) as pool:
        (env,) = pool.snapshot().environments
        os.kill(env.pid, signal.SIGKILL)
        wait_until(lambda: pool.stats()["Births"] == 2, "another is born", 20)
        wait_until(lambda: pool.stats()["Idle"] == 1, "it is ready", 20)
        assert [event.reason for event in retired if event.kind == "retired"] == [
            nsbox.Retirement.FAILURE
        ]
        assert pool.invoke({})["calls"] == 1
        stats = check_sums(pool, 1)
        assert stats["ProvisionedConcurrencyInvocations"] == 1
        assert stats["ProvisionedConcurrencySpilloverInvocations"] == 0


def test_a_late_word_of_a_death_is_not_believed_of_another(
    dispatch: Callable[[int], None], slots: list[PoolSlot], commands: nsbox.WarmPool
) -> None:
    """The kernel tells a descriptor's number, which may have become another environment's."""
    with commands.acquire() as env:
        pass
    dispatch(slots[0].fd)
    with commands.acquire() as again:
        assert again.id == env.id
    dispatch(1 << 20)


def test_a_snapshot_is_what_there_is_at_one_moment(make: Make) -> None:
    version = make()
    with nsbox.WarmPool(version, max_environments=3, freeze_after=None) as pool:
        own = pool.function(nsbox.Function(command=["/bin/cat"], name="cat"), reserved=1)
        own.invoke(1)
        pool.invoke({}, tenant="a")
        running = [pool.submit({"sleep": 0.5 * PATIENCE}) for _ in range(3)]
        wait_until(lambda: pool.stats()["Waiting"] == 1, "one waits", 20)
        wait_until(lambda: pool.snapshot().count("busy") == 2, "two run", 20)
        snapshot = pool.snapshot()
        first, second = snapshot.functions
        assert (snapshot.max_environments, snapshot.memory_budget) == (3, None)
        assert (first.name, first.version) == (version.name, version.id)
        assert (first.waiting, first.reserved, first.provisioned) == (1, None, 0)
        assert (second.name, second.waiting, second.reserved) == ("cat", 0, 1)
        (idle,) = second.environments
        assert (idle.state, idle.invocations, idle.tenant) == ("idle", 1, None)
        assert psutil.Process(idle.pid).is_running()
        assert len(snapshot.environments) == 3
        for future in running:
            future.result()
        assert snapshot.count("busy") == 2, "it does not change"
        with pytest.raises(dataclasses.FrozenInstanceError):
            snapshot.max_environments = 9  # type: ignore[misc]
    assert pool.snapshot().environments == ()


def test_provisioned_ones_are_ready_when_the_pool_is(make: Make) -> None:
    with nsbox.WarmPool(make(), provisioned=3) as pool:
        stats = pool.stats()
        assert (stats["Births"], stats["Idle"], stats["Environments"]) == (3, 3, 3)
        assert stats["InitDuration"] > 0
        invocation = pool.invoke_bytes(b"{}")
        assert invocation.initialization_type == "provisioned-concurrency"
        assert invocation.init_seconds is None
        assert "Init Duration" not in invocation.report()
    with nsbox.WarmPool(make()) as pool:
        invocation = pool.invoke_bytes(b"{}")
        assert invocation.initialization_type == "on-demand"
        assert "Init Duration" in invocation.report()


def test_the_death_of_the_launcher_is_survived(make: Make) -> None:
    with nsbox.WarmPool(make(), provisioned=2, max_environments=2) as pool:
        launcher = get_launcher()
        running = pool.submit({"sleep": 3600}, timeout=900)
        wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "it runs")
        os.kill(launcher.pid, signal.SIGKILL)
        with pytest.raises(nsbox.InvokeError):
            running.result(20 * PATIENCE)

        def is_full_again() -> bool:
            stats = pool.stats()
            return stats["Births"] >= 4 and stats["Idle"] == 2

        wait_until(is_full_again, "the pool fills again", 20)
        assert pool.invoke({"echo": 1})["echo"] == 1


def test_a_start_that_fails_is_told_and_stops_births_for_a_while(make: Make) -> None:
    with nsbox.WarmPool(make(BROKEN)) as pool:
        for _ in range(3):
            with pytest.raises(nsbox.FunctionError, match="broken"):
                pool.invoke({})
        with pytest.raises(nsbox.Throttled, match="broken") as info:
            pool.invoke({})
        assert info.value.reason == "start failures"
        stats = check_sums(pool, 4)
        assert (stats["Errors"], stats["Throttles"], stats["Environments"]) == (3, 1, 0)
        pool.publish(make())
        assert pool.invoke({"echo": 1})["echo"] == 1
    with pytest.raises(nsbox.FunctionError, match="broken"):
        nsbox.WarmPool(make(BROKEN), provisioned=1)


# -- lives ---------------------------------------------------------------------------------------


def test_lives_end_by_calls_idleness_and_age(make: Make) -> None:
    version = make()
    with nsbox.WarmPool(version, max_invocations=2) as pool:
        assert [pool.invoke({})["calls"] for _ in range(5)] == [1, 2, 1, 2, 1]
    for settings in ({"idle_timeout": 0.05}, {"max_lifetime": 0.05}):
        events: list[nsbox.PoolEvent] = []
        with nsbox.WarmPool(version, on_event=events.append, **settings) as pool:  # type: ignore[call-overload]
            pool.invoke({})
            wait_until(lambda: pool.stats()["Environments"] == 0, "it is closed")
        expected = nsbox.Retirement.IDLE if "idle_timeout" in settings else None
        assert events[-1].reason is (expected or nsbox.Retirement.LIFETIME)


def test_provisioned_ones_stay_however_idle(make: Make) -> None:
    with nsbox.WarmPool(make(), provisioned=1, idle_timeout=0.02) as pool:
        (first,) = pool.snapshot().environments
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda _: pool.invoke({"sleep": 0.2 * PATIENCE}), range(2)))
        wait_until(lambda: pool.stats()["Environments"] == 1, "the other one is closed")
        assert [env.id for env in pool.snapshot().environments] == [first.id]
        assert pool.stats()["ProvisionedConcurrencySpilloverInvocations"] == 1


def test_publish_moves_traffic(make: Make) -> None:
    old, new = make(), make(("VERSION = 1", "VERSION = 2"))
    events: list[nsbox.PoolEvent] = []
    with nsbox.WarmPool(old, provisioned=1, on_event=events.append) as pool:
        running = pool.submit({"sleep": 0.5 * PATIENCE})
        wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "it runs")
        assert pool.invoke({})["version"] == 1
        assert pool.publish(new) is new
        assert pool.invoke({})["version"] == 2
        assert running.result()["version"] == 1
        wait_until(
            lambda: sum(e.reason is nsbox.Retirement.VERSION for e in events) == 2, "they are gone"
        )
        assert pool.publish(new) is new
        assert pool.invoke({})["version"] == 2
        with pytest.raises(nsbox.ConfigError, match="reuse"):
            pool.publish(make(reuse="never"))


# -- the end -------------------------------------------------------------------------------------


def test_submit_many_and_drain(make: Make) -> None:
    pool = nsbox.WarmPool(make(), max_environments=2)
    futures = [pool.submit({"echo": n}) for n in range(50)]
    pool.close()
    assert [future.result()["echo"] for future in futures] == list(range(50))
    for call in (lambda: pool.submit({}), lambda: pool.invoke({})):
        with pytest.raises(nsbox.PoolClosed):
            call()
    pool.close()
    assert check_sums(pool, 50)["Environments"] == 0


def test_close_without_drain_ends_running_and_waiting_calls(make: Make) -> None:
    pool = nsbox.WarmPool(make(), max_environments=1, acquire_timeout=None)
    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(pool.invoke, {"sleep": 3600}, timeout=900) for _ in range(3)]
        wait_until(lambda: pool.stats()["Waiting"] == 2, "two wait", 20)
        wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "one runs", 20)
        pool.close(drain=False)
        for future in futures:
            with pytest.raises(nsbox.PoolClosed):
                future.result()
    stats = check_sums(pool, 3)
    assert (stats["Errors"], stats["Throttles"], stats["Environments"]) == (1, 2, 0)


def test_close_without_drain_overtakes_one_that_drains(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1, acquire_timeout=None) as pool:
        futures = [pool.submit({"sleep": 3600}, timeout=900) for _ in range(2)]
        wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "one runs", 20)
        draining = threading.Thread(target=pool.close)
        draining.start()

        def is_draining() -> bool:
            try:
                futures.append(pool.submit({}))
            except nsbox.PoolClosed:
                return True
            return False

        wait_until(is_draining, "it takes no more calls", 20)
        pool.close(drain=False)
        for future in futures:
            with pytest.raises(nsbox.PoolClosed):
                future.result(0)
        draining.join(30 * PATIENCE)
        assert not draining.is_alive()


@pytest.mark.parametrize(
    "last_word", ["", "threading.Thread(target=pool.close, daemon=True).start()"]
)
def test_nothing_hangs_at_exit(make: Make, tmp_path: Path, last_word: str) -> None:
    make()
    program = host_program(
        f"""
        import nsbox, threading, time
        fn = nsbox.Function("app.handler", code={str(tmp_path)!r}, timeout=900)
        pool = nsbox.WarmPool(fn, provisioned=1, max_environments=2)
        futures = [pool.submit({{"sleep": 3600}}) for _ in range(5)]
        while pool.stats()["ConcurrentExecutions"] < 2:
            time.sleep(0.01)
        {last_word}
        """
    )
    assert program.wait(60 * PATIENCE) == 0


def test_a_forked_child_has_no_part_in_it() -> None:
    program = host_program(
        """
        import nsbox, os, warnings
        warnings.simplefilter("ignore")  # Python 3.12: of a fork beside threads
        with nsbox.WarmPool(max_environments=1) as pool:
            with pool.acquire():
                pass
            child = os.fork()
            if not child:
                try:
                    pool.acquire().__enter__()
                except nsbox.PoolError as error:
                    pool.close()
                    os._exit(7 if "belongs to process" in str(error) else 1)
                os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            with pool.acquire() as env:
                assert env.run(["true"]).ok
        """
    )
    assert program.wait(60 * PATIENCE) == 0


def kill_one(pool: nsbox.WarmPool) -> None:
    """Kill whatever environment comes first, busy or idle, from outside."""
    for env in pool.snapshot().environments:
        if env.state not in ("starting", "ending"):
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(env.pid, signal.SIGKILL)
            return


def test_random_schedules_add_up(make: Make) -> None:
    """Eight threads; answers, errors, exits, timeouts and kills; tenants and publishes."""
    versions = [make(), make(("import", "# other\nimport"))]
    kinds: tuple[dict[str, object], ...] = (
        {},
        {"raise": True},
        {"exit": True},
        {"sleep": 60},
        {},
        {},
        {},
        {},
    )
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    with nsbox.WarmPool(versions[0], max_environments=3, provisioned=1, max_waiting=4) as pool:

        def call(n: int) -> None:
            event = kinds[n % len(kinds)]
            tenant = (None, "a", "b")[n % 3]
            try:
                if n % 20 == 0:
                    pool.publish(versions[n // 20 % 2])
                if n % 8 == 5:
                    kill_one(pool)
                answer = pool.invoke(
                    event | {"echo": n}, tenant=tenant, timeout=0.2 if "sleep" in event else None
                )
                assert (answer["echo"], answer["tenant"]) == (n, tenant)
                word = "answer"
            except (nsbox.Throttled, nsbox.PoolTimeout):
                word = "throttle"
            except nsbox.InvokeError:
                word = "error"
            with lock:
                outcomes[word] += 1

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(call, range(80)))
        stats = check_sums(pool, 80)
        assert stats["Errors"] == outcomes["error"] > 0
        assert stats["Throttles"] == outcomes["throttle"]
        assert stats["Invocations"] - stats["Errors"] == outcomes["answer"] > 0
