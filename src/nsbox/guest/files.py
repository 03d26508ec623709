# SPDX-License-Identifier: Apache-2.0
"""Read and write files for the host, from inside, where no link leads out."""

from __future__ import annotations

import errno
import os
import stat

from nsbox.guest import protocol as p
from nsbox.linux import calls
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as _Socket

_CHUNK = 1 << 18


class Failure(Exception):
    """An operation failed; becomes a FAILED answer."""

    def __init__(self, error: int, stage: str) -> None:
        super().__init__(error, stage)
        self.error = error
        self.stage = stage


def read_exactly(channel: _Socket, size: int) -> bytearray:
    """Return the next `size` bytes; ConnectionError when there are fewer."""
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise ConnectionError
        view = view[count:]
    return data


def _open_regular(path: bytes, flags: int, mode: int = 0) -> int:
    """Open a regular file, following no symbolic link anywhere in `path` and waiting for none."""
    resolve = c.RESOLVE_NO_SYMLINKS | c.RESOLVE_NO_MAGICLINKS
    try:
        # O_NONBLOCK: a planted FIFO must not hold up PID 1.
        fd = calls.openat2(c.AT_FDCWD, path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode, resolve)
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "open") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Failure(errno.EINVAL, "kind")
    return fd


def write_file(channel: _Socket, request: bytes) -> None:
    """Serve a write request (`protocol.write_request`); the file's bytes follow on the channel."""
    path, mode, size = p.parse_write(request)
    left = size
    fd = _open_regular(path, os.O_WRONLY | os.O_CREAT, mode)
    try:
        os.ftruncate(fd, 0)
        os.fchmod(fd, mode)
        while left:
            view = memoryview(read_exactly(channel, min(left, _CHUNK)))
            left -= len(view)
            while view:
                view = view[os.write(fd, view) :]
    except ConnectionError:
        raise
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "io") from error
    finally:
        os.close(fd)
    channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))


def read_file(channel: _Socket, request: bytes) -> None:
    """Serve a read request (`protocol.read_request`)."""
    path, most = p.parse_read(request)
    fd = _open_regular(path, os.O_RDONLY)
    try:
        size = left = os.fstat(fd).st_size
        if size > most:
            raise Failure(errno.EFBIG, "size")
        channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))
        while left:
            data = os.read(fd, min(left, _CHUNK))
            if not data:
                break  # it shrank meanwhile; the host sees a short answer
            channel.sendall(data)
            left -= len(data)
    finally:
        os.close(fd)
