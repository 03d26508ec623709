# SPDX-License-Identifier: Apache-2.0
"""What is soaked: four functions in three pools, and the ledger of what was promised and found."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from benchmarks.subject import import_nsbox

TENANTS = (*[None] * 8, "red", "blue")
"""Most calls are of one: each change of an environment's tenant is a birth."""
VERSIONS = 4
MEMORY = "128M"
INVOCATIONS = 60
TOLD = 5
"""Violations of one kind that are told."""
HOUSE: Mapping[str, Mapping[str, Any]] = {
    "keep": {"provisioned": 2, "max_environments": 10, "max_waiting": 16, "acquire_timeout": 5.0},
    "reset": {"max_environments": 3, "acquire_timeout": 0.5, "idle_timeout": 2.0},
    "aging": {
        "max_environments": 4,
        "max_invocations": INVOCATIONS,
        "max_lifetime": 4.0,
        "idle_timeout": 1.0,
        "acquire_timeout": 5.0,
    },
}
"""The pools by name: tenants and versions change in "keep", "reset" has that reuse, "aging" has two
functions."""
SECOND: Final = "second"
"""The other function of "aging", with a place of its own."""

HANDLER = """
import hashlib, json, os, time
VERSION = 0
served, owner, poisoned = 0, None, False

class Asked(Exception):
    pass

def handler(event, context):
    global served, owner, poisoned
    served += 1
    tenant = context.tenant_id
    mixed = owner not in (None, [tenant])
    owner = [tenant]
    do = event["do"]
    if do == "raise":
        raise Asked(event["nonce"])
    if do in ("hang", "exit", "hog"):
        poisoned = True
    if do == "exit":
        os._exit(3)
    if do == "large":
        return "x" * (7 << 20)
    hoard = []
    while do == "hog":
        hoard.append(bytes([len(hoard) % 251 + 1]) * (4 << 20))
    time.sleep(event["seconds"])
    text = json.dumps(event, sort_keys=True).encode()
    return {
        "caller": event["caller"], "nonce": event["nonce"], "version": VERSION, "tenant": tenant,
        "sum": hashlib.sha256(text).hexdigest(), "served": served, "mixed": mixed,
        "poisoned": poisoned,
    }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how many callers, and what deadlines are multiplied with on a slow machine."""

    seconds: float
    threads: int = 32
    seed: int = 0
    patience: float = 1.0
    kill_every: float = 0.5
    """Mean seconds between two kills."""

    @property
    def watches_memory(self) -> bool:
        """Whether it is long enough to tell growth from warming up."""
        return self.seconds >= 60

    @property
    def slack(self) -> float:
        """Seconds that a call may take besides its own: a birth on a busy machine."""
        return 10.0 * self.patience


@dataclasses.dataclass(slots=True)
class Call:
    """One call: what is sent, and what has to come of it."""

    pool: str
    do: str
    event: dict[str, Any]
    timeout: float
    tenant: str | None
    begin: float = 0.0
    version: int = 0
    """How many versions had been published when it began."""


