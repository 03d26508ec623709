# SPDX-License-Identifier: Apache-2.0
"""`close(grace=...)`: SIGTERM, time to end in, then the end; no longer than necessary."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox.functions.function import ReuseChoice, StartChoice

pytestmark = pytest.mark.needs("userns")

LONG = 60.0
CATCHES = "trap 'echo bye > /out/{name}; exit 3' TERM; echo ready; while :; do sleep 0.01; done"
IGNORES = "trap 'echo asked > /out/ignores' TERM; echo ready; while :; do sleep 0.01; done"


def start(env: nsbox.ExecutionEnvironment, script: str) -> nsbox.Process:
    process = env.popen(["sh", "-c", script], stdin=nsbox.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def make(out: Path) -> nsbox.ExecutionEnvironment:
    return nsbox.ExecutionEnvironment(**writes_to(out))


def writes_to(out: Path) -> dict[str, Any]:
    # Anybody may write there, and no file system needs to support idmapped mounts.
    mounts = [nsbox.Mount.bind(out, "/out", rw=True)]
    return {"mounts": mounts, "allow_missing": {"idmapped_mounts"}}


def test_commands_end_by_themselves_and_are_not_waited_for_longer(out: Path) -> None:
    env = make(out)
    with (
        start(env, CATCHES.format(name="a")) as first,
        start(env, CATCHES.format(name="b")) as second,
        start(env, "echo ready; exec sleep 1000") as third,
    ):
        begin = time.monotonic()
        env.close(grace=LONG)
        assert time.monotonic() - begin < LONG
        assert sorted(path.name for path in out.iterdir()) == ["a", "b"]
        for process in (first, second):
            assert process.wait(10).returncode == 3
        result = third.wait(10)
        assert result.outcome is nsbox.Outcome.KILLED
        assert result.evidence == "its environment was closed"
    assert env.state is nsbox.State.CLOSED


def test_one_that_does_not_end_is_killed(out: Path) -> None:
    env = make(out)
    with start(env, IGNORES) as process:
        env.close(grace=0.3 * PATIENCE)
        assert (out / "ignores").exists()
        assert process.wait(10).outcome is nsbox.Outcome.KILLED


def test_a_frozen_one_is_thawed_for_it(out: Path) -> None:
    env = make(out)
    with start(env, CATCHES.format(name="a")) as process:
        env.freeze()
        env.close(grace=LONG)
        assert process.wait(10).returncode == 3


def test_nothing_is_waited_for_where_nothing_runs_or_is_left() -> None:
    for prepare in (
        lambda env: None,
        lambda env: env.run(["true"]),
        lambda env: env.close(),
        lambda env: os.kill(env.pid, signal.SIGKILL),
    ):
        env = nsbox.ExecutionEnvironment()
        prepare(env)
        begin = time.monotonic()
        env.close(grace=LONG)
        assert time.monotonic() - begin < LONG
    with pytest.raises(nsbox.ConfigError, match="grace: must be above zero"):
        env.close(grace=-1)


HANDLES = """
import signal, sys
def bye(*_):
    open("/out/bye", "w").write("bye")
    sys.exit(0)
signal.signal(signal.SIGTERM, bye)
def handler(event, context):
    return event
"""
# The kernel gives the signal to the other thread, and the one that waits for an event sleeps on:
# as when the signal comes in the moment before it goes to sleep.
HANDLES_LATER = (
    """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
    + HANDLES
    + """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
"""
)


def publish(
    out: Path, directory: Path, source: str, reuse: ReuseChoice, **fields: Any
) -> nsbox.FunctionVersion:
    directory.mkdir()
    (directory / "app.py").write_text(source)
    return nsbox.Function(
        "app.handler",
        code=directory,
        reuse=reuse,
        **writes_to(out),
        init_timeout=30 * PATIENCE,
        timeout=30 * PATIENCE,
        **fields,
    ).publish()


@pytest.mark.parametrize(
    ("source", "reuse", "start"),
    [
        (HANDLES, "keep", "clone"),
        (HANDLES, "reset", "clone"),
        (HANDLES_LATER, "keep", "clone"),
        (HANDLES_LATER, "keep", "exec"),
    ],
)
def test_a_handler_of_the_functions_runs(
    out: Path, tmp_path: Path, source: str, reuse: ReuseChoice, start: StartChoice
) -> None:
    version = publish(out, tmp_path / "code", source, reuse, start=start)
    env = nsbox.ExecutionEnvironment(version)
    assert env.invoke(1) == 1
    begin = time.monotonic()
    env.close(grace=LONG)
    assert time.monotonic() - begin < LONG
    assert (out / "bye").read_text() == "bye"


def test_a_function_that_was_never_started_has_no_handler_yet(out: Path, tmp_path: Path) -> None:
    version = publish(out, tmp_path / "code", HANDLES, "keep")
    nsbox.ExecutionEnvironment(version).close(grace=LONG)
    assert not (out / "bye").exists()


def test_closed_again_meanwhile(out: Path) -> None:
    env = make(out)
    with start(env, IGNORES) as process:
        thread = threading.Thread(target=env.close, kwargs={"grace": LONG})
        thread.start()
        wait_until((out / "ignores").exists, "it was asked")
        env.close()
        thread.join()
        assert process.wait(10).outcome is nsbox.Outcome.KILLED
