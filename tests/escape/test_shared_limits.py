# SPDX-License-Identifier: Apache-2.0
"""Attacks on what the kernel counts for a whole user or host: descriptors in flight, terminals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import nsbox
from nsbox.isolation.filesystem import TERMINALS

pytestmark = pytest.mark.needs("userns")

FLOOD = """
import array, errno, socket, sys, time
held, sent = [], 0
null = open("/dev/null")
try:
    while True:
        pair = socket.socketpair()
        held.append(pair)
        rights = array.array("i", [null.fileno()] * 250)
        try:
            pair[0].sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        except OSError as error:
            print(sent, errno.errorcode[error.errno], flush=True)
            break
        sent += 250
finally:
    time.sleep(600)
"""

BESIDE = """
import json, resource, sys
import nsbox
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
told = []
try:
    for _ in range(2):
        with nsbox.ExecutionEnvironment() as env:
            told.append(env.run(["true"]).returncode)
except nsbox.NsboxError as error:
    told.append(f"{type(error).__name__}: {error}")
print(json.dumps([told, resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)]))
"""


@pytest.fixture
def flooded(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> Iterator[str]:
    """An environment with as many descriptors in flight as its limit of 1,024 lets it have."""
    env = make_env()
    with env.popen([sys.executable, "-c", FLOOD], stdout=nsbox.supervisor.process.PIPE) as process:
        assert process.stdout is not None
        told = process.stdout.readline().decode()
        assert int(told.split()[0]) >= 1000, told
        yield told


def beside(hard: int) -> tuple[list[object], bool]:
    """Return what two births in another process of this user come to, and if its limits stay."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard)),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    told, is_restored = json.loads(done.stdout)
    return told, is_restored


@pytest.mark.usefixtures("flooded")
def test_descriptors_in_flight_of_one_environment_stop_no_birth() -> None:
    told, is_restored = beside(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert told == [0, 0]
    assert is_restored


@pytest.mark.usefixtures("flooded")
@pytest.mark.skipif(os.geteuid() == 0, reason="the kernel lets root have any number in flight")
def test_without_room_above_the_soft_limit_the_cause_is_told() -> None:
    told, is_restored = beside(1024)
    if told != [0, 0]:  # with subordinate ids an environment is another user
        assert "RLIMIT_NOFILE" in str(told[-1])
        assert str(told[-1]).startswith("SetupError")
    assert is_restored


def test_terminals_of_one_environment_are_bounded(env: nsbox.ExecutionEnvironment) -> None:
    script = """
import os, errno
held = []
try:
    while len(held) < 5000:
        held.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY))
except OSError as error:
    print(len(held), errno.errorcode[error.errno])
"""
    result = env.run([sys.executable, "-c", script])
    assert result.stdout.decode().split() == [str(TERMINALS), "ENOSPC"], result


TAKE_NAMES = """
import socket, sys, time
held = []
for block in range(0x70000000, 0x70000000 + (1 << 20), 4096):
    held.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    try:
        held[-1].bind(f"\\0nsbox/ids/{block}")
    except OSError:
        pass  # a launcher's
print("taken", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="of root's host ids")
def test_names_that_anybody_can_take_keep_no_host_ids_from_root() -> None:
    attacker = subprocess.Popen(
        [os.path.realpath(sys.executable), "-c", TAKE_NAMES],
        user=65534,
        cwd="/",
        stdout=subprocess.PIPE,
    )
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"taken\n"
        assert beside(resource.getrlimit(resource.RLIMIT_NOFILE)[1])[0] == [0, 0]
    finally:
        attacker.kill()
        attacker.communicate()
