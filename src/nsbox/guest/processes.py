# SPDX-License-Identifier: Apache-2.0
"""The other processes of PID 1's namespace: listing, counting, inherited settings, killing.

/proc is read by system calls alone: each of Python's file objects makes six more.
"""

from __future__ import annotations

import errno
import os
import select

from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container, Iterable

MOST_HELD = 256
"""More descriptors than are ever `held`."""
_DEATH_DEADLINE = 1000  # milliseconds a killed process may take to end
_THREADS = 17  # field of /proc/PID/stat behind the name (proc(5), num_threads)
_OUTSIDE = -1  # what stands for a parent outside of the namespace
_ONE_THREAD = 3  # links of /proc/PID/task: two of a directory, and one for each thread
_ENOUGH = 4096  # bytes; a stat has some 300
_NETWORK = "/proc/self/ns/net"
_FIRST_LINE = 32  # bytes of "sockets: used NUMBER", and of what comes next
_loadavg: list[int] = []  # the descriptor of /proc/loadavg, once it has been read
_TUNABLE = ("oom_score_adj", "coredump_filter", "autogroup")
"""Files of /proc/PID that their owner can write without a capability (proc(5)). That is the root of
the user namespace in which the process has executed a program: where a user has one id alone, the
templates of functions have executed in one whose root has the id of everybody inside."""
_sockstat: list[int] = []  # the descriptor of /proc/net/sockstat, likewise; none where it is shared
_network: list[int] = []  # that of the process that others are cloned from, by inode
_as_born: dict[str, bytes] = {}  # what `_TUNABLE` have in a clone
_tunable: dict[int, list[tuple[str, int]]] = {}  # descriptors of a process's own, once looked at


def others(kept: Container[int]) -> list[int]:
    """Return the pids of all running processes of the namespace but those in `kept`."""
    return [pid for pid in _pids() if pid not in kept and not _status_of(pid)[1]]


def strays(commands: Container[int], alone: int = 0) -> list[int]:
    """Return the pids of processes that descend from none of the running `commands`.

    /proc is listed first, and then each process is looked at: one that has a child behind the list
    and ends before its turn is not seen, nor is its child. But what descends from no command
    descends from a child of PID 1, the reaper of orphans, which stays in /proc until PID 1 waits
    for it. So children of PID 1 that have ended count, too: where there are none, nobody is missed.

    Orphans of a command that still runs count as well: nobody can tell whose they are, and what a
    finished command leaves must not live on.

    Args:
        commands: Their pids.
        alone: One of them whose descendants are returned as well. A first list may miss some of
            those; a second one does not, for they are orphans by then.
    """
    parents: dict[int, int] = {}
    found = []
    for pid in _pids():
        parent, has_ended, _ = _status_of(pid)
        if not has_ended:
            parents[pid] = parent
        elif parent == 1 and pid not in commands:
            found.append(pid)
    for pid in parents:
        ancestor = pid
        while ancestor not in commands and ancestor > 1:
            ancestor = parents.get(ancestor, 0)
        is_of_command = ancestor in commands and (ancestor != alone or pid == alone)
        if not is_of_command and pid != 1:
            found.append(pid)
    return found


def is_alone(worker: int, commands: Container[int]) -> bool:
    """Whether a worker has one thread and no child, and PID 1 no child but `commands`.

    A list of children is read from its beginning, and of PID 1's nobody is removed meanwhile: an
    empty one, and PID 1's, are exact. They are read in this order, since what the worker's
    children leave becomes PID 1's. Where the kernel has no such lists (CONFIG_PROC_CHILDREN), or
    not just these are in them, `strays` has to look.
    """
    try:
        if os.stat(f"/proc/{worker}/task").st_nlink != _ONE_THREAD or _read(
            f"/proc/{worker}/task/{worker}/children"
        ):
            return False
        own = _read("/proc/1/task/1/children")
    except OSError:
        return False
    return len(own) < _ENOUGH and all(int(word) in commands for word in own.split())


