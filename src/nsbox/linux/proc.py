# SPDX-License-Identifier: Apache-2.0
"""/proc: parsers of its texts, and small readers of single files. See proc(5).

A parser takes the text as `os.fsdecode` gives it and raises `ValueError` on what no kernel writes.
A reader raises what open(2) and read(2) say: `FileNotFoundError` or `ProcessLookupError` for a
process that is gone. Lines end at "\\n" alone: `str.splitlines` also cuts at characters that a
file or a process may have in its name.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class MountInfo:
    """One line of /proc/PID/mountinfo.

    Attributes:
        id: The mount's number, unique while it exists.
        parent: The number of the mount it is on.
        major_minor: The device as text, e.g. ``"0:31"``.
        root: The path inside the file system that is mounted here.
        mount_point: Where, as seen from the process's root.
        options: Of this mount, e.g. ``("rw", "nosuid")``.
        optional: Propagation, e.g. ``("shared:1",)``; empty for a private mount.
        fstype: Type of the file system, with a subtype if it has one.
        source: What was mounted; what it says is up to the file system.
        super_options: Of the file system.
    """

    __slots__ = (
        "fstype",
        "id",
        "major_minor",
        "mount_point",
        "optional",
        "options",
        "parent",
        "root",
        "source",
        "super_options",
    )

    def __init__(self, line: str) -> None:
        # An empty source leaves two spaces in a row, so no split() without a separator.
        fields = line.split(" ")
        dash = fields.index("-", 6)  # ValueError when there is none
        fstype, source, super_options = fields[dash + 1 :]
        self.id = int(fields[0])
        self.parent = int(fields[1])
        self.major_minor = fields[2]
        self.root = _unescape(fields[3])
        self.mount_point = _unescape(fields[4])
        self.options = tuple(fields[5].split(","))
        self.optional = tuple(fields[6:dash])
        self.fstype = _unescape(fstype)
        self.source = _unescape(source)
        self.super_options = tuple([_unescape(word) for word in super_options.split(",")])

    def __repr__(self) -> str:
        return f"<MountInfo {self.id} {self.fstype} on {self.mount_point!r}>"


class Stat:
    """The fields of /proc/PID/stat that nsbox uses, under the names of proc(5).

    Attributes:
        pid: Process id, in the pid namespace of the /proc that was read.
        comm: Name of the program, at most 15 bytes, any bytes.
        state: One letter, e.g. ``"S"``, ``"Z"``.
        ppid: Parent's process id; 0 when it is outside the pid namespace.
        pgrp: Process group.
        session: Session.
        utime: Ticks (`os.sysconf("SC_CLK_TCK")` a second) in user mode.
        stime: Ticks in the kernel.
        cutime: Ticks of awaited children in user mode.
        cstime: Ticks of awaited children in the kernel.
        starttime: Ticks from boot to the start of the process.
        rss: Resident pages.
    """

    __slots__ = (
        "comm",
        "cstime",
        "cutime",
        "pgrp",
        "pid",
        "ppid",
        "rss",
        "session",
        "starttime",
        "state",
        "stime",
        "utime",
    )

    def __init__(self, text: str) -> None:
        # The name may hold spaces, parentheses and newlines; what follows it never does.
        opening = text.index("(")
        closing = text.rindex(")")
        fields = text[closing + 1 :].split()
        if len(fields) < 22:
            raise ValueError(f"not a /proc/PID/stat: {text!r}")
        self.pid = int(text[:opening])
        self.comm = text[opening + 1 : closing]
        self.state = fields[0]
        self.ppid = int(fields[1])
        self.pgrp = int(fields[2])
        self.session = int(fields[3])
        self.utime = int(fields[11])
        self.stime = int(fields[12])
        self.cutime = int(fields[13])
        self.cstime = int(fields[14])
        self.starttime = int(fields[19])
        self.rss = int(fields[21])

    def __repr__(self) -> str:
        return f"<Stat {self.pid} {self.comm!r} {self.state}>"


def _unescape(text: str) -> str:
    """Undo the kernel's mangle_path: a backslash and three octal digits are one byte."""
    if "\\" not in text:
        return text
    head, *pieces = os.fsencode(text).split(b"\\")
    decoded = [head]
    for piece in pieces:
        digits = piece[:3]
        # Not isdigit(): 8 and 9 are no octal digits, and \400 and above is no byte.
        if len(digits) == 3 and digits[0] in b"0123" and not digits.strip(b"01234567"):
            decoded.append(bytes((int(digits, 8),)) + piece[3:])
        else:
            decoded.append(b"\\" + piece)
    return os.fsdecode(b"".join(decoded))


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.split("\n") if line)


