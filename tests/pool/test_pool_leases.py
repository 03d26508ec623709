# SPDX-License-Identifier: Apache-2.0
"""The state of a pool under random schedules: hypothesis plays the callers, one step at a time.

Environments are stand-ins here, and so is the clock; every rule about who has what is the real one.
"""

from __future__ import annotations

from collections.abc import Hashable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nsbox import errors
from nsbox.pool.entries import Entry, Grant, Phase, Waiter
from nsbox.pool.events import Retirement
from nsbox.pool.leases import FAILURES_MAX, Leases

MOST = 3
MAX_WAITING = 3
TENANTS = st.sampled_from([None, "a", "b"])


class Env:
    """Belongs to one key for ever; knows who is in it."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.users = 0
        self.is_closed = False

    def close(self, *, wait: bool = True) -> None:
        assert not self.is_closed, "closed twice"
        assert self.users == 0, "closed under a call"
        self.is_closed = True


class Caller:
    """A call: waiting, or with a lease."""

    def __init__(self, tenant: str | None) -> None:
        self.waiter = Waiter[Env, int](tenant)
        self.grant: Grant[Env, int] | None = None


class Pool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.now = 0.0
        self.leases: Leases[Env, int] = Leases(
            self.resolver(0),
            most=MOST,
            max_waiting=MAX_WAITING,
            max_lifetime=100,
            max_invocations=5,
            clock=lambda: self.now,
        )
        self.callers: list[Caller] = []
        self.births: list[Caller] = []
        self.running: list[Caller] = []
        self.removing: list[Entry[Env, int]] = []
        self.living: set[Env] = set()
        self.dead: set[Entry[Env, int]] = set()
        self.order: list[Entry[Env, int]] = []
        self.calls = self.answers = self.errors = self.throttles = 0
        self.is_closed = False

    @staticmethod
    def resolver(version: int):  # type: ignore[no-untyped-def] # noqa: ANN205
        return lambda tenant: ((version, tenant), version)

    # -- what callers do -----------------------------------------------------------------------

    @rule(tenant=TENANTS)
    def call(self, tenant: str | None) -> None:
        caller = Caller(tenant)
        try:
            grant = self.leases.ask(caller.waiter)
        except errors.PoolClosed:
            assert self.is_closed
            return
        except errors.Throttled:
            self.calls += 1
            self.throttles += 1
            return
        self.calls += 1
        if grant is None:
            self.callers.append(caller)
        else:
            self.begin(caller, grant)
        self.collect()

    def begin(self, caller: Caller, grant: Grant[Env, int]) -> None:
        caller.grant = grant
        # The key is that of the version of this very moment, and of the caller's own tenant.
        assert grant.entry.key == (self.version, caller.waiter.tenant)
        if grant.victim is not None:
            self.remove(grant.victim)
        if grant.is_birth:
            assert grant.entry.env is None
            self.births.append(caller)
            self.order.append(grant.entry)
        else:
            self.enter(caller)

    def enter(self, caller: Caller) -> None:
        assert caller.grant is not None
        env = caller.grant.entry.env
        assert env is not None
        assert caller.grant.is_birth or caller.grant.entry not in self.dead
        assert env.key == caller.grant.entry.key
        assert not env.is_closed
        assert env.users == 0, "two calls at once"
        env.users += 1
        self.running.append(caller)

    def collect(self) -> None:
        """Let those go on whose turn has come."""
        for caller in list(self.callers):
            if not caller.waiter.wait(0):
                continue
            self.callers.remove(caller)
            if caller.waiter.error is not None:
                self.throttles += 1
            else:
                assert caller.waiter.grant is not None
                self.begin(caller, caller.waiter.grant)

    def remove(self, entry: Entry[Env, int]) -> None:
        assert entry.phase is Phase.RETIRED
        assert entry.reason is not None
        if entry.env is not None:
            entry.env.close()
            self.living.remove(entry.env)
        self.leases.removed(entry)
        self.collect()

    @precondition(lambda self: self.births)
    @rule(data=st.data(), succeeds=st.sampled_from([True, True, False]))
    def birth_ends(self, data: st.DataObject, succeeds: bool) -> None:
        caller = self.births.pop(data.draw(st.integers(0, len(self.births) - 1)))
        assert caller.grant is not None
        if succeeds:
            env = Env(caller.grant.entry.key)
            self.living.add(env)
            self.leases.born(caller.grant, env, -1)
            self.leases.started(caller.grant, 0.5)
            self.enter(caller)
            return
        self.leases.failed(caller.grant, OSError("no room"))
        self.end(caller, Retirement.FAILURE, False)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["answer", "answer", "error", "doubt"]))
    def call_ends(self, data: st.DataObject, how: str) -> None:
        caller = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert caller.grant is not None
        env = caller.grant.entry.env
        assert env is not None
        env.users -= 1
        self.end(caller, Retirement.FAILURE if how == "doubt" else None, how == "answer")

    def end(self, caller: Caller, doubt: Retirement | None, answered: bool) -> None:
        assert caller.grant is not None
        reason = self.leases.give_back(caller.grant, doubt, answered=answered, seconds=0.1)
        self.answers += answered
        self.errors += not answered
        if doubt is not None:
            assert reason is doubt
        elif caller.grant.entry in self.dead:
            assert reason is Retirement.FAILURE
        with pytest.raises(errors.EnvironmentStateError):
            self.leases.give_back(caller.grant, None, answered=True)
        if reason is not None:
            self.removing.append(caller.grant.entry)
        self.collect()

    @precondition(lambda self: self.removing)
    @rule()
    def closing_ends(self) -> None:
        self.remove(self.removing.pop())

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def waiting_ends(self, data: st.DataObject) -> None:
        caller = self.callers.pop(data.draw(st.integers(0, len(self.callers) - 1)))
        assert self.leases.withdraw(caller.waiter) is None
        self.throttles += 1

    # -- what happens to them ------------------------------------------------------------------

    @rule(data=st.data())
    def one_dies(self, data: st.DataObject) -> None:
        # In an order that is the same when hypothesis runs the schedule again.
        entries = [entry for entry in self.order if entry in self.leases._entries]
        if entries:
            entry = data.draw(st.sampled_from(entries))
            was_idle = entry.phase is Phase.IDLE
            self.dead.add(entry)
            assert self.leases.died(entry) is was_idle
            if was_idle:
                self.removing.append(entry)

    @rule(seconds=st.sampled_from([1, 30, 90]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        over, orphans, due = self.leases.sweep(60)
        assert not orphans
        assert due > 0
        self.removing += over

    @precondition(lambda self: not self.is_closed)
    @rule()
    def publish(self) -> None:
        self.version += 1
        self.removing += self.leases.publish(self.resolver(self.version))

    @precondition(lambda self: not self.is_closed)
    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        if not drain and self.births:
            return  # what a birth finds then is for the tests of the whole pool
        killed: list[int] = []
        self.is_closed = True
        waiting = len(self.callers)
        idle, _ = self.leases.begin_close(None if drain else killed.append)
        self.removing += idle
        if not drain:
            assert len(killed) == len(self.running)
            before = self.throttles
            self.collect()
            assert self.throttles == before + waiting

    # -- what always holds ---------------------------------------------------------------------

    @invariant()
    def none_is_lost_or_counted_twice(self) -> None:
        entries = self.leases._entries
        assert len(entries) <= MOST
        held = [caller.grant.entry for caller in self.births + self.running if caller.grant]
        idle = [entry for stack in self.leases._idle.values() for entry in stack]
        everyone = [*held, *idle, *self.removing]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) == entries
        assert all(entry.key == (self.version, entry.key[1]) for entry in idle)  # type: ignore[index]
        assert {entry.env for entry in everyone} - {None} == self.living

    @invariant()
    def sums_add_up(self) -> None:
        stats = self.leases.stats()
        assert stats["Calls"] == self.calls
        assert stats["Errors"] == self.errors
        assert stats["Throttles"] == self.throttles
        assert stats["Invocations"] == self.answers + self.errors
        under_way = len(self.callers) + len(self.births) + len(self.running)
        assert self.calls == self.answers + self.errors + self.throttles + under_way
        assert stats["Waiting"] == len(self.callers) <= MAX_WAITING

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        if self.callers:
            assert len(self.leases._entries) == MOST
            assert not self.leases._idle

    def teardown(self) -> None:
        """Whatever the schedule was, everything ends."""
        if not self.is_closed:
            self.close(True)
        while self.births or self.running or self.removing:
            while self.removing:
                self.remove(self.removing.pop())
            for caller in [*self.births]:
                self.births.remove(caller)
                assert caller.grant is not None
                self.end(caller, Retirement.FAILURE, False)
            for caller in [*self.running]:
                self.running.remove(caller)
                assert caller.grant is not None
                assert caller.grant.entry.env is not None
                caller.grant.entry.env.users -= 1
                self.end(caller, None, True)
        assert not self.callers
        assert not self.living
        assert self.leases.await_empty(0)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


def test_births_stop_after_failures_and_are_tried_one_by_one() -> None:
    now = 0.0
    leases: Leases[Env, int] = Leases(
        Pool.resolver(0), most=9, max_waiting=0, max_lifetime=100, max_invocations=None,
        clock=lambda: now,
    )  # fmt: skip

    def ask() -> Grant[Env, int]:
        grant = leases.ask(Waiter(None))
        assert grant is not None
        return grant

    def fail(grant: Grant[Env, int]) -> None:
        leases.failed(grant, OSError("no room"))
        leases.give_back(grant, Retirement.FAILURE, answered=False)
        leases.removed(grant.entry)

    for _ in range(FAILURES_MAX):
        fail(ask())
    with pytest.raises(errors.Throttled, match="no room") as info:
        ask()
    assert info.value.retry_after == 1.0
    now += 1
    trial = ask()
    with pytest.raises(errors.Throttled):
        ask()
    fail(trial)
    with pytest.raises(errors.Throttled) as info:
        ask()
    assert info.value.retry_after == 2.0
    now += 2
    trial = ask()
    leases.born(trial, Env((0, None)), -1)
    leases.started(trial, 0.0)
    ask()
