# SPDX-License-Identifier: Apache-2.0
"""Reads and writes of control files.

cgroupspy's descriptors ask their instance for ``get_property`` and ``set_property``; its own
versions go through a buffered text file (25 us an access here, and the error of a write comes out
of ``close``). These take one open and one write, and name the file when the kernel refuses.
"""

from __future__ import annotations

import errno
import os
from io import FileIO

from nsbox.errors import SyscallError
from nsbox.linux.descriptors import as_file

_CHUNK = 4096


def read_bytes(path: str) -> bytes:
    """Return the whole of a control file; `SyscallError` when it cannot be read."""
    try:
        file = FileIO(path)
    except OSError as error:
        raise SyscallError("open", error.errno or 0, path) from None
    try:
        with file:
            data = file.read(_CHUNK) or b""
            # Only cgroup.procs, memory.stat, io.stat get so long; a kernfs read ends at a record.
            if len(data) > _CHUNK // 2:
                while more := file.read(_CHUNK):
                    data += more
    except OSError as error:
        raise SyscallError("read", error.errno or 0, path) from None
    return data


def read_text(path: str) -> str:
    """Return a control file as text without its last newline; `SyscallError` on failure."""
    return read_bytes(path).decode().strip()


def write_text(path: str, value: str) -> None:
    """Write `value` in one write(2), as control files need it; `SyscallError` on failure."""
    try:
        # No O_CREAT, no O_TRUNC: a missing file is an error, and the kernel ignores truncation.
        file = as_file(os.open, path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise SyscallError("open", error.errno or 0, path) from None
    try:
        os.write(file.fileno(), value.encode())
    except OSError as error:
        raise SyscallError("write", error.errno or 0, path) from None
    finally:
        file.close()


def read_processes(directory: str) -> list[int]:
    """Return the process ids in one cgroup (0 = of another pid namespace), [] when it is gone."""
    path = f"{directory}/cgroup.procs"
    try:
        return [int(word) for word in read_bytes(path).split()]
    except SyscallError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):
            return []
        raise


class ControlFiles:
    """One cgroup directory: what cgroupspy's file descriptors read and write through.

    It is its own cgroupspy "node", so that no tree of nodes is ever built.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._prefix = f"{directory}/"

    @property
    def node(self) -> ControlFiles:
        """The node that ``cgroupspy.controllers.Controller`` methods ask for."""
        return self

    @property
    def full_path(self) -> bytes:
        """The directory, as cgroupspy's node has it."""
        return os.fsencode(self.directory)

    def get_property(self, filename: bytes) -> str:
        """Return the text of one file; `SyscallError` on failure."""
        return read_bytes(self._prefix + filename.decode()).decode().strip()

    def set_property(self, filename: bytes, value: object) -> None:
        """Write one value; `SyscallError` on failure."""
        write_text(self._prefix + filename.decode(), str(value))

    def has(self, name: str) -> bool:
        """Return whether the file is there and this process may write it."""
        return os.access(self._prefix + name, os.W_OK)
