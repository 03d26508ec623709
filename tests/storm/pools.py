# SPDX-License-Identifier: Apache-2.0
"""What is stormed: functions and commands in five pools, what is promised of them, and a judge."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from tests.storm.ledger import Call, Ledger, Plan

import nsbox
from nsbox.host.features import probe

TENANTS = (*[None] * 8, "red", "blue")
"""Most calls are of one: each change of an environment's tenant is a birth."""
VERSIONS = 4
MEMORY = "128M"
INVOCATIONS = 60
IMPORT = 10.0
"""Seconds that the birth and the import of a function may take."""
POOLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "keep": {"provisioned": 2, "max_environments": 10, "max_waiting": 16, "acquire_timeout": 5.0},
    "reset": {"max_environments": 3, "acquire_timeout": 0.5, "idle_timeout": 2.0},
    "aging": {
        "max_environments": 4,
        "max_invocations": INVOCATIONS,
        "max_lifetime": 4.0,
        "idle_timeout": 1.0,
        "acquire_timeout": 5.0,
    },
    "commands": {"max_environments": 3, "acquire_timeout": 2.0, "freeze_after": 0.2},
    "short": {"provisioned": 1, "max_environments": 3, "acquire_timeout": 5.0},
}
"""The pools by name: tenants and versions change in "keep", "reset" has that reuse, "aging" has two
functions, "commands" is leased, and "short" is closed and made again."""
SECOND: Final = "second"
"""The other function of "aging", with a place of its own."""
NAMES: Final = (*POOLS, SECOND)
WEIGHTS: Final = (4, 1, 2, 1, 1, 1)
"""How often each is called."""

HANDLER = """
import hashlib, json, os, time
VERSION = 0
seen, owner, poisoned = set(), None, False

class Asked(Exception):
    pass

def handler(event, context):
    global owner, poisoned
    tenant = context.tenant_id
    mixed = owner not in (None, [tenant])
    owner = [tenant]
    again = event["nonce"] in seen
    seen.add(event["nonce"])
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
        "sum": hashlib.sha256(text).hexdigest(), "served": len(seen), "mixed": mixed,
        "poisoned": poisoned, "again": again,
    }
"""


class AskedError(Exception):
    """What a caller raises while it has a lease, because it was asked to."""