def threads_of(pids: Iterable[int]) -> int:
    """Return the number of threads of processes, without the first of each."""
    return sum(max(0, _status_of(pid)[2] - 1) for pid in pids)


def newest() -> bytes:
    """Return the pid that the namespace has assigned last (proc(5), loadavg), in digits."""
    if not _loadavg:
        _loadavg.append(os.open("/proc/loadavg", os.O_RDONLY | os.O_CLOEXEC))
    return os.pread(_loadavg[0], _ENOUGH, 0).split()[-1]


def sockets() -> int:
    """Return how many sockets the network namespace has, of any kind; 0 where it is the host's."""
    if not _sockstat:
        if not _network:
            return 0
        if _network.pop() == os.stat(_NETWORK).st_ino:
            return 0
        _sockstat.append(os.open("/proc/net/sockstat", os.O_RDONLY | os.O_CLOEXEC))
    return int(os.pread(_sockstat[0], _FIRST_LINE, 0).split(None, 3)[2])


def unix_sockets() -> int:
    """Return how many Unix sockets of those there are."""
    with open("/proc/net/unix", "rb", 0) as file:
        return file.readall().count(b"\n") - 1


def remember_born() -> None:
    """Read, in the template, the values that `is_tuned` and `sockets` compare with."""
    _network.append(os.stat(_NETWORK).st_ino)
    for name, fd in _open_tunable("self"):
        _as_born[name] = _tuning(fd, name)
        os.close(fd)


def is_tuned(pid: int) -> bool:
    """Whether a file of `_TUNABLE` of a process has another value than in the template.

    Raises:
        ProcessLookupError: The process has ended.
    """
    files = _tunable.get(pid)
    if files is None:
        try:
            is_own = os.stat(f"/proc/{pid}/{_TUNABLE[0]}").st_uid == os.geteuid()
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from error
        files = _tunable[pid] = _open_tunable(str(pid)) if is_own else []
    return any(_tuning(fd, name) != _as_born.get(name) for name, fd in files)


def held() -> int:
    """Return the number of descriptors that this module keeps open."""
    return len(_loadavg) + len(_sockstat) + sum(map(len, _tunable.values()))


def _open_tunable(process: str) -> list[tuple[str, int]]:
    found = []
    for name in _TUNABLE:
        try:
            fd = os.open(f"/proc/{process}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the kernel has none
        found.append((name, fd))
    return found


def _tuning(fd: int, name: str) -> bytes:
    """Return what a file says; of an autogroup, which each session has, the nice value."""
    text = os.pread(fd, _ENOUGH, 0)
    if not text:  # its memory is gone already
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    return text.partition(b" ")[2] if name == "autogroup" else text


def end_all(pids: list[int]) -> None:
    """SIGKILL processes and wait until each has ended, up to `_DEATH_DEADLINE`."""
    for pid in pids:
        try:
            send_signal(pid, c.SIGKILL)
        except OSError:
            pass  # the next pass finds it again
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue  # it has ended, or there is no room: the next pass looks again
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(_DEATH_DEADLINE)
        finally:
            os.close(fd)


def send_signal(pid: int, number: int) -> None:
    """kill(2); does nothing when the process has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended, and SIGCHLD is pending


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def _status_of(pid: int) -> tuple[int, bool, int]:
    """Return parent, whether it has ended, and number of threads; 0, True, 0 of what is gone.

    A process whose first thread has ended is in state Z while its other threads run: the kernel
    tells of its end, and drops it, after the last of them (proc(5), wait(2)).
    """
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    except OSError:
        return 0, True, 0
    threads = int(fields[_THREADS])
    has_ended = fields[0] in (b"Z", b"X") and threads <= 1
    return int(fields[1]) or _OUTSIDE, has_ended, threads


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _ENOUGH)
    finally:
        os.close(fd)
