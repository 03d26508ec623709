# SPDX-License-Identifier: Apache-2.0
"""What nsbox may leave behind, as a value that can be taken before a test and compared after it.

Other programs and other test sessions run on the same machine: only what is certainly ours counts,
by descent from this process, by nsbox's names together with a dead owner, or by place.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nsbox.supervisor.launcher import Launcher

import nsbox

_MAIN = {
    os.fsencode(os.path.join(os.path.dirname(find(nsbox.__file__)), "launcher", "main.py"))
    for find in (os.path.abspath, os.path.realpath)
}
"""Entry point of the launchers of this session and of the hosts that it starts."""
_OUR_NAME = re.compile(r"nsbox-(launcher|template|janitor|[0-9a-f]{8})")
_TEMPLATES_OF_FUNCTIONS = 4
"""Templates kept for functions at most (nsbox.launcher.server)."""
_CGROUP_ROOT = "/sys/fs/cgroup"

Snapshot = dict[str, frozenset[str]]


def current_launcher() -> Launcher | None:
    """Return the launcher of this process, or None; never starts one."""
    client = sys.modules.get("nsbox.supervisor.launcher")
    launcher: Launcher | None = None if client is None else client._holder._launcher
    return launcher


def snapshot(temporary: str) -> Snapshot:
    """Return all that there is now; `temporary` is this session's own directory for such files.

    It reads the whole of /proc: 16 ms and more, as many as there are processes.
    """
    launcher = current_launcher()
    everything = processes()
    return own(temporary) | {
        "mounts": _lines("/proc/self/mountinfo"),
        "mounts of the launcher": _launcher_mounts(launcher),
        "cgroups": cgroups(launcher),
        "processes": _leaked_processes(everything, launcher),
        "sockets": _sockets(everything),
        "stray files": frozenset(_stray_files()),
    }


def own(temporary: str) -> Snapshot:
    """Return what this process and its launcher have now: descriptors, children, threads, files.

    It is asked before and after every test: some tens of system calls.
    """
    launcher = current_launcher()
    of_launcher = [] if launcher is None else children(launcher.pid)
    return {
        "descriptors": _descriptors(launcher),
        "descriptors of the launcher": _launcher_descriptors(launcher, of_launcher),
        "children": _leaked_children(launcher, of_launcher),
        "own cgroups": frozenset(_own_cgroups(launcher)),
        "temporary files": frozenset(_names(temporary)),
        "threads": _threads(),
    }


def difference(before: Snapshot, after: Snapshot) -> dict[str, list[str]]:
    """Return what is there now and was not before, by kind."""
    found = {kind: sorted(after[kind] - before[kind]) for kind in after}
    return {kind: items for kind, items in found.items() if items}


def await_clean(
    before: Snapshot, look: Callable[[], Snapshot], grace: float
) -> dict[str, list[str]]:
    """Wait for the teardown of what has been let go; return what of it `look` still sees.

    `grace` is the time in seconds that the asynchronous teardown may take (`run()` answers first
    and removes after).

    What other programs do meanwhile comes and goes: only what was there at every look counts. What
    only Python's collector of cycles frees, an exception with its frames, is collected after half
    of that time.
    """
    launcher = current_launcher()
    if launcher is not None and not launcher.alive:
        sys.modules["nsbox.supervisor.launcher"].shutdown()
    begin = time.monotonic()
    is_collected = False
    leaked = difference(before, look())
    delay = 0.002
    while leaked and (passed := time.monotonic() - begin) < grace:
        if passed > grace / 2 and not is_collected:
            is_collected = True
            gc.collect()
        time.sleep(delay)
        delay = min(delay * 2, 0.1)
        again = difference(before, look())
        leaked = {
            kind: [item for item in items if item in again.get(kind, ())]
            for kind, items in leaked.items()
            if again.get(kind)
        }
        leaked = {kind: items for kind, items in leaked.items() if items}
    return leaked


def _lines(path: str) -> frozenset[str]:
    try:
        with open(path) as file:
            return frozenset(file)
    except OSError:
        return frozenset()


def _names(path: str) -> list[str]:
    try:
        return [f"{path}/{name}" for name in os.listdir(path)]
    except FileNotFoundError:
        return []


def _descriptors(launcher: Launcher | None) -> frozenset[str]:
    own: set[int] = set()
    if launcher is not None:
        sockets = {launcher._channel.fileno(), launcher._requests.fileno()}
        own = {*sockets, launcher._done.fileno(), launcher._pidfd.fileno()}
    found = set()
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in own:
            try:
                found.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
            except FileNotFoundError:
                continue  # the descriptor of the listing itself
    return frozenset(found)


def _launcher_mounts(launcher: Launcher | None) -> frozenset[str]:
    """Say how many mounts more than the host the launcher has: none, between births."""
    if launcher is None:
        return frozenset()

    ours = len(_lines("/proc/self/mountinfo"))
    theirs = len(_lines(f"/proc/{launcher.pid}/mountinfo"))
    # Another program may mount or unmount something meanwhile, which the launcher sees too.
    return frozenset([f"{theirs} and not {ours}"]) if theirs > ours else frozenset()


def _launcher_descriptors(launcher: Launcher | None, of_launcher: list[_Process]) -> frozenset[str]:
    """Return kinds and counts of the launcher's open files, without what it keeps on purpose."""
    if launcher is None:
        return frozenset()
    templates = sum(process.name == "nsbox-template" for process in of_launcher)
    directory = f"/proc/{launcher.pid}/fd"
    links = []
    try:
        for name in os.listdir(directory):
            links.append(os.readlink(f"{directory}/{name}"))
    except OSError:
        return frozenset()  # not dumpable, and this user may not look; or it has ended
    # Layouts (mnt) and ready network namespaces (net) are kept; the rest is what it began with:
    # its sockets to the host and each template, the lock on its ids, the pidfd of the host,
    # epoll, a signalfd, the lifeline, the done pipe, 0 to 2.
    sockets = sum(link.startswith("socket:") for link in links)
    pidfds = sum("pidfd" in link for link in links)
    found = []
    if sockets > 3 + templates:
        found.append(f"{sockets} sockets, {templates} templates")
    if pidfds > 1:
        found.append(f"{pidfds} pidfds")
    namespaces = sum(link.startswith(("mnt:", "net:")) for link in links)
    if namespaces > 2 + 8 + 4:
        found.append(f"{namespaces} namespaces")
    return frozenset(found)


