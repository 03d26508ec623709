# SPDX-License-Identifier: Apache-2.0
"""PID 1 of an environment: starts commands, reaps processes, ends with its launcher.

It runs with the same user id, filter and limits as the commands, and without privileges; what
protects it from them is that it is not dumpable, that the kernel shields PID 1 from signals of
its own namespace, and that its descriptors are close-on-exec. It never executes guest code.
"""

from __future__ import annotations

import errno
import os
import select
import time

# The C half of `socket`, as in `linux.calls`.
from _socket import AF_UNIX, MSG_WAITALL, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET
from _socket import socket as _Socket
from resource import RLIMIT_NOFILE, getrlimit
from struct import pack

from nsbox.guest import processes
from nsbox.guest import protocol as p
from nsbox.guest.exec import given_actions, open_terminal, spawn, stdio_actions
from nsbox.guest.files import Failure, read_exactly, serve
from nsbox.linux import constants as c
from nsbox.linux.calls import CHILD, kill_all_others
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes
from nsbox.linux.scheduling import Standing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from resource import struct_rusage
    from typing import NoReturn

    from nsbox.linux.image import Image

_IO_DEADLINE = 30.0  # seconds a host may take to deliver a request it has begun
_KILL_PASSES = 1000
_RESET_EFFORT = 1.0  # seconds of PID 1's own CPU time to kill all that an invocation has left
_REST = 1000  # milliseconds without an event after which memory is given back
_RESET_DEADLINE = 10.0  # seconds that may take: a busy machine, or cpu.max, is no fault of theirs
_OTHER_FDS = 12
"""Descriptors besides those it watches and those that `processes` holds, at most: 0 to 2, four of
the next message (one that finds no room is lost, unix(7)), its pagemap, those of serving one."""


class _Command:
    """A running command, or the worker.

    Attributes:
        pid: Its process id inside.
        channel: The socket on which its end is answered: that of its RUN; of the worker that of
            END, None before.
    """

    __slots__ = ("channel", "pid")

    def __init__(self, pid: int, channel: _Socket | None) -> None:
        self.pid = pid
        self.channel = channel


class _Rehearsal:
    """A stand-in for a socket that holds a RUN request; makes no system call."""

    def __init__(self) -> None:
        request = p.run_request([b"/"], [b"PATH=/"], b"/", [False, True, True, False], 0, None)
        rights = (SOL_SOCKET, SCM_RIGHTS, pack("3i", 0, 0, 0))
        self._received = (p.RUN + p.HERE + request, [rights], 0, None)

    def recvmsg(self, *_: int) -> tuple[object, ...]:
        return self._received


_REHEARSAL = _Rehearsal()


class Runtime:
    """What the template gives PID 1.

    Attributes:
        reset: Empties the writable mounts named, and those of every environment.
        fork_worker: Forks the worker; None in environments of commands.
        image: Memory shared by the clones born from now on; None where nothing is shared.
    """

    __slots__ = ("fork_worker", "image", "reset")

    def __init__(
        self, reset: Callable[[list[bytes]], None], fork_worker: Callable[..., int] | None = None
    ) -> None:
        self.reset = reset
        self.fork_worker = fork_worker
        self.image: Image | None = None


