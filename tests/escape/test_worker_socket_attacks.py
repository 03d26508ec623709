# SPDX-License-Identifier: Apache-2.0
"""What a guest may do with its worker's socket, whose hang-up is how a pool sees a death."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from tests.support import PATIENCE, publish_app, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns")

Publish = Callable[..., nsbox.FunctionVersion]

CODE = """
import array, ctypes, os, signal, socket, threading, time
WORKERS = 3  # its number

def later(act):
    def wait():
        time.sleep(0.1)  # it has been answered, and waits for an event
        act()
    threading.Thread(target=wait, daemon=True).start()

def handler(event, context):
    if event == "own":
        return "answered"
    own = socket.socket(fileno=os.dup(WORKERS))
    if event == "junk":
        later(lambda: own.send(b"junk" * 9))
    elif event == "shut down":
        later(lambda: own.shutdown(socket.SHUT_RDWR))
    elif event == "another program":
        own.detach()
        later(lambda: os.execv("/bin/sleep", ["sleep", "60"]))
    elif event == "in flight":
        # The host's queue has it: whatever ends, it does not hang up until that is read.
        rights = array.array("i", [own.fileno()])
        later(lambda: own.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]))
    elif event == "outlived":
        # By the call itself: Python's fork would close it in the child.
        fork = {"x86_64": 57}.get(os.uname().machine)
        child = ctypes.CDLL(None).syscall(fork) if fork else os.fork()
        if child == 0:
            while True:
                time.sleep(60)
        own.detach()
        later(lambda: os._exit(3))
    else:
        later(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    return "done"
"""


@pytest.fixture
def publish(tmp_path: Path) -> Iterator[Publish]:
    def make(**options: object) -> nsbox.FunctionVersion:
        return publish_app(tmp_path, CODE, **options)

    yield make
    gc.collect()  # a version holds a lock in the store


def ids(pool: nsbox.WarmPool) -> set[str]:
    return {env.id for env in pool.snapshot().environments}


@pytest.mark.parametrize("attack", ["shut down", "another program", "outlived"])
def test_a_socket_that_is_closed_costs_its_own_environment(publish: Publish, attack: str) -> None:
    """The pool sees it in a moment, with nobody calling; PID 1 lives until then.

    Nothing that has the socket outlives the worker: PID 1 kills what that has left.
    """
    version = publish(left_running="run")
    with nsbox.WarmPool(version, provisioned=2, max_environments=2, freeze_after=None) as pool:
        before = ids(pool)
        assert pool.invoke(attack) == "done"
        wait_until(lambda: before - ids(pool), "it is retired", 10 * PATIENCE)
        assert len(before - ids(pool)) == 1, "no other one is"
        for _ in range(2):
            assert pool.invoke("own") == "answered"
        assert pool.stats()["Errors"] == 0


@pytest.mark.parametrize("attack", ["junk", "in flight", "stopped"])
def test_a_death_is_seen_whatever_is_on_the_socket(publish: Publish, attack: str) -> None:
    """An environment says so at once, whose word is the kernel's on PID 1."""
    version = publish(left_running="run")
    with nsbox.ExecutionEnvironment(version) as env, nsbox.ExecutionEnvironment(version) as other:
        assert env.invoke(attack) == "done"
        time.sleep(0.2)  # it has been made
        assert env.state is nsbox.State.READY, "PID 1 lives, and nobody has asked anything"
        os.kill(env.pid, signal.SIGKILL)
        wait_until(lambda: env.state is nsbox.State.DEAD, "its death is seen", 10 * PATIENCE)
        with pytest.raises(nsbox.EnvironmentStateError, match="killed from outside by SIGKILL"):
            env.invoke("own")
        assert other.invoke("own") == "answered"


@pytest.mark.parametrize("attack", ["own", "junk", "in flight", "stopped"])
def test_a_pool_sees_a_death_whatever_is_on_the_socket(publish: Publish, attack: str) -> None:
    version = publish(left_running="run")
    with nsbox.WarmPool(version, max_environments=1, freeze_after=None) as pool:
        pool.invoke(attack)
        (env,) = pool.snapshot().environments
        time.sleep(0.2)  # it has been made
        (worker,) = psutil.Process(env.pid).children()
        os.kill(env.pid, signal.SIGKILL)
        if attack == "in flight":
            # The kernel tells of no hang-up then. It is the attacker's own next call that sees it.
            wait_until(lambda: not psutil.pid_exists(worker.pid), "it has ended", 10 * PATIENCE)
            with pytest.raises(nsbox.EnvironmentDied, match="killed from outside by SIGKILL"):
                pool.invoke("own")
        wait_until(lambda: env.id not in ids(pool), "it is retired", 10 * PATIENCE)
        assert pool.invoke("own") == "answered"
        assert pool.stats()["Errors"] == (attack == "in flight")
