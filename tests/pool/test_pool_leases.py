# SPDX-License-Identifier: Apache-2.0
"""The state of a pool under random schedules: hypothesis plays the callers, one step at a time.

Environments are stand-ins here, and so is the clock; every rule about who has what is the real one.
"""

from __future__ import annotations

from collections.abc import Hashable

import hypothesis.strategies as st
import pytest
from hypothesis import event, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from nsbox import errors
from nsbox.pool.entries import Entry, Grant, Phase, Waiter
from nsbox.pool.events import Retirement
from nsbox.pool.leases import Leases
from nsbox.pool.quick import QuickLeases
from nsbox.pool.shares import FAILURES_MAX, Resolve, Share

pytestmark = pytest.mark.static

MOST = 4
MAX_WAITING = 3
WEIGHTS = {"alone": 1, "light": 1, "heavy": 2}
"""Three functions: one has a reserved place, two share the other three, and one of those weighs so
much that three of it are too many."""
BUDGET = 6
IDLE_TIMEOUT = 60
LIFETIME = 100
FREEZE_AFTER = 5
TENANTS = st.sampled_from([None, "a", "b"])
FUNCTIONS = st.sampled_from(sorted(WEIGHTS))

What = tuple[str, int]
"""Function and version."""


class Env:
    """Belongs to one key for ever; knows who is in it."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.users = 0
        self.is_closed = self.is_frozen = False

    def close(self, *, wait: bool = True) -> None:
        assert not self.is_closed, "closed twice"
        assert self.users == 0, "closed under a call"
        self.is_closed = True


class Caller:
    """A call, waiting or with a lease; or a birth of one that is to be kept ready."""

    def __init__(self, function: str, tenant: str | None, *, is_call: bool = True) -> None:
        self.function = function
        self.is_call = is_call
        self.waiter = Waiter[Env, What](tenant)
        self.grant: Grant[Env, What] | None = None


def resolver(function: str, version: int) -> Resolve[What]:
    return lambda tenant: ((version, tenant), (function, version))


class Pool(RuleBasedStateMachine):
    max_invocations: int | None = 5
    is_quick = False
    """Whether calls go the short way where they can."""
    freeze_after: float | None = FREEZE_AFTER
    least_calls = 0
    """Before it may be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.versions = dict.fromkeys(WEIGHTS, 0)
        self.now = 0.0
        self.leases: QuickLeases[Env, What] = QuickLeases(
            most=MOST,
            max_waiting=MAX_WAITING,
            max_lifetime=LIFETIME,
            max_invocations=self.max_invocations,
            idle_timeout=IDLE_TIMEOUT,
            freeze_after=self.freeze_after,
            memory_budget=BUDGET,
            weigh=lambda what: WEIGHTS[what[0]],
            clock=lambda: self.now,
        )
        self.shares: dict[str, Share[Env, What]] = {}
        for name, reserved, provisioned in (
            ("alone", 1, 0),
            ("light", None, 0),
            ("heavy", None, 1),
        ):
            self.shares[name], surplus = self.leases.add(
                resolver(name, 0), reserved=reserved, provisioned=provisioned
            )
            assert not surplus
            self.shares[name].is_open = True
        self.callers: list[Caller] = []
        self.births: list[Caller] = []
        self.running: list[Caller] = []
        self.removing: list[Entry[Env, What]] = []
        self.living: set[Env] = set()
        self.dead: set[Entry[Env, What]] = set()
        self.order: list[Entry[Env, What]] = []
        self.counts = {
            name: dict.fromkeys(("calls", "answers", "errors", "throttles"), 0) for name in WEIGHTS
        }
        self.is_closed = False

    # -- what callers do -----------------------------------------------------------------------

    @rule(function=FUNCTIONS, tenant=TENANTS)
    def call(self, function: str, tenant: str | None) -> None:
        caller = Caller(function, tenant)
        count = self.counts[function]
        grant = None
        try:
            if self.is_quick:
                grant = self.leases.take_idle(self.shares[function], tenant)
            if grant is None:
                grant = self.leases.ask(caller.waiter, self.shares[function])
        except errors.PoolClosed:
            assert self.is_closed
            return
        except errors.Throttled:
            count["calls"] += 1
            count["throttles"] += 1
            return
        count["calls"] += 1
        if grant is None:
            self.callers.append(caller)
        else:
            self.begin(caller, grant)
        self.collect()

    def begin(self, caller: Caller, grant: Grant[Env, What]) -> None:
        caller.grant = grant
        entry = grant.entry
        # The key is that of the version of this very moment, and of the caller's own tenant.
        assert entry.key == (self.versions[caller.function], caller.waiter.tenant)
        assert entry.share is self.shares[caller.function]
        for victim in grant.victims:
            assert victim.share.places is entry.share.places, "its place was set aside"
            wanted = Retirement.DEMAND if caller.is_call else Retirement.PROVISIONED
            assert victim.reason is wanted
            if victim.is_provisioned:
                assert caller.is_call
                assert victim.share is entry.share
            self.remove(victim)
        if grant.is_birth:
            assert entry.env is None
            self.births.append(caller)
            self.order.append(entry)
            return
        if grant.is_cold:
            assert entry.env is not None
            entry.env.is_frozen = False
        self.enter(caller)

    def enter(self, caller: Caller) -> None:
        assert caller.grant is not None
        env = caller.grant.entry.env
        assert env is not None
        assert caller.grant.is_birth or caller.grant.entry not in self.dead
        assert env.key == caller.grant.entry.key
        assert not env.is_closed
        assert not env.is_frozen, "nobody has thawed it"
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
                self.counts[caller.function]["throttles"] += 1
            else:
                assert caller.waiter.grant is not None
                self.begin(caller, caller.waiter.grant)

    def remove(self, entry: Entry[Env, What]) -> None:
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
            caller.grant.entry.is_plain = True
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
        told = answered if caller.is_call else None
        reason = None
        is_kept = False
        if self.is_quick and doubt is None and told is True:
            entry = caller.grant.entry
            share = entry.share
            is_special = (
                entry in self.dead,
                self.is_closed,
                self.now - entry.born >= LIFETIME,
                entry.generation != share.generation,
                bool(share.places.waiters),
                share.places.taken > share.places.most,
            )
            is_kept = self.leases.keep_idle(caller.grant)
            assert not (is_kept and any(is_special)), is_special
            event(f"kept {is_kept}, special {is_special}")
        if not is_kept:
            reason = self.leases.give_back(caller.grant, doubt, answered=told)
        if caller.is_call:
            self.counts[caller.function]["answers" if answered else "errors"] += 1
        if doubt is not None:
            assert reason is doubt
        elif caller.grant.entry in self.dead:
            assert reason is Retirement.FAILURE
        with pytest.raises(errors.EnvironmentStateError):
            self.leases.give_back(caller.grant, None, answered=True)
        assert not self.leases.keep_idle(caller.grant)
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
        self.counts[caller.function]["throttles"] += 1
        self.collect()

    # -- what happens to them ------------------------------------------------------------------

    @rule()
    def one_to_be_kept_ready_is_born(self) -> None:
        grant = self.leases.reserve()
        if grant is not None:
            assert not self.is_closed
            assert grant.entry.is_provisioned
            function = next(name for name, s in self.shares.items() if s is grant.entry.share)
            self.begin(Caller(function, None, is_call=False), grant)

    @rule(function=st.sampled_from(["light", "heavy"]), count=st.integers(0, 2))
    def provision(self, function: str, count: int) -> None:
        share = self.shares[function]
        before = share.provisioned
        try:
            surplus = self.leases.provision(share, count)
        except errors.ConfigError:
            assert share.provisioned == before
            return
        assert all(entry.reason is Retirement.PROVISIONED for entry in surplus)
        self.removing += surplus

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

    @rule(seconds=st.sampled_from([1, 6, 30, 90]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = self.leases.sweep()
        assert not due.orphans
        assert due.seconds > 0
        self.removing += due.over
        for entry in due.cold:
            assert self.now - entry.idle_since >= FREEZE_AFTER
            assert self.leases.begin_freeze(entry)
            assert not self.leases.begin_freeze(entry)
            assert entry.env is not None
            entry.env.is_frozen = True

    @rule(function=FUNCTIONS, tenant=TENANTS)
    def a_call_is_faster_than_the_freezer(self, function: str, tenant: str | None) -> None:
        """It is told to freeze one, and finds that a call has it."""
        cold = self.leases.sweep()
        self.removing += cold.over
        self.call(function, tenant)
        for entry in cold.cold:
            is_idle = entry.phase is Phase.IDLE
            assert self.leases.begin_freeze(entry) is is_idle
            if is_idle:
                assert entry.env is not None
                entry.env.is_frozen = True

    @rule()
    def memory_is_short(self) -> None:
        idle = [e for e in self.leases._entries if e.phase is Phase.IDLE and not e.is_provisioned]
        gone = self.leases.relieve()
        assert len(gone) == -(-len(idle) // 4)
        kept = [entry.idle_since for entry in idle if entry not in gone]
        assert all(entry.idle_since <= min(kept, default=self.now) for entry in gone)
        self.removing += gone

    @precondition(lambda self: not self.is_closed)
    @rule(function=FUNCTIONS)
    def publish(self, function: str) -> None:
        self.versions[function] += 1
        resolve = resolver(function, self.versions[function])
        self.removing += self.leases.publish(self.shares[function], resolve)

    @precondition(lambda self: not self.is_closed and self.total("calls") >= self.least_calls)
    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        if not drain and self.births:
            return  # what a birth finds then is for the tests of the whole pool
        killed: list[object] = []
        self.is_closed = True
        waiting = len(self.callers)
        idle, _ = self.leases.begin_close(None if drain else killed.append)
        self.removing += idle
        if not drain:
            assert len(killed) == len(self.running)
            before = self.total("throttles")
            self.collect()
            assert self.total("throttles") == before + waiting

    # -- what always holds ---------------------------------------------------------------------

    def total(self, name: str) -> int:
        return sum(count[name] for count in self.counts.values())

    def idle(self) -> list[Entry[Env, What]]:
        return [entry for places in self.leases._parts for entry in places.idle()]

    @invariant()
    def none_is_lost_or_counted_twice(self) -> None:
        entries = self.leases._entries
        held = [caller.grant.entry for caller in self.births + self.running if caller.grant]
        idle = self.idle()
        everyone = [*held, *idle, *self.removing]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) == entries
        for name, share in self.shares.items():
            assert all(entry.key[0] == self.versions[name] for entry in share.idle_ones())  # type: ignore[index]
            assert share.taken == sum(entry.share is share for entry in entries)
        assert {entry.env for entry in everyone} - {None} == self.living

    @invariant()
    def there_is_room_for_all(self) -> None:
        entries = self.leases._entries
        assert len(entries) <= MOST
        assert sum(WEIGHTS[entry.what[0]] for entry in entries) <= BUDGET
        for places in self.leases._parts:
            assert places.taken == sum(share.taken for share in places.shares) <= places.most
            own = [entry.memory for entry in entries if entry.share.places is places]
            assert places.memory == sum(own)
            assert places.waiters == sum(len(share.waiters) for share in places.shares)

    @invariant()
    def sums_add_up(self) -> None:
        for name, share in self.shares.items():
            stats, count = self.leases.stats(share), self.counts[name]
            assert stats["Calls"] == count["calls"]
            assert stats["Errors"] == count["errors"]
            assert stats["Throttles"] == count["throttles"]
            assert stats["Invocations"] == count["answers"] + count["errors"]
            under_way = [*self.callers, *self.births, *self.running]
            calls = sum(caller.function == name and caller.is_call for caller in under_way)
            ended = count["answers"] + count["errors"] + count["throttles"]
            assert count["calls"] == ended + calls
            waiting = sum(caller.function == name for caller in self.callers)
            assert stats["Waiting"] == waiting <= MAX_WAITING
            running = sum(caller.function == name and caller.is_call for caller in self.running)
            assert stats["ConcurrentExecutions"] == running
        for name, value in self.leases.stats().items():
            parts = [self.leases.stats(share)[name] for share in self.shares.values()]
            assert value == pytest.approx(sum(parts))

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        for places in self.leases._parts:
            waiting = places.waiting()
            for share in waiting:
                key, what = share.resolve(share.first.tenant)
                own = share.idle.get(key, ())
                assert not any(entry.is_provisioned for entry in own)
                if share is waiting[0]:
                    assert not own
                    weight = WEIGHTS[what[0]]
                    assert self.leases._find_room(share, weight, Retirement.DEMAND) is None

    @invariant()
    def no_reserved_place_is_anothers(self) -> None:
        """Whoever asks for it gets it, however busy the others are."""
        share = self.shares["alone"]
        assert share.places.most == 1
        assert len(share.waiters) == 0 or share.taken == 1

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


class QuickPool(Pool):
    max_invocations = None
    is_quick = True
    freeze_after = None  # nobody sweeps here when a call is to have it done
    least_calls = 10


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)
TestQuickPool = QuickPool.TestCase
TestQuickPool.settings = settings(max_examples=100, stateful_step_count=40)


# -- whose turn it is ----------------------------------------------------------------------------


class Floor:
    """A pool whose functions share its places, and calls of them."""

    def __init__(self, most: int, functions: str, **settings: object) -> None:
        self.leases: Leases[Env, What] = Leases(
            **{
                "most": most,
                "max_waiting": 99,
                "max_lifetime": 100,
                "max_invocations": None,
                "idle_timeout": 60,
                **settings,
            }  # type: ignore[arg-type]
        )
        self.shares = {
            name: self.leases.add(resolver(name, 0), reserved=None, provisioned=0)[0]
            for name in functions
        }
        self.served: list[str] = []

    def ask(self, function: str) -> Grant[Env, What] | Waiter[Env, What]:
        waiter = Waiter[Env, What](None)
        return self.leases.ask(waiter, self.shares[function]) or waiter

    def begin(self, grant: Grant[Env, What]) -> Grant[Env, What]:
        for victim in grant.victims:
            self.leases.removed(victim)
        if grant.is_birth:
            self.leases.born(grant, Env(grant.entry.key), -1)
            self.leases.started(grant, 0.0)
        return grant

    def end(self, grant: Grant[Env, What]) -> None:
        assert self.leases.give_back(grant, None, answered=True) is None

    def play(self, running: list[Grant[Env, What]], waiting: list[Waiter[Env, What]]) -> list[str]:
        """End those that run, the oldest first, until none waits; return who was served."""
        served = []
        while waiting:
            self.end(running.pop(0))
            (next_one,) = [waiter for waiter in waiting if waiter.grant is not None]
            waiting.remove(next_one)
            assert next_one.grant is not None
            served.append(next_one.grant.entry.what[0])
            running.append(self.begin(next_one.grant))
        return served


def fill(floor: Floor, calls: str) -> tuple[list[Grant[Env, What]], list[Waiter[Env, What]]]:
    running, waiting = [], []
    for function in calls:
        answer = floor.ask(function)
        if isinstance(answer, Grant):
            running.append(floor.begin(answer))
        else:
            waiting.append(answer)
    return running, waiting


@pytest.mark.parametrize(
    ("most", "calls", "served"),
    [
        # A burst of one function gives way to another, place by place, until they have as many;
        # then each keeps its own.
        (4, "aaaaaaaaaabbbbb", "bb" "aabb" "aab" "aa"),
        # One call of another function waits for one call of the burst, not for all of it.
        (3, "aaaaaaaab", "baaaaa"),
        # More functions than places: by turns, in the order in which their calls came.
        (1, "aaabbccc", "babaccc"),
    ],
)  # fmt: skip
def test_the_turn_is_of_who_has_the_fewest_places(most: int, calls: str, served: str) -> None:
    floor = Floor(most, "abc")
    found = "".join(floor.play(*fill(floor, calls)))
    assert found == served


def test_births_stop_after_failures_and_are_tried_one_by_one() -> None:
    now = 0.0
    floor = Floor(9, "ab", max_waiting=0, clock=lambda: now)
    leases = floor.leases

    def ask(function: str = "a") -> Grant[Env, What]:
        grant = floor.ask(function)
        assert isinstance(grant, Grant)
        return grant

    def fail(grant: Grant[Env, What]) -> None:
        leases.failed(grant, OSError("no room"))
        leases.give_back(grant, Retirement.FAILURE, answered=False)
        leases.removed(grant.entry)

    for _ in range(FAILURES_MAX):
        fail(ask())
    with pytest.raises(errors.Throttled, match="no room") as info:
        ask()
    assert info.value.retry_after == 1.0
    floor.begin(ask("b"))  # another function's start
    now += 1
    trial = ask()
    with pytest.raises(errors.Throttled):
        ask()
    fail(trial)
    with pytest.raises(errors.Throttled) as info:
        ask()
    assert info.value.retry_after == 2.0
    now += 2
    floor.begin(ask())
    ask()


# -- the short way -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["nothing", "dead", "closed", "version", "waiting", "old", "surplus", "counted", "odd"]
)
def test_the_short_way_back_is_for_what_may_stay(what: str) -> None:
    now = 0.0
    leases: QuickLeases[Env, What] = QuickLeases(
        most=2,
        max_waiting=9,
        max_lifetime=LIFETIME,
        max_invocations=5 if what == "counted" else None,
        idle_timeout=IDLE_TIMEOUT,
        clock=lambda: now,
    )
    share, _ = leases.add(resolver("light", 0), reserved=None, provisioned=0)
    for _ in range(2):
        born = leases.ask(Waiter(None), share)
        assert born is not None
        leases.born(born, Env(born.entry.key), -1)
        born.entry.is_plain = what != "odd"
    (one, _) = leases._entries
    leases.give_back(Grant(one), None, answered=True)
    grant = leases.take_idle(share, None)
    assert grant is not None
    assert leases.take_idle(share, None) is None
    if what == "dead":
        assert not leases.died(grant.entry)
    elif what == "closed":
        leases.begin_close(None)
    elif what == "version":
        leases.publish(share, resolver("light", 1))
    elif what == "waiting":
        assert leases.ask(Waiter(None), share) is None
    elif what == "old":
        now = float(LIFETIME)
    elif what == "surplus":
        leases.add(resolver("alone", 0), reserved=1, provisioned=0)
    assert leases.keep_idle(grant) is (what == "nothing")
    assert (grant.entry.phase is Phase.IDLE) is (what == "nothing")
    assert (leases.take_idle(share, None) is not None) is (what == "nothing")
