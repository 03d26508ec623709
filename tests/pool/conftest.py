# SPDX-License-Identifier: Apache-2.0
"""For tests of pools: versions are gone before leaks are looked for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import PATIENCE

import nsbox

HANDLER = """
import os, sys, time
calls = 0
def handler(event, context):
    global calls
    calls += 1
    if event.get("sleep"):
        time.sleep(event["sleep"])
    if event.get("raise"):
        raise ValueError("asked for")
    if event.get("exit"):
        os._exit(3)
    return {"calls": calls, "log": context.log_stream_name[-8:], "tenant": context.tenant_id,
            "echo": event.get("echo"), "version": VERSION}
VERSION = 1
"""

Make = Callable[..., nsbox.FunctionVersion]


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have versions, which hold a lock in the store each, gone before leaks are looked for."""
    yield
    gc.collect()


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that publishes the handler, with its text changed as asked for."""

    def publish(change: tuple[str, str] = ("", ""), **fields: object) -> nsbox.FunctionVersion:
        (tmp_path / "app.py").write_text(HANDLER.replace(*change, 1))
        settings: dict[str, object] = {"timeout": 30 * PATIENCE, "init_timeout": 30 * PATIENCE}
        return nsbox.Function("app.handler", code=tmp_path, **(settings | fields)).publish()  # type: ignore[arg-type]

    return publish
