# SPDX-License-Identifier: Apache-2.0
"""PID 1 of an environment: starts commands, reaps orphans, ends with its launcher.

It runs with the same user id, filter and limits as the commands, and without privileges; what
protects it from them is that it is not dumpable, that the kernel shields PID 1 from signals of
its own namespace, and that its descriptors are close-on-exec. It never executes guest code.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import struct
import time

# The C half of `socket`, as in `linux.calls`.
from _socket import MSG_WAITALL
from _socket import socket as _Socket
from fcntl import ioctl

from nsbox.guest import protocol as p
from nsbox.guest.files import Failure, read_exactly, read_file, write_file
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from resource import struct_rusage
    from typing import Any, NoReturn

# What the interpreter ignores stays ignored over an exec; handlers do not (signal(7)).
_IGNORED_SIGNALS = (c.SIGPIPE, c.SIGXFSZ)
_SIGNALFD_READ = 128 * 16  # bytes; a record has 128 (signalfd(2)), and equal signals are merged
_IO_DEADLINE = 30.0  # seconds a host may take to deliver a request it has begun
_KILL_PASSES = 1000
_DEATH_DEADLINE = 1000  # milliseconds a killed process may take to end
_RESET_DEADLINE = 2.0  # seconds in which all that an invocation has left must be dead


class _Command:
    """A running command, or the worker: its process, and the channel it was asked for on."""

    __slots__ = ("channel", "pid")

    def __init__(self, pid: int, channel: _Socket) -> None:
        self.pid = pid
        self.channel = channel


class Runtime:
    """What PID 1 of a function's environment can do besides; made by the template."""

    __slots__ = ("fork_worker", "reset")

    def __init__(self, fork_worker: Callable[..., int], reset: Callable[[], None]) -> None:
        self.fork_worker = fork_worker
        self.reset = reset


class Init:
    """The event loop of PID 1. Made by the template, once for all that are cloned from it."""

    def __init__(
        self,
        control: int,
        lifeline: int,
        signals: int,
        runtime: Runtime | None = None,
    ) -> None:
        """Take descriptors that are the same in every clone.

        Args:
            control: The socket that the host asks on.
            lifeline: Reads as ended when the launcher is gone.
            signals: A signalfd of SIGCHLD.
            runtime: In environments of functions: how to make a worker, and how to reset.
        """
        self._control = _Socket(fileno=control)
        self._signals = signals
        self._runtime = runtime
        self._worker: _Command | None = None
        self._commands: dict[int, _Command] = {}
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._watch(control, self._on_control)
        self._watch(signals, self._on_child)
        self._watch(lifeline, _leave)

    def run(self, *, is_blank: bool) -> NoReturn:
        """Serve until the host or the launcher is gone.

        `is_blank` says that nobody waits for this environment yet.
        """
        if self._runtime is not None:
            self._start_worker(self._runtime, is_blank=is_blank)
        while True:
            for fd, _ in self._poll.poll():
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _start_worker(self, runtime: Runtime, *, is_blank: bool) -> None:
        """Fork the worker, with what the host has sent for it together with the birth."""
        try:
            message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
        except ConnectionError:
            _leave()
        if message[:1] != p.WORK or len(fds) != 1 + p.WORK_STREAMS:
            _leave()
        channel, given = _Socket(fileno=fds[0]), fds[1:]
        pid = runtime.fork_worker(given, has_time=is_blank)
        close_all(given)
        worker = self._worker = self._commands[pid] = _Command(pid, channel)
        self._watch(channel.fileno(), lambda: self._on_channel(worker, channel))

    def _forget(self, fd: int) -> None:
        del self._handlers[fd]
        self._poll.unregister(fd)

    # -- requests ------------------------------------------------------------------------------

    def _on_control(self) -> None:
        try:
            message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
        except ConnectionError:
            _leave()
        if not message or not fds:
            _leave()  # the host closed this environment, or is gone
        operation, place, request = message[:1], message[1:2], message[2:]
        channel = _Socket(fileno=fds[0])
        stdio = fds[1:]
        try:
            try:
                if place == p.ON_CHANNEL:
                    channel.settimeout(_IO_DEADLINE)
                    request = _read_request(channel)
                if operation == p.RUN:
                    self._start(channel, request, stdio)
                    return  # the channel lives on
                channel.settimeout(_IO_DEADLINE)
                if operation == p.WRITE:
                    write_file(channel, request)
                elif operation == p.READ:
                    read_file(channel, request)
                elif operation == p.RESET:
                    self._reset(channel, p.PID.unpack(request)[0])
                else:
                    raise Failure(errno.EINVAL, "request")
            except Failure as failure:
                stage = p.STAGES.index(failure.stage)
                channel.sendall(p.ANSWER.pack(p.FAILED, failure.error, stage, 0))
        except OSError:
            pass  # whoever asked is gone
        finally:
            close_all(stdio)
        channel.close()

    def _start(self, channel: _Socket, request: bytes, fds: list[int]) -> None:
        flags, size, stdio, cwd, argv, environment = p.parse_run(request)
        terminal: list[int] = []
        try:
            if flags & p.TTY:
                actions, terminal = _open_terminal(size)
                actions += _given_actions(stdio, fds)
            else:
                actions = _stdio_actions(stdio, fds)
            pid = _spawn(cwd, argv, environment, actions)
        except Failure:
            close_all(terminal)
            raise
        if flags & (p.TTY | p.ANNOUNCE):
            try:
                send_bytes(channel, p.ANSWER.pack(p.STARTED, pid, 0, 0), terminal[:1])
            except OSError:
                pass  # the channel reads EOF at once, and the command is killed then
        close_all(terminal)
        command = self._commands[pid] = _Command(pid, channel)
        self._watch(channel.fileno(), lambda: self._on_channel(command, channel))

    def _reset(self, channel: _Socket, kept: int) -> None:
        worker, runtime = self._worker, self._runtime
        if runtime is None or worker is None or worker.pid not in self._commands:
            raise Failure(errno.ESRCH, "worker")
        try:
            self._kill_all_but((1, worker.pid, kept))
            runtime.reset()
        except OSError as error:
            raise Failure(error.errno or errno.EIO, "reset") from error
        channel.sendall(p.ANSWER.pack(p.OK, 0, 0, 0))

    def _kill_all_but(self, kept: tuple[int, ...]) -> None:
        deadline = time.monotonic() + _RESET_DEADLINE
        while time.monotonic() < deadline:
            others = [pid for pid in _parents() if pid not in kept]
            if not others:
                return
            _end_all(others)
            self._reap()
        _leave()  # it breeds faster than it dies: only the end of the namespace stops it

    def _on_channel(self, command: _Command, channel: _Socket) -> None:
        try:
            data = channel.recv(p.SIGNAL.size, MSG_WAITALL)
        except OSError:
            data = b""
        if len(data) != p.SIGNAL.size:
            # The caller let go of the command: nobody is left to say how it ended.
            self._forget(channel.fileno())
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
            os.read(self._signals, _SIGNALFD_READ)
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

    def _finish(self, command: _Command, status: int, usage: struct_rusage) -> None:
        channel = command.channel
        self._kill_leftovers()
        user, system = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
        try:
            channel.sendall(p.ANSWER.pack(p.EXITED, status, user, system))
        except OSError:
            pass  # the caller let go of it
        if channel.fileno() in self._handlers:
            self._forget(channel.fileno())
        channel.close()

    def _kill_leftovers(self) -> None:
        """Kill all that a finished command left: whatever no running command is a parent of."""
        if not self._commands:
            try:
                # kill(2): every process of this pid namespace but the caller. The kernel holds
                # the process list meanwhile, so that not even a fork bomb slips through.
                os.kill(-1, c.SIGKILL)
            except ProcessLookupError:
                return
            self._reap_all()
            return
        for _ in range(_KILL_PASSES):
            strays = self._strays()
            if not strays:
                return
            _end_all(strays)
            self._reap()
        _leave()  # it breeds faster than it dies: only the end of the namespace stops it

    def _strays(self) -> list[int]:
        """Return the processes that descend from no running command.

        Reparented orphans of a command that still runs count as strays too: nobody can tell
        whose they are, and what a finished command leaves must not live on.
        """
        try:
            parents = _parents()
        except OSError:
            return []  # no /proc could be had here: they die with the last command
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
            _signal(command.pid, c.SIGKILL)