def cgroups(launcher: Launcher | None) -> frozenset[str]:
    """Return directories of environments of our launcher, and those whose launcher is dead."""
    found = set(_own_cgroups(launcher))
    bases = cgroup_bases()
    if launcher is not None:
        bases |= {os.path.dirname(tree) for tree in launcher.hello.trees.values()}
    for base in bases:
        for entry in _directories(base):
            is_owned = entry.startswith("nsbox.") and entry.count(".") == 4
            if is_owned and _is_dead(entry) and _is_mine(f"{base}/{entry}"):
                found.add(f"{base}/{entry}")
    return frozenset(found)


def _is_mine(path: str) -> bool:
    try:
        return os.stat(path).st_uid == os.geteuid()  # another user's session has its own check
    except FileNotFoundError:
        return False


def _own_cgroups(launcher: Launcher | None) -> list[str]:
    found = []
    for tree in set() if launcher is None else set(launcher.hello.trees.values()):
        try:
            found += [entry.path for entry in os.scandir(tree) if entry.is_dir()]
        except FileNotFoundError:
            continue  # it has just ended
    return found


_bases: set[str] | None = None


def cgroup_bases() -> set[str]:
    """Return this process's cgroup directories, where launchers make theirs."""
    global _bases  # noqa: PLW0603 - asked often, and never changes
    if _bases is None:
        _bases = set()
        with open("/proc/self/cgroup") as file:
            for line in file:
                _, controllers, path = line.rstrip("\n").split(":", 2)
                for mount in ("unified", "") if not controllers else controllers.split(","):
                    base = f"{_CGROUP_ROOT}/{mount}{path}".rstrip("/")
                    if os.path.exists(f"{base}/cgroup.procs"):
                        # A user's processes are moved to a leaf, and directories are made beside.
                        _bases.add(base.removesuffix("/nsbox.host"))
    return set(_bases)


