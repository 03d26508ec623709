# SPDX-License-Identifier: Apache-2.0
"""The storm of tests/storm for some seconds: everything at once, and nothing is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tests.storm.__main__ import Storm
from tests.storm.ledger import Plan
from tests.support import PATIENCE, SLOW_MACHINE

pytestmark = [
    # What an interrupt lets go of is closed as the last reference to it goes, which Python tells.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    # One that comes in a __del__ goes no further.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.mark.needs("userns")
def test_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Starts that fail are what is asked for here; calls are told of them.
    caplog.set_level(logging.CRITICAL, "nsbox")
    plan = Plan(
        seconds=12 if SLOW_MACHINE else 4,
        threads=4 if SLOW_MACHINE else 12,
        patience=PATIENCE,
        strike_every=0.25 * PATIENCE,
    )
    storm = Storm(plan, tmp_path)
    assert storm.run() == []
    summary = storm.summary()
    # It has been through what it is for.
    strikes = set(summary["strikes"])
    assert {"interrupt by a signal", "clock set"} <= strikes
    assert any(what.endswith((" killed", " stopped")) for what in strikes)
    for name in ("keep", "reset", "aging", "commands", "short"):
        ways = summary["calls"][name].values()
        assert sum(kinds.get("answers", 0) for kinds in ways), name
