# SPDX-License-Identifier: Apache-2.0
"""docs/pool.md says what the code does: its example, its settings, the names of its numbers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import nsbox
from nsbox.pool import accounts, pressure

TEXT = (Path(__file__).resolve().parents[2] / "docs/pool.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.needs("userns")
def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    code = "".join(re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S))
    exec(compile(code, "<example>", "exec"), {"__name__": "example"})  # noqa: S102
    assert capsys.readouterr().out.splitlines() == re.findall(r"\)  # (.*)$", code, re.M)


def test_settings_have_the_defaults_that_are_told() -> None:
    parameters = list(inspect.signature(nsbox.WarmPool).parameters.values())[1:]
    told = [(name.strip("`"), default) for name, default, _ in rows("Settings")]
    assert told == [(item.name, str(item.default)) for item in parameters]


def test_settings_of_a_function_have_the_defaults_that_are_told() -> None:
    parameters = list(inspect.signature(nsbox.WarmPool.function).parameters.values())[2:]
    told = [(name.strip("`"), default) for name, default, _ in rows("Several functions")]
    assert told == [(item.name, str(item.default)) for item in parameters]


def test_reasons_are_told() -> None:
    assert [name.strip("`") for name, _ in rows("Events")] == [
        item.name for item in nsbox.Retirement
    ]


def test_numbers_of_pressure() -> None:
    stall, window = pressure.STALL / 1e3, pressure.WINDOW / 1e6
    text = " ".join(TEXT.split())
    assert f"waited for memory for {stall:g} ms of {window:g} s" in text
    assert f"looked at every {pressure.LOOK_SECONDS:g} s" in text
    assert pressure.ALARM == 2, "twice"


@pytest.mark.needs("userns")
def test_numbers_have_the_names_that_are_told() -> None:
    with nsbox.WarmPool() as pool:
        assert set(re.findall(r"`(\w+)`", str(rows("Numbers")))) - {
            "Throttled",
            "PoolTimeout",
            "ConfigError",
        } == set(pool.stats())


def test_numbers_of_failed_starts() -> None:
    assert f"After {accounts.FAILURES_MAX} in a row" in TEXT
    assert f"up to {accounts.PAUSE_MAX:g} s" in TEXT
    assert accounts.PAUSE_MIN == 1
