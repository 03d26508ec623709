# SPDX-License-Identifier: Apache-2.0
"""For tests of pools: versions are gone before leaks are looked for; the slots of what is born."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE

import nsbox
from nsbox.environment.managed import ManagedEnvironment
from nsbox.pool.maintenance import Maintenance
from nsbox.pool.manager import PoolLease, PoolScheduler, PoolSlot
from nsbox.pool.scheduler import Scheduler

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
def slots(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[PoolSlot]]:
    """The slots of all environments that are born, in that order."""
    found: list[PoolSlot] = []
    born = Scheduler.born

    def note(scheduler: PoolScheduler, lease: PoolLease, env: ManagedEnvironment, fd: int) -> None:
        found.append(lease.slot)
        born(scheduler, lease, env, fd)

    monkeypatch.setattr(Scheduler, "born", note)
    yield found
    found.clear()


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that tells pools' maintenance of a descriptor, as the kernel does."""
    found: set[Maintenance] = set()
    watch = Maintenance.watch

    def note(maintenance: Maintenance, *arguments: Any, **options: Any) -> None:
        found.add(maintenance)
        watch(maintenance, *arguments, **options)

    def tell(fd: int) -> None:
        for maintenance in found:
            maintenance.dispatch(fd)

    monkeypatch.setattr(Maintenance, "watch", note)
    return tell


def managed_of(slot: PoolSlot) -> ManagedEnvironment:
    """Return what has been born into a slot."""
    assert slot.env is not None
    return slot.env


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that publishes the handler, with its text changed as asked for."""

    def publish(change: tuple[str, str] = ("", ""), **fields: object) -> nsbox.FunctionVersion:
        (tmp_path / "app.py").write_text(HANDLER.replace(*change, 1))
        settings: dict[str, object] = {"timeout": 30 * PATIENCE, "init_timeout": 30 * PATIENCE}
        return nsbox.Function("app.handler", code=tmp_path, **(settings | fields)).publish()  # type: ignore[arg-type]

    return publish