def parse_mountinfo(text: str) -> list[MountInfo]:
    """Return the mounts of a /proc/PID/mountinfo, in its order: a mount follows its parent."""
    return [MountInfo(line) for line in _lines(text)]


def parse_cgroup(text: str) -> list[tuple[int, tuple[str, ...], str]]:
    """Return the lines of a /proc/PID/cgroup as (hierarchy id, controllers, path).

    The hierarchy of cgroup v2 has the id 0 and no controllers. The path is as seen from the root
    of the reader's cgroup namespace: it begins with ``/../`` for a cgroup outside of it. That of a
    removed cgroup ends in `` (deleted)``.
    """
    entries = []
    for line in _lines(text):
        number, controllers, path = line.split(":", 2)  # a path may hold more colons
        entries.append((int(number), tuple(controllers.split(",")) if controllers else (), path))
    return entries


def parse_status(text: str) -> dict[str, str]:
    """Return the lines of a /proc/PID/status by their name; the values as text, stripped.

    It is the read-back check of `Seccomp`, `NoNewPrivs` and `Cap*` (bits, base 16).
    """
    values = {}
    for line in _lines(text):
        name, colon, value = line.partition(":")
        if not colon:
            raise ValueError(f"not a line of /proc/PID/status: {line!r}")
        # The kernel escapes newlines in Name, so no process can forge a second line.
        values[name] = value.strip(" \t")
    return values


def parse_stat(text: str) -> Stat:
    """Return the fields of a /proc/PID/stat."""
    return Stat(text)


def _read(path: str) -> str:
    with open(path, "rb", buffering=0) as file:
        return os.fsdecode(file.read())


def read_mountinfo(pid: int | str = "self") -> list[MountInfo]:
    """Read /proc/PID/mountinfo."""
    return parse_mountinfo(_read(f"/proc/{pid}/mountinfo"))


def read_cgroup(pid: int | str = "self") -> list[tuple[int, tuple[str, ...], str]]:
    """Read /proc/PID/cgroup."""
    return parse_cgroup(_read(f"/proc/{pid}/cgroup"))


def read_status(pid: int | str = "self") -> dict[str, str]:
    """Read /proc/PID/status."""
    return parse_status(_read(f"/proc/{pid}/status"))


def has_pending(pid: int, number: int) -> bool:
    """Whether a signal is on its way to a process (proc_pid_status(5), ShdPnd).

    False when that cannot be seen.
    """
    try:
        return bool(int(read_status(pid)["ShdPnd"], 16) & 1 << (number - 1))
    except (OSError, KeyError, ValueError):
        return False


def read_stat(pid: int | str = "self") -> Stat:
    """Read /proc/PID/stat."""
    return Stat(_read(f"/proc/{pid}/stat"))


def pidfd_number(fd: int) -> int:
    """Return the number of the process of a pidfd here; 0 where it has none or `fd` is none."""
    try:
        number = int(parse_status(_read(f"/proc/self/fdinfo/{fd}"))["Pid"])
    except (OSError, KeyError, ValueError):
        return 0
    return max(number, 0)


def boot_id() -> str:
    """Return the random id of this boot of the kernel."""
    return _read("/proc/sys/kernel/random/boot_id").strip()


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process; none when it is gone.

    proc(5): the list is only sure to be whole while the process is frozen or stopped.

    Raises:
        FileNotFoundError: The kernel lists no children (CONFIG_PROC_CHILDREN).
    """
    tasks = f"/proc/{pid}/task"
    found: list[int] = []
    try:
        threads = os.listdir(tasks)
    except (FileNotFoundError, ProcessLookupError):
        return found
    for thread in threads:
        try:
            text = _read(f"{tasks}/{thread}/children")
        except (FileNotFoundError, ProcessLookupError) as err:
            # A thread that is still there without this file: the kernel does not offer it, and
            # "no children" would be a wrong answer.
            if isinstance(err, FileNotFoundError) and os.path.exists(f"{tasks}/{thread}"):
                raise
            continue
        found += [int(word) for word in text.split()]
    return found


def descendants(pid: int) -> list[int]:
    """Return the children of a process, their children and so on, parents first.

    Not those whose parent in between has ended: they belong to a reaper now.
    """
    found = children(pid)
    for process in found:  # grows while it is walked
        found += children(process)
    return found


CHROOT = "this process is in a chroot, in which the kernel makes no user namespace"


def is_in_chroot() -> bool:
    """Return whether this process's root is surely another than its mount namespace's.

    False for a chroot to a mount point, which looks the same from inside.
    """
    return all(mount.mount_point != "/" for mount in read_mountinfo())