def _directories(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _is_dead(name: str) -> bool:
    from nsbox.isolation.cgroups import Owner

    owner = Owner.parse(name)
    return owner is not None and owner.is_dead()


class _Process:
    __slots__ = ("name", "parent", "pid", "state")

    def __init__(self, pid: int, name: str, state: str, parent: int) -> None:
        self.pid, self.name, self.state, self.parent = pid, name, state, parent


def _process(pid: int | str) -> _Process | None:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            text = file.read(512).decode(errors="replace")
    except OSError:
        return None
    name = text[text.index("(") + 1 : text.rindex(")")]
    state, parent = text[text.rindex(")") + 2 :].split(" ", 2)[:2]
    return _Process(int(pid), name, state, int(parent))


def processes() -> dict[int, _Process]:
    """Return every process of the machine that this user can see, by pid."""
    found = (_process(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return {process.pid: process for process in found if process is not None}


def children(pid: int) -> list[_Process]:
    """Return a process's children as the kernel lists them, for each of its threads."""
    found = []
    for thread in _directories(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                found += [_process(child.decode()) for child in file.read(65536).split()]
        except OSError:
            continue  # it has just ended
    return [process for process in found if process is not None]


def _words_of(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []


def _is_ours(process: _Process) -> bool:
    """Whether it is a launcher, or a clone of one, of the nsbox under test and not of another."""
    return not _MAIN.isdisjoint(_words_of(process.pid))


def host_of(pid: int) -> int:
    """Return the pid of the host that a launcher, or what it has had made, belongs to; else 0."""
    words = _words_of(pid)
    is_ours = len(words) > 5 and words[3].endswith(b"/nsbox/launcher/main.py")
    return int(words[5]) if is_ours else 0


def _label(process: _Process) -> str:
    return f"{process.pid} {process.name}"  # its state may be another at the next look


def _leaked_children(launcher: Launcher | None, of_launcher: list[_Process]) -> frozenset[str]:
    """Return children of this process and of its launcher, without what it keeps on purpose."""
    # One template for commands, and some for functions, by what they have preloaded.
    helpers = ["nsbox-janitor", *["nsbox-template"] * (1 + _TEMPLATES_OF_FUNCTIONS)]
    found = {_label(p) for p in children(os.getpid()) if launcher is None or p.pid != launcher.pid}
    for process in of_launcher:
        if process.name in helpers:
            helpers.remove(process.name)  # no clone that was never renamed
        else:
            found.add(_label(process))
    return frozenset(found)


def _leaked_processes(
    all_of_them: dict[int, _Process], launcher: Launcher | None
) -> frozenset[str]:
    """Return nsbox's processes without an owner, whoever started them."""
    mine = {os.getpid(), 0 if launcher is None else launcher.pid}
    found = set()
    for process in all_of_them.values():
        # A zombie that is nobody's child here waits for the machine's own init to reap it.
        if process.parent in mine or process.state == "Z" or not _OUR_NAME.fullmatch(process.name):
            continue
        parent = all_of_them.get(process.parent)
        if process.name == "nsbox-launcher":
            orphan = process.parent != host_of(process.pid) and not (
                # A clone of a launcher on its way to being an environment or a janitor.
                parent is not None and parent.name == "nsbox-launcher"
            )
        else:
            orphan = parent is None or parent.name != "nsbox-launcher"
        if orphan and _is_ours(process):
            found.add(_label(process))
    return frozenset(found)


def _sockets(all_of_them: dict[int, _Process]) -> frozenset[str]:
    """Return named sockets of nsbox: only each launcher's lock on its block of ids may be there."""
    launchers = sum(process.name == "nsbox-launcher" for process in all_of_them.values())
    names = [line.split()[7] for line in _lines("/proc/net/unix") if "nsbox" in line]
    # User-Mode Linux of CI's other lane keeps its management console there.
    names = [name for name in names if "/nsbox-uml-" not in name]
    locks = [name for name in names if name.startswith("@nsbox/ids/")]
    others = [name for name in names if not name.startswith("@nsbox/ids/")]
    if len(locks) > launchers:
        others.append(f"{len(locks)} id locks of {launchers} launchers")
    return frozenset(others)


_STRAY = re.compile(r"\.?nsbox[-._]?[0-9a-f]{8}")


def _stray_files() -> list[str]:
    return [
        f"{place}/{name}"
        for place in ("/tmp", "/dev/shm", "/run", "/var/tmp")
        for name in _directories(place)
        if _STRAY.fullmatch(name)
    ]


def _threads() -> frozenset[str]:
    names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
    return frozenset(f"{tid} {names.get(tid, '')}" for tid in os.listdir("/proc/self/task"))
