# SPDX-License-Identifier: Apache-2.0
"""docs/pool.md says what the code does: its example, its settings, the names of its numbers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import nsbox
from nsbox.pool import leases

TEXT = (Path(__file__).resolve().parents[2] / "docs/pool.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.needs("userns")
def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)[0]
    exec(compile(code, "<example>", "exec"), {"__name__": "example"})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == re.findall(r"\)  # (.*)$", code, re.M)


def test_settings_have_the_defaults_that_are_told() -> None:
    parameters = list(inspect.signature(nsbox.WarmPool).parameters.values())[1:]
    told = [(name.strip("`"), default) for name, default, _ in rows("Settings")]
    assert told == [(item.name, str(item.default)) for item in parameters]


@pytest.mark.needs("userns")
def test_numbers_have_the_names_that_are_told() -> None:
    with nsbox.WarmPool() as pool:
        assert set(re.findall(r"`(\w+)`", str(rows("Numbers")))) - {
            "Throttled",
            "PoolTimeout",
        } == set(pool.stats())


def test_numbers_of_failed_starts() -> None:
    assert f"After {leases.FAILURES_MAX} in a row" in TEXT
    assert f"up to {leases.PAUSE_MAX:g} s" in TEXT
    assert leases.PAUSE_MIN == 1
