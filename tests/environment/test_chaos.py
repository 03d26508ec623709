# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at any moment: of the host, of its launcher, of a PID 1, and of all of them at once."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from tests import leaks
from tests.support import (
    PATIENCE,
    dead_cgroups,
    family_of,
    host_program,
    is_over,
    name_of,
    processes_with,
    wait_until,
)

import nsbox
from nsbox.isolation.cgroups import Hierarchies, Owner, collect_garbage
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

SEED = 20261124
GONE_WITHIN = 2.0
LONGEST_DELAY = 0.05

# Makes environments until its stdin ends, and then one more.
HOST = """
import sys, threading
import nsbox

over = threading.Event()

def work():
    while not over.is_set():
        try:
            with nsbox.ExecutionEnvironment() as env:
                print("born", env.pid, flush=True)
                env.run(["sh", "-c", "sleep MARK & setsid sleep MARK & sleep 0.01"])
                env.run(["true"])
        except nsbox.NsboxError as error:
            print("error", type(error).__name__, flush=True)

worker = threading.Thread(target=work)
print("begin", flush=True)
worker.start()
sys.stdin.buffer.read()
over.set()
worker.join()
print(nsbox.run(["echo", "alive"]).text(), end="", flush=True)
"""

# What may be told of a launcher or a PID 1 that is gone. Never a verdict on the command.
TYPED = {"LauncherError", "SetupError", "EnvironmentDied", "EnvironmentStateError", "CleanupError"}

WARNING = r"the launcher \d+ has died; starting another"


@contextmanager
def chaotic_host(mark: str) -> Iterator[subprocess.Popen[bytes]]:
    program = HOST.replace("MARK", mark)
    pipe = subprocess.PIPE
    host = host_program(program, stdin=pipe, stdout=pipe, stderr=pipe)
    try:
        assert host.stdout is not None
        assert host.stdout.readline() == b"begin\n"
        yield host
    finally:
        host.kill()
        host.communicate()


def launcher_of(host: int) -> int:
    """Return the launcher of a host as soon as there is one."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [child.pid for child in leaks.children(host) if leaks.host_of(child.pid) == host]
        return bool(found)

    wait_until(look, "the host has a launcher", 10)
    return found[0]


def children_of(launcher: int) -> list[int]:
    """Return the children of a launcher but its janitor: PID 1s, ready or on their way."""
    return [pid for pid in everyone_of(launcher) if name_of(pid) != "nsbox-janitor"]


def janitors_of(launcher: int) -> list[int]:
    """Return the janitor of a launcher; nobody where it has no cgroups.

    It is waited for: a clone has its parent's name until it gives itself one, which it may do
    after the launcher's first answers when the processors are busy.
    """
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in everyone_of(launcher) if name_of(pid) == "nsbox-janitor"]
        return bool(found)

    if live_cgroups():
        wait_until(look, "the launcher has a janitor")
    return found


def everyone_of(launcher: int) -> list[int]:
    # Not psutil's children(): it compares times of the wall clock, which may be set meanwhile, and
    # looks at every process of the machine, which takes longer than some that are looked for live.
    return [process.pid for process in leaks.children(launcher)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it had ended by itself
        os.kill(pid, signal.SIGKILL)


def strike(host: subprocess.Popen[bytes], victim: str, delay: float) -> None:
    """Kill `victim` at a moment of the host's life; of a PID 1 one that is there then."""
    if victim == "host":
        time.sleep(delay)
        host.kill()
        return
    launcher = launcher_of(host.pid)
    time.sleep(delay)
    if victim == "launcher":
        kill(launcher)
        wait_until(lambda: is_over(launcher), "the launcher is gone")
        return
    janitors_of(launcher)  # it has its own name by now, and is not taken for a PID 1
    found: list[int] = []

    def look() -> bool:
        children = children_of(launcher)
        is_wanted = victim == "template"
        found[:] = [pid for pid in children if (name_of(pid) == "nsbox-template") == is_wanted]
        return bool(found)

    wait_until(look, f"the launcher has a child that is {victim}", 10)
    kill(found[0])
    # It may be on standby: the host's last run, which must not fail, is not to take a dying one.
    wait_until(lambda: is_over(found[0]), f"the {victim} is gone")


def strike_at_random(number: int) -> None:
    temporary = tempfile.gettempdir()  # this session's own (conftest.py)
    dice = random.Random(SEED + number)
    victim = dice.choice(["host", "launcher", "template", "init"])
    # Of the start of the launcher, or of births and runs.
    during_runs = dice.random() < 0.5
    delay = dice.uniform(0, LONGEST_DELAY)
    what = f"number {number}: {victim}, {delay:.4f} s, {'runs' if during_runs else 'start'}"
    mark = f"60.{number:06d}"
    look = partial(leaks.snapshot, temporary)
    before = look()
    with chaotic_host(mark) as host:
        assert host.stdout is not None
        if during_runs:
            assert host.stdout.readline().startswith(b"born"), what
        strike(host, victim, delay)
        if victim == "host":
            assert host.wait(10) == -signal.SIGKILL
        else:
            out, err = host.communicate(timeout=60)
            # The one thing to say, by logging.
            told = err.decode().splitlines()
            assert all(re.fullmatch(WARNING, line) for line in told), (what, err)
            assert len(told) <= (victim == "launcher"), (what, err)
            assert host.returncode == 0, what
            lines = out.decode().splitlines()
            assert lines[-1] == "alive", what
            errors = {line.split()[1] for line in lines if line.startswith("error")}
            assert errors <= TYPED, what
    wait_until(lambda: not family_of(host.pid), what, GONE_WITHIN)
    assert not processes_with(mark), what
    leaked = leaks.await_clean(before, look, GONE_WITHIN * PATIENCE)
    assert not leaked, (what, leaked)


