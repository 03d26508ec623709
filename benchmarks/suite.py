# SPDX-License-Identifier: Apache-2.0
"""A set of cases with what they hold open: servers, environments, temporary files."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from benchmarks.harness import MICROSECONDS, PER_SECOND, Case, Report, describe
from benchmarks.peers import UnavailableError, compile_floor

SANDBOXES_PER_STARTER = 4
STARTERS = (2, 8)


class Suite:
    """The cases that were asked for and can run here. Subclasses add theirs in `_add_all`."""

    def __init__(self, wanted: Sequence[str], report: Report) -> None:
        """Nothing is started yet. `wanted` are prefixes of case names; empty means all."""
        self._wanted = wanted
        self._report = report
        self._stack = contextlib.ExitStack()
        self._directory = Path()
        self._program: Path | None = None
        self.single: list[Case] = []
        self.rates: list[Case] = []

    def _add_all(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Starts every peer; one that cannot run is named in the report."""
        with contextlib.ExitStack() as stack:
            temporary = tempfile.TemporaryDirectory(prefix="nsbox-bench-")
            self._directory = Path(stack.enter_context(temporary))
            self._directory.chmod(0o755)  # crun enters its bundle as the container's user
            self._stack = stack
            self._add_all()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every peer and removes the temporary directory."""
        self._stack.close()

    def _wants(self, *names: str) -> bool:
        return not self._wanted or any(n.startswith(p) for n in names for p in self._wanted)

    def _attempt(self, peer: str, cases: Sequence[str], add: Callable[[], None]) -> None:
        """Calls `add` if one of its `cases` is wanted; names `peer` as missing if it raises."""
        if not self._wants(*cases):
            return
        try:
            add()
        except Exception as error:  # noqa: BLE001 - whatever a peer raises, it is named and left out
            text = str(error) if isinstance(error, UnavailableError) else describe(error)
            self._report.missing[peer] = text

    def _add(self, name: str, measure: Callable[[], float | Sequence[float]]) -> None:
        self._add_case(name, lambda: {name: measure()})

    def _add_case(
        self, name: str, measure: Callable[[], Mapping[str, float | Sequence[float]]]
    ) -> None:
        if self._wants(name):
            self.single.append(Case(name, measure, MICROSECONDS))

    def _add_rates(self, peer: str, measure: Callable[[int, int], float]) -> None:
        for name, starters in zip(rate_names(peer), STARTERS, strict=True):
            if self._wants(name):
                count = starters * SANDBOXES_PER_STARTER
                self.rates.append(_rate_case(name, measure, count, starters))

    def _compiled(self) -> Path:
        if self._program is None:
            self._program = compile_floor(self._directory)
        return self._program


def rate_names(peer: str) -> list[str]:
    """The names of the cases of `peer` with several starters."""
    return [f"{peer}-rate-{starters}" for starters in STARTERS]


def _rate_case(name: str, measure: Callable[[int, int], float], count: int, starters: int) -> Case:
    return Case(name, lambda: {name: measure(count, starters)}, PER_SECOND)
