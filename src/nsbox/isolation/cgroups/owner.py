# SPDX-License-Identifier: Apache-2.0
"""The owner of a cgroup directory, which its name states, and whether that process lives.

``nsbox.<pid>.<start time>.<pid namespace inode>.<first 8 of the boot id>``: a pid alone is reused;
with its start time (proc_pid_stat(5), field 22, clock ticks since boot) and the boot it is not.
"""

from __future__ import annotations

import os

from nsbox.linux import proc

PREFIX = "nsbox."
HOST_LEAF = "nsbox.host"
"""The leaf that the processes of a delegated v2 cgroup are moved to."""


class Owner:
    """The launcher that owns a directory. `name` is the directory's name."""

    __slots__ = ("boot", "namespace", "pid", "start_time")

    def __init__(self, pid: int, start_time: int, namespace: int, boot: str) -> None:
        self.pid = pid
        self.start_time = start_time
        self.namespace = namespace
        self.boot = boot

    @classmethod
    def current(cls) -> Owner:
        """Return the owner that this process is."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Owner:
        """Return the owner that a process of this pid namespace is; `OSError` when it is gone."""
        process = "self" if pid == os.getpid() else pid
        return cls(pid, proc.read_stat(process).starttime, _namespace(), proc.boot_id()[:8])

    @classmethod
    def parse(cls, name: str) -> Owner | None:
        """Return the owner a directory name states, or None when it is no such name exactly."""
        parts = name.split(".")
        if len(parts) != 5 or parts[0] != "nsbox":
            return None
        numbers = parts[1:4]
        for word in numbers:
            # "007", "+7" and other digits would come out of int() as somebody else's name.
            if not (word.isascii() and word.isdigit()) or word != str(int(word)):
                return None
        boot = parts[4]
        if len(boot) != 8 or boot.strip("0123456789abcdef"):
            return None
        return cls(int(numbers[0]), int(numbers[1]), int(numbers[2]), boot)

    @property
    def name(self) -> str:
        """The name of the owner's directories."""
        return f"{PREFIX}{self.pid}.{self.start_time}.{self.namespace}.{self.boot}"

    def is_dead(self) -> bool:
        """Return True only when it is certain that the owner is gone.

        Owners of another pid namespace cannot be judged from here: False. An owner of an earlier
        boot is dead.
        """
        if self.boot != proc.boot_id()[:8]:
            return True
        if self.namespace != _namespace() or self.pid == 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody's process: the start time tells whether it is the owner
        try:
            if os.readlink("/proc/self") != str(os.getpid()):
                return False  # this /proc is another pid namespace's
        except OSError:
            return False
        try:
            found = proc.read_stat(self.pid)
        except (OSError, ValueError):  # hidepid=, or it ended just now: a later sweep will know
            return False
        return found.starttime != self.start_time or found.state in ("Z", "X")

    def is_of_this_boot_and_namespace(self) -> bool:
        """Return whether its pid is one of this boot, and of this process's pid namespace."""
        return self.boot == proc.boot_id()[:8] and self.namespace == _namespace()

    def __repr__(self) -> str:
        return f"Owner({self.name!r})"


def _namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino
