# SPDX-License-Identifier: Apache-2.0
"""``nsbox ps``: the live environments of this user, read from the process table."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any, Final

import click

from nsbox.linux import proc

_LAUNCHER: Final = "nsbox-launcher"
_ENVIRONMENT: Final = re.compile(r"nsbox-([0-9a-f]{8})")
# Root and mount point of a line of mountinfo (proc(5)).
_CODE: Final = re.compile(rb" \S*/sha256-([0-9a-f]{12})[0-9a-f]*/\S* /var/task ")
_USAGE: Final = re.compile(r"^usage_usec (\d+)", re.MULTILINE)
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_COLUMNS: Final = (
    ("ID", "id"),
    ("STATE", "state"),
    ("PID", "pid"),
    ("PROCS", "processes"),
    ("MEMORY", "memory_bytes"),
    ("CPU", "cpu_seconds"),
    ("AGE", "age_seconds"),
    ("LAUNCHER", "launcher_pid"),
    ("HOST", "host"),
    ("UID", "uid"),
)


@click.command("ps")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def ps_command(as_json: bool) -> int:
    """List the live environments of this user; as root, of all users."""
    found = sorted(live_environments(), key=lambda entry: -entry["age_seconds"])
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return 0
    rows = [[title for title, _ in _COLUMNS]]
    rows += [[_cell(entry, key) for _, key in _COLUMNS] for entry in found]
    click.echo("\n".join(format_rows(rows)))
    return 0


def format_rows(rows: list[list[str]]) -> list[str]:
    """Return rows of cells as lines with columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(text.ljust(width) for text, width in cells).rstrip())
    return lines


class _Process:
    """A row of the process table: what every process of the host costs one small read for."""

    __slots__ = ("name", "pid", "ppid", "state", "text")

    def __init__(self, pid: int, text: str) -> None:
        self.pid = pid
        self.text = text  # of /proc/PID/stat: most of it is of interest for few
        end = text.rindex(")")
        self.name = text[text.index("(") + 1 : end]
        self.state, parent = text[end + 2 :].split(" ", 2)[:2]
        self.ppid = int(parent)


def _processes() -> dict[int, _Process]:
    found = {}
    proc_fd = os.open("/proc", _DIRECTORY)
    try:
        for name in os.listdir(proc_fd):
            if name.isdigit():
                text = _read(f"{name}/stat", proc_fd)
                if text:
                    found[int(name)] = _Process(int(name), text)
    finally:
        os.close(proc_fd)
    return found


