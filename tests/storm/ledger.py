# SPDX-License-Identifier: Apache-2.0
"""The ledger of a storm: each call from its begin to its one end, and what was wrong."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from typing import Any

TOLD = 5
"""Violations of one kind that are told."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, how many callers, and what deadlines are multiplied with on a slow machine."""

    seconds: float
    threads: int = 16
    seed: int = 0
    patience: float = 1.0
    strike_every: float = 0.25
    """Mean seconds between two kills or stops; that of the other strikes goes with it."""
    without: tuple[str, ...] = ()
    """Kinds of strikes that are left out: names of `chaos.KINDS`."""

    @property
    def watches_memory(self) -> bool:
        """Whether it is long enough to tell growth from warming up."""
        return self.seconds >= 60

    @property
    def slack(self) -> float:
        """Seconds that a call may take over its deadline."""
        return 2.0 * self.patience


@dataclasses.dataclass(slots=True)
class Call:
    """One call: by whom and how, what is sent, and what has to come of it."""

    pool: str
    way: str
    do: str
    event: dict[str, Any]
    timeout: float
    tenant: str | None
    begin: float = 0.0
    version: int = 0
    """How many versions had been published when it began."""


class Ledger:
    """What came of the calls, by pool, way and kind; and what was wrong."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._open: dict[str, str] = {}
        self._wrong: Counter[str] = Counter()
        self.violations: list[str] = []
        self.slowest = 0.0

    def wrong(self, kind: str, text: str) -> None:
        """Note a violation; of each kind some are told in full."""
        with self._lock:
            self._wrong[kind] += 1
            if self._wrong[kind] <= TOLD:
                self.violations.append(f"{kind}: {text}")

    def begin(self, call: Call) -> None:
        """Open the call's entry."""
        with self._lock:
            self._open[call.event["nonce"]] = call.event["caller"]

    def end(self, call: Call, kind: str, over: float) -> None:
        """Close the call's entry as one of `kind`; `over` is the part of its deadline it took."""
        with self._lock:
            is_open = self._open.pop(call.event["nonce"], None) is not None
            self.counts[call.pool, call.way, kind] += 1
            self.slowest = max(self.slowest, over)
        if not is_open:
            self.wrong("ledger", f"ended twice: {call}")

    def close(self) -> None:
        """No call is under way any more."""
        for nonce, caller in self._open.items():
            self.wrong("ledger", f"call {nonce} of {caller} has no end")

    def of_pool(self, pool: str) -> Counter[str]:
        """Return how many calls of one pool ended as what."""
        found: Counter[str] = Counter()
        for (name, _, kind), count in self.counts.items():
            if name == pool:
                found[kind] += count
        return found

    def count(self, kind: str) -> int:
        """Return how many calls of all pools ended as `kind`."""
        return sum(count for (_, _, found), count in self.counts.items() if found == kind)

    def summary(self) -> dict[str, Any]:
        """Return the counts for JSON: by pool, way and kind of end; and of each violation."""
        calls: dict[str, dict[str, dict[str, int]]] = {}
        for (pool, way, kind), count in sorted(self.counts.items()):
            calls.setdefault(pool, {}).setdefault(way, {})[kind] = count
        return {
            "calls": calls,
            "ended": sum(self.counts.values()),
            "slowest call, part of its deadline": round(self.slowest, 3),
            "wrong": dict(self._wrong),
            "violations": self.violations,
        }
