# SPDX-License-Identifier: Apache-2.0
"""PID 1 of an environment: starts commands, reaps orphans, ends with its launcher.

It runs with the same user id, filter and limits as the commands, and without privileges; what
protects it from them is that it is not dumpable, that the kernel shields PID 1 from signals of
its own namespace, and that its descriptors are close-on-exec. It never executes guest code.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import signal
import socket
import stat

from nsbox.guest import protocol as p
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_IO_DEADLINE = 30.0  # seconds a host may take to deliver a request it has begun
_KILL_PASSES = 1000
_CHUNK = 1 << 18


class _Failure(Exception):
    """An operation failed; becomes a FAILED answer."""

    def __init__(self, error: int, stage: str) -> None:
        super().__init__(error, stage)
        self.error = error
        self.stage = stage


class _Command:
    """A running command: its process, and the channel it was asked for on."""

    __slots__ = ("channel", "pid")

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel


class Init:
    """The event loop of PID 1."""

    def __init__(self, control: int, lifeline: int) -> None:
        self._control = socket.socket(fileno=control)
        self._commands: dict[int, _Command] = {}
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        # SIGCHLD wakes the loop through a pipe written by CPython's C handler.
        self._wake, wake_write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore)
        self._watch(control, self._on_control)
        self._watch(self._wake, self._on_child)
        self._watch(lifeline, _leave)

    def run(self) -> NoReturn:
        """Serve until the host or the launcher is gone."""
        while True:
            for fd, _ in self._poll.poll():
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        del self._handlers[fd]
        self._poll.unregister(fd)

    # -- requests ------------------------------------------------------------------------------

    def _on_control(self) -> None:
        try:
            operation, fds = receive_bytes(self._control, 16)
        except ConnectionError:
            _leave()
        if not operation or not fds:
            _leave()  # the host closed this environment, or is gone
        channel = socket.socket(fileno=fds[0])
        channel.settimeout(_IO_DEADLINE)
        stdio = fds[1:]
        try:
            try:
                request = _read_request(channel)
                if operation == p.RUN:
                    self._start(channel, request, stdio)
                    return  # the channel lives on
                if operation == p.WRITE:
                    _write_file(channel, request)
                elif operation == p.READ:
                    _read_file(channel, request)
                else:
                    raise _Failure(errno.EINVAL, "request")
            except _Failure as failure:
                stage = p.STAGES.index(failure.stage)
                channel.sendall(p.ANSWER.pack(p.FAILED, failure.error, stage, 0))
        except OSError:
            pass  # whoever asked is gone
        finally:
            close_all(stdio)
        channel.close()

    def _start(self, channel: socket.socket, request: dict[str, Any], stdio: list[int]) -> None:
        terminal: list[int] = []
        try:
            if request["tty"]:
                actions, terminal = _open_terminal()
                actions += _given_actions(request["stdio"], stdio)
            else:
                actions = _stdio_actions(request["stdio"], stdio)
            pid = _spawn(request, actions)
        except _Failure:
            close_all(terminal)
            raise
        started = p.ANSWER.pack(p.STARTED, pid, 0, 0)
        try:
            send_bytes(channel, started, terminal[:1])
        except OSError:
            pass  # the channel reads EOF at once, and the command is killed then
        close_all(terminal)
        command = self._commands[pid] = _Command(pid, channel)
        self._watch(channel.fileno(), lambda: self._on_channel(command))

    def _on_channel(self, command: _Command) -> None:
        try:
            data = command.channel.recv(p.SIGNAL.size, socket.MSG_WAITALL)
        except OSError:
            data = b""
        if len(data) != p.SIGNAL.size:
            # The caller let go of the command: nobody is left to say how it ended.
            self._forget(command.channel.fileno())
            self._kill_all_of(command)
            return
        kind, number = p.SIGNAL.unpack(data)
        if kind == p.SIGNAL_ALL:
            self._kill_all_of(command)
        elif command.pid in self._commands:
            _signal(command.pid, number)

    # -- ends ----------------------------------------------------------------------------------

    def _on_child(self) -> None:
        try:
            while os.read(self._wake, 4096):
                pass
        except BlockingIOError:
            pass
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            command = self._commands.pop(pid, None)
            if command is not None:
                self._finish(command, status, usage)

    def _finish(self, command: _Command, status: int, usage: resource.struct_rusage) -> None:
        self._kill_leftovers()
        user, system = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
        try:
            command.channel.sendall(p.ANSWER.pack(p.EXITED, status, user, system))
        except OSError:
            pass  # the caller let go of it
        if command.channel.fileno() in self._handlers:
            self._forget(command.channel.fileno())
        command.channel.close()

    def _kill_leftovers(self) -> None:
        """Kill all that a finished command left: whatever no running command is a parent of."""
        if not self._commands:
            try:
                # kill(2): every process of this pid namespace but the caller. The kernel holds
                # the process list meanwhile, so that not even a fork bomb slips through.
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return
            self._reap_all()
            return
        for _ in range(_KILL_PASSES):
            strays = self._strays()
            if not strays:
                return
            for pid in strays:
                _signal(pid, signal.SIGKILL)
            self._reap()
        _leave()  # it breeds faster than it dies: only the end of the namespace stops it

    def _strays(self) -> list[int]:
        """Return the processes that descend from no running command.

        Reparented orphans of a command that still runs count as strays too: nobody can tell
        whose they are, and what a finished command leaves must not live on.
        """
        parents: dict[int, int] = {}
        try:
            entries = os.listdir("/proc")
        except OSError:
            return []  # no /proc could be had here: they die with the last command
        for entry in entries:
            if entry.isdigit():
                try:
                    with open(f"/proc/{entry}/stat", "rb") as file:
                        fields = file.read().rpartition(b")")[2].split()
                except OSError:
                    continue
                if fields[0] not in (b"Z", b"X"):
                    parents[int(entry)] = int(fields[1])
        strays = []
        for pid in parents:
            ancestor = pid
            while ancestor not in self._commands and ancestor > 1:
                ancestor = parents.get(ancestor, 0)
            if ancestor not in self._commands and pid != 1:
                strays.append(pid)
        return strays

    def _reap_all(self) -> None:
        """Wait until no other process is left in the namespace."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, 0)
            except ChildProcessError:
                return
            command = self._commands.pop(pid, None)
            if command is not None:
                self._finish(command, status, usage)

    def _kill_all_of(self, command: _Command) -> None:
        # The rest of its processes go when the end of the first is seen (_finish).
        if command.pid in self._commands:
            _signal(command.pid, signal.SIGKILL)


