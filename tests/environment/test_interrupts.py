# SPDX-License-Identifier: Apache-2.0
"""An interrupt at each place of a start, a freeze, a close: nothing is left, no state is false."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.interrupts import interrupt_at_each_place
from tests.support import PATIENCE, SLOW_MACHINE, SOURCE, wait_until

import nsbox
from nsbox.store import integrity
from nsbox.supervisor.launcher import get_launcher

# What an interrupt lets go of is closed as the last reference to it goes, which Python tells.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SOON = 5.0 * PATIENCE
"""Seconds; a place that is lost is waited for for 10."""


def own_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> str:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


@pytest.fixture
def alone() -> None:
    """No launcher runs, and what its first start imports is there."""
    get_launcher()
    nsbox.shutdown()


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_start_of_the_launcher_leaves_nothing(alone: None, stride: int) -> None:
    before = own_descriptors(), children()

    def check() -> None:
        nsbox.shutdown()
        assert (own_descriptors(), children()) == before

    assert interrupt_at_each_place(lambda: get_launcher, check, stride) > 100


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_shutdown_is_ended_by_the_next(alone: None, stride: int) -> None:
    before = own_descriptors(), children()

    def prepare() -> Callable[[], None]:
        get_launcher()
        return nsbox.shutdown

    def check() -> None:
        nsbox.shutdown()
        assert (own_descriptors(), children()) == before

    interrupt_at_each_place(prepare, check, stride)


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["freeze", "thaw"])
def test_an_interrupted_freeze_or_thaw_tells_the_state(name: str, stride: int) -> None:
    with nsbox.ExecutionEnvironment() as env:

        def prepare() -> Callable[[], None]:
            if name == "thaw":
                env.freeze()
            return getattr(env, name)  # type: ignore[no-any-return]

        def check() -> None:
            if env.state is nsbox.State.FROZEN:
                env.thaw()
            assert env.state is nsbox.State.READY
            assert env.run(["true"], timeout=5 * PATIENCE).returncode == 0

        interrupt_at_each_place(prepare, check, stride)


def environments() -> list[str]:
    found = []
    for child in psutil.Process(get_launcher().pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found.append(child.name())
    return [name for name in found if name not in ("nsbox-template", "nsbox-janitor")]


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_function", [False, True], ids=["commands", "function"])
@pytest.mark.parametrize("operation", ["birth", "first", "second", "close"])
def test_an_interrupt_in_a_life_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, stride: int, is_function: bool
) -> None:
    what = None
    if is_function:
        # Its code is not read again, as that of a function published a while ago.
        monkeypatch.setattr(integrity, "_SETTLED", 0)
        (tmp_path / "app.py").write_text("def handler(event, context): return event")
        what = nsbox.Function("app.handler", code=tmp_path).publish()
    envs: list[nsbox.ExecutionEnvironment] = []

    def birth() -> None:
        envs.append(nsbox.ExecutionEnvironment(what))

    def use() -> None:
        if is_function:
            envs[0].invoke({"a": 1})
        else:
            envs[0].run(["cat"], input=b"in", timeout=5 * PATIENCE)

    def prepare() -> Callable[[], object]:
        if operation == "birth":
            return birth
        birth()
        if operation == "first":
            return use
        use()
        return use if operation == "second" else envs[0].close

    def check() -> None:
        begin = time.monotonic()
        while envs:
            envs.pop().close()
        assert time.monotonic() - begin < SOON
        wait_until(lambda: not environments(), "the environment has ended")
        assert own_descriptors() == descriptors

    prepare()()
    while envs:
        envs.pop().close()
    descriptors = own_descriptors()
    interrupt_at_each_place(prepare, check, stride)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_nothing(stride: int) -> None:
    nsbox.run(["true"])
    descriptors = own_descriptors()

    def check() -> None:
        wait_until(lambda: not environments(), "the environment has ended")
        assert own_descriptors() == descriptors

    interrupt_at_each_place(lambda: lambda: nsbox.run(["true"], timeout=9.0), check, stride)


PROGRAM = """
import sys, time
import nsbox

def call():
    with nsbox.WarmPool(max_environments=2, shutdown_grace=0.1) as pool:
        while True:
            with pool.acquire() as env:
                env.run(["true"])
            print(flush=True)

call()
"""


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_program_that_ctrl_c_ends_ends_soon_and_with_one_traceback(count: int) -> None:
    """What it leaves is looked for after the test."""
    moments = random.Random(11)
    for _ in range(2 if SLOW_MACHINE else count):
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONPATH": SOURCE},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert program.stdout is not None
        program.stdout.readline()
        time.sleep(moments.uniform(0, 0.05))
        os.killpg(program.pid, signal.SIGINT)
        begin = time.monotonic()
        _, errors = program.communicate(timeout=30)
        assert time.monotonic() - begin < SOON, errors.decode()
        assert errors.count(b"Traceback") <= 1, errors.decode()
        assert program.returncode == -signal.SIGINT
