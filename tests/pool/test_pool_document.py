# SPDX-License-Identifier: Apache-2.0
"""docs/pool.md says what the code does: its example, its settings, the names of its numbers."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import pydoc
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
    told = {name.strip("`"): attribute.strip("`") for name, attribute, _ in rows("Numbers")}
    with nsbox.WarmPool() as pool:
        stats = pool.stats()
    assert set(told) == set(stats)
    assert set(told.values()) == {
        name for name, value in vars(nsbox.PoolStats).items() if isinstance(value, property)
    }
    # Each attribute is its number, and none another's.
    stats = nsbox.PoolStats({name: 1000.0 * at for at, name in enumerate(told, 1)})
    for name, attribute in told.items():
        scale = 1000 if attribute.endswith("_seconds") else 1
        assert getattr(stats, attribute) == stats[name] / scale


def test_numbers_are_a_value_and_a_dict() -> None:
    stats = nsbox.PoolStats(Calls=2, Duration=1500.0)
    assert stats == {"Calls": 2, "Duration": 1500.0} == dict(stats)
    assert json.loads(json.dumps(stats)) == stats
    for same in (pickle.loads(pickle.dumps(stats)), copy.copy(stats), copy.deepcopy(stats)):  # noqa: S301
        assert (type(same), same) == (nsbox.PoolStats, stats)
    both = stats + nsbox.PoolStats(Calls=1, Births=1)
    assert both == {"Calls": 3, "Duration": 1500.0, "Births": 1}
    assert (both.calls, both.duration_seconds, both.births) == (3, 1.5, 1)
    with pytest.raises(AttributeError):
        stats.call = 3  # type: ignore[attr-defined]
    text = pydoc.plain(pydoc.render_doc(nsbox.PoolStats))
    for name, value in vars(nsbox.PoolStats).items():
        if isinstance(value, property):
            unit = "Seconds" if name.endswith("_seconds") else "(count)"
            assert unit in str(value.__doc__)
            assert str(value.__doc__) in text


def test_numbers_of_failed_starts() -> None:
    assert f"After {accounts.FAILURES_MAX} in a row" in TEXT
    assert f"up to {accounts.PAUSE_MAX:g} s" in TEXT
    assert accounts.PAUSE_MIN == 1
