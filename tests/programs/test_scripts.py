# SPDX-License-Identifier: Apache-2.0
"""What the scripts of the repository do when two of them run at once."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_runs_at_once_install_one_after_the_other(tmp_path: Path) -> None:
    """One is in the middle of making the virtual environment when the other begins."""
    place = tmp_path / "venv"
    environment = {**os.environ, "NSBOX_VENV": str(place)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [REPOSITORY / "scripts/run", "--version"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start() as first:
        while first.poll() is None and not (place / "pyvenv.cfg").exists():
            time.sleep(0.01)
        with start() as second:
            told = [process.communicate(timeout=100) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told
    assert [err.count("installing") for _, err in told] == [1, 0], told
    assert told[0][0] == told[1][0]
    assert told[0][0].startswith("nsbox")