class Subject:
    """The pools, and what is known of them from outside."""

    def __init__(self, plan: Plan, directory: Path) -> None:
        """Publishes the versions; the pools are made when it is entered."""
        self.ledger = Ledger()
        self.can_hog = bool(probe("cgroup.memory")[0])
        self.code = directory / "code"
        self.store = directory / "store"
        self._plan = plan
        self._versions = [self._publish(number, "keep") for number in range(VERSIONS)]
        self._reset = self._publish(0, "reset")
        self.started = [0]  # numbers of versions, in the order of their publishing
        self.completed = 0
        self.pools: dict[str, Any] = {}
        """Pools, or functions of one, by the names of their numbers."""
        self._stats: dict[str, nsbox.PoolStats] = {}
        self._ended: list[nsbox.PoolStats] = []  # of each "short" that was closed
        self._log: deque[nsbox.PoolEvent] = deque()
        self._events: Counter[str] = Counter()

    def _publish(self, number: int, reuse: str) -> nsbox.FunctionVersion:
        self.code.mkdir(exist_ok=True)
        (self.code / "app.py").write_text(HANDLER.replace("VERSION = 0", f"VERSION = {number}"))
        fields: dict[str, Any] = {"reuse": reuse, "init_timeout": IMPORT * self._plan.patience}
        if self.can_hog:
            fields["limits"] = nsbox.Limits(memory_max=MEMORY)
        function = nsbox.Function("app.handler", code=self.code, **fields)
        return function.publish(store=self.store)

    def __enter__(self) -> Self:
        """Makes the pools."""
        for name in POOLS:
            self._make(name)
        self._aging = self.pools["aging"]
        self.pools["aging"] = self._aging.function(self._versions[0])
        self.pools[SECOND] = self._aging.function(self._versions[0], reserved=1)
        return self

    def _make(self, name: str) -> None:
        settings = dict(POOLS[name])
        for setting in settings:
            if "_time" in setting:
                settings[setting] *= self._plan.patience
        sources = {"keep": self._versions[0], "reset": self._reset, "short": self._versions[0]}
        source: Any = nsbox.Config() if name == "commands" else sources.get(name)
        # Events are told by C alone: an interrupt that comes meanwhile is none of the callback's.
        self.pools[name] = nsbox.WarmPool(source, on_event=self._log.append, **settings)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes the pools; their calls have ended."""
        for name in POOLS:
            pool = self._aging if name == "aging" else self.pools[name]
            pool.close(drain=kind is None)

    # -- what happens to pools --------------------------------------------------------------------

    def publish_next(self) -> None:
        """Move the traffic of "keep" to another version."""
        number = (self.started[-1] + 1) % VERSIONS
        self.started.append(number)
        self.pools["keep"].publish(self._versions[number])
        self.completed = len(self.started) - 1

    def close_short(self, choices: random.Random) -> str:
        """Close "short" under its calls, by one thread or two; make it again. Return how."""
        pool = self.pools["short"]
        drain = choices.random() < 0.5
        begin = time.monotonic()
        others = []
        if choices.random() < 0.3:
            others.append(threading.Thread(target=pool.close, kwargs={"drain": False}))
        for thread in others:
            thread.start()
        pool.close(drain=drain)
        for thread in others:
            thread.join()
        took = time.monotonic() - begin
        # Those that wait are served, too, one after the other.
        limit = self._plan.slack + (3 * self._longest("short") if drain and not others else 1.0)
        if took > limit:
            self.ledger.wrong("close", f"drain={drain} took {took:.1f} of {limit:.1f} seconds")
        stats = pool.stats()
        if stats.environments or stats.concurrent_executions or stats.waiting_calls:
            self.ledger.wrong("close", f"something is left of a closed pool: {stats}")
        self._ended.append(stats)
        for last in (False, False, True):
            try:
                self._make("short")
                break
            except nsbox.NsboxError:  # the one that is kept ready was killed as it was born
                if last:
                    raise
        return "drained" if drain else "killed"

    # -- judging ----------------------------------------------------------------------------------

    def _longest(self, pool: str, timeout: float = 5.0) -> float:
        settings = POOLS["aging" if pool == SECOND else pool]
        return (float(settings["acquire_timeout"]) + IMPORT + timeout) * self._plan.patience

    def deadline(self, call: Call) -> float:
        """Seconds in which a call has to be over: wait for a place, birth, and its timeout."""
        longest = self._longest(call.pool, call.timeout / self._plan.patience)
        return longest + self._plan.slack

    def judge(
        self, call: Call, answer: object, error: BaseException | None, *, cancelled: bool = False
    ) -> None:
        """Set what came of a call beside what had to."""
        took = time.monotonic() - call.begin
        limit = self.deadline(call)
        if took > limit:
            self.ledger.wrong("deadline", f"{call} took {took:.1f} of {limit:.1f} seconds")
        kind = ""
        if error is None:
            faults = self._faults(call, answer)
            if isinstance(answer, nsbox.Result):
                kind, faults = self._result(call, answer, took)
            for text in faults:
                self.ledger.wrong("answer", f"{text}: {call}: {str(answer)[:300]}")
            kind = kind or "answers"
        else:
            kind = self._kind_of(call, error, took, cancelled=cancelled)
            if not kind:
                text = f"{type(error).__name__}: {str(error)[:300]}"
                self.ledger.wrong("error", f"{text}, of {call} after {took:.2f} s")
        self.ledger.end(call, kind, took / limit)

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
            "to an event that was sent twice": answer["again"],
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

    def _result(self, call: Call, result: nsbox.Result, took: float) -> tuple[str, list[str]]:
        """Return as what a command is counted, and what is wrong with its result."""
        if result.outcome is nsbox.Outcome.TIMED_OUT:
            return "timeouts", [] if took >= call.timeout else ["a timeout before its time"]
        if result.outcome is nsbox.Outcome.SIGNALED and result.returncode == -9:
            return "killed", []
        faults = []
        if call.do == "hang" or not result.ok:
            faults.append("not what was asked for")
        elif result.text() != call.event["nonce"]:
            faults.append("the output of another command")
        return "answers", faults

    def _kind_of(self, call: Call, error: BaseException, took: float, *, cancelled: bool) -> str:
        """Return under what an error is counted; "" when it must not be."""
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        if isinstance(error, AskedError):
            return "exceptions"
        if isinstance(error, nsbox.PoolClosed):
            return "closed" if call.pool == "short" else ""
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
        deaths = [nsbox.EnvironmentDied, nsbox.SetupError, nsbox.LauncherError]
        if call.way == "lease":
            deaths.append(nsbox.EnvironmentStateError)  # it has died before it was used
        return "killed" if isinstance(error, tuple(deaths)) else ""

    def check_sums(self) -> None:
        """Set the pools' numbers beside those of their callers, when no call is under way."""
        for name, pool in self.pools.items():
            deadline = time.monotonic() + 10 * self._plan.patience
            # A birth that nobody wanted any more is given back by its own thread.
            while (stats := pool.stats()).concurrent_executions and time.monotonic() < deadline:
                time.sleep(0.01)
            for ended in self._ended if name == "short" else ():
                stats = stats + ended
            self._stats[name] = stats
            found = self.ledger.of_pool(name)
            # What is refused for its arguments is no call of the pool's.
            calls = found.total() - found["wrong events"]
            answers, throttles = found["answers"], found["throttles"]
            if name == "commands":  # a lease has ended well, whatever became of the command
                answers += found["timeouts"] + found["killed"]
            # An interrupt, or a close, may come before the pool has counted, or after.
            either = found["interrupted"] + found["closed"]
            while_waiting = either + found["cancelled"]
            killed = found["killed"] if name == "commands" else 0
            good = stats.invocations - stats.errors
            claims = {
                "no call is under way": not stats.concurrent_executions and not stats.waiting_calls,
                "calls are invocations and throttles": (
                    stats.calls == stats.invocations + stats.throttles
                ),
                "calls are the callers'": calls - either <= stats.calls <= calls,
                "answers are the callers'": answers - killed <= good <= answers + either,
                "throttles are the callers', and some of the cancelled": (
                    throttles <= stats.throttles <= throttles + while_waiting
                ),
            }
            for claim, holds in claims.items():
                if not holds:
                    self.ledger.wrong("sums", f"{name}: not so: {claim}: {stats}, {found}")

    def check_ends(self) -> None:
        """Every environment that was created is retired, and all of them were counted."""
        alive: set[str] = set()
        for event in self._log:
            self._events[
                event.reason.value if event.kind == "retired" and event.reason else event.kind
            ] += 1
            if (event.environment in alive) is (event.kind == "created"):
                self.ledger.wrong("events", f"out of order: {event}")
            alive.add(event.environment)
            if event.kind == "retired":
                alive.discard(event.environment)
        if alive:
            self.ledger.wrong("events", f"never retired: {sorted(alive)}")
        births = sum(stats.births for stats in self._stats.values())
        # What a close, or an interrupt, has met between its birth and the word of that.
        untold = 3 * len(self._ended) + self.ledger.count("interrupted")
        if self._events["created"] < births - untold:
            self.ledger.wrong("events", f"{self._events['created']} created, {births} births")
        for name, pool in self.pools.items():
            if pool.stats().environments:
                self.ledger.wrong("end", f"environments are left in {name}")
            with contextlib.suppress(nsbox.PoolClosed):
                if name == "commands":
                    pool.acquire().__enter__()
                else:
                    pool.invoke({})
                self.ledger.wrong("end", f"{name} serves after its close")

    def summary(self) -> dict[str, Any]:
        """Return the pools' own numbers, and what has become of environments, for JSON."""
        told = ("Calls", "Invocations", "Errors", "Throttles", "Births")
        return {
            "stats": {name: {k: int(s[k]) for k in told} for name, s in self._stats.items()},
            "events": dict(sorted(self._events.items())),
            "versions published": len(self.started),
            "pools closed under load": len(self._ended),
        }