@pytest.mark.parametrize("number", range(10))
def test_a_kill_at_any_moment(number: int) -> None:
    strike_at_random(number)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_kills() -> None:
    for number in range(10, 110):
        strike_at_random(number)


# -- all at once ---------------------------------------------------------------------------------

ONE_ENVIRONMENT = """
import sys, nsbox
env = nsbox.ExecutionEnvironment()
process = env.popen(["sleep", "MARK"])
if sys.argv[1] == "frozen":
    env.freeze()
print(env.pid, flush=True)
sys.stdin.read()
"""


def kill_all_at_once(mark: str, state: str) -> list[str]:
    """Kill host, launcher and janitor together; return the cgroup directories they leave."""
    program = ONE_ENVIRONMENT.replace("MARK", mark)
    host = host_program(program, state, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert host.stdout is not None
        host.stdout.readline()
        launcher = launcher_of(host.pid)
        doomed = [host.pid, launcher, *janitors_of(launcher)]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in doomed:
                os.kill(pid, number)
    finally:
        host.kill()
        host.communicate()
    wait_until(lambda: not processes_with(mark), "no command outlives its launcher")
    wait_until(lambda: not family_of(host.pid), "no PID 1 outlives its launcher")
    wait_until(lambda: is_over(launcher), "the launcher is gone")
    return [path for path in dead_cgroups() if f"/nsbox.{launcher}." in path]


def gc() -> None:
    done = host_program(
        "from nsbox.cli import main; main()", "gc", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, b"")


def start_another() -> None:
    """Start another host, which runs one command and ends."""
    done = host_program("import nsbox; nsbox.run(['true']).check()", stderr=subprocess.PIPE)
    _, err = done.communicate(timeout=60)
    assert (done.returncode, err) == (0, b"")


def run_for_a_while() -> None:
    """Start another host, and leave it running until it has swept."""
    host = host_program(
        "import nsbox, sys; nsbox.run(['true']).check(); sys.stdin.read()", stdin=subprocess.PIPE
    )
    try:
        wait_until(lambda: not dead_cgroups(), "a live launcher's janitor sweeps")
    finally:
        host.communicate(timeout=60)


@pytest.fixture
def own_janitor_stands_still(env: nsbox.ExecutionEnvironment) -> Iterator[None]:
    """It sweeps a moment after its launcher's start, which may be now."""
    del env  # it has made the launcher start
    janitors = janitors_of(get_launcher().pid)
    for pid in janitors:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in janitors:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.usefixtures("own_janitor_stands_still")
@pytest.mark.parametrize("state", ["running", "frozen"])
@pytest.mark.parametrize("remover", [gc, start_another, run_for_a_while])
def test_what_is_left_of_all_is_removed_later(
    env: nsbox.ExecutionEnvironment, remover: Callable[[], None], state: str
) -> None:
    own = env.run(["cat", "/proc/self/cgroup"]).text()
    directories = [path for path in live_cgroups() if os.path.isdir(f"{path}/{env.id}")]
    env.freeze()
    left = kill_all_at_once(f"60.{os.getpid()}", state)
    assert bool(left) == bool(directories), "otherwise there is nothing to test here"
    remover()
    assert [path for path in left if os.path.exists(path)] == []
    assert [path for path in directories if not os.path.isdir(f"{path}/{env.id}")] == []
    env.thaw()
    assert env.run(["cat", "/proc/self/cgroup"]).text() == own


def live_cgroups() -> set[str]:
    return set(get_launcher().hello.trees.values())


@pytest.mark.needs("root")
def test_a_process_frozen_by_v1_dies_with_its_dead_owners_directory(
    env: nsbox.ExecutionEnvironment,
) -> None:
    """v1's freezer holds even SIGKILL back: thawing is a part of the removal."""
    place = Hierarchies.detect()["freezer"]
    if place.version != 1:
        pytest.skip(f"the freezer is not v1's here: {place!r}")
    with subprocess.Popen(["true"]) as process:
        owner = Owner.of(process.pid)
        process.wait()
    directory = f"{place.directory}/{owner.name}"
    os.makedirs(f"{directory}/environment")
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        Path(directory, "environment/cgroup.procs").write_text(str(sleeper.pid))
        state = Path(directory, "environment/freezer.state")
        state.write_text("FROZEN")
        wait_until(lambda: state.read_text() == "FROZEN\n", "it is frozen")
        kill(sleeper.pid)
        assert sleeper.poll() is None, "it does not die of SIGKILL alone"

        removed = collect_garbage(Hierarchies.detect())

        assert directory in removed
        assert sleeper.wait(10) == -signal.SIGKILL
    finally:
        if os.path.isdir(directory):
            Path(directory, "environment/freezer.state").write_text("THAWED")
            sleeper.kill()
            sleeper.wait()
            os.rmdir(f"{directory}/environment")
            os.rmdir(directory)
    assert env.run(["true"]).ok
