# SPDX-License-Identifier: Apache-2.0
"""How a cold start, a warm call and the memory grow with the number of live environments."""

from __future__ import annotations

import contextlib
import random
import resource
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.harness import (
    COUNT,
    MEGABYTES,
    MICROSECONDS,
    Report,
    describe,
)
from benchmarks.memory import environment_pss, kernel_memory
from benchmarks.peers import UnavailableError
from benchmarks.subject import Standby, microseconds

STEPS = (1, 10, 100, 300, 1000, 2000)
SAMPLES = 20
KERNEL_FROM = 100
"""Live environments from which on the kernel's memory is told: that of fewer is lost in what the
machine does besides."""
DESCRIPTORS = 16
"""Wanted per live environment, of which the host has only a few; the rest is room."""


def raise_descriptor_limit(environments: int) -> None:
    """Lets this process and the launcher, which inherits it, hold so many environments open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, environments * DESCRIPTORS + 1024)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def steps_up_to(most: int) -> list[int]:
    """The numbers of live environments to measure at."""
    return [step for step in STEPS if step <= most]


class Growth:
    """Environments that stay, and measurements beside them."""

    def __init__(
        self,
        make: Callable[[], Any],
        event: object,
        standby: Standby,
        report: Report,
        floor: Callable[[], float] | None,
    ) -> None:
        """Starts nothing yet. `make` makes an environment that answers `event` with itself.

        `floor` measures the floor once: what the kernel itself, or a neighbour on the machine,
        adds from step to step is in that, too.
        """
        self._make = make
        self._event = event
        self._standby = standby
        self._report = report
        self._floor = floor
        self._live: list[Any] = []
        self._random = random.Random(0)
        self._kernel_before = 0.0

    def measure(self, steps: Sequence[int], advance: Callable[[int], object]) -> None:
        """Goes up through `steps`; the first that fails is named and ends it. Closes all."""
        with contextlib.ExitStack() as stack:
            for step in steps:
                try:
                    self._standby.none(self._make)
                    if not self._live:
                        self._cold()  # the launcher, the template and the layout are there
                        self._kernel_before = kernel_memory()
                    self._grow_to(step, stack, advance)
                    self._measure_at(step)
                except Exception as error:  # noqa: BLE001 - named, as in every other benchmark
                    text = str(error) if isinstance(error, UnavailableError) else describe(error)
                    live = len(self._live)
                    self._report.missing[f"growth-{step}"] = f"with {live} live: {text}"
                    return

    def _grow_to(
        self, step: int, stack: contextlib.ExitStack, advance: Callable[[int], object]
    ) -> None:
        while len(self._live) < step:
            environment = stack.enter_context(self._make())
            self._call(environment)
            self._live.append(environment)
            advance(1)

    def _measure_at(self, step: int) -> None:
        cold, warm, floor = [], [], []
        for _ in range(SAMPLES):
            if self._floor is not None:
                floor.append(self._floor())
            cold.append(self._cold())
            environment = self._random.choice(self._live)
            self._call(environment)  # the first call after a while finds cold caches
            warm.append(microseconds(partial(self._call, environment)))
        self._report.add(MICROSECONDS, {f"cold-at-{step}": cold, f"warm-at-{step}": warm})
        if floor:
            self._report.add(MICROSECONDS, {f"floor-at-{step}": floor})
        for environment in self._live:
            self._call(environment)
        self._report.add(COUNT, {f"answering-at-{step}": float(len(self._live))})
        self._measure_memory_at(step)

    def _measure_memory_at(self, step: int) -> None:
        kernel = (kernel_memory() - self._kernel_before) / len(self._live)
        if step >= KERNEL_FROM:
            self._report.add(MEGABYTES, {f"kernel-at-{step}": kernel})
        try:
            pss = [environment_pss(environment.pid) for environment in self._live]
        except UnavailableError as error:
            self._report.missing[f"pss-at-{step}"] = str(error)
        else:
            self._report.add(MEGABYTES, {f"pss-at-{step}": pss})
            if step >= KERNEL_FROM:
                whole = sum(pss) / len(pss) + kernel
                self._report.add(MEGABYTES, {f"memory-at-{step}": whole})

    def _cold(self) -> float:
        with contextlib.ExitStack() as stack:
            return microseconds(lambda: self._call(stack.enter_context(self._make())))

    def _call(self, environment: Any) -> None:  # noqa: ANN401 - an environment, found dynamically
        if (answer := environment.invoke(self._event)) != self._event:
            raise UnavailableError(f"the answer was {str(answer)[:100]}")
