# SPDX-License-Identifier: Apache-2.0
"""System calls that fail, in each process of nsbox: each costs the call that meets it alone.

That call ends in one typed error or rightly, another environment goes on and the next call works,
nothing is left, no sandbox is weaker, nobody waits longer than for a deadline.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults import engine
from tests.faults.engine import Fault, Verdict
from tests.faults.errnos import ERRNOS
from tests.support import SLOW_MACHINE, x86_64_only

pytestmark = [pytest.mark.needs("userns", "gcc"), x86_64_only]

SHORT_SEED = 11
IN_SHORT = 3
"""Faults of each class in each scenario that are tried every time."""


def show(config: pytest.Config, text: str) -> None:
    """Write a line now, and not after the test."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    assert capture is not None
    assert reporter is not None
    with capture.global_and_fixture_disabled():
        reporter.write_line(text)


@pytest.fixture(scope="module")
def program(tracer: Path) -> Iterator[engine.Program]:
    made = engine.Program(tracer)
    made.start()  # outside of what is looked after each test
    yield made
    made.close()


@pytest.mark.parametrize("scenario", engine.SCENARIOS)
def test_a_call_that_fails_costs_one_call(program: engine.Program, scenario: str) -> None:
    counts = program.counts(scenario)
    chance = random.Random(f"{SHORT_SEED}{scenario}")
    verdicts = []
    for who in chance.sample(sorted(counts), 2) if SLOW_MACHINE else counts:
        faults = engine.choose({who: counts[who]}, scenario, SHORT_SEED, 2)
        some = min(1 if SLOW_MACHINE or scenario == "cold" else IN_SHORT, len(faults))
        verdicts += [program.meet(fault) for fault in chance.sample(faults, some)]
    wrong = [engine.describe(verdict) for verdict in verdicts if verdict.wrong]
    assert not wrong, "\n".join(wrong)


# None has held once: a bare OSError, half a freeze, 30 seconds, a lost signal, a refusal for good.
FOUND = """
host/run/write/EIO/1
host/invoke/poll/ENOMEM/1
host/invoke/read/EIO/1
host/invoke/recvfrom/ENOMEM/1
host/reset/ioctl/ENOMEM/8
host/freeze/sendto/ENOBUFS/1
launcher/freeze/pread64/EIO/1
launcher/birth/setns/EPERM/1
init/freeze/sendto/ENOBUFS/1
init/freeze/kill/EPERM/1
template/cold/sendto/ENOMEM/1
"""


def test_what_has_not_held_holds(program: engine.Program) -> None:
    lines = FOUND.split()[::5] if SLOW_MACHINE else FOUND.split()
    verdicts = [program.meet(Fault.parse(line)) for line in lines]
    wrong = [engine.describe(verdict) for verdict in verdicts if verdict.wrong]
    assert not wrong, "\n".join(wrong)


def test_no_environment_is_without_one_of_its_locks(program: engine.Program) -> None:
    """Nor with one of them in part."""
    counts = program.counts("birth")["clone"]
    calls = sorted(engine.ESSENTIAL["clone"] & set(counts))
    assert len(calls) >= 8, calls  # one more where the kernel has Landlock
    for call in calls[::4] if SLOW_MACHINE else calls:
        error = ERRNOS[call].split()[0]
        verdict = program.meet(Fault("clone", "birth", call, error, 1))
        assert (verdict.is_met, verdict.wrong) == (True, ""), engine.describe(verdict)


# -- the whole: scripts/test --faults ------------------------------------------------------------


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest, tracer: Path) -> dict[tuple[str, str], list[Verdict]]:
    config = request.config
    cells = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = {(cell["who"], cell["scenario"]) for cell in cells if "who" in cell}
    seed = config.getoption("--fault-seed")
    faults = [Fault.parse(text) for text in config.getoption("--fault")]
    if not faults:
        counter = engine.Program(tracer)
        for scenario in engine.SCENARIOS:
            if any(scenario == cell[1] for cell in wanted):
                counts = counter.counts(scenario)
                occurrences = config.getoption("--fault-occurrences")
                faults += engine.choose(counts, scenario, seed, occurrences)
        counter.close()
        faults = [fault for fault in faults if fault[:2] in wanted]
    groups = [
        part[begin : begin + 25]
        for scenario in engine.SCENARIOS
        for part in [[fault for fault in faults if fault.scenario == scenario]]
        for begin in range(0, len(part), 25)
    ]
    show(config, f"{len(faults)} faults, seed {seed}")
    found: list[Verdict] = []

    def tell(verdict: Verdict) -> None:
        found.append(verdict)
        if verdict.wrong or config.getoption("--fault"):
            show(config, engine.describe(verdict))

    engine.each(tracer, groups, max(2, os.cpu_count() or 1), tell)
    show(config, engine.table(found))
    if report := config.getoption("--fault-report"):
        Path(report).write_text(
            json.dumps(
                {
                    "seed": seed,
                    "faults": [{**v._asdict(), "fault": str(v.fault)} for v in found],
                },
                indent=1,
            )
        )
    by_cell: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in found:
        by_cell.setdefault(verdict.fault[:2], []).append(verdict)
    return by_cell


@pytest.mark.faults
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("scenario", engine.SCENARIOS)
@pytest.mark.parametrize("who", engine.CLASSES)
def test_each_call_that_fails_costs_one_call(
    verdicts: dict[tuple[str, str], list[Verdict]], who: str, scenario: str
) -> None:
    found = verdicts.get((who, scenario), [])
    wrong = [engine.describe(verdict) for verdict in found if verdict.wrong]
    assert not wrong, f"{len(found) - len(wrong)} of {len(found)} held\n" + "\n".join(wrong)
