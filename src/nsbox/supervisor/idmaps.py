# SPDX-License-Identifier: Apache-2.0
"""Write the id maps of a rootless launcher's user namespace, from the host's side.

With a range in /etc/subuid and /etc/subgid (subuid(5)), the first or that of NSBOX_ID_RANGE, the
set-user-ID helpers newuidmap and newgidmap write them; else the caller's own id is all an
ordinary user may map (user_namespaces(7)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
from functools import partial
from itertools import starmap
from typing import NoReturn

from nsbox.errors import ConfigError, UnsupportedHostError
from nsbox.isolation.namespaces import HOST_ID_BASE, HOST_ID_COUNT
from nsbox.linux.binding import is_unknown


def given_range() -> tuple[int, int] | None:
    """Return the first id and the count that NSBOX_ID_RANGE names; None without it.

    Raises:
        ConfigError: It is no range.
    """
    text = os.environ.get("NSBOX_ID_RANGE", "")
    if not text:
        return None
    first, _, count = text.partition(":")
    if not (first.isdigit() and count.isdigit()) or int(first) < 1 or int(count) < 1:
        raise ConfigError(f"NSBOX_ID_RANGE: {text!r} is not FIRST:COUNT, such as 1879048192:65536")
    return int(first), int(count)


def write_launcher_maps(pid: int, wanted: tuple[int, int] | None = None) -> None:
    """Map id 0 of the launcher `pid` to the caller's, and ids from 1 to subordinate ones if any.

    Args:
        pid: Its process id.
        wanted: First id and count of those to use (`given_range`); None: what can be had.

    Raises:
        ConfigError: Those that are wanted cannot be had.
        UnsupportedHostError: What is left to map is root outside.
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and pid > 0 and _write_roots_range(pid, wanted):
        return
    users, groups = _subordinate("/etc/subuid", uid), _subordinate("/etc/subgid", uid)
    tools = shutil.which("newuidmap"), shutil.which("newgidmap")
    is_granted = wanted is not None or (users and groups)
    if is_granted and all(tools) and pid > 0:
        first_user, first_group = (wanted, wanted) if wanted else (users[0], groups[0])
        count = min(first_user[1], first_group[1])
        done = [
            _run([str(tool), str(pid), "0", str(own), "1", "1", str(first), str(count)])
            for tool, own, (first, _) in zip(
                tools, (uid, gid), (first_user, first_group), strict=True
            )
        ]
        if done == [0, 0]:
            return
        # One map may be there and the other not: fill the one that is missing below.
    if wanted is not None:
        _refuse(wanted, users, groups, has_tools=all(tools))
    _write_if_empty(pid, "uid_map", f"0 {uid} 1")
    if not _read(pid, "gid_map"):
        # Without it a process could drop a group that denies it access (CVE-2014-8989).
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
        _write_if_empty(pid, "gid_map", f"0 {gid} 1")


def _run(words: list[str]) -> int:
    """Run a program and return its exit status. An interrupt leaves no process behind."""
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    started: list[int] = []
    try:
        # Its number is kept within one step of the interpreter.
        started += starmap(partial(os.posix_spawn, file_actions=quiet), [(words[0], words, {})])
        return os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1])
    except ChildProcessError:
        return 0  # the host program reaps all its children: the map itself tells
    except BaseException:
        for pid in started:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        raise


Ranges = list[tuple[int, int]]


def _refuse(wanted: tuple[int, int], users: Ranges, groups: Ranges, *, has_tools: bool) -> NoReturn:
    """Raise the ConfigError of an ordinary user's range that cannot be had."""
    text = f"NSBOX_ID_RANGE: {wanted[0]}:{wanted[1]}"
    if not has_tools:
        raise ConfigError(
            f"{text} needs newuidmap and newgidmap, which are not installed (package uidmap); or "
            "unset it"
        )
    told = [
        f"{', '.join(f'{first}:{count}' for first, count in ranges) or 'none'} in {path}"
        for ranges, path in ((users, "/etc/subuid"), (groups, "/etc/subgid"))
    ]
    raise ConfigError(
        f"{text} is not among this user's subordinate ids, {' and '.join(told)}; name a part of "
        "what both have, or unset it"
    )


def _write_roots_range(pid: int, wanted: tuple[int, int] | None) -> bool:
    """Map ids from 1 to those that root's environments have; False where these cannot be had.

    This is a root without all of its privileges: in a user namespace, or in a container.

    Raises:
        ConfigError: Those that are wanted cannot be had.
        UnsupportedHostError: What is left to map is root outside.
    """
    first, count = wanted or (HOST_ID_BASE, HOST_ID_COUNT)
    lines = f"0 0 1\n1 {first} {count}"
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(lines)
    except OSError as error:
        if is_unknown(error):
            raise
        if wanted is not None:
            raise ConfigError(
                f"NSBOX_ID_RANGE: {first}:{count} cannot be mapped by this root: {error.strerror}; "
                "name ids that it has (/proc/self/uid_map and gid_map), or unset it"
            ) from error
        with open("/proc/self/uid_map") as file:
            outside = [line.split()[1] for line in file if line.split()[0] == "0"]
        if outside == ["0"]:
            raise UnsupportedHostError(
                "host_id",
                "this root has no id to give but its own, which is root outside as well",
                "Run it as an ordinary user, or as root with CAP_SYS_ADMIN and CAP_SETUID",
            ) from None
        return False
    return True


def _read(pid: int, name: str) -> str:
    with open(f"/proc/{pid}/{name}") as file:
        return file.read()


def _write_if_empty(pid: int, name: str, line: str) -> None:
    if not _read(pid, name):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(line)


def _subordinate(path: str, uid: int) -> Ranges:
    """Return first ids and counts of what `path` grants to `uid`."""
    names = {str(uid)}
    with contextlib.suppress(KeyError):  # an id without an account can still be named by number
        names.add(pwd.getpwuid(uid).pw_name)
    found = []
    try:
        with open(path) as file:
            lines = file.readlines()
    except OSError as error:
        if is_unknown(error):
            raise
        lines = []
    for line in lines:
        name, _, rest = line.strip().partition(":")
        first, _, count = rest.partition(":")
        if name in names and first.isdigit() and count.isdigit() and int(count) > 0:
            found.append((int(first), int(count)))
    return found