class Ledger:
    """What came of the calls, by pool and kind; and what was wrong."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str]] = Counter()
        self._wrong: Counter[str] = Counter()
        self.violations: list[str] = []
        self.killed = 0
        self.slowest = 0.0

    def wrong(self, kind: str, text: str) -> None:
        """Note a violation; of each kind some are told in full."""
        with self._lock:
            self._wrong[kind] += 1
            if self._wrong[kind] <= TOLD:
                self.violations.append(f"{kind}: {text}")

    def count(self, pool: str, *words: str, over: float = 0.0) -> None:
        """Count what happened once; `over` is the part of its deadline that it took."""
        with self._lock:
            for word in words:
                self.counts[pool, word] += 1
            self.killed += "killed" in words
            self.slowest = max(self.slowest, over)


class Subject:
    """The pools, and what is known of them from outside."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """Publishes the versions; the pools are made when it is entered."""
        self.nsbox = import_nsbox()
        self.ledger = Ledger()
        self.can_hog = bool(
            importlib.import_module("nsbox.host.features").probe("cgroup.memory")[0]
        )
        self._plan = plan
        self._directory = directory
        self._versions = [self._publish(n, "keep") for n in range(VERSIONS)]
        self._reset = self._publish(0, "reset")
        self.started = [0]  # numbers of versions, in the order of their publishing
        self.completed = 0
        self.pools: dict[str, Any] = {}
        """Pools, or functions of one, by the names of their numbers."""
        self._owners: list[Any] = []
        self._stats: dict[str, dict[str, float]] = {}
        self._alive: set[str] = set()
        self._events: Counter[str] = Counter()
        self._events_lock = threading.Lock()

    def _publish(self, number: int, reuse: str) -> Any:  # noqa: ANN401 - dynamic
        code = self._directory / "code"
        code.mkdir(exist_ok=True)
        (code / "app.py").write_text(HANDLER.replace("VERSION = 0", f"VERSION = {number}"))
        fields: dict[str, Any] = {}
        if self.can_hog:
            fields["limits"] = self.nsbox.Limits(memory_max=MEMORY)
        function = self.nsbox.Function(
            "app.handler", code=code, reuse=reuse, timeout=60 * self._plan.patience,
            init_timeout=60 * self._plan.patience, **fields,
        )  # fmt: skip
        return function.publish(store=self._directory / "store")

    def __enter__(self) -> Self:
        """Makes the pools."""
        for name, settings in HOUSE.items():
            times = {k: v * self._plan.patience for k, v in settings.items() if "_time" in k}
            versions = {"keep": self._versions[0], "reset": self._reset}
            pool = self.nsbox.WarmPool(
                versions.get(name), on_event=self._on_event, **{**settings, **times}
            )
            self._owners.append(pool)
            self.pools[name] = pool if name in versions else pool.function(self._versions[0])
        self.pools[SECOND] = self._owners[-1].function(self._versions[0], reserved=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the pools; their calls have ended."""
        for pool in self._owners:
            pool.close(drain=kind is None)

    def _on_event(self, event: Any) -> None:  # noqa: ANN401 - dynamic
        with self._events_lock:
            self._events[event.reason.value if event.kind == "retired" else event.kind] += 1
            if event.kind == "created":
                is_wrong = event.environment in self._alive
                self._alive.add(event.environment)
            else:
                is_wrong = event.environment not in self._alive
                if event.kind == "retired":
                    self._alive.discard(event.environment)
        if is_wrong:
            self.ledger.wrong("events", f"out of order: {event}")

    def publish_next(self) -> None:
        """Move the traffic of "keep" to another version."""
        number = (self.started[-1] + 1) % VERSIONS
        self.started.append(number)
        self.pools["keep"].publish(self._versions[number])
        self.completed = len(self.started) - 1

    # -- judging ----------------------------------------------------------------------------------

    def deadline(self, call: Call) -> float:
        """Seconds in which a call has to be over."""
        acquire = (
            float(HOUSE["aging" if call.pool == SECOND else call.pool]["acquire_timeout"])
            * self._plan.patience
        )
        return call.timeout + acquire + self._plan.slack

    def judge(
        self, call: Call, answer: object, error: BaseException | None, *, cancelled: bool
    ) -> None:
        """Set what came of a call beside what had to."""
        took = time.monotonic() - call.begin
        limit = self.deadline(call)
        if took > limit:
            self.ledger.wrong("deadline", f"{call} took {took:.1f} of {limit:.1f} seconds")
        kind = "answers"
        if error is None:
            for text in self._faults(call, answer):
                self.ledger.wrong("answer", f"{text}: {call}: {str(answer)[:300]}")
        else:
            kind = self._kind_of(call, error, took, cancelled=cancelled)
            if not kind:
                text = f"{type(error).__name__}: {str(error)[:300]}"
                self.ledger.wrong("error", f"{text}, of {call} after {took:.2f} s")
        self.ledger.count(call.pool, "calls", kind, over=took / limit)

    def _faults(self, call: Call, answer: object) -> list[str]:
        if call.do != "echo":
            return [f"{call.do} must not answer"]
        if not isinstance(answer, dict):
            return ["no answer of the handler"]
        text = json.dumps(call.event, sort_keys=True).encode()
        possible = [0]
        if call.pool == "keep":
            possible = self.started[call.version :]
        faults = {
            "to another caller": answer["caller"] != call.event["caller"],
            "of another call": answer["nonce"] != call.event["nonce"],
            "to another event": answer["sum"] != hashlib.sha256(text).hexdigest(),
            "of a version that was not there": answer["version"] not in possible,
            "of another tenant": answer["tenant"] != call.tenant,
            "of an environment of two tenants": answer["mixed"],
            "of an environment that had to be destroyed": answer["poisoned"],
            "of an environment that was not reset": call.pool == "reset" and answer["served"] != 1,
            "of an environment past its number of calls": (
                call.pool in ("aging", SECOND) and answer["served"] > INVOCATIONS
            ),
        }
        return [text for text, is_so in faults.items() if is_so]

    def _kind_of(self, call: Call, error: BaseException, took: float, *, cancelled: bool) -> str:
        """Return under what an error is counted; "" when it must not be."""
        nsbox = self.nsbox
        if isinstance(error, nsbox.Throttled | nsbox.PoolTimeout):
            return "throttles"
        if isinstance(error, nsbox.InvokeTimeout):
            return "timeouts" if took >= call.timeout else ""
        if isinstance(error, nsbox.ConfigError):
            return "wrong events" if call.do == "wrong" else ""
        if cancelled:
            return "cancelled"
        if isinstance(error, nsbox.FunctionError):
            kind = error.error_type
            if call.do == "raise" and (kind, error.message) == ("Asked", call.event["nonce"]):
                return "exceptions"
            asked = {
                "exit": ("Runtime.ExitError", "exits"),
                "hog": ("Runtime.OutOfMemory", "out of memory"),
                "large": ("Function.ResponseSizeTooLarge", "too large"),
            }.get(call.do)
            if asked is not None and kind == asked[0]:
                return asked[1]
            return "killed" if kind == "Runtime.ExitError" else ""
        deaths = (nsbox.EnvironmentDied, nsbox.SetupError, nsbox.LauncherError)
        return "killed" if isinstance(error, deaths) else ""

    def check_sums(self) -> None:
        """Set the pools' numbers beside those of their callers, when no call is under way."""
        for name, pool in self.pools.items():
            deadline = time.monotonic() + self._plan.slack
            # A birth that nobody wanted any more is given back by its own thread.
            while (stats := pool.stats())["ConcurrentExecutions"] and time.monotonic() < deadline:
                time.sleep(0.01)
            self._stats[name] = stats
            found = {
                word: count for (pool_, word), count in self.ledger.counts.items() if pool_ == name
            }
            # What is refused for its arguments is no call of the pool's.
            calls = found.get("calls", 0) - found.get("wrong events", 0)
            answers = found.get("answers", 0)
            throttles, cancelled = found.get("throttles", 0), found.get("cancelled", 0)
            failures = calls - answers
            claims = {
                "no call is under way": not stats["ConcurrentExecutions"] and not stats["Waiting"],
                "calls are invocations and throttles": (
                    stats["Calls"] == stats["Invocations"] + stats["Throttles"]
                ),
                "calls are the callers'": stats["Calls"] == calls,
                "answers are the callers'": stats["Invocations"] - stats["Errors"] == answers,
                "failures are the callers'": stats["Errors"] + stats["Throttles"] == failures,
                "throttles are the callers', and some of the cancelled": (
                    throttles <= stats["Throttles"] <= throttles + cancelled
                ),
            }
            for claim, holds in claims.items():
                if not holds:
                    self.ledger.wrong("sums", f"{name}: not so: {claim}: {stats}, {found}")

    def check_ends(self) -> None:
        """Every environment that was created is retired, and all of them were counted."""
        if self._alive:
            self.ledger.wrong("events", f"never retired: {sorted(self._alive)}")
        births = sum(stats["Births"] for stats in self._stats.values())
        if self._events["created"] < births:
            self.ledger.wrong("events", f"{self._events['created']} created, {births} births")
        left = [name for name, pool in self.pools.items() if pool.stats()["Environments"]]
        if left:
            self.ledger.wrong("end", f"environments are left in {left}")

    def rows(self) -> list[list[str]]:
        """What happened, as rows of a table."""
        rows = []
        for name, stats in self._stats.items():
            found = {
                word: count
                for (pool, word), count in sorted(self.ledger.counts.items())
                if pool == name
            }
            rows.append([f"{name}: callers", ", ".join(f"{k} {v}" for k, v in found.items())])
            told = ("Calls", "Invocations", "Errors", "Throttles", "Births")
            rows.append([f"{name}: stats()", ", ".join(f"{k} {stats[k]:.0f}" for k in told)])
        events = ", ".join(f"{k} {v}" for k, v in sorted(self._events.items()))
        rows.append(["events", events])
        rows.append(["slowest call", f"{self.ledger.slowest:.0%} of its deadline"])
        rows.append(["versions published", str(len(self.started))])
        return rows
