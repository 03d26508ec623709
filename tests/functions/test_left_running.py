# SPDX-License-Identifier: Apache-2.0
"""What invocations leave running: it is known, and killed where that is asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.functions.conftest import MakeFunction
from tests.support import PATIENCE, cgroup_feature

import nsbox
from nsbox import LeftRunning

pytestmark = pytest.mark.needs("userns")

LEAVE = """
import os, subprocess, threading, time

def handler(event, context):
    if event == "process":
        subprocess.Popen(["sleep", "1000"])
    elif event == "daemon":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        os.waitpid(pid, 0)
    elif event == "thread":
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    elif event == "raise":
        subprocess.Popen(["sleep", "1000"])
        raise KeyError("pear")
    return event
"""

ROUNDS = [
    ("process", (1, 0)),
    ("daemon", (1, 0)),
    ("nothing", (0, 0)),
    ("thread", (0, 1)),
    ("raise", (1, 1)),
]
"""Events, and how many processes and threads they leave when nothing but threads goes on."""


def told(env: nsbox.ExecutionEnvironment) -> LeftRunning | None:
    """Return what the record of the last invocation says."""
    assert env.last is not None
    return env.last.left_running


def invoke(env: nsbox.ExecutionEnvironment, event: str) -> None:
    """Invoke with an event, and see what is raised if it has that raise."""
    if event != "raise":
        assert env.invoke(event) == event
        return
    with pytest.raises(nsbox.FunctionError, match="pear") as caught:
        env.invoke(event)
    assert caught.value.invocation is env.last


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_it_goes_on_and_is_known(make_function: MakeFunction, start: str) -> None:
    env = make_function(LEAVE, start=start)
    expected = [0, 0]
    for event, (processes, threads) in ROUNDS:
        invoke(env, event)
        expected = [expected[0] + processes, max(expected[1], threads)]
        left = LeftRunning(*expected)
        assert env.left_running() == left
        is_counted = start == "clone" and cgroup_feature("cgroup.pids")
        assert told(env) == (left if is_counted else None)


@pytest.mark.parametrize(
    "options",
    [
        {"tenant": "a"},
        {"left_running": "kill"},
        {"left_running": "kill", "start": "exec"},
        {"tenant": "a", "limits": nsbox.Limits(pids_max=None)},  # nothing counts its processes
    ],
    ids=["tenant", "kill", "exec", "uncounted"],
)
def test_it_is_killed_and_known(make_function: MakeFunction, options: dict[str, Any]) -> None:
    env = make_function(LEAVE, **options)
    for event, left in ROUNDS:
        invoke(env, event)
        assert told(env) == LeftRunning(*left)
        assert env.left_running() == LeftRunning(0, left[1])

    async def on_a_loop() -> None:
        for event, (processes, _) in ROUNDS[:3]:
            assert await env.invoke_async(event) == event
            assert told(env) == LeftRunning(processes, 1)

    asyncio.run(on_a_loop())
    # What the caller has started is the caller's.
    with env.popen(["sh", "-c", "sleep 1000 & cat; kill $!"]) as process:
        assert env.invoke("process") == "process"
        assert told(env) == LeftRunning(1, 1)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"goes on")
        process.stdin.close()
        assert process.stdout.read() == b"goes on"
        assert process.wait(20 * PATIENCE).ok
    assert env.state is nsbox.State.READY


def test_a_tenants_goes_on_by_name(make_function: MakeFunction) -> None:
    env = make_function(LEAVE, tenant="a", left_running="run")
    env.invoke("process")
    env.invoke("process")
    assert env.left_running() == LeftRunning(processes=2)
    with make_function(LEAVE, reuse="reset", tenant="a") as other:
        other.invoke("process")
        assert told(other) is None
        other.invoke("nothing")
    with pytest.raises(nsbox.EnvironmentStateError, match="closed"):
        other.left_running()


def test_wrong_settings() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"left_running": "freeze"}, "left_running: must be one of run, kill, got 'freeze'"),
        ({"left_running": "run", "reuse": "reset"}, "with reuse='reset': nothing is left running"),
        ({"left_running": "run", "reuse": "never"}, "with reuse='never': nothing is left running"),
    ]
    for options, message in wrong:
        with pytest.raises(nsbox.ConfigError, match=message):
            nsbox.Function("os.getcwd", **options)
    with pytest.raises(nsbox.ConfigError, match="with a command: nothing is left running"):
        nsbox.Function(command=["true"], left_running="run")
    assert nsbox.Function(command=["true"], left_running="kill").left_running == "kill"
