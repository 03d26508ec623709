# SPDX-License-Identifier: Apache-2.0
"""``nsbox ps``: the live environments of this user, read from the process table."""

from __future__ import annotations

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
    for line in format_rows(rows):
        click.echo(line)
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
    for name in os.listdir("/proc"):
        if name.isdigit():
            text = _read(f"/proc/{name}/stat")
            if text:
                found[int(name)] = _Process(int(name), text)
    return found


def _read(path: str) -> str:
    """Return the beginning of a small file, "" when it is gone or not shown to this user."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.fsdecode(os.read(fd, 4096))
        finally:
            os.close(fd)
    except OSError:
        return ""


def live_environments() -> Iterator[dict[str, Any]]:
    """Yield what is known about each live environment; ends of them meanwhile are left out."""
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
        base: dict[str, str] = {}
        host = processes.get(launcher.ppid)
        for child in children.get(launcher.pid, ()):
            match = _ENVIRONMENT.fullmatch(child.name)
            if match is None:
                continue
            # Those of one launcher have their cgroups side by side.
            base = base or _cgroup_base(child.pid, match[1], mounts)
            described = _describe(match[1], _with_descendants(child, children), base)
            yield {
                "id": match[1],
                "pid": child.pid,
                "launcher_pid": launcher.pid,
                "host_pid": None if host is None else host.pid,
                "host_program": None if host is None else host.name,
                "uid": uid,
                **described,
            }


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


def _describe(env_id: str, processes: list[_Process], base: dict[str, str]) -> dict[str, Any]:
    directories = {name: f"{directory}/{env_id}" for name, directory in base.items()}
    started = proc.parse_stat(processes[0].text).starttime / _TICKS
    memory, cpu_usec = _memory(directories), _cpu_usec(directories)
    return {
        "state": "frozen" if _is_frozen(processes[0], directories) else "running",
        "processes": len(processes),
        "memory_bytes": sum(map(_resident, processes)) if memory is None else memory,
        "cpu_seconds": sum(map(_cpu_time, processes)) if cpu_usec is None else cpu_usec / 1e6,
        "age_seconds": round(max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started), 3),
    }


def _memory(directories: dict[str, str]) -> int | None:
    for name, file in (("memory", "memory.usage_in_bytes"), ("unified", "memory.current")):
        text = _read(f"{directories[name]}/{file}") if name in directories else ""
        if text:
            return int(text)
    return None


def _cpu_usec(directories: dict[str, str]) -> int | None:
    if "cpuacct" in directories:
        text = _read(f"{directories['cpuacct']}/cpuacct.usage")
        if text:
            return int(text) // 1000
    if "unified" in directories:
        match = _USAGE.search(_read(f"{directories['unified']}/cpu.stat"))
        if match is not None:
            return int(match[1])
    return None


def code_of(pid: int) -> str:
    """Return the first digits of the digest of the code that an environment's PID 1 has bound.

    Empty: it has none, or the host does not show it to this user (proc_pid_mountinfo(5)).
    """
    try:
        with open(f"/proc/{pid}/mountinfo", "rb", buffering=0) as file:
            match = _CODE.search(file.read())
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
    try:
        entries = proc.read_cgroup(pid)
    except OSError:
        return found
    for number, controllers, path in entries:
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


def _is_frozen(init: _Process, directories: dict[str, str]) -> bool:
    for name, file, word in (
        ("unified", "cgroup.events", "frozen 1"),
        ("freezer", "freezer.state", "FROZEN"),
    ):
        if name in directories and word in _read(f"{directories[name]}/{file}"):
            return True
    return init.state == "T"


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
