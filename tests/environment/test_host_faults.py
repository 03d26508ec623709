# SPDX-License-Identifier: Apache-2.0
"""System calls of the host that fail: each ends in a typed error that names it, and leaves nothing.

What the launcher calls is in test_launcher_faults, a cold start's probes in test_unknown.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support import host_program

pytestmark = pytest.mark.needs("userns", "strace")

HOST = """
import json, os, sys
import nsbox
from nsbox.linux import proc

nsbox.set_standby(0)

def life():
    step = "birth"
    try:
        with nsbox.ExecutionEnvironment() as env:
            step = "run"
            env.run(["cat"], input=b"x", timeout=10).check()
            step = "write"
            env.write_file("/tmp/x", b"x" * 5000)
            step = "read"
            assert env.read_file("/tmp/x") == b"x" * 5000
            step = "popen"
            with env.popen(["sleep", "60"]) as process:
                process.send_signal(15)
                process.wait(10)
            step = "freeze"
            env.freeze()
            step = "thaw"
            env.thaw()
            step = "reset"
            env.reset()
            step = "close"
    except nsbox.NsboxError as error:
        return f"{step}: {type(error).__name__}: {error}"
    except BaseException as error:
        return f"{step}: untyped {error!r}"
    return "whole"

def kept():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        except OSError:
            pass
    ended = [pid for pid in proc.children(os.getpid()) if proc.read_stat(pid).state == "Z"]
    return sorted(links), ended

def hear():
    while True:
        try:
            return os.read(0, 100)
        except OSError:
            pass  # a call that was to fail, and life did not make

def say(what):
    while True:
        try:
            return os.write(1, json.dumps(what).encode() + b"\\n")
        except OSError:
            pass

assert life() == "whole"
before = kept()
say("ready")
while kind := hear():
    if kind == b"cold":
        nsbox.shutdown()
        say("ready")
        hear()
    answer = life()
    say(answer)
    hear()  # nothing fails any more
    again = life()
    now = kept()
    say([now == before, again, str(now)])
"""

# As in test_launcher_faults. EAGAIN of sockets that do not wait is none of these.
CALLS = {
    "fcntl": (["EMFILE"], 2),
    "fchmod": (["EPERM"], 3),
    "ioctl": (["ENOMEM"], 12),
    "openat": (["EMFILE", "ENFILE", "ENOMEM"], 16),
    "pidfd_open": (["EMFILE", "ENOMEM"], 2),
    "pidfd_send_signal": (["EPERM"], 1),
    "pipe2": (["EMFILE"], 3),
    "poll": (["ENOMEM"], 20),
    "read": (["EIO"], 12),
    "recvfrom": (["ENOMEM"], 10),
    "recvmsg": (["ENOMEM"], 10),
    "sendmsg": (["ENOBUFS", "ETOOMANYREFS"], 10),
    "sendto": (["ENOBUFS"], 6),
    "socketpair": (["EMFILE", "ENFILE"], 8),
}
COLD = {
    "pidfd_open": (["EMFILE", "ENOMEM"], 1),
    "pipe2": (["EMFILE"], 1),
    "poll": (["ENOMEM"], 4),
    "recvmsg": (["ENOMEM"], 2),
    "socketpair": (["EMFILE"], 2),
}
SEED = 11


class Host:
    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = host_program(HOST, stdin=pipe, stdout=pipe)
        assert self.read() == "ready"

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode())
        self.process.stdin.flush()

    def live(self, kind: str, call: str, error: str, number: int) -> str:
        """Have it use an environment while a call of its fails; return what was wrong with that."""
        if kind == "cold":
            self.tell(kind)
            assert self.read() == "ready"
        tracer = subprocess.Popen(
            ["strace", "-p", str(self.process.pid), "-o", "/dev/null", "-e", f"trace={call}",
             "-e", f"inject={call}:error={error}:when={number}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        if b"attached" not in line:
            tracer.kill()
            tracer.communicate()
            pytest.skip(f"strace cannot be used here: {line.decode().strip()}")
        self.tell("go")
        try:
            answer = self.read()
        finally:
            tracer.send_signal(signal.SIGINT)
            tracer.communicate(timeout=30)
        self.tell("on")
        is_clean, again, kept = self.read()
        what = f"{kind} {call} {error} number {number}: {answer}"
        if "untyped" in answer:
            return what
        if again != "whole":
            return f"{what}; then {again}"
        return "" if is_clean else f"{what}; left: {kept}"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.process.communicate(timeout=30)


def test_a_call_that_fails_once_ends_in_a_typed_error(host: Host) -> None:
    chance = random.Random(SEED)
    found = []
    for kind, calls in (("warm", CALLS), ("cold", COLD)):
        for call, (errors, count) in calls.items():
            found.append(host.live(kind, call, chance.choice(errors), chance.randint(1, count)))
    found = list(filter(None, found))
    assert not found, "\n".join(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["warm", "cold"])
def test_each_call_that_fails_ends_in_a_typed_error(host: Host, kind: str) -> None:
    found = [
        host.live(kind, call, error, number)
        for call, (errors, count) in (CALLS if kind == "warm" else COLD).items()
        for error in errors
        for number in range(1, count + 1)
    ]
    found = list(filter(None, found))
    assert not found, "\n".join(found)
