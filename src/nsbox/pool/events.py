# SPDX-License-Identifier: Apache-2.0
"""What a pool tells: events in the lives of its environments, and numbers that add up."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from nsbox.values.invocation import LeftRunning

EventKind = Literal["created", "initialised", "invoked", "frozen", "thawed", "retired"]
EnvironmentState = Literal["starting", "busy", "idle", "frozen", "ending"]


class Retirement(enum.Enum):
    """Why a pool closed an environment; the first two say why it made one, too."""

    DEMAND = "demand"
    """It was idle, and its place or memory was needed for a call. Of one made: a call needs it."""
    PROVISIONED = "provisioned"
    """It was idle, and its place or memory was needed for one that is to be kept ready; or fewer
    are to be kept ready. Of one made: it is to be kept ready."""
    IDLE = "idle"
    LIFETIME = "lifetime"
    INVOCATIONS = "invocations"
    """It has served as many as it may; with reuse "never" that is one."""
    VERSION = "version"
    """Another version was published."""
    FAILURE = "failure"
    """It died, did not start, or a call ended in a way that leaves doubt."""
    PRESSURE = "pressure"
    """It was idle, and the host is short of memory."""
    CLOSE = "close"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvent:
    """A step in the life of one environment of a pool.

    Of one environment they come in order; those of several may come from several threads.

    Attributes:
        kind: ``created``, ``initialised``, ``invoked``, ``frozen``, ``thawed`` or ``retired``.
        environment: The environment's id.
        function: The function's name; empty for a `Config`.
        version: The function version's id; empty for a `Config`.
        tenant: On whose behalf, or None.
        provisioned: Whether it is one of those that are kept ready.
        reason: Of ``retired``; of ``created`` DEMAND or PROVISIONED.
        error: Of ``invoked``: the class of what was raised, if anything was.
        left_running: Of ``invoked``: as `Invocation.left_running`.
    """

    kind: EventKind
    environment: str
    function: str
    version: str
    tenant: str | None = None
    provisioned: bool = False
    reason: Retirement | None = None
    error: str = ""
    left_running: LeftRunning | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentSnapshot:
    """One environment of a pool, as it was at one moment."""

    id: str
    """Its id; empty before its birth."""
    pid: int
    """Process id of its PID 1; 0 before its birth."""
    state: EnvironmentState
    """``starting``, ``busy``, ``idle``, ``frozen`` or ``ending``."""
    tenant: str | None
    """On whose behalf it runs calls, or None."""
    provisioned: bool
    """Whether it is one of those that are kept ready."""
    invocations: int
    """Calls that it has served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSnapshot:
    """One function of a pool, or its `Config`, as it was at one moment."""

    name: str
    """The function's name; empty for a `Config`."""
    version: str
    """The id of the version that the next call runs; empty for a `Config`."""
    environments: tuple[EnvironmentSnapshot, ...]
    """All that take a place, the oldest first."""
    waiting: int
    """Calls that wait for one."""
    reserved: int | None
    """Places that are its own; None: it shares those of the pool."""
    provisioned: int
    """Environments to be kept ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """A pool as it was at one moment: `WarmPool.snapshot`."""

    functions: tuple[FunctionSnapshot, ...]
    max_environments: int
    """The most at a time."""
    memory_budget: int | None
    """Bytes that the memory limits of all may sum up to; None: any."""

    @property
    def environments(self) -> tuple[EnvironmentSnapshot, ...]:
        """Those of all functions."""
        return tuple(each for function in self.functions for each in function.environments)

    def count(self, state: EnvironmentState) -> int:
        """Return how many environments are in a state."""
        return sum(each.state == state for each in self.environments)


class Counters:
    """The numbers of one function of a pool; the scheduler's lock is held for every change.

    Attributes:
        calls: Calls asked for.
        answers: Those that returned.
        errors: Those that raised, and had an environment or a place for one.
        throttles: Those that never ran.
        births: Environments born.
        left_running: Calls that have left processes running, which were killed.
        provisioned: Calls served by environments that are kept ready.
        spillover: Calls served by others, where there are such.
        seconds: Sum of the calls' durations.
        init_seconds: Sum of the starts' durations.
    """

    def __init__(self) -> None:
        self.calls = self.answers = self.errors = self.throttles = self.births = 0
        self.left_running = self.provisioned = self.spillover = 0
        self.seconds = self.init_seconds = 0.0

    def end(self, answered: bool, seconds: float, is_provisioned: bool, spills: bool) -> None:
        """Count a call that had an environment, or a place for one.

        `spills`: one that no provisioned environment has served is told as such.
        """
        self.answers += answered
        self.errors += not answered
        self.seconds += seconds
        self.served(is_provisioned, spills)

    def served(self, is_provisioned: bool, spills: bool) -> None:
        """Count by what kind of environment a call was served; see `end`."""
        self.provisioned += is_provisioned
        self.spillover += spills and not is_provisioned

    def add(self, other: Counters) -> None:
        """Add the numbers of another function."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def mean_duration(self) -> float:
        """Return the mean seconds of a call so far, or a tenth before the first."""
        ended = self.answers + self.errors
        return self.seconds / ended if ended else 0.1

    def as_dict(self) -> dict[str, float]:
        """Return them as `PoolStats` has them."""
        return {
            "Calls": self.calls,
            "Invocations": self.answers + self.errors,
            "Errors": self.errors,
            "Throttles": self.throttles,
            "Duration": self.seconds * 1000,
            "InitDuration": self.init_seconds * 1000,
            "ProvisionedConcurrencyInvocations": self.provisioned,
            "ProvisionedConcurrencySpilloverInvocations": self.spillover,
            "Births": self.births,
            "LeftRunning": self.left_running,
        }