def _read(path: str, directory: int) -> str:
    """Return the beginning of a small file, "" when it is gone or not shown to this user."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return os.fsdecode(os.read(fd, 4096))
        finally:
            os.close(fd)
    except OSError:
        return ""


class _Accounts:
    """The control files of the environments of one launcher, which has their cgroups side by side.

    Only what is shown is read, from the hierarchies that this user can see.
    """

    def __init__(self) -> None:
        self._directories: dict[str, int] | None = None  # by hierarchy; None: not looked for

    def locate(self, pid: int, env_id: str, mounts: list[proc.MountInfo]) -> None:
        """Find the directories by those of one environment, unless they are known."""
        if self._directories is None:
            with contextlib.suppress(OSError):  # it has just ended: the next one tells
                found = _cgroup_base(pid, env_id, mounts)
                self._directories = {
                    name: os.open(directory, _DIRECTORY) for name, directory in found.items()
                }

    def close(self) -> None:
        """Close the directories."""
        for fd in (self._directories or {}).values():
            os.close(fd)
        self._directories = None

    def _text(self, hierarchy: str, env_id: str, file: str) -> str:
        directory = (self._directories or {}).get(hierarchy)
        return "" if directory is None else _read(f"{env_id}/{file}", directory)

    def memory(self, env_id: str) -> int | None:
        """Bytes in use."""
        text = self._text("memory", env_id, "memory.usage_in_bytes")
        text = text or self._text("unified", env_id, "memory.current")
        return int(text) if text else None

    def cpu_seconds(self, env_id: str) -> float | None:
        """CPU time so far."""
        if text := self._text("cpuacct", env_id, "cpuacct.usage"):
            return int(text) / 1e9
        match = _USAGE.search(self._text("unified", env_id, "cpu.stat"))
        return None if match is None else int(match[1]) / 1e6

    def is_frozen(self, env_id: str) -> bool:
        """Whether its cgroup is frozen. A cgroup v2 before Linux 5.2 has no such line."""
        text = self._text("unified", env_id, "cgroup.events")
        if "frozen " in text:
            return "frozen 1" in text
        return "FROZEN" in self._text("freezer", env_id, "freezer.state")


class _Environment:
    """A live environment.

    Attributes:
        id: Its id.
        processes: Its processes, PID 1 first.
        launcher: Its launcher.
        host: The program that uses it; None: it has ended.
        uid: The user id of that.
        accounts: Counters of cgroups, by environment.
    """

    __slots__ = ("accounts", "host", "id", "launcher", "processes", "uid")

    def __init__(
        self,
        env_id: str,
        processes: list[_Process],
        launcher: _Process,
        host: _Process | None,
        uid: int,
        accounts: _Accounts,
    ) -> None:
        self.id = env_id
        self.processes = processes
        self.launcher = launcher
        self.host = host
        self.uid = uid
        self.accounts = accounts

    def cpu_seconds(self) -> float:
        counted = self.accounts.cpu_seconds(self.id)
        return sum(map(_cpu_time, self.processes)) if counted is None else counted

    def describe(self) -> dict[str, Any]:
        init, memory = self.processes[0], self.accounts.memory(self.id)
        started = proc.parse_stat(init.text).starttime / _TICKS
        is_frozen = self.accounts.is_frozen(self.id) or init.state == "T"
        return {
            "id": self.id,
            "pid": init.pid,
            "launcher_pid": self.launcher.pid,
            "host_pid": None if self.host is None else self.host.pid,
            "host_program": None if self.host is None else self.host.name,
            "uid": self.uid,
            "state": "frozen" if is_frozen else "running",
            "processes": len(self.processes),
            "memory_bytes": sum(map(_resident, self.processes)) if memory is None else memory,
            "cpu_seconds": self.cpu_seconds(),
            "age_seconds": round(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started), 3),
        }


def live_environments() -> Iterator[dict[str, Any]]:
    """Yield what is known about each live environment; ends of them meanwhile are left out."""
    for environment in _look():
        yield environment.describe()


def cpu_seconds() -> Iterator[tuple[str, int, float]]:
    """Yield id, PID 1 and CPU time of each live environment: all that a rate begins with."""
    for environment in _look():
        yield environment.id, environment.processes[0].pid, environment.cpu_seconds()


def _look() -> Iterator[_Environment]:
    mounts = [mount for mount in proc.read_mountinfo() if mount.fstype in ("cgroup", "cgroup2")]
    own, everyone = os.getuid(), os.geteuid() == 0
    processes = _processes()
    children: dict[int, list[_Process]] = {}
    for process in processes.values():
        children.setdefault(process.ppid, []).append(process)
    for launcher in [process for process in processes.values() if process.name == _LAUNCHER]:
        try:
            uid = int(proc.read_status(launcher.pid)["Uid"].split()[0])
        except OSError:
            continue  # it has ended, or /proc is mounted with hidepid=
        # A process can give itself any name, but not other ancestors: guests that call
        # themselves nsbox-launcher and nsbox-... are below their environment's PID 1.
        if not (everyone or uid == own) or _is_inside(launcher, processes):
            continue
        host = processes.get(launcher.ppid)
        with contextlib.closing(_Accounts()) as accounts:
            for child in children.get(launcher.pid, ()):
                match = _ENVIRONMENT.fullmatch(child.name)
                if match is not None:
                    accounts.locate(child.pid, match[1], mounts)
                    below = _with_descendants(child, children)
                    yield _Environment(match[1], below, launcher, host, uid, accounts)


def _is_inside(process: _Process, processes: dict[int, _Process]) -> bool:
    """Whether a process is below one that has the name of an environment."""
    seen = {process.pid}
    while (above := processes.get(process.ppid)) is not None and above.pid not in seen:
        if _ENVIRONMENT.fullmatch(above.name):
            return True
        seen.add(above.pid)
        process = above
    return False


def _with_descendants(process: _Process, children: dict[int, list[_Process]]) -> list[_Process]:
    """Return a process and all below it. How deep they are nested is the guest's choice."""
    found = {process.pid: process}
    waiting = [process.pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            # Pids reused while the table was read could make a ring.
            if child.pid not in found:
                found[child.pid] = child
                waiting.append(child.pid)
    return list(found.values())


def code_of(pid: int) -> str:
    """Return the first digits of the digest of the code that an environment's PID 1 has bound.

    Empty: it has none, or the host does not show it to this user (proc_pid_mountinfo(5)).
    """
    data = b""
    try:
        fd = os.open(f"/proc/{pid}/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Code is bound after most else, but mostly all fits into one piece.
            while (match := _CODE.search(data)) is None and (more := os.read(fd, 1 << 16)):
                data += more
        finally:
            os.close(fd)
    except OSError:
        return ""
    return match[1].decode() if match is not None else ""


def _resident(process: _Process) -> int:
    return proc.parse_stat(process.text).rss * os.sysconf("SC_PAGE_SIZE")


def _cpu_time(process: _Process) -> float:
    stat = proc.parse_stat(process.text)
    return (stat.utime + stat.stime) / _TICKS


def _cgroup_base(pid: int, env_id: str, mounts: list[proc.MountInfo]) -> dict[str, str]:
    """Return where the cgroups of environments are, by hierarchy, as far as they are visible."""
    found: dict[str, str] = {}
    for number, controllers, path in proc.read_cgroup(pid):
        if not path.endswith(f"/{env_id}"):
            continue  # the launcher had nothing in this hierarchy
        for mount in mounts:
            if number == 0 and mount.fstype == "cgroup2":
                names = ["unified"]
            elif number and mount.fstype == "cgroup" and controllers[0] in mount.super_options:
                names = ["io" if name == "blkio" else name for name in controllers]
            else:
                continue
            below = path.removeprefix(mount.root) if mount.root != "/" else path
            if os.path.isdir(mount.mount_point + below):
                directory = os.path.dirname(mount.mount_point + below)
                found.update(dict.fromkeys(names, directory))
    return found


def _cell(entry: dict[str, Any], key: str) -> str:
    if key == "memory_bytes":
        return megabytes(entry[key])
    if key == "cpu_seconds":
        return f"{entry[key]:.2f}s"
    if key == "age_seconds":
        return duration(entry[key])
    if key == "host":
        return f"{entry['host_pid']} {printable(entry['host_program'])}"
    return str(entry[key])


def printable(name: object) -> str:
    """Return a process's name, which it has given itself, without what a terminal would act on."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(name))


def megabytes(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / (1 << 20):.1f}M"


def duration(seconds: float) -> str:
    """Return a length of time for people."""
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
