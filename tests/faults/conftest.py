# SPDX-License-Identifier: Apache-2.0
"""Options of the faults (scripts/test --faults), and the program that makes calls fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults import engine


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption(
        "--fault",
        action="append",
        default=[],
        metavar="CLASS/SCENARIO/CALL/ERRNO/N",
        help="only this one, as a report names it; may be repeated",
    )
    group.addoption("--fault-seed", type=int, default=11, help="default 11; which occurrences")
    group.addoption(
        "--fault-occurrences", type=int, default=3, metavar="N", help="of each call; default 3"
    )
    group.addoption("--fault-report", metavar="FILE", help="each fault and what became of it, JSON")


@pytest.fixture(scope="session")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine.build_tracer(tmp_path_factory.mktemp("tracer"))
