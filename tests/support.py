# SPDX-License-Identifier: Apache-2.0
"""What many tests need: hostile programs to run inside, and events to wait for."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests import leaks

import nsbox
from nsbox.environment.command import Command
from nsbox.environment.environment import EnvironmentFace
from nsbox.environment.managed import ManagedEnvironment
from nsbox.supervisor.process import PIPE, RunningCommand

SOURCE = str(Path(nsbox.__file__).resolve().parent.parent)
"""Where other programs find the package under test: as installed, and so compiled already."""

IS_ROOT = os.geteuid() == 0

SLOW_MACHINE = "User Mode Linux" in Path("/proc/cpuinfo").read_text()
"""User-Mode Linux: one CPU, system calls at 35 us, Python starts in a quarter of a second."""

PATIENCE = 6.0 if SLOW_MACHINE else 1.0
"""What to multiply deadlines with."""


class OpenEnvironment(EnvironmentFace):
    """An environment with what is below its public face: `managed`."""

    def __init__(self, config: nsbox.Config | nsbox.FunctionVersion | None = None) -> None:
        self.managed = ManagedEnvironment(config)
        super().__init__(self.managed)

    def start(self, argv: Sequence[str]) -> RunningCommand:
        """Start a command with pipes, as `popen` does, and return what is below its `Process`."""
        return self.managed.start(Command(argv, None, None, (PIPE, PIPE, PIPE), None))


x86_64_only = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="written in this machine's call numbers and code"
)

i386_only = pytest.mark.skipif(
    SLOW_MACHINE, reason="User-Mode Linux has no i386 calls: int 0x80 enters the native ones"
)

NUMBERS = {
    "ptrace": 101, "syslog": 103, "setuid": 105, "personality": 135, "pivot_root": 155,
    "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169,
    "sethostname": 170, "iopl": 172, "init_module": 175, "quotactl": 179, "kexec_load": 246,
    "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
    "fanotify_init": 300, "prlimit64": 302, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "fsmount": 432, "fspick": 433, "clone3": 435, "pidfd_getfd": 438,
    "mount_setattr": 442,
}  # fmt: skip
"""x86-64 system call numbers of what attacks use (asm/unistd_64.h)."""


def publish_app(directory: Path, code: str, **options: Any) -> nsbox.FunctionVersion:
    """Publish `code`, whose handler is ``app.handler``, with limits that no slow machine meets."""
    (directory / "app.py").write_text(code)
    limit = 30 * PATIENCE
    function = nsbox.Function(
        "app.handler", code=directory, timeout=limit, init_timeout=limit, **options
    )
    return function.publish()


_PRELUDE = """
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    libc.syscall.restype = ctypes.c_long
    result = libc.syscall(ctypes.c_long(number), *words)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
def attempt(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
def read(path):
    with open(path, 'rb') as file:
        return file.read(65536).decode(errors='replace')
answer = None
"""


def attack(env: nsbox.ExecutionEnvironment, code: str, **arguments: object) -> Any:
    """Run Python code inside; return what it has put into `answer`, by way of JSON.

    It finds `syscall(number, ...)` and `attempt(function, ...)`, which return the name of the
    error where there is one, `read(path)`, and its `arguments` as variables.
    """
    lines = [_PRELUDE, *(f"{name} = {value!r}" for name, value in arguments.items())]
    lines += [textwrap.dedent(code), "print('\\n@' + json.dumps(answer))"]
    result = env.run(["python3", "-I", "-S", "-c", "\n".join(lines)], timeout=60 * PATIENCE)
    assert result.ok, (result.outcome, result.evidence, result.stderr_text())
    return json.loads(result.text().rpartition("\n@")[2])


def is_over(pid: int) -> bool:
    """Whether a process is gone, or a zombie that waits for its parent."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True


def wait_until(condition: Callable[[], object], what: str, seconds: float = 5.0) -> None:
    """Return when `condition` holds; fail when it does not within `seconds`."""
    deadline = time.monotonic() + seconds * PATIENCE
    delay = 0.001
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds * PATIENCE:g} s: {what}"
        time.sleep(delay)
        delay = min(delay * 1.5, 0.05)


def host_program(code: str, *arguments: str, **popen: int) -> subprocess.Popen[bytes]:
    """Start a Python program outside that uses nsbox: another host."""
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [SOURCE, *_own_path()]))},
        **popen,
    )


def _own_path() -> list[str]:
    return os.environ.get("PYTHONPATH", "").split(os.pathsep)


def family_of(host: int) -> list[int]:
    """Return launcher, template, janitor and inits that a host has had made, by command line."""
    everything = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return sorted(pid for pid in everything if leaks.host_of(pid) == host)


def name_of(pid: int) -> str:
    """Return the name of a process, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def processes_with(mark: str) -> list[int]:
    """Return the processes that have `mark` in their command line: commands, seen from outside."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark.encode() in words:
                found.append(int(entry))
    return found


def dead_cgroups() -> list[str]:
    """Return the cgroup directories whose launcher is dead."""
    return sorted(leaks.cgroups(None))


def resident_bytes() -> int:
    """Return this process's resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def cgroup_feature(name: str) -> bool:
    """Whether environments here have this cgroup feature."""
    from nsbox.supervisor.launcher import get_launcher

    return "missing" not in get_launcher().hello.cgroups[name]
