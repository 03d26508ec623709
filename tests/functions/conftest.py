# SPDX-License-Identifier: Apache-2.0
"""For tests of functions: environments of handlers given as text."""

from __future__ import annotations

import gc
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import nsbox

MakeFunction = Callable[..., nsbox.ExecutionEnvironment]


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have versions, which hold a lock in the store each, gone before leaks are looked for."""
    yield
    gc.collect()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., nsbox.FunctionVersion]:
    """A function that publishes ``app.handler`` from the text of app.py."""
    count = 0

    def make(source: str, **options: Any) -> nsbox.FunctionVersion:
        nonlocal count
        count += 1
        code = tmp_path / f"code-{count}"
        code.mkdir()
        (code / "app.py").write_text(textwrap.dedent(source))
        return nsbox.Function("app.handler", code=code, **options).publish()

    return make


@pytest.fixture
def make_function(publish: Callable[..., nsbox.FunctionVersion]) -> Iterator[MakeFunction]:
    """A function that makes an environment of ``app.handler``; all are closed afterwards."""
    made: list[nsbox.ExecutionEnvironment] = []

    def make(source: str, **options: Any) -> nsbox.ExecutionEnvironment:
        made.append(nsbox.ExecutionEnvironment(publish(source, **options)))
        return made[-1]

    yield make
    while made:
        made.pop().close()
