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
import psutil

from nsbox.isolation.cgroups import UsageReader
from nsbox.linux import proc

_LAUNCHER: Final = "nsbox-launcher"
_ENVIRONMENT: Final = re.compile(r"nsbox-([0-9a-f]{8})")
_CODE: Final = re.compile(r"/sha256-([0-9a-f]{12})[0-9a-f]*/")
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


def live_environments() -> Iterator[dict[str, Any]]:
    """Yield what is known about each live environment; ends of them meanwhile are left out."""
    mounts = [mount for mount in proc.read_mountinfo() if mount.fstype in ("cgroup", "cgroup2")]
    own, everyone = os.getuid(), os.geteuid() == 0
    # One look at the process table for all: psutil's children() reads it each time it is asked.
    processes = {process.pid: process for process in psutil.process_iter(["name", "ppid"])}
    children: dict[int, list[psutil.Process]] = {}
    for process in processes.values():
        children.setdefault(process.info["ppid"], []).append(process)
    for launcher in processes.values():
        try:
            if launcher.info["name"] != _LAUNCHER or not (everyone or launcher.uids().real == own):
                continue
            # A process can give itself any name, but not other ancestors: guests that call
            # themselves nsbox-launcher and nsbox-... are below their environment's PID 1.
            if _is_inside(launcher, processes):
                continue
            for child in children.get(launcher.pid, ()):
                match = _ENVIRONMENT.fullmatch(child.info["name"] or "")
                if match is not None:
                    members = _with_descendants(child, children)
                    host = processes.get(launcher.info["ppid"])
                    yield _describe(match[1], members, launcher, host, mounts)
        except psutil.NoSuchProcess:
            continue
        except psutil.AccessDenied:
            continue  # /proc is mounted with hidepid=


def _is_inside(process: psutil.Process, processes: dict[int, psutil.Process]) -> bool:
    """Whether a process is below one that has the name of an environment."""
    seen = {process.pid}
    while (above := processes.get(process.info["ppid"])) is not None and above.pid not in seen:
        if _ENVIRONMENT.fullmatch(above.info["name"] or ""):
            return True
        seen.add(above.pid)
        process = above
    return False


def _with_descendants(
    process: psutil.Process, children: dict[int, list[psutil.Process]]
) -> list[psutil.Process]:
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


def _describe(
    env_id: str,
    processes: list[psutil.Process],
    launcher: psutil.Process,
    host: psutil.Process | None,
    mounts: list[proc.MountInfo],
) -> dict[str, Any]:
    init = processes[0]
    directories = _cgroup_directories(init.pid, env_id, mounts)
    usage = _read_usage(directories)
    memory, cpu_usec = usage.get("memory_current"), usage.get("cpu_usec")
    return {
        "id": env_id,
        "pid": init.pid,
        "launcher_pid": launcher.pid,
        "host_pid": None if host is None else host.pid,
        "host_program": None if host is None else host.info["name"],
        "uid": launcher.uids().real,
        "state": "frozen" if _is_frozen(init, directories) else "running",
        "processes": len(processes),
        "memory_bytes": sum(map(_resident, processes)) if memory is None else memory,
        "cpu_seconds": sum(map(_cpu_time, processes)) if cpu_usec is None else cpu_usec / 1e6,
        "age_seconds": round(_age(init.pid), 3),
    }


def code_of(pid: int) -> str:
    """Return the first digits of the digest of the code that an environment's PID 1 has bound.

    Empty: it has none, or the host does not show it to this user (proc_pid_mountinfo(5)).
    """
    try:
        mounts = proc.read_mountinfo(pid)
    except OSError:
        return ""
    for mount in mounts:
        match = _CODE.search(mount.root) if mount.mount_point == "/var/task" else None
        if match is not None:
            return match[1]
    return ""


def _age(pid: int) -> float:
    try:
        started = proc.read_starttime(pid) / os.sysconf("SC_CLK_TCK")
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _cpu_time(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return float(times.user + times.system)
    except psutil.Error:
        return 0.0


def _cgroup_directories(pid: int, env_id: str, mounts: list[proc.MountInfo]) -> dict[str, str]:
    """Return where the environment's own cgroups are, by hierarchy, as far as they are visible."""
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
                found.update(dict.fromkeys(names, mount.mount_point + below))
    return found


def _read_usage(directories: dict[str, str]) -> dict[str, int | None]:
    try:
        return UsageReader(directories).read()
    except OSError:
        return {}


def _is_frozen(init: psutil.Process, directories: dict[str, str]) -> bool:
    for name, file, word in (
        ("unified", "cgroup.events", "frozen 1"),
        ("freezer", "freezer.state", "FROZEN"),
    ):
        try:
            with open(f"{directories.get(name, '')}/{file}") as stream:
                if word in stream.read():
                    return True
        except OSError:
            continue
    return bool(init.status() == psutil.STATUS_STOPPED)


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
