# SPDX-License-Identifier: Apache-2.0
"""Removal of cgroups: an environment's, a dead launcher's, and those without a living owner.

Everything here refuses, with ValueError, a path that is not named and placed as nsbox's own.
Nothing follows a symbolic link, and rmdir(2) on a cgroup removes no data and no process.
"""

from __future__ import annotations

import functools
import os
import signal
import time

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups.files import read_processes, read_text, write_text
from nsbox.isolation.cgroups.owner import Owner
from nsbox.isolation.cgroups.v2 import release_leaf
from nsbox.linux import proc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from nsbox.isolation.cgroups.locate import Hierarchies

REMOVE_SECONDS = 5.0
"""How long a removal may be retried: a killed task leaves its cgroup only when it is reaped or,
in uninterruptible sleep, when that ends (containers/common PR 858 waits as long)."""


def is_environment_name(name: str) -> bool:
    """Return whether `name` may name an environment's directory: letters, digits, ``-``, ``_``."""
    return (
        0 < len(name) <= 64 and name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    )


def check_environment_path(path: str, tree_directories: Collection[str]) -> None:
    """Raise ValueError unless `path` is an environment's directory right below one of ours."""
    parent, _, name = path.rpartition("/")
    if parent not in tree_directories or not is_environment_name(name):
        raise ValueError(f"{path!r} is not below this launcher's cgroup; not removed")
    check_tree_name(parent)


@functools.lru_cache(maxsize=32)  # a launcher has a few, and asks about each end of an environment
def check_tree_name(path: str) -> None:
    """Raise ValueError unless `path` is absolute, plain, and named as a launcher's directory."""
    if not path.startswith("/") or os.path.normpath(path) != path:
        raise ValueError(f"{path!r} is no plain absolute path; not removed")
    if Owner.parse(os.path.basename(path)) is None:
        raise ValueError(f"{path!r} is not named as a launcher's cgroup; not removed")


def check_tree_path(path: str) -> None:
    """Raise ValueError unless `path` is a launcher's cgroup directory, or is gone."""
    check_tree_name(path)
    if os.path.realpath(path) != path:
        raise ValueError(f"{path!r} leads through a symbolic link; not removed")
    if os.path.lexists(path) and not os.path.exists(f"{path}/cgroup.procs"):
        raise ValueError(f"{path!r} is no cgroup; not removed")


def remove_subtree(path: str) -> list[str]:
    """Remove one cgroup and those below it, children first; return what remains (EBUSY)."""
    try:
        os.rmdir(path)
        return []
    except FileNotFoundError:
        return []
    except OSError:
        pass  # it has children or processes
    remaining = [left for child in _children(path) for left in remove_subtree(child)]
    if not remaining:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            pass
        except OSError:
            remaining.append(path)
    return remaining


def remove_retrying(paths: Iterable[str], timeout: float = REMOVE_SECONDS) -> list[str]:
    """Remove cgroups, EBUSY retried with back-off up to `timeout` seconds; return what remains."""
    deadline = time.monotonic() + timeout
    delay = 0.001
    remaining = list(paths)
    while True:
        remaining = [path for path in remaining if remove_subtree(path)]
        left = deadline - time.monotonic()
        if not remaining or left <= 0:
            return remaining
        time.sleep(min(delay, left))
        delay = min(delay * 2, 0.1)


def is_populated(path: str) -> bool:
    """Return whether any process is in the cgroup or below it; True where it cannot be read."""
    try:
        return "populated 1" in read_text(f"{path}/cgroup.events")
    except SyscallError:
        pass  # v1 has no such file, and a v2 cgroup that is gone has no processes
    try:
        return any(read_processes(directory) for directory in walk(path))
    except SyscallError:
        return True


def walk(path: str) -> Iterator[str]:
    """Yield a cgroup and all below it, parents first."""
    yield path
    for child in _children(path):
        yield from walk(child)


