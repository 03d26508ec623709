# SPDX-License-Identifier: Apache-2.0
"""The soak of benchmarks/soak.py for some seconds: everything at once, and nothing is wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from benchmarks.soaked import Plan
from benchmarks.soaking import Soak
from tests.support import PATIENCE, SLOW_MACHINE


@pytest.mark.needs("userns")
def test_nothing_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Starts that fail are what is asked for here; calls are told of them.
    caplog.set_level(logging.CRITICAL, "nsbox.pool")
    plan = Plan(
        seconds=12 if SLOW_MACHINE else 4,
        threads=4 if SLOW_MACHINE else 16,
        patience=PATIENCE,
        kill_every=0.25 * PATIENCE,
    )
    soak = Soak(plan, tmp_path)
    assert soak.run() == []
    told = dict(soak.rows())
    # It has been through what it is for.
    assert "launcher 1" in told["killed"]
    for name in ("keep", "reset", "aging"):
        assert "answers" in told[f"{name}: callers"]
