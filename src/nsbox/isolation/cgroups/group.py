# SPDX-License-Identifier: Apache-2.0
"""The cgroup of one environment, in as many hierarchies as its limits need."""

from __future__ import annotations

import errno
import os
import select
import time

from nsbox.errors import EnvironmentStateError, SyscallError
from nsbox.isolation.cgroups import sweep
from nsbox.isolation.cgroups.files import read_text, write_text
from nsbox.isolation.cgroups.usage import UsageReader
from nsbox.isolation.cgroups.v1 import Freezer
from nsbox.isolation.cgroups.v2 import Unified
from nsbox.linux.binding import named
from nsbox.linux.questions import exists

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

FREEZE_SECONDS = 5.0


class EnvironmentCgroup:
    """The cgroup of one environment, made by `Tree.make`; never reused.

    Attributes:
        env_id: Its name below the launcher's directory.
        paths: {hierarchy: directory}: "unified" is the v2 one, any other name a v1 controller.
            JSON-able; `UsageReader` takes it.
        killed: Whether `kill` was called.
    """

    def __init__(
        self, env_id: str, paths: dict[str, str], tree_directories: Collection[str]
    ) -> None:
        self.env_id = env_id
        self.paths = paths
        self.killed = False
        self._tree_directories = tree_directories
        # Controllers mounted together (cpu,cpuacct) share a directory.
        self._v1 = list(dict.fromkeys(p for name, p in paths.items() if name != "unified"))
        self._unified = paths.get("unified")
        self._clone_fd = -1
        if self._unified is not None:
            try:
                flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                self._clone_fd = os.open(self._unified, flags)
            except OSError as error:
                raise SyscallError("open", error.errno or 0, self._unified) from None

    @property
    def can_freeze(self) -> bool:
        """Whether `freeze` has something to freeze with."""
        return self._freezes_unified() or "freezer" in self.paths

    @property
    def clone_fd(self) -> int:
        """Directory for ``clone3(CLONE_INTO_CGROUP)`` (5.7), -1 without v2; this object closes it.

        After `kill`: EnvironmentStateError. Kernel 6.18 kills every later child cloned into a
        cgroup whose ``cgroup.kill`` was written once.
        """
        self._require_unkilled()
        return self._clone_fd

    def attach(self, pid: int, *, unified: bool = False) -> None:
        """Move a process (all its threads) into the v1 hierarchies; `SyscallError` names the file.

        `unified` also moves it in v2, for a child not born there by ``CLONE_INTO_CGROUP``. Moving
        another process takes a system-wide lock in the kernel (an RCU grace period when it was
        not taken lately); `open_tasks` is the cheap way.
        """
        self._require_unkilled()
        for directory in self._v1:
            write_text(f"{directory}/cgroup.procs", str(pid))
        if unified and self._unified is not None:
            write_text(f"{self._unified}/cgroup.procs", str(pid))

    def open_tasks(self) -> list[int]:
        """Open the v1 ``tasks`` files; the caller closes them.

        A single-threaded child that writes ``b"0"`` to each moves itself: the kernel needs no
        lock over all threads then, and checks the credentials of who opened the file (5.16).
        """
        self._require_unkilled()
        opened: list[int] = []
        try:
            for directory in self._v1:
                opened.append(os.open(f"{directory}/tasks", os.O_WRONLY | os.O_CLOEXEC))
        except OSError as error:
            for descriptor in opened:
                os.close(descriptor)
            raise SyscallError("open", error.errno or 0, f"{directory}/tasks") from None
        return opened

    def freeze(self, timeout: float = FREEZE_SECONDS) -> None:
        """Stop every process; returns when all stand still.

        Raises:
            TimeoutError: Not all did within `timeout` seconds (one sleeps uninterruptibly).
            OSError: The kernel refused, or there is no freezer (ENOENT). Some may stand still by
                then: whatever the error, they are thawed again.
        """
        try:
            self._set_frozen(True, timeout)
        except OSError:
            self._set_frozen(False, timeout)
            raise

    def thaw(self, timeout: float = FREEZE_SECONDS) -> None:
        """Continue every process; errors as `freeze`."""
        self._set_frozen(False, timeout)

    def kill(self) -> bool:
        """Send SIGKILL to every process inside, frozen ones too; return whether there was any.

        At once and complete with ``cgroup.kill`` (v2, 5.14); else process by process, to be
        called again until it returns False.
        """
        self.killed = True
        found = False
        unified = [self._unified] if self._unified is not None else []
        # Every v1 hierarchy too: without cgroup.kill a process may be in one and not in another.
        for path in unified + self._v1:
            found = sweep.kill_processes(path) or found
            if path == self._unified and os.path.exists(f"{path}/cgroup.kill"):
                break
        return found

    def read_usage(self) -> dict[str, int | None]:
        """Return the counters of its whole life so far, as `UsageReader.read`."""
        return UsageReader(self.paths).read()

    def is_populated(self) -> bool:
        """Return whether any process is inside."""
        return any(sweep.is_populated(path) for path in self.paths.values())

    def try_remove(self) -> list[str]:
        """Remove the directories, children first, without waiting; return those that remain.

        A process that was killed but not reaped keeps them busy (EBUSY): call again later, with
        back-off up to `sweep.REMOVE_SECONDS`. Removing twice is fine. Raises ValueError, and
        removes nothing, when a path is not below this launcher's own directory.
        """
        paths = list(dict.fromkeys(self.paths.values()))
        for path in paths:
            sweep.check_environment_path(path, self._tree_directories)
        self.close()
        return [left for path in paths for left in sweep.remove_subtree(path)]

    def close(self) -> None:
        """Close the descriptor that this object owns."""
        if self._clone_fd >= 0:
            os.close(self._clone_fd)
            self._clone_fd = -1

    def oom_eventfd(self) -> int | None:
        """Return an eventfd that becomes readable when the memory limit is hit for good (v1).

        v1 kills one process, not the environment; who waits here can kill the rest. It also
        becomes readable when the directory is removed: believe `UsageReader.oom_kills`. None on
        v2, where ``memory.oom.group`` kills all. The caller closes it.
        """
        directory = self.paths.get("memory")
        if directory is None:
            return None
        event = named(os.eventfd, 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            control = os.open(f"{directory}/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
            try:
                write_text(f"{directory}/cgroup.event_control", f"{event} {control}")
            finally:
                os.close(control)
        except OSError:
            os.close(event)
            raise
        return event

    def _freezes_unified(self) -> bool:
        return self._unified is not None and exists(f"{self._unified}/cgroup.freeze")

    def _require_unkilled(self) -> None:
        if self.killed:
            raise EnvironmentStateError(
                f"cgroup {self.env_id} was killed; the kernel kills whatever enters it again"
            )

    def _set_frozen(self, frozen: bool, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if self._unified is not None and self._freezes_unified():
            Unified(self._unified).freeze = frozen
            _wait_frozen(self._unified, frozen, deadline)
        elif "freezer" in self.paths:
            _freeze_v1(self.paths["freezer"], frozen, deadline)
        else:
            raise SyscallError(
                "open", errno.ENOENT, f"{self._unified or self.env_id}/cgroup.freeze"
            )


def _wait_frozen(directory: str, frozen: bool, deadline: float) -> None:
    """Wait for ``frozen 0|1`` in ``cgroup.events``: the kernel signals a change with POLLPRI."""
    path = f"{directory}/cgroup.events"
    wanted = b"frozen 1" if frozen else b"frozen 0"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SyscallError("open", error.errno or 0, path) from None
    try:
        waiter = select.poll()
        waiter.register(descriptor, select.POLLPRI)
        # Reading arms the next POLLPRI, so a change between read and poll is not lost.
        while wanted not in os.pread(descriptor, 4096, 0):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"{path} does not say {wanted.decode()!r} in time")
            waiter.poll(left * 1000)
    finally:
        os.close(descriptor)


def _freeze_v1(directory: str, frozen: bool, deadline: float) -> None:
    wanted = "FROZEN" if frozen else "THAWED"
    files = Freezer(directory)
    delay = 0.0001
    while True:
        # Written again each time: FREEZING can stick until then (freezer-subsystem.rst).
        files.state = wanted
        if read_text(f"{directory}/freezer.state") == wanted:
            return
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{directory}/freezer.state is not {wanted} in time")
        time.sleep(delay)
        delay = min(delay * 2, 0.02)
