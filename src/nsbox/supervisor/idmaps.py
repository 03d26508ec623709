# SPDX-License-Identifier: Apache-2.0
"""Write the id maps of a rootless launcher's user namespace, from the host's side.

With a range in /etc/subuid and /etc/subgid (subuid(5)) the set-user-ID helpers newuidmap and
newgidmap write them; else the caller's own id is all an ordinary user may map
(user_namespaces(7)).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess

from nsbox.errors import UnsupportedHostError
from nsbox.isolation.namespaces import HOST_ID_BASE, HOST_ID_COUNT


def write_launcher_maps(pid: int) -> None:
    """Map id 0 of the launcher `pid` to the caller's, and ids from 1 to subordinate ones if any."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0 and pid > 0 and _write_roots_range(pid):
        return
    users, groups = _subordinate("/etc/subuid", uid), _subordinate("/etc/subgid", uid)
    tools = shutil.which("newuidmap"), shutil.which("newgidmap")
    if users and groups and all(tools) and pid > 0:
        count = min(users[1], groups[1])
        done = [
            subprocess.run(
                [str(tool), str(pid), "0", str(own), "1", "1", str(first), str(count)],
                check=False,
                capture_output=True,
                env={},
            ).returncode
            for tool, own, first in zip(tools, (uid, gid), (users[0], groups[0]), strict=True)
        ]
        if done == [0, 0]:
            return
        # One map may be there and the other not: fill the one that is missing below.
    _write_if_empty(pid, "uid_map", f"0 {uid} 1")
    if not _read(pid, "gid_map"):
        # Without it a process could drop a group that denies it access (CVE-2014-8989).
        with open(f"/proc/{pid}/setgroups", "w") as file:
            file.write("deny")
        _write_if_empty(pid, "gid_map", f"0 {gid} 1")


def _write_roots_range(pid: int) -> bool:
    """Map ids from 1 to those that root's environments have; False where these cannot be had.

    This is a root without all of its privileges: in a user namespace, or in a container.

    Raises:
        UnsupportedHostError: What is left to map is root outside.
    """
    lines = f"0 0 1\n1 {HOST_ID_BASE} {HOST_ID_COUNT}"
    try:
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(lines)
    except OSError:
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


def _subordinate(path: str, uid: int) -> tuple[int, int] | None:
    """Return the first id and the count that `path` grants to `uid`, or None."""
    names = {str(uid)}
    with contextlib.suppress(KeyError):  # an id without an account can still be named by number
        names.add(pwd.getpwuid(uid).pw_name)
    try:
        with open(path) as file:
            for line in file:
                name, _, rest = line.strip().partition(":")
                first, _, count = rest.partition(":")
                if name in names and first.isdigit() and count.isdigit() and int(count) > 0:
                    return int(first), int(count)
    except OSError:
        return None
    return None
