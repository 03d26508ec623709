# SPDX-License-Identifier: Apache-2.0
"""System calls of the launcher that fail: each ends one birth or request, and nothing besides."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.support import name_of, wait_until

import nsbox
from nsbox.linux import proc
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns", "strace")

# What the launcher calls for births, requests and ends, errors that the manual names, and how many
# of each are made to fail one by one. Not those whose failure is a fault of the caller (EBADF).
CALLS = {
    "clone": (["EAGAIN", "ENOMEM"], 2),
    "epoll_ctl": (["ENOSPC", "ENOMEM"], 6),
    "eventfd2": (["ENOMEM", "EMFILE"], 1),
    "fcntl": (["EMFILE"], 3),
    "getsockname": (["ENOBUFS"], 3),
    "ioctl": (["ENOMEM"], 2),
    "mkdir": (["ENOMEM", "EAGAIN"], 6),
    "mount_setattr": (["ENOMEM"], 1),
    "newfstatat": (["ENOMEM"], 12),
    "open_tree": (["EMFILE"], 1),
    "openat": (["EMFILE", "ENFILE", "ENOMEM"], 40),
    "poll": (["ENOMEM"], 2),
    "pread64": (["EIO"], 4),
    "prlimit64": (["EPERM"], 2),
    "read": (["EIO"], 12),
    "recvfrom": (["ENOMEM"], 12),
    "recvmsg": (["ENOMEM"], 12),
    "rmdir": (["EBUSY"], 6),
    "sendmsg": (["ENOMEM", "ETOOMANYREFS"], 4),
    "sendto": (["ENOBUFS"], 6),
    "setns": (["ENOMEM"], 2),
    "socket": (["EMFILE", "ENOBUFS"], 2),
    "socketpair": (["EMFILE"], 1),
    "unshare": (["ENOSPC", "ENOMEM"], 2),
    "write": (["ENOMEM"], 12),
}
SEED = 11


class Inject:
    """Has the kernel refuse the `number`th `call` of the launcher alone, once."""

    def __init__(self, launcher: int, call: str, error: str, number: int) -> None:
        self._tracer = subprocess.Popen(
            ["strace", "-p", str(launcher), "-o", "/dev/null", "-e", f"trace={call}",
             "-e", f"inject={call}:error={error}:when={number}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self._tracer.stderr is not None
        line = self._tracer.stderr.readline()
        if b"attached" not in line:
            self._tracer.kill()
            self._tracer.communicate()
            pytest.skip(f"strace cannot be used here: {line.decode().strip()}")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._tracer.send_signal(signal.SIGINT)
        self._tracer.communicate(timeout=30)


def life(config: nsbox.Config) -> str:
    """Have an environment whose layout is new; return what of it failed."""
    step = "birth"
    try:
        with nsbox.ExecutionEnvironment(config) as env:
            step = "run"
            env.run(["true"], timeout=10).check()
            step = "freeze"
            env.freeze()
            step = "thaw"
            env.thaw()
            step = "close"
    except nsbox.NsboxError as error:
        return f"{step}: {error!r}"
    return "whole"


def kept_by(launcher: int) -> list[str]:
    """Return what descriptors a launcher has, and its children that have ended."""
    links = []
    for fd in os.listdir(f"/proc/{launcher}/fd"):
        try:
            links.append(os.readlink(f"/proc/{launcher}/fd/{fd}"))
        except OSError:
            continue
    # Layouts and network namespaces are kept for later births, up to a number.
    own = [link for link in links if not link.startswith(("mnt:", "net:"))]
    kinds = [link.partition(":")[0] for link in own]
    return sorted(
        [*kinds, *(f"ended: {name_of(pid)}" for pid in proc.children(launcher) if is_over(pid))]
    )


def is_over(pid: int) -> bool:
    try:
        return proc.read_stat(pid).state == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def settled(launcher: int) -> list[str]:
    """Return what it has while it makes no network namespace ahead of need: that takes a socket."""
    seen = []
    for _ in range(20):
        seen.append(kept_by(launcher))
        time.sleep(0.002)
    return min(seen, key=len)


def expect_kept(launcher: int, wanted: list[str], what: str) -> None:
    seen: list[str] = []

    def is_as_wanted() -> bool:
        seen[:] = kept_by(launcher)
        return seen == wanted

    try:
        wait_until(is_as_wanted, what)
    except AssertionError:
        assert seen == wanted, what


def cgroups_left(but: str) -> list[str]:
    trees = set(get_launcher().hello.trees.values())
    return [
        f"{tree}/{name}"
        for tree in trees
        for name in os.listdir(tree)
        if name != but and os.path.isdir(f"{tree}/{name}")
    ]


def check(call: str, errors: list[str], numbers: list[int], tmp_path: Path) -> None:
    launcher = get_launcher()
    with nsbox.ExecutionEnvironment() as before:
        assert life(nsbox.Config()) == "whole"
        wait_until(lambda: not cgroups_left(before.id), "all is removed")
        start = settled(launcher.pid)
        for error in errors:
            for number in numbers:
                what = f"{call} {error} number {number}"
                source = tmp_path / f"{error}{number}"
                source.mkdir()
                mount = nsbox.Mount.bind(str(source), "/data")
                config = nsbox.Config(mounts=(mount,))
                with Inject(launcher.pid, call, error, number):
                    seen = life(config)
                assert get_launcher() is launcher, f"{what}: the launcher has died; {seen}"
                assert before.run(["echo", "fine"], timeout=10).text() == "fine\n", what
                assert life(config) == "whole", f"{what}: {seen}"
                wait_until(lambda: not cgroups_left(before.id), f"{what}: all is removed; {seen}")
                expect_kept(launcher.pid, start, f"{what}: {seen}")


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_once_ends_one_birth_or_request(call: str, tmp_path: Path) -> None:
    errors, count = CALLS[call]
    chance = random.Random(f"{SEED}{call}")
    numbers = [1, chance.randint(2, count)] if count > 3 else [chance.randint(1, count)]
    check(call, [chance.choice(errors)], numbers, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("call", CALLS)
def test_each_call_that_fails_ends_one_birth_or_request(call: str, tmp_path: Path) -> None:
    errors, count = CALLS[call]
    check(call, errors, list(range(1, count + 1)), tmp_path)


def test_a_full_table_of_descriptors_ends_births_alone() -> None:
    """However many of them a birth finds room for."""
    launcher = get_launcher()
    with nsbox.ExecutionEnvironment() as before:
        assert life(nsbox.Config()) == "whole"
        wait_until(lambda: not cgroups_left(before.id), "all is removed")
        start = settled(launcher.pid)
        limits = resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE)
        taken = set(map(int, os.listdir(f"/proc/{launcher.pid}/fd")))
        free = min(set(range(len(taken) + 1)) - taken)
        try:
            for more in range(4):
                now = (free + more, limits[1])
                resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, now)
                with pytest.raises((nsbox.SetupError, nsbox.DescriptorsExhausted)):
                    nsbox.ExecutionEnvironment()
        finally:
            resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, limits)
        assert get_launcher() is launcher
        assert before.run(["echo", "fine"], timeout=10).text() == "fine\n"
        assert life(nsbox.Config()) == "whole"
        expect_kept(launcher.pid, start, "")