def _end_all(pids: list[int]) -> None:
    """SIGKILL processes and wait until they have ended, whoever their parents are."""
    for pid in pids:
        _signal(pid, c.SIGKILL)
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue  # it has ended, or there is no room: the next pass looks again
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(_DEATH_DEADLINE)
        finally:
            os.close(fd)


def _parents() -> dict[int, int]:
    """Return the parent of each process of the namespace that has not ended."""
    parents: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            if fields[0] not in (b"Z", b"X"):
                parents[int(entry)] = int(fields[1])
    return parents


def _leave() -> NoReturn:
    os._exit(0)  # the kernel kills every other process of the namespace (pid_namespaces(7))


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:
        pass  # it is gone; its status is on the way


def _read_request(channel: _Socket) -> bytes:
    (size,) = p.LENGTH.unpack(read_exactly(channel, p.LENGTH.size))
    if size > p.LARGEST_REQUEST:
        raise Failure(errno.E2BIG, "request")
    return bytes(read_exactly(channel, size))


# -- commands ------------------------------------------------------------------------------------


def _stdio_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions: the next descriptor, or /dev/null, for each of 0, 1, 2."""
    remaining = iter(fds)
    actions: list[Any] = []
    for number, given in enumerate(stdio):
        if given:
            actions.append((os.POSIX_SPAWN_DUP2, next(remaining), number))
        elif number < 3:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            actions.append((os.POSIX_SPAWN_OPEN, number, "/dev/null", mode, 0))
    return actions


def _given_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions for the given ones of 0, 1, 2 alone."""
    numbers = [number for number, given in enumerate(stdio) if given]
    return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in zip(numbers, fds, strict=True)]


def _open_terminal(size: tuple[int, int]) -> tuple[list[Any], list[int]]:
    try:
        master, slave = os.openpty()
        name = os.ttyname(slave)
        # Before the command starts: it may ask at once (ioctl_tty(2), struct winsize).
        ioctl(slave, c.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "tty") from error
    # The first terminal that a session leader opens becomes its controlling one (tty(4)).
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    return actions, [master, slave]


def _spawn(
    cwd: bytes, argv: list[bytes], environment: dict[bytes, bytes], actions: list[Any]
) -> int:
    program = _find_program(argv[0], environment.get(b"PATH", b""), cwd)
    try:
        os.chdir(cwd)
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "cwd") from error
    try:
        return os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_IGNORED_SIGNALS,
        )
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "exec") from error
    finally:
        os.chdir("/")


def _find_program(name: bytes, path: bytes, cwd: bytes) -> bytes:
    """Search as execvp(3) does, but in the PATH and working directory of the command."""
    if b"/" in name:
        return name
    found_error = errno.ENOENT
    for directory in path.split(b":"):
        candidate = os.path.join(cwd, directory, name)
        try:
            mode = os.stat(candidate).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        found_error = errno.EACCES
    raise Failure(found_error, "exec")