def _ignore(_number: int, _frame: object) -> None:
    """Let SIGCHLD do no more than write to the wake-up pipe."""


def _leave() -> NoReturn:
    os._exit(0)  # the kernel kills every other process of the namespace (pid_namespaces(7))


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it is gone; its status is on the way


def _read_exactly(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = channel.recv_into(view)
        if not count:
            raise ConnectionError
        view = view[count:]
    return data


def _read_request(channel: socket.socket) -> dict[str, Any]:
    (size,) = p.LENGTH.unpack(_read_exactly(channel, p.LENGTH.size))
    if size > p.LARGEST_REQUEST:
        raise _Failure(errno.E2BIG, "request")
    request: dict[str, Any] = json.loads(_read_exactly(channel, size))
    return request


# -- commands ------------------------------------------------------------------------------------


def _stdio_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions: the next descriptor, or /dev/null, for each of 0, 1, 2."""
    remaining = iter(fds)
    actions: list[Any] = []
    for number, given in enumerate(stdio):
        if given:
            actions.append((os.POSIX_SPAWN_DUP2, next(remaining), number))
        else:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            actions.append((os.POSIX_SPAWN_OPEN, number, "/dev/null", mode, 0))
    return actions


def _given_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions for the given ones of 0, 1, 2 alone."""
    numbers = [number for number, given in enumerate(stdio) if given]
    return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in zip(numbers, fds, strict=True)]


def _open_terminal() -> tuple[list[Any], list[int]]:
    try:
        master, slave = os.openpty()
        name = os.ttyname(slave)
    except OSError as error:
        raise _Failure(error.errno or errno.EIO, "tty") from error
    # The first terminal that a session leader opens becomes its controlling one (tty(4)).
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    return actions, [master, slave]


def _spawn(request: dict[str, Any], actions: list[Any]) -> int:
    argv, environment = request["argv"], request["env"]
    program = _find_program(argv[0], environment.get("PATH", ""), request["cwd"])
    try:
        os.chdir(request["cwd"])
    except OSError as error:
        raise _Failure(error.errno or errno.EIO, "cwd") from error
    try:
        return os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_ALL_SIGNALS,
        )
    except OSError as error:
        raise _Failure(error.errno or errno.EIO, "exec") from error
    finally:
        os.chdir("/")


def _find_program(name: str, path: str, cwd: str) -> str:
    """Search as execvp(3) does, but in the PATH and working directory of the command."""
    if "/" in name:
        return name
    found_error = errno.ENOENT
    for directory in path.split(":"):
        candidate = os.path.join(cwd, directory, name)
        try:
            mode = os.stat(candidate).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        found_error = errno.EACCES
    raise _Failure(found_error, "exec")


# -- files ---------------------------------------------------------------------------------------


def _open_regular(path: str, flags: int, mode: int = 0) -> int:
    """Open a regular file, following no symbolic link anywhere in `path` and waiting for none."""
    resolve = c.RESOLVE_NO_SYMLINKS | c.RESOLVE_NO_MAGICLINKS
    try:
        # O_NONBLOCK: a planted FIFO must not hold up PID 1.
        fd = calls.openat2(c.AT_FDCWD, path, flags | os.O_NONBLOCK | os.O_NOCTTY, mode, resolve)
    except OSError as error:
        raise _Failure(error.errno or errno.EIO, "open") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _Failure(errno.EINVAL, "kind")
    return fd


def _write_file(channel: socket.socket, request: dict[str, Any]) -> None:
    size, left = request["size"], request["size"]
    fd = _open_regular(request["path"], os.O_WRONLY | os.O_CREAT, request["mode"])
    try:
        os.ftruncate(fd, 0)
        os.fchmod(fd, request["mode"])
        while left:
            view = memoryview(_read_exactly(channel, min(left, _CHUNK)))
            left -= len(view)
            while view:
                view = view[os.write(fd, view) :]
    except ConnectionError:
        raise
    except OSError as error:
        raise _Failure(error.errno or errno.EIO, "io") from error
    finally:
        os.close(fd)
    channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))


def _read_file(channel: socket.socket, request: dict[str, Any]) -> None:
    fd = _open_regular(request["path"], os.O_RDONLY)
    try:
        size = left = os.fstat(fd).st_size
        if size > request["most"]:
            raise _Failure(errno.EFBIG, "size")
        channel.sendall(p.ANSWER.pack(p.OK, size, 0, 0))
        while left:
            data = os.read(fd, min(left, _CHUNK))
            if not data:
                break  # it shrank meanwhile; the host sees a short answer
            channel.sendall(data)
            left -= len(data)
    finally:
        os.close(fd)
