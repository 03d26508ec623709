# SPDX-License-Identifier: Apache-2.0
"""Read and write files for the host, by PID 1, in the environment's own mount namespace."""

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

_PLACE = "/tmp"  # noqa: S108 - the environment's own
_WAY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Failure(Exception):
    """An operation failed; PID 1 answers FAILED.

    Attributes:
        error: The error number.
        stage: One of `protocol.STAGES`.
    """

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
    """Open a regular file; follows no symbolic link in `path`, and blocks on no FIFO."""
    resolve = c.RESOLVE_NO_SYMLINKS | c.RESOLVE_NO_MAGICLINKS
    try:
        # O_NONBLOCK: a planted FIFO must not hold up PID 1.
        how = flags | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = calls.openat2(c.AT_FDCWD, path, how, mode, resolve)
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            fd = _open_stepwise(path, how, mode)
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "open") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Failure(errno.EINVAL, "kind")
    return fd


def _open_stepwise(path: bytes, flags: int, mode: int) -> int:
    """Open `path` component by component, without links, where the filter refuses openat2(2)."""
    *way, name = path.rstrip(b"/").split(b"/")
    directory = os.open("/", _WAY)
    try:
        for part in filter(None, way):
            inner = os.open(part, _WAY, dir_fd=directory)
            os.close(directory)
            directory = inner
        how = flags | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name or b".", how, mode, dir_fd=directory)
    finally:
        os.close(directory)


def write_file(channel: _Socket, request: bytes) -> None:
    """Serve a write request (`protocol.write_request`); the file's bytes follow on the channel."""
    path, mode, size = p.parse_write(request)
    fd = _open_regular(path, os.O_WRONLY | os.O_CREAT, mode)
    try:
        os.ftruncate(fd, 0)
        _fill(fd, channel, mode, size)
    except ConnectionError:
        raise
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "io") from error
    finally:
        os.close(fd)
    channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))


def _fill(fd: int, channel: _Socket, mode: int, size: int) -> None:
    os.fchmod(fd, mode)
    left = size
    while left:
        view = memoryview(read_exactly(channel, min(left, p.LARGEST_PART)))
        left -= len(view)
        while view:
            view = view[os.write(fd, view) :]


def place_file(channel: _Socket, request: bytes) -> None:
    """Serve a place request (`protocol.PLACE`); the file's bytes follow on the channel.

    An existing entry of that name is unlinked first: a link a guest has made is not followed, and
    no guest has the new file open.
    """
    path, mode, size = p.parse_write(request)
    try:
        directory, name = _enter(path, make=True)
        try:
            try:
                os.unlink(name, dir_fd=directory)
            except FileNotFoundError:
                pass
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, mode, dir_fd=directory)
        finally:
            os.close(directory)
        try:
            _fill(fd, channel, mode, size)
        finally:
            os.close(fd)
    except ConnectionError:
        raise
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "place") from error
    channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))


def remove_files(channel: _Socket, request: bytes) -> None:
    """Serve a remove request (`protocol.REMOVE`): files, then directories that are empty then."""
    names = p.parse_names(request)
    ways = {name[:at] for name in names for at in range(len(name)) if name[at : at + 1] == b"/"}
    # The deepest first.
    for path in [*names, *sorted(ways, key=len, reverse=True)]:
        try:
            directory, name = _enter(path, make=False)
        except OSError:
            continue  # the way is gone, or leads elsewhere
        try:
            if path in ways:
                os.rmdir(name, dir_fd=directory)
            else:
                os.unlink(name, dir_fd=directory)
        except OSError:
            pass  # the function has removed it, or made something else of it: that is its own
        finally:
            os.close(directory)
    channel.sendall(p.ANSWER.pack(p.OK, 0, 0, 0))


def _enter(path: bytes, *, make: bool) -> tuple[int, bytes]:
    """Return the directory below /tmp that the last component of `path` is in, and that.

    No link is followed and no other file system entered: what is bound below /tmp is the host's.
    """
    directory = os.open(_PLACE, _DIRECTORY)
    try:
        device = os.fstat(directory).st_dev
        *way, name = path.split(b"/")
        for part in way:
            if make:
                try:
                    os.mkdir(part, 0o755, dir_fd=directory)
                except FileExistsError:
                    pass
            inner = os.open(part, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
            if os.fstat(directory).st_dev != device:
                raise OSError(errno.EXDEV, "another file system")
    except BaseException:
        os.close(directory)
        raise
    return directory, name


def read_file(channel: _Socket, request: bytes) -> None:
    """Serve a read request (`protocol.read_request`): parts, each announced by an answer.

    A file that shrinks meanwhile is read to its new end, as read(2) does; one that grows to the
    size that it had.
    """
    path, most = p.parse_read(request)
    fd = _open_regular(path, os.O_RDONLY)
    try:
        left = os.fstat(fd).st_size
        if left > most:
            raise Failure(errno.EFBIG, "size")
        while True:
            try:
                data = os.read(fd, min(left, p.LARGEST_PART))
            except OSError as error:
                raise Failure(error.errno or errno.EIO, "io") from error
            left = left - len(data) if data else 0
            header = p.ANSWER.pack(p.OK, len(data), left > 0, 0)
            if not left:
                channel.sendall(header + data)
                return
            channel.sendall(header)
            channel.sendall(data)
    finally:
        os.close(fd)


_SERVED = {p.WRITE: write_file, p.READ: read_file, p.PLACE: place_file, p.REMOVE: remove_files}


def serve(operation: bytes, channel: _Socket, request: bytes) -> None:
    """Serve an operation on files; raises `Failure` when there is no such operation."""
    if operation not in _SERVED:
        raise Failure(errno.EINVAL, "request")
    _SERVED[operation](channel, request)
