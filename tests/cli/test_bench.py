# SPDX-License-Identifier: Apache-2.0
"""``nsbox bench`` and ``python -m benchmarks``: found or not, and a run as small as can be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import PATIENCE

import nsbox

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = str(Path(nsbox.__file__).resolve().parents[1])
SMALL = ["--quick", "--live", "0", "--no-plots"]


def run(*words: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )


def test_echo_and_subprocess(tmp_path: Path) -> None:
    cases = "echo-100B,subprocess-answer"
    done = run("nsbox", "bench", *SMALL, "--only", cases, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["series"]) == set(cases.split(","))
    assert found["missing"] == {}
    assert {"kernel", "cpu", "commit", "user"} <= set(found["host"])
    for series in found["series"].values():
        assert series["count"] == len(series["samples"]) > 0
        assert series["p10"] <= series["median"] <= series["p99"]
    assert (tmp_path / "results.md").read_text() == done.stdout


@pytest.mark.needs("userns", "gcc")
def test_floor_answers_and_tells_its_steps(tmp_path: Path) -> None:
    done = run("benchmarks", *SMALL, "--only", "floor-answer", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["missing"] == {}
    floor, *steps = found["series"]
    assert floor == "floor-answer"
    assert [step.removeprefix("floor-step-") for step in steps] == [
        *("clone3", "id_maps", "mounts", "pivot_root", "privileges", "program", "exit")
    ]


def test_an_unknown_case_is_refused() -> None:
    done = run("nsbox", "bench", "--only", "nonesuch")
    assert done.returncode == 125
    assert "no case begins with 'nonesuch'" in done.stderr


def test_without_a_checkout_it_says_where_the_benchmarks_are(tmp_path: Path) -> None:
    # As installed: the package alone, away from its repository, in a directory that has others.
    shutil.copytree(Path(SOURCE) / "nsbox", tmp_path / "lib/nsbox")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__main__.py").write_text("raise AssertionError('not nsbox')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'lib')!r})\n"
    code += "import nsbox.cli; sys.exit(nsbox.cli.main(['bench']))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 125
    assert "clone it, and run 'nsbox bench' in the clone's top directory" in done.stderr
    assert len(done.stderr.splitlines()) == 1
