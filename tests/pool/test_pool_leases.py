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
from nsbox.pool.accounts import FAILURES_MAX, FunctionQueue, Lease, Phase, Resolve, Slot, Waiter
from nsbox.pool.events import Retirement
from nsbox.pool.scheduler import Scheduler

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
        self.lease: Lease[Env, What] | None = None


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
        self.scheduler: Scheduler[Env, What] = Scheduler(
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
        self.queues: dict[str, FunctionQueue[Env, What]] = {}
        for name, reserved, provisioned in (
            ("alone", 1, 0),
            ("light", None, 0),
            ("heavy", None, 1),
        ):
            self.queues[name], surplus = self.scheduler.add(
                resolver(name, 0), reserved=reserved, provisioned=provisioned
            )
            assert not surplus
            self.queues[name].is_open = True
        self.callers: list[Caller] = []
        self.births: list[Caller] = []
        self.running: list[Caller] = []
        self.removing: list[Slot[Env, What]] = []
        self.lists: list[list[Slot[Env, What]]] = []
        self.leases: list[Lease[Env, What]] = []
        self.living: set[Env] = set()
        self.dead: set[Slot[Env, What]] = set()
        self.order: list[Slot[Env, What]] = []
        self.counts = {
            name: dict.fromkeys(("calls", "answers", "errors", "throttles"), 0) for name in WEIGHTS
        }
        self.is_closed = False

    # -- what callers do -----------------------------------------------------------------------

    @rule(function=FUNCTIONS, tenant=TENANTS)
    def call(self, function: str, tenant: str | None) -> None:
        caller = Caller(function, tenant)
        count = self.counts[function]
        lease = None
        try:
            if self.is_quick:
                record = caller.waiter.record
                if self.scheduler.take_idle(record, self.queues[function], tenant):
                    lease = record
            if lease is None:
                lease = self.scheduler.ask(caller.waiter, self.queues[function])
        except errors.PoolClosed:
            assert self.is_closed
            return
        except errors.Throttled:
            count["calls"] += 1
            count["throttles"] += 1
            return
        count["calls"] += 1
        if lease is None:
            self.callers.append(caller)
        else:
            self.begin(caller, lease)
        self.collect()

    def begin(self, caller: Caller, lease: Lease[Env, What]) -> None:
        caller.lease = lease
        slot = lease.slot
        # The key is that of the version of this very moment, and of the caller's own tenant.
        assert slot.key == (self.versions[caller.function], caller.waiter.tenant)
        assert slot.queue is self.queues[caller.function]
        for victim in lease.slot.victims:
            assert victim.queue.places is slot.queue.places, "its place was set aside"
            wanted = Retirement.DEMAND if caller.is_call else Retirement.PROVISIONED
            assert victim.reason is wanted
            if victim.is_provisioned:
                assert caller.is_call
                assert victim.queue is slot.queue
            self.remove(victim)
        if lease.is_birth:
            assert slot.env is None
            self.births.append(caller)
            self.order.append(slot)
            return
        if lease.is_cold:
            assert slot.env is not None
            slot.env.is_frozen = False
        self.enter(caller)

    def enter(self, caller: Caller) -> None:
        assert caller.lease is not None
        env = caller.lease.slot.env
        assert env is not None
        assert caller.lease.is_birth or caller.lease.slot not in self.dead
        assert env.key == caller.lease.slot.key
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
                assert caller.waiter.lease is not None
                self.begin(caller, caller.waiter.lease)

    def have_to_close(self, slots: list[Slot[Env, What]]) -> None:
        self.removing += slots
        self.lists.append(slots)  # whoever lets go of it does not close them

    def remove(self, slot: Slot[Env, What]) -> None:
        assert slot.phase is Phase.RETIRED
        assert slot.reason is not None
        if slot.env is not None:
            slot.env.close()
            self.living.remove(slot.env)
        self.scheduler.removed(slot)
        self.collect()

    @precondition(lambda self: self.births)
    @rule(data=st.data(), succeeds=st.sampled_from([True, True, False]))
    def birth_ends(self, data: st.DataObject, succeeds: bool) -> None:
        caller = self.births.pop(data.draw(st.integers(0, len(self.births) - 1)))
        assert caller.lease is not None
        if succeeds:
            env = Env(caller.lease.slot.key)
            self.living.add(env)
            self.scheduler.born(caller.lease, env, -1)
            caller.lease.slot.is_plain = True
            self.scheduler.started(caller.lease, 0.5)
            self.enter(caller)
            return
        self.scheduler.failed(caller.lease, OSError("no room"))
        self.end(caller, Retirement.FAILURE, False)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), how=st.sampled_from(["answer", "answer", "error", "doubt"]))
    def call_ends(self, data: st.DataObject, how: str) -> None:
        caller = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        assert caller.lease is not None
        env = caller.lease.slot.env
        assert env is not None
        env.users -= 1
        self.end(caller, Retirement.FAILURE if how == "doubt" else None, how == "answer")

    def end(self, caller: Caller, doubt: Retirement | None, answered: bool) -> None:
        assert caller.lease is not None
        told = answered if caller.is_call else None
        reason = None
        is_kept = False
        if self.is_quick and doubt is None and told is True:
            slot = caller.lease.slot
            queue = slot.queue
            is_special = (
                slot in self.dead,
                self.is_closed,
                self.now - slot.born >= LIFETIME,
                slot.generation != queue.generation,
                bool(queue.places.waiters),
                queue.places.taken > queue.places.most,
            )
            is_kept = self.scheduler.keep_idle(caller.lease)
            assert not (is_kept and any(is_special)), is_special
            event(f"kept {is_kept}, special {is_special}")
        if not is_kept:
            reason = self.scheduler.give_back(caller.lease, doubt, answered=told)
        if caller.is_call:
            self.counts[caller.function]["answers" if answered else "errors"] += 1
        if doubt is not None:
            assert reason is doubt
        elif caller.lease.slot in self.dead:
            assert reason is Retirement.FAILURE
        with pytest.raises(errors.EnvironmentStateError):
            self.scheduler.give_back(caller.lease, None, answered=True)
        assert not self.scheduler.keep_idle(caller.lease)
        if reason is not None:
            self.have_to_close([caller.lease.slot])
            self.leases.append(caller.lease)
        self.collect()

    @precondition(lambda self: self.removing)
    @rule()
    def closing_ends(self) -> None:
        self.remove(self.removing.pop())

    @precondition(lambda self: self.callers)
    @rule(data=st.data())
    def waiting_ends(self, data: st.DataObject) -> None:
        caller = self.callers.pop(data.draw(st.integers(0, len(self.callers) - 1)))
        assert self.scheduler.withdraw(caller.waiter) is None
        self.counts[caller.function]["throttles"] += 1
        self.collect()

    # -- what happens to them ------------------------------------------------------------------

    @rule()
    def one_to_be_kept_ready_is_born(self) -> None:
        lease = self.scheduler.reserve()
        if lease is not None:
            assert not self.is_closed
            assert lease.slot.is_provisioned
            function = next(name for name, s in self.queues.items() if s is lease.slot.queue)
            self.begin(Caller(function, None, is_call=False), lease)

    @rule(function=st.sampled_from(["light", "heavy"]), count=st.integers(0, 2))
    def provision(self, function: str, count: int) -> None:
        queue = self.queues[function]
        before = queue.provisioned
        try:
            surplus = self.scheduler.provision(queue, count)
        except errors.ConfigError:
            assert queue.provisioned == before
            return
        assert all(slot.reason is Retirement.PROVISIONED for slot in surplus)
        self.have_to_close(surplus)

    @rule(data=st.data())
    def one_dies(self, data: st.DataObject) -> None:
        # In an order that is the same when hypothesis runs the schedule again.
        slots = [slot for slot in self.order if slot in self.scheduler._slots]
        if slots:
            slot = data.draw(st.sampled_from(slots))
            was_idle = slot.phase is Phase.IDLE
            self.dead.add(slot)
            assert self.scheduler.died(slot) is was_idle
            if was_idle:
                self.removing.append(slot)

    @rule(seconds=st.sampled_from([1, 6, 30, 90]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = self.scheduler.sweep()
        assert not due.orphans
        assert due.seconds > 0
        self.have_to_close(due.over)
        for slot in due.cold:
            assert self.now - slot.idle_since >= FREEZE_AFTER
            assert self.scheduler.begin_freeze(slot)
            assert not self.scheduler.begin_freeze(slot)
            assert slot.env is not None
            slot.env.is_frozen = True

    @rule(function=FUNCTIONS, tenant=TENANTS)
    def a_call_is_faster_than_the_freezer(self, function: str, tenant: str | None) -> None:
        """It is told to freeze one, and finds that a call has it."""
        cold = self.scheduler.sweep()
        self.have_to_close(cold.over)
        self.call(function, tenant)
        for slot in cold.cold:
            is_idle = slot.phase is Phase.IDLE
            assert self.scheduler.begin_freeze(slot) is is_idle
            if is_idle:
                assert slot.env is not None
                slot.env.is_frozen = True

    @rule()
    def memory_is_short(self) -> None:
        idle = [e for e in self.scheduler._slots if e.phase is Phase.IDLE and not e.is_provisioned]
        gone = self.scheduler.relieve()
        assert len(gone) == -(-len(idle) // 4)
        kept = [slot.idle_since for slot in idle if slot not in gone]
        assert all(slot.idle_since <= min(kept, default=self.now) for slot in gone)
        self.have_to_close(gone)

    @precondition(lambda self: not self.is_closed)
    @rule(function=FUNCTIONS)
    def publish(self, function: str) -> None:
        self.versions[function] += 1
        resolve = resolver(function, self.versions[function])
        self.have_to_close(self.scheduler.publish(self.queues[function], resolve))

    @precondition(lambda self: not self.is_closed and self.total("calls") >= self.least_calls)
    @rule(drain=st.booleans())
    def close(self, drain: bool) -> None:
        if not drain and self.births:
            return  # what a birth finds then is for the tests of the whole pool
        killed: list[object] = []
        self.is_closed = True
        waiting = len(self.callers)
        idle, _ = self.scheduler.begin_close(None if drain else killed.append)
        self.have_to_close(idle)
        if not drain:
            assert len(killed) == len(self.running)
            before = self.total("throttles")
            self.collect()
            assert self.total("throttles") == before + waiting

    # -- what always holds ---------------------------------------------------------------------

    def total(self, name: str) -> int:
        return sum(count[name] for count in self.counts.values())

    def idle(self) -> list[Slot[Env, What]]:
        return [slot for places in self.scheduler._parts for slot in places.idle()]

    @invariant()
    def none_is_lost_or_counted_twice(self) -> None:
        slots = self.scheduler._slots
        held = [caller.lease.slot for caller in self.births + self.running if caller.lease]
        idle = self.idle()
        everyone = [*held, *idle, *self.removing]
        assert len(everyone) == len(set(everyone))
        assert set(everyone) == slots
        for name, queue in self.queues.items():
            assert all(slot.key[0] == self.versions[name] for slot in queue.idle_ones())  # type: ignore[index]
            assert queue.taken == sum(slot.queue is queue for slot in slots)
        assert {slot.env for slot in everyone} - {None} == self.living

    @invariant()
    def there_is_room_for_all(self) -> None:
        slots = self.scheduler._slots
        assert len(slots) <= MOST
        assert sum(WEIGHTS[slot.what[0]] for slot in slots) <= BUDGET
        for places in self.scheduler._parts:
            assert places.taken == sum(queue.taken for queue in places.queues) <= places.most
            own = [slot.memory for slot in slots if slot.queue.places is places]
            assert places.memory == sum(own)
            assert places.waiters == sum(len(queue.waiters) for queue in places.queues)

    @invariant()
    def sums_add_up(self) -> None:
        for name, queue in self.queues.items():
            stats, count = self.scheduler.stats(queue), self.counts[name]
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
        for name, value in self.scheduler.stats().items():
            parts = [self.scheduler.stats(queue)[name] for queue in self.queues.values()]
            assert value == pytest.approx(sum(parts))

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        for places in self.scheduler._parts:
            waiting = places.waiting()
            for queue in waiting:
                key, what = queue.resolve(queue.first.tenant)
                own = queue.idle.get(key, ())
                assert not any(slot.is_provisioned for slot in own)
                if queue is waiting[0]:
                    assert not own
                    weight = WEIGHTS[what[0]]
                    assert self.scheduler._find_room(queue, weight, Retirement.DEMAND) is None

    @invariant()
    def no_reserved_place_is_anothers(self) -> None:
        """Whoever asks for it gets it, however busy the others are."""
        queue = self.queues["alone"]
        assert queue.places.most == 1
        assert len(queue.waiters) == 0 or queue.taken == 1

    def teardown(self) -> None:
        """Whatever the schedule was, everything ends."""
        if not self.is_closed:
            self.close(True)
        while self.births or self.running or self.removing:
            while self.removing:
                self.remove(self.removing.pop())
            for caller in [*self.births]:
                self.births.remove(caller)
                assert caller.lease is not None
                self.end(caller, Retirement.FAILURE, False)
            for caller in [*self.running]:
                self.running.remove(caller)
                assert caller.lease is not None
                assert caller.lease.slot.env is not None
                caller.lease.slot.env.users -= 1
                self.end(caller, None, True)
        assert not self.callers
        assert not self.living
        assert self.scheduler.await_empty(0)


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
        self.scheduler: Scheduler[Env, What] = Scheduler(
            **{
                "most": most,
                "max_waiting": 99,
                "max_lifetime": 100,
                "max_invocations": None,
                "idle_timeout": 60,
                **settings,
            }  # type: ignore[arg-type]
        )
        self.queues = {
            name: self.scheduler.add(resolver(name, 0), reserved=None, provisioned=0)[0]
            for name in functions
        }
        self.served: list[str] = []

    def ask(self, function: str) -> Lease[Env, What] | Waiter[Env, What]:
        waiter = Waiter[Env, What](None)
        return self.scheduler.ask(waiter, self.queues[function]) or waiter

    def begin(self, lease: Lease[Env, What]) -> Lease[Env, What]:
        for victim in lease.slot.victims:
            self.scheduler.removed(victim)
        if lease.is_birth:
            self.scheduler.born(lease, Env(lease.slot.key), -1)
            self.scheduler.started(lease, 0.0)
        return lease

    def end(self, lease: Lease[Env, What]) -> None:
        assert self.scheduler.give_back(lease, None, answered=True) is None

    def play(self, running: list[Lease[Env, What]], waiting: list[Waiter[Env, What]]) -> list[str]:
        """End those that run, the oldest first, until none waits; return who was served."""
        served = []
        while waiting:
            self.end(running.pop(0))
            (next_one,) = [waiter for waiter in waiting if waiter.lease is not None]
            waiting.remove(next_one)
            assert next_one.lease is not None
            served.append(next_one.lease.slot.what[0])
            running.append(self.begin(next_one.lease))
        return served


def fill(floor: Floor, calls: str) -> tuple[list[Lease[Env, What]], list[Waiter[Env, What]]]:
    running, waiting = [], []
    for function in calls:
        answer = floor.ask(function)
        if isinstance(answer, Lease):
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
    scheduler = floor.scheduler

    def ask(function: str = "a") -> Lease[Env, What]:
        lease = floor.ask(function)
        assert isinstance(lease, Lease)
        return lease

    def fail(lease: Lease[Env, What]) -> None:
        scheduler.failed(lease, OSError("no room"))
        scheduler.give_back(lease, Retirement.FAILURE, answered=False)
        scheduler.removed(lease.slot)

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
    scheduler: Scheduler[Env, What] = Scheduler(
        most=2,
        max_waiting=9,
        max_lifetime=LIFETIME,
        max_invocations=5 if what == "counted" else None,
        idle_timeout=IDLE_TIMEOUT,
        clock=lambda: now,
    )
    queue, _ = scheduler.add(resolver("light", 0), reserved=None, provisioned=0)
    leases = []
    for _ in range(2):
        born = scheduler.ask(Waiter(None), queue)
        assert born is not None
        scheduler.born(born, Env(born.slot.key), -1)
        born.slot.is_plain = what != "odd"
        leases.append(born)
    scheduler.give_back(leases.pop(), None, answered=True)
    lease = Lease[Env, What]()
    assert scheduler.take_idle(lease, queue, None)
    assert not scheduler.take_idle(Lease(), queue, None)
    if what == "dead":
        assert not scheduler.died(lease.slot)
    elif what == "closed":
        scheduler.begin_close(None)
    elif what == "version":
        scheduler.publish(queue, resolver("light", 1))
    elif what == "waiting":
        assert scheduler.ask(Waiter(None), queue) is None
    elif what == "old":
        now = float(LIFETIME)
    elif what == "surplus":
        scheduler.add(resolver("alone", 0), reserved=1, provisioned=0)
    assert scheduler.keep_idle(lease) is (what == "nothing")
    assert (lease.slot.phase is Phase.IDLE) is (what == "nothing")
    assert scheduler.take_idle(Lease(), queue, None) is (what == "nothing")
