# SPDX-License-Identifier: Apache-2.0
"""Files that a caller gives a command as streams: handed in, or relayed through a pipe.

Who has a descriptor of a file can open the file again (/proc/self/fd), with all rights that its
mode gives; its owner can change the mode, too. So what a guest could open with more rights than it
was given is relayed. Pipes and sockets are handed in: they cost nothing, and have no name.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import struct
import termios
import threading
from io import FileIO
from typing import Final

from nsbox.errors import ConfigError, SyscallError
from nsbox.linux.descriptors import as_file
from nsbox.supervisor.channel import make_pipe, unblock

NAMES: Final = ("stdin", "stdout", "stderr")
_CHUNK: Final = 1 << 16
_PIPE_BUF: Final = 4096  # what a pipe that polls as writable has room for (pipe(7))
_PATIENCE: Final = 1000  # milliseconds that an output may take no byte once its command is over
_O_PATH: Final = 0o10000000  # asm-generic/fcntl.h
# null, zero, full, random, urandom (Documentation/admin-guide/devices.txt): everybody has them.
_PLAIN_DEVICES: Final = frozenset(os.makedev(1, minor) for minor in (3, 5, 7, 8, 9))
# What others must not be allowed for a descriptor of each access mode.
_MORE: Final = {os.O_RDONLY: stat.S_IWOTH, os.O_WRONLY: stat.S_IROTH, os.O_RDWR: 0}


def descriptor_of(stream: object, what: str) -> int:
    """Return the descriptor of a stream that the caller gave; ConfigError when it is none."""
    try:
        fd = stream if isinstance(stream, int) else stream.fileno()  # type: ignore[attr-defined]
        if isinstance(stream, bool) or not isinstance(fd, int):
            raise TypeError
    except (AttributeError, TypeError, OSError, ValueError) as error:
        raise ConfigError(
            f"{what}: must be an open file, a descriptor, PIPE or DEVNULL, got {stream!r}"
        ) from error
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise ConfigError(f"{what}: descriptor {fd}: {error.strerror}") from error
    except OverflowError as error:
        raise ConfigError(f"{what}: {fd} is no descriptor") from error
    if stat.S_ISDIR(mode):
        # openat(2) from a directory of the host leads out of the pivoted root.
        raise ConfigError(
            f"{what}: descriptor {fd} is a directory, which leads out of the sandbox; give a file"
        )
    return fd


def gives_more(fd: int, what: str, *, is_own: bool) -> bool:
    """Return whether a guest could do more with the file of `fd` than the descriptor allows.

    `is_own` says that guests have the caller's own id, and so all of its rights.

    Raises:
        ConfigError: The descriptor is a mere name of a file (O_PATH).
    """
    status = os.fstat(fd)
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & _O_PATH:
        raise ConfigError(
            f"{what}: descriptor {fd} was opened with O_PATH; open it to read or write"
        )
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFCHR:
        if status.st_rdev in _PLAIN_DEVICES or os.isatty(fd):
            return False
    elif kind == stat.S_IFIFO:
        if os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
            return False
    elif kind not in (stat.S_IFREG, stat.S_IFBLK):
        return False
    return is_own or bool(status.st_mode & _MORE[flags & os.O_ACCMODE])


class Relay:
    """Copies between a file of the caller's and a pipe that the command gets instead.

    Attributes:
        theirs: The command's end of the pipe; the caller's to close.
        error: What failed, once it has ended, or None.
    """

    def __init__(self, fd: int, what: str) -> None:
        """Prepare. SyscallError: there is no room for it."""
        self._thread = threading.Thread(target=self._run, name="nsbox-relay", daemon=True)
        self._what = what
        self.error: SyscallError | None = None
        self._unsent = self._sent = 0
        self._drains = False
        self._pipe, self.theirs = make_pipe(to_guest=what == NAMES[0])
        self._made = [self._pipe, self.theirs]
        try:
            self._file = as_file(os.dup, fd)
            self._made.append(self._file)
            self._end = as_file(os.eventfd, 0)
            self._made.append(self._end)
            self._is_seekable = stat.S_ISREG(os.fstat(fd).st_mode)
            unblock(self._pipe.fileno())
        except BaseException as error:
            self._close()
            if not isinstance(error, OSError) or isinstance(error, SyscallError):
                raise
            raise SyscallError("fstat", error.errno or 0) from error

    def start(self) -> None:
        """Copy until the end of the file, or until all that a command wrote is written."""
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._what == NAMES[0]:
                self._feed()
            else:
                self._collect()
        except BrokenPipeError:
            pass  # its reader has enough, which is its right
        except OSError as error:
            call = "read" if self._what == NAMES[0] else "write"
            self.error = SyscallError(call, error.errno or errno.EIO, self._what)
        if self._what != NAMES[0]:
            self._pipe.close()  # a command that still writes is to notice

    def finish(self, *, drains: bool = True) -> None:
        """End; what its command has written is written before, if it `drains`."""
        if self._end.closed:
            return
        self._drains = drains
        if self._thread.is_alive():
            os.eventfd_write(self._end.fileno(), 1)
            self._thread.join()
        self._go_back()
        self._close()

    def _close(self) -> None:
        for end in self._made:
            end.close()

    def _await(self, file: FileIO, event: int) -> bool:
        """Wait until `file` is ready; False when this is to end."""
        poller = select.poll()
        poller.register(file, event)
        poller.register(self._end, select.POLLIN)
        return self._end.fileno() not in (ready for ready, _ in poller.poll())

    def _feed(self) -> None:
        while self._await(self._file, select.POLLIN):
            data = memoryview(os.read(self._file.fileno(), _CHUNK))
            if not data:
                # Opened for reading it keeps what the command has not read, for `_go_back`.
                reader = FileIO(f"/proc/self/fd/{self._pipe.fileno()}", opener=_open_at_once)
                self._made.append(reader)
                self._pipe.close()
                self._pipe = reader
                return
            self._unsent = len(data)
            while self._unsent:
                if not self._await(self._pipe, select.POLLOUT):
                    return
                try:
                    count = os.write(self._pipe.fileno(), data[-self._unsent :])
                except BlockingIOError:
                    continue
                self._unsent -= count
                self._sent += count

    def _go_back(self) -> None:
        """Set the file's offset behind what the command has read, for later readers."""
        if self._what == NAMES[0] and self._is_seekable and self._sent + self._unsent:
            (waiting,) = struct.unpack("i", fcntl.ioctl(self._pipe, termios.FIONREAD, bytes(4)))
            # The command can have written to the pipe as well.
            os.lseek(self._file.fileno(), -min(waiting, self._sent) - self._unsent, os.SEEK_CUR)

    def _collect(self) -> None:
        while self._await(self._pipe, select.POLLIN):
            data = os.read(self._pipe.fileno(), _CHUNK)
            if not data:
                return
            self._write(data)
        while self._drains:
            # All that could write is gone; but for descriptors sent to a command that still runs.
            try:
                data = os.read(self._pipe.fileno(), _CHUNK)
            except BlockingIOError:
                return
            if not data:
                return
            self._write(data)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._is_seekable:
                view = view[os.write(self._file.fileno(), view) :]
            elif self._await(self._file, select.POLLOUT) or self._has_room():
                view = view[os.write(self._file.fileno(), view[:_PIPE_BUF]) :]
            else:
                raise BrokenPipeError

    def _has_room(self) -> bool:
        poller = select.poll()
        poller.register(self._file, select.POLLOUT)
        return bool(poller.poll(_PATIENCE))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


class Relays:
    """The relays of one command."""

    def __init__(self) -> None:
        self._relays: list[Relay] = []
        self._outputs: dict[tuple[int, int], Relay] = {}

    def add(self, fd: int, what: str) -> int:
        """Return the command's end of a pipe that stands for the file of `fd`."""
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        # One file for both outputs: one pipe, which keeps the order of what is written.
        relay = self._outputs.get(key) if what != NAMES[0] else None
        if relay is None:
            relay = Relay(fd, what)
            self._relays.append(relay)
            if what != NAMES[0]:
                self._outputs[key] = relay
        return relay.theirs.fileno()

    def start(self) -> None:
        """Begin to copy, once the command has its ends."""
        for relay in self._relays:
            relay.theirs.close()
            relay.start()

    def finish(self, *, drains: bool = True) -> None:
        """End them, the command being over.

        Raises:
            SyscallError: A file could not be read or written, so that something is missing.
        """
        relays, self._relays = self._relays, []
        for relay in relays:
            relay.finish(drains=drains)
        for relay in relays:
            if relay.error is not None and drains:
                raise relay.error