class Init:
    """The event loop of PID 1. Made by the template, once for all that are cloned from it."""

    def __init__(self, control: int, lifeline: int, signals: int, runtime: Runtime) -> None:
        """Take descriptors that have the same numbers in every clone.

        Args:
            control: The control socket (SOCK_SEQPACKET).
            lifeline: A pipe's read end: end of file when the launcher has ended.
            signals: A signalfd of SIGCHLD.
            runtime: How to reset, and in environments of functions how to fork a worker.
        """
        self._control = _Socket(fileno=control)
        self._signals = signals
        self._runtime = runtime
        self._standing, self._standing_now = Standing(), Standing()
        self._standing.take(0)  # a first time, before there are clones
        self._worker: _Command | None = None
        self._kept: tuple[int, ...] = ()  # by the reset that is under way
        self._worker_end = b""  # what is answered to who asks for it
        self._deferred: list[tuple[bytes, list[int]]] = []
        self._commands: dict[int, _Command] = {}
        self._exit_notice: _Socket | None = None  # where it is told that all of them have ended
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None] | _Command] = {}
        self._watch(control, self._on_control)
        self._watch(signals, self._on_child)
        self._watch(lifeline, _leave)

    def run(self, *, is_standby: bool, pagemap: int) -> NoReturn:
        """Serve requests until the host closes the control socket, or the launcher ends.

        Args:
            is_standby: The environment was born ahead of need: there is time to warm up.
            pagemap: A descriptor of this process's /proc/self/pagemap, or -1.
        """
        self._standing.take(0)
        fork_worker = self._runtime.fork_worker
        if fork_worker is not None:
            self._start_worker(fork_worker, is_standby=is_standby)
        elif is_standby:
            self._rehearse()
        image = self._runtime.image
        rest = None if image is None else _REST
        while True:
            events = self._poll.poll(rest)
            if not events and image is not None:
                image.drop(pagemap)
                rest = None
            for fd, _ in events:
                handler = self._handlers.get(fd)
                if isinstance(handler, _Command):  # to make a function for it touches eight pages
                    self._on_channel(fd, handler)
                elif handler is not None:
                    handler()

    def _rehearse(self) -> None:
        """Copy the pages that a command's start writes to, while the environment is on standby."""
        message, fds = receive_bytes(_REHEARSAL, p.LARGEST_MESSAGE)  # type: ignore[arg-type]
        _, _, stdio, _, _, environment = p.parse_run(message[2:])
        stdio_actions(stdio, fds)
        environment.get(b"PATH", b"")
        command = _Command(0, None)
        self._watch(0, command)
        self._forget(0)
        p.ANSWER.pack(p.EXITED, command.pid, 0, 0)

    def _watch(self, fd: int, handler: Callable[[], None] | _Command) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _start_worker(self, fork_worker: Callable[..., int], *, is_standby: bool) -> None:
        """Fork the worker with the descriptors of WORK, the first message."""
        try:
            message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
        except ConnectionError:
            _leave()
        if message[:1] != p.WORK or len(fds) != p.WORK_STREAMS:
            _leave()
        pid = fork_worker(fds, self._runtime.image, has_time=is_standby)
        close_all(fds)
        self._worker = self._commands[pid] = _Command(pid, None)

    def _forget(self, fd: int) -> None:
        del self._handlers[fd]
        self._poll.unregister(fd)

    # -- requests ------------------------------------------------------------------------------

    def _on_control(self) -> None:
        try:
            message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
        except ConnectionError:
            _leave()
        self._serve(message, fds)
        while self._deferred:
            self._serve(*self._deferred.pop(0))

    def _serve(self, message: bytes, fds: list[int]) -> None:
        if not fds:
            _leave()  # the host closed this environment, or is gone
        operation, place, request = message[:1], message[1:2], message[2:]
        channel = _Socket(AF_UNIX, SOCK_STREAM, 0, fds[0])  # told, it need not ask the kernel
        stdio = fds[1:]
        try:
            try:
                if place == p.ON_CHANNEL:
                    channel.settimeout(_IO_DEADLINE)
                    request = _read_request(channel)
                if operation == p.RUN:
                    self._start(channel, request, stdio)
                    return  # the channel lives on
                if operation == p.TERMINATE:
                    self._terminate(channel)
                    return
                if operation == p.END:
                    self._tell_end_of_worker(channel)
                    return
                if operation == p.RESET:
                    self._reset(channel, *p.parse_reset(request))
                elif operation == p.LEFT:
                    self._tell_left(channel, *p.parse_left(request))
                else:
                    channel.settimeout(_IO_DEADLINE)
                    serve(operation, channel, request)
            except Failure as failure:
                stage = p.STAGES.index(failure.stage)
                channel.sendall(p.ANSWER.pack(p.FAILED, failure.error, stage, 0))
        except OSError:
            pass  # the host has closed the channel
        finally:
            close_all(stdio)
        channel.close()

    def _start(self, channel: _Socket, request: bytes, fds: list[int]) -> None:
        flags, size, stdio, cwd, argv, environment = p.parse_run(request)
        room = getrlimit(RLIMIT_NOFILE)[0] - len(self._handlers) - _OTHER_FDS
        if room < processes.MOST_HELD and room < processes.held():
            raise Failure(errno.EMFILE, "room")
        terminal: list[int] = []
        try:
            if flags & p.TTY:
                actions, terminal = open_terminal(size)
                actions += given_actions(stdio, fds)
            else:
                actions = stdio_actions(stdio, fds)
            pid = spawn(cwd, argv, environment, actions)
        except Failure:
            close_all(terminal)
            raise
        if flags & (p.TTY | p.ANNOUNCE):
            try:
                send_bytes(channel, p.ANSWER.pack(p.STARTED, pid, 0, 0), terminal[:1])
            except OSError as error:  # there is no memory for it, or the host does not want it
                self._commands[pid] = _Command(pid, None)
                processes.send_signal(pid, c.SIGKILL)
                close_all(terminal)
                raise Failure(error.errno or errno.EIO, "request") from error
        close_all(terminal)
        if stdio[p.WORKER]:
            if self._worker is not None:
                self._kill_all_of(self._worker)  # the clone, which is of no use now
            self._worker = self._commands[pid] = _Command(pid, None)
            channel.close()
            return
        command = self._commands[pid] = _Command(pid, channel)
        self._watch(channel.fileno(), command)

    def _reset(self, channel: _Socket, kept: int, has_commands: bool, places: list[bytes]) -> None:
        worker = self._worker
        served = kept or (worker.pid if worker is not None else 0)
        if worker is not None and served not in self._commands:
            raise Failure(errno.ESRCH, "worker")
        try:
            if worker is not None:
                self._kept = (1, worker.pid, served)
                self._kill_all_but(self._kept)
                # A process killed just now may have stopped it.
                processes.send_signal(served, c.SIGCONT)
            else:
                self._kept = (1,)
                self._kill_all()
            # Guests have the uid of PID 1 and of the worker: they can lower priorities, which
            # the next command or fork would inherit.
            origins = ([0] if has_commands else []) + ([served] if worker is not None else [])
            for pid in origins:
                self._standing_now.take(pid)
                if self._standing_now != self._standing:
                    raise PermissionError(errno.EPERM, "priority")
            if processes.is_tuned(1) or (served and processes.is_tuned(served)):
                raise PermissionError(errno.EPERM, "priority")
            self._runtime.reset(places)
        except OSError as error:
            self._reap()
            is_there = served in self._commands and error.errno != errno.ESRCH
            if worker is None or is_there:
                raise Failure(error.errno or errno.EIO, "reset") from error
            raise Failure(errno.ESRCH, "worker") from error
        finally:
            self._kept = ()
        if worker is not None and served not in self._commands:
            raise Failure(errno.ESRCH, "worker")
        channel.sendall(p.ANSWER.pack(p.OK, 0, 0, 0))

    def _tell_end_of_worker(self, channel: _Socket) -> None:
        """Answer END: at once when the worker has ended, else at its end."""
        worker = self._worker
        if worker is not None and worker.pid in self._commands:
            worker.channel = channel
            return
        channel.sendall(self._worker_end)
        channel.close()

    def _hear_question(self, worker: _Command) -> _Socket | None:
        """Return the channel of END, and wait `SEEN_DEADLINE` seconds for it; None: none came."""
        poll = select.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        deadline = time.monotonic() + p.SEEN_DEADLINE
        while worker.channel is None and (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
                if not fds:
                    _leave()
                if message[:1] == p.END:
                    worker.channel = _Socket(AF_UNIX, SOCK_STREAM, 0, fds[0])
                else:
                    self._deferred.append((message, fds))
        return worker.channel

    def _tell_left(self, channel: _Socket, worker: int, is_to_die: bool) -> None:
        if not worker and self._worker is not None:
            worker = self._worker.pid
        if worker not in self._commands:
            raise Failure(errno.ESRCH, "worker")
        self._reap()
        try:
            if processes.is_alone(worker, self._commands):
                left, going_on = 0, []
            elif is_to_die:
                left, going_on = self._kill_strays(worker), [worker]
                processes.send_signal(worker, c.SIGCONT)  # one of them may have stopped it
            else:
                processes.strays(self._commands, worker)  # the second look misses none
                found = processes.strays(self._commands, worker)
                left, going_on = len(found), [worker, *found]
            threads = processes.threads_of(going_on)
        except OSError as error:
            raise Failure(error.errno or errno.EIO, "left") from error
        channel.sendall(p.ANSWER.pack(p.OK, left, threads, 0))

    def _terminate(self, channel: _Socket) -> None:
        self._exit_notice = channel
        try:
            os.kill(-1, c.SIGTERM)  # kill(2): every process of this pid namespace but the caller
        except ProcessLookupError:
            pass
        self._send_exit_notice()

    def _send_exit_notice(self) -> None:
        if self._exit_notice is not None and not self._commands:
            try:
                self._exit_notice.sendall(p.ANSWER.pack(p.OK, 0, 0, 0))
            except OSError:
                pass  # the host waits no longer
            self._exit_notice.close()
            self._exit_notice = None

    def _kill_all_but(self, kept: tuple[int, ...]) -> None:
        """Kill every process but those of `kept`, none of which makes others meanwhile.

        /proc is listed number by number: a process that has a child with a lower number and ends
        at once is in no list, nor is its child. So two lists in a row must be empty, and no number
        may have been given out from before the first until after the second.
        """
        deadline = time.monotonic() + _RESET_DEADLINE
        effort = time.process_time() + _RESET_EFFORT
        while time.monotonic() < deadline and time.process_time() < effort:
            newest = processes.newest()
            others = processes.others(kept)
            if others:
                processes.end_all(others)
                self._reap()
            elif not processes.others(kept) and processes.newest() == newest:
                return
        _leave()  # it breeds faster than it dies: only the end of the namespace stops it

    def _on_channel(self, fd: int, command: _Command) -> None:
        try:
            data = command.channel.recv(p.SIGNAL.size, MSG_WAITALL) if command.channel else b""
        except OSError:
            data = b""
        if len(data) != p.SIGNAL.size:
            # The host has closed the channel: the result is no longer wanted.
            self._forget(fd)
            self._kill_all_of(command)
            return
        kind, number = p.SIGNAL.unpack(data)
        if kind == p.SIGNAL_ALL:
            self._kill_all_of(command)
        elif command.pid in self._commands:
            # It leads a session (spawn), so that its group can be no other.
            target = -command.pid if kind == p.SIGNAL_GROUP else command.pid
            processes.send_signal(target, number)

    # -- ends ----------------------------------------------------------------------------------

    def _on_child(self) -> None:
        # A code above 0 is the kernel's word: processes cannot send one (rt_sigqueueinfo(2)).
        code, pid = CHILD.unpack(os.read(self._signals, CHILD.size))
        self._reap(pid if code == os.CLD_EXITED else -1)
        self._send_exit_notice()

    def _reap(self, exited: int = -1) -> None:
        while True:
            if exited < 0:  # else it is known that no signal has ended it
                self._show(os.WNOHANG)
            try:
                pid, status, usage = os.wait4(exited, os.WNOHANG)
            except ChildProcessError:
                pid = 0
            if pid == 0 and exited < 0:
                return
            exited = -1
            command = self._commands.pop(pid, None)
            if command is not None and self._finish(command, status, usage):
                return  # not even to hear that there is no child: an exception is dear here

    def _show(self, flags: int) -> None:
        """Send the host a pidfd of the next process to be reaped, if SIGSYS has ended a command.

        The kernel's log names a process that the filter has killed by its number outside, which
        nobody can tell any more when it has been reaped.
        """
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | flags)
        except OSError:
            return  # there is no child, or a filter of the caller's refuses it
        if ended is None or ended.si_status != c.SIGSYS or ended.si_code == os.CLD_EXITED:
            return
        command = self._commands.get(ended.si_pid)
        if command is None:
            return
        channel = command.channel or self._hear_question(command)
        if channel is None:
            return  # the host has not asked for its end
        try:
            pidfd = os.pidfd_open(command.pid)
        except OSError:
            return  # no room: then it cannot be known
        try:
            send_bytes(channel, p.ANSWER.pack(p.SHOWN, 0, 0, 0), [pidfd])
            channel.settimeout(p.SEEN_DEADLINE)
            data = channel.recv(p.SIGNAL.size)
            while len(data) == p.SIGNAL.size and data[:1] != p.SEEN:
                data = channel.recv(p.SIGNAL.size)  # signals to what has ended
        except OSError:
            pass  # the host does not answer, or has closed the channel
        finally:
            os.close(pidfd)

    def _finish(self, command: _Command, status: int, usage: struct_rusage) -> bool:
        """Answer the end of a command; return whether no process but this one is left."""
        channel = command.channel
        is_alone = self._kill_leftovers()
        user, system = int(usage.ru_utime * 1e6), int(usage.ru_stime * 1e6)
        kind = p.SWEPT if self._kept and command.pid not in self._kept else p.EXITED
        answer = p.ANSWER.pack(kind, status, user, system)
        if command is self._worker:
            self._worker_end = answer
        if channel is None:
            return is_alone
        try:
            channel.sendall(answer)
        except OSError:
            pass  # the host has closed the channel
        if channel.fileno() in self._handlers:
            self._forget(channel.fileno())
        channel.close()
        return is_alone

    def _kill_leftovers(self) -> bool:
        """Kill what a finished command left running: processes that descend from no running one.

        Returns whether no process but this one is left.
        """
        if not self._commands:
            return self._kill_all()
        try:
            self._kill_strays()
        except OSError:
            pass  # no /proc could be had here: they die with the last command
        return False

    def _kill_strays(self, alone: int = 0) -> int:
        """Kill processes that descend from no running command; return their number.

        `alone` is the pid of a command whose descendants are killed as well.
        """
        killed: set[int] = set()
        was_empty = not alone  # else two looks in a row are to find nothing
        for _ in range(_KILL_PASSES):
            strays = processes.strays(self._commands, alone)
            if not strays and was_empty:
                return len(killed)
            was_empty = not alone or not strays
            killed.update(strays)
            processes.end_all(strays)
            self._reap()
        _leave()  # it breeds faster than it dies: only the end of the namespace stops it

    def _kill_all(self) -> bool:
        """Kill every process but this one; returns that there is none left."""
        # The kernel holds the process list meanwhile, so that not even a fork bomb slips through.
        if kill_all_others():
            self._reap_all()
        return True

    def _reap_all(self) -> None:
        """Wait until no other process is left in the namespace."""
        while True:
            self._show(0)
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
            processes.send_signal(command.pid, c.SIGKILL)


def _leave() -> NoReturn:
    os._exit(0)  # the kernel kills every other process of the namespace (pid_namespaces(7))


def _read_request(channel: _Socket) -> bytes:
    (size,) = p.LENGTH.unpack(read_exactly(channel, p.LENGTH.size))
    if size > p.LARGEST_REQUEST:
        raise Failure(errno.E2BIG, "request")
    return bytes(read_exactly(channel, size))