class PoolStats(dict[str, float]):
    """The numbers of a pool, or of one of its functions, all of one moment.

    A dict under AWS Lambda's names, where it has one, with times in milliseconds as there. Each
    number is an attribute, too, with times in seconds; the sum of two is that of their numbers.
    """

    __slots__ = ()

    def __add__(self, other: PoolStats) -> PoolStats:
        if not isinstance(other, PoolStats):
            return NotImplemented
        names = dict.fromkeys([*self, *other])
        return PoolStats({name: self.get(name, 0) + other.get(name, 0) for name in names})

    @property
    def calls(self) -> int:
        """Calls (count) that an open pool was asked for."""
        return int(self["Calls"])

    @property
    def invocations(self) -> int:
        """Calls (count) that got an environment, or whose did not start."""
        return int(self["Invocations"])

    @property
    def errors(self) -> int:
        """Invocations (count) that raised."""
        return int(self["Errors"])

    @property
    def throttles(self) -> int:
        """Calls (count) that never ran: throttled, timed out or cancelled in the queue."""
        return int(self["Throttles"])

    @property
    def duration_seconds(self) -> float:
        """Seconds that invocations took, without waiting and birth: a sum."""
        return self["Duration"] / 1000

    @property
    def init_duration_seconds(self) -> float:
        """Seconds that environments' initialisation took: a sum."""
        return self["InitDuration"] / 1000

    @property
    def provisioned_invocations(self) -> int:
        """Invocations (count) served by provisioned environments."""
        return int(self["ProvisionedConcurrencyInvocations"])

    @property
    def provisioned_spillover_invocations(self) -> int:
        """Invocations (count) that no provisioned environment served, where there are some."""
        return int(self["ProvisionedConcurrencySpilloverInvocations"])

    @property
    def births(self) -> int:
        """Environments (count) born."""
        return int(self["Births"])

    @property
    def left_running(self) -> int:
        """Invocations (count) that have left processes running, which were killed."""
        return int(self["LeftRunning"])

    @property
    def concurrent_executions(self) -> int:
        """Environments (count) that are leased to calls now."""
        return int(self["ConcurrentExecutions"])

    @property
    def environments(self) -> int:
        """Environments (count), and places of those being born, now."""
        return int(self["Environments"])

    @property
    def idle_environments(self) -> int:
        """Environments (count) that nobody uses now."""
        return int(self["Idle"])

    @property
    def waiting_calls(self) -> int:
        """Calls (count) in the queue now."""
        return int(self["Waiting"])