def kill_processes(path: str) -> bool:
    """Kill every process in the cgroup and below it; return whether there was any.

    With ``cgroup.kill`` (5.14) the kernel does it at once, forks included. Else by pidfd, so that
    a reused pid is never hit, and to be called again until nothing is left.
    """
    try:
        populated = is_populated(path)
        write_text(f"{path}/cgroup.kill", "1")
        return populated
    except SyscallError:
        pass  # v1, or a v2 before 5.14
    found = False
    for directory in walk(path):
        found = _kill_one_by_one(directory) or found
        for name, thawed in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
            # A task frozen by v1 dies when it is thawed, not before.
            try:
                write_text(f"{directory}/{name}", thawed)
            except SyscallError:
                continue  # no such file in this hierarchy, or the cgroup is gone
    return found


def collect_garbage(hierarchies: Hierarchies, timeout: float = REMOVE_SECONDS) -> list[str]:
    """Remove what dead launchers left in the own cgroup; return the removed paths.

    Judged by pid, start time, pid namespace and boot id (`Owner.is_dead`). The processes of a dead
    launcher's environments end by themselves, unless they were frozen: a frozen process neither
    sees that its launcher is gone nor dies of a signal. Those are killed and thawed, and nothing
    else is (`_is_orphaned`): a directory with any other process is left alone.
    """
    dead: dict[str, list[str]] = {}
    for base in hierarchies.bases:
        for path in _children(base):
            owner = Owner.parse(os.path.basename(path))
            if owner is not None and owner.is_dead():
                check_tree_path(path)
                dead.setdefault(owner.name, []).append(path)
    empty: list[str] = []
    orphaned: list[str] = []
    for name, paths in dead.items():
        populated = [path for path in paths if is_populated(path)]
        empty += [path for path in paths if path not in populated]
        # All of an owner's directories or none: a process is in several hierarchies at once.
        if all(_is_orphaned(path, name) for path in populated):
            orphaned += populated
    removed = [path for path in empty if not remove_subtree(path)]
    remaining = _kill_and_remove(orphaned, timeout)
    return removed + [path for path in orphaned if path not in remaining]


def _is_orphaned(path: str, name: str) -> bool:
    """Return whether every process in a dead owner's directory is certainly one it has left.

    Start times differ between time namespaces (time_namespaces(7)), so that from another one a
    live owner looks dead. But every live environment has a child of its launcher in it: PID 1.
    """
    owner = Owner.parse(name)
    if owner is None or not owner.is_of_this_boot_and_namespace():
        return False  # its pid means nothing here
    for directory in walk(path):
        for process in read_processes(directory):
            if process == 0:
                return False  # of a pid namespace outside ours: not to be judged from here
            try:
                parent = proc.read_stat(process).ppid
            except OSError:
                continue  # it has ended
            if parent == owner.pid:
                return False
    return True


def remove_tree_after(paths: Iterable[str], timeout: float = REMOVE_SECONDS) -> list[str]:
    """Kill what is left in a dead launcher's directories and remove them; return what remains.

    For the janitor, which knows that the owner is gone. Blocks up to `timeout` seconds.
    """
    trees = list(paths)
    for path in trees:
        check_tree_path(path)
    remaining = _kill_and_remove(trees, timeout)
    for base in dict.fromkeys(os.path.dirname(path) for path in trees):
        if os.path.exists(f"{base}/cgroup.subtree_control"):
            release_leaf(base)
    return remaining


def _kill_and_remove(trees: list[str], timeout: float) -> list[str]:
    deadline = time.monotonic() + timeout
    delay = 0.001
    remaining = trees
    while remaining:
        for path in remaining:
            try:
                kill_processes(path)
            except OSError:
                continue  # it was removed meanwhile, by another janitor or a sweep
        remaining = remove_retrying(remaining, min(delay, max(0.0, deadline - time.monotonic())))
        if time.monotonic() >= deadline:
            break
        delay = min(delay * 2, 0.25)
    return remaining


def _children(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def _kill_one_by_one(directory: str) -> bool:
    handles: dict[int, int] = {}
    try:
        for process in read_processes(directory):
            if process:
                try:
                    handles[process] = os.pidfd_open(process)
                except OSError:
                    continue  # it ended
        # Still in the cgroup, so the handle is of the process that was listed.
        for process in read_processes(directory):
            if process in handles:
                try:
                    signal.pidfd_send_signal(handles[process], signal.SIGKILL)
                except OSError:
                    continue
    finally:
        for handle in handles.values():
            os.close(handle)
    return bool(handles)
