# SPDX-License-Identifier: Apache-2.0
"""The host's end of one environment: control socket, requests to the launcher, counters.

From the launcher come the facts (born, gone, status, OOM); from PID 1 only answers to what was
asked, in frames of fixed size that are checked and not trusted (`nsbox.guest.protocol`).
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from _socket import socket as Socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from typing import Final

from nsbox.errors import DescriptorsExhausted, LauncherError, NsboxError, SetupError, SyscallError
from nsbox.guest import protocol as p
from nsbox.isolation import cgroups, readback
from nsbox.launcher import messages, protocol
from nsbox.launcher.messages import Gone, Spec
from nsbox.linux.binding import is_unknown
from nsbox.linux.descriptors import as_file
from nsbox.linux.owned import Descriptor
from nsbox.supervisor import reports
from nsbox.supervisor.channel import BrokenAnswer, Channel, WorkerEndpoints
from nsbox.supervisor.launcher import NAMESPACES_USED_UP, Launcher
from nsbox.supervisor.requests import END_DEADLINE, Answer, Supervision, is_gone, receive
from nsbox.values.result import EnvironmentDied, Outcome

BIRTH_DEADLINE: Final = 30.0
"""Seconds a birth may take."""
_STEP_HINTS: Final = {
    "clone": "'nsbox doctor' tells which namespace this host does not allow",
    "verify": "PID 1 has ended, or /proc hides it (hidepid=, proc(5)): then let its gid= name a "
    "group of this user",
    "trees": "an idmapped mount needs a file system that supports it (ext4, xfs, btrfs, tmpfs "
    "since Linux 6.3); allow_missing={'idmapped_mounts'} binds without",
}


_DYING: Final = 1.0
"""Seconds that PID 1 may take to end, all its processes first, after its descriptors are closed."""
_MORE_HERE: Final = (
    "Close some, or raise the limit: resource.setrlimit(resource.RLIMIT_NOFILE, ...), 'ulimit -n'"
)
_MORE_IN_LAUNCHER: Final = (
    "It takes the hard limit: close some, or raise that, by 'ulimit -Hn' as root or LimitNOFILE= "
    "of a service"
)


class ForgottenSpec(NsboxError):
    """The launcher no longer knows a spec by its key: ask again."""


Attachments = Sequence[tuple[str, str]]
"""Directories of the host, and where they are bound read-only inside."""
Counters = dict[str, int | None]
"""What `isolation.cgroups.UsageReader` reads; empty where there is no cgroup."""


def _setup_error(step: str, number: int, message: str) -> SetupError:
    # What fails in passing is no host's that does not allow it.
    hint = "" if is_unknown(OSError(number, "")) else _STEP_HINTS.get(step, "")
    if step == "clone" and number == errno.ENOSPC:
        hint = NAMESPACES_USED_UP
    elif number == errno.EFBIG:
        hint = "RLIMIT_FSIZE of this process holds for those that nsbox starts, too: raise it"
    return SetupError(step, message, errno=number, hint=hint)


def _failure(word: bytes) -> SetupError:
    """Return what to raise for the first word of an environment that is not ready."""
    failed = p.parse_failure(word)
    if failed is not None:
        return _setup_error(*failed)
    return SetupError("birth", "the environment was killed before it was ready")


class EnvironmentConnection:
    """Made with the birth, closed with the environment. Safe to use from many threads.

    Attributes:
        env_id: The environment's id.
        asked_at: When the launcher was last told of it, by `time.monotonic`.
        pid: Process id of its PID 1, on the host.
        host_id: Uid and gid it has outside, as the launcher's user namespace counts them.
        proc: How much of a /proc it has.
        closing: Whether the caller has asked for the end.
        has_callers_id: Whether its user is the caller outside, with all of the caller's rights.
        running: Who awaits the end of a command, and so the last counters; by `id`.
        is_killed: Whether this end has killed it.
        cause: Why it has, for people; empty: it was gone already, or closed.
        endpoints: Those of the worker; None in environments that have none.
        supervision: What the launcher is asked of it, and has said of its end.
    """

    def __init__(
        self,
        launcher: Launcher,
        spec: Spec,
        env_id: str,
        *,
        is_brief: bool = False,
    ) -> None:
        """Make its sockets. `ask_for_birth` is next, and `await_birth` waits for it.

        Args:
            launcher: Whom to ask.
            spec: What the environment is to be (`nsbox.supervisor.plan`).
            env_id: Its id.
            is_brief: It is for one command (`protocol.scarcity`).

        Raises:
            SetupError: This process has no room for its sockets.
            DescriptorsExhausted: It would have none for others.
        """
        self.env_id = env_id
        self.asked_at = time.monotonic()
        self._launcher = launcher
        self._spec = spec
        self._is_brief = is_brief
        self.supervision = Supervision(launcher, env_id)
        self.closing = self.is_killed = False
        self.cause = ""
        self.running: set[int] = set()
        self.has_callers_id = launcher.hello.ids == "own" or spec.as_caller
        self.endpoints: WorkerEndpoints | None = None
        self._cgroup: Mapping[str, str] = {}
        self._reader: cgroups.UsageReader | None = None
        self._awaits_attachments = False
        self._is_lent = False  # the control socket, to the launcher
        self._control_lock = threading.Lock()
        self.pid = self._pid_inode = 0
        self._pidfd: Descriptor | None = None  # only where pidfds have no inode of their own
        ends: list[Socket] = []
        try:
            self._control, control = protocol.pair()
            ends += (self._control, control)
            # Where its birth is answered; closed when that is over.
            self._birth, birth = protocol.raw_pair()
            ends += (self._birth, birth)
            if spec.runtime:
                self.endpoints = WorkerEndpoints(self._control)
            newest = [self._birth.fileno(), birth.fileno()]
            if self.endpoints is not None:
                newest.append(self.endpoints.stderr.fileno())
            scarce = protocol.scarcity(newest, is_brief=is_brief)
            if scarce is not None:
                raise DescriptorsExhausted("this process", *scarce, _MORE_HERE)
        except BaseException as error:
            for end in ends:
                end.close()
            self.drop_endpoints()
            if isinstance(error, OSError):
                raise SetupError("birth", str(error), errno=error.errno or 0) from error
            raise
        self._others = (control, birth)

    @property
    def end(self) -> Gone | None:
        """What the launcher said of its end; None while it lives."""
        return self.supervision.end

    def ask_for_birth(self, awaits: str = "") -> None:
        """Ask the launcher for the environment; `awaits` is as in `Launcher.request_birth`.

        With ``"taker"`` nobody needs it yet: the launcher ends it when nobody takes it
        (`tell_of_taker`).

        Raises:
            LauncherError: The launcher is gone.
        """
        self.asked_at = time.monotonic()
        control, birth = self._others
        fds = [control.fileno(), birth.fileno()]
        try:
            self.supervision.ask_for_birth(self._spec, fds, awaits, is_brief=self._is_brief)
        except BaseException:
            self.close()
            raise
        control.close()
        birth.close()

    def await_birth(self, attachments: Attachments = (), *, lends_control: bool = False) -> None:
        """Wait until the environment is locked in, and see that it is.

        With `attachments` the launcher is told to attach them, which it does meanwhile, and that
        somebody has taken the environment; `await_attached` waits for its answer. With
        `lends_control` it gets the control socket, too, until PID 1 is to be asked something: an
        environment that is only invoked has a descriptor less.

        Raises:
            SetupError: A step failed; nothing is left of it.
            LauncherError: The launcher is gone.
            ForgottenSpec: Ask again.
        """
        try:
            word = self._await_ready()
            is_ready = bool(word) and p.parse_failure(word) is None
            if attachments and is_ready:
                self._awaits_attachments = True
                for source, _ in attachments:
                    # One that does not answer stops this thread, not all; the launcher tells.
                    os.path.exists(source)
                self._is_lent = lends_control
                self._ask_to_attach(attachments, self._control.fileno() if lends_control else -1)
                if lends_control:
                    self._control.close()
            born = self._hear_of_birth()
            if not is_ready:
                raise _failure(word)
            self.proc = word.decode()
            self._verify(filtered=bool(self._spec.seccomp))
            if not self._awaits_attachments:
                self._birth.close()
            self.host_id = born.host_id
            self._cgroup = born.cgroup
        except BaseException:
            self._abandon()
            raise

    # -- birth ---------------------------------------------------------------------------------

    def _ask_to_attach(self, attachments: Attachments, control: int) -> None:
        try:
            message = messages.Attach(mounts=attachments)
            protocol.send(self._birth, message, [control] if control >= 0 else ())
        except OSError as error:
            if not is_gone(error):  # else that is seen next
                raise SetupError("attach", f"sendmsg: {error}", errno=error.errno or 0) from error

    def tell_of_taker(self, message: messages.Claim | messages.Keep) -> bool:
        """Tell the launcher that this standby environment has a taker, or that it is to wait on.

        Returns whether that could be told; otherwise it is gone, which its taker will see.
        """
        try:
            protocol.send(self._birth, message)
        except OSError:
            return False
        return True

    def await_attached(self) -> None:
        """Wait until all attachments are in their places.

        Raises:
            SetupError: A source is gone, or a mount was refused.
            EnvironmentDied: The environment is gone.
        """
        if self._awaits_attachments:
            self._awaits_attachments = False
            try:
                self._check_answer("attach", lambda: receive(self._birth, END_DEADLINE))
            finally:
                self._birth.close()

    def _await_ready(self) -> bytes:
        """Return the environment's own first word, b"" when it ended without one.

        Every other copy of its end is closed by then, so that its death reads as the end.
        """
        if not protocol.is_readable(self._control.fileno(), BIRTH_DEADLINE):
            raise SetupError("birth", f"not over after {BIRTH_DEADLINE:g} seconds")
        for _ in range(2):
            try:
                return self._control.recv(p.LARGEST_MESSAGE)
            except ConnectionError:
                continue  # it has left something unread, which is told once, before its word
            except OSError as error:
                raise SetupError("birth", f"recvfrom: {error}", errno=error.errno or 0) from error
        return b""

    def _hear_of_birth(self) -> messages.Born:
        """Return the launcher's report on the clone; it comes at about the same time."""
        if not protocol.is_readable(self._birth.fileno(), BIRTH_DEADLINE):
            raise LauncherError(f"the launcher did not answer within {BIRTH_DEADLINE:g} seconds")
        try:
            received = protocol.hear(self._birth)
        except OSError as error:
            raise SetupError("birth", str(error), errno=error.errno or 0) from error
        if received is None:
            if self._launcher.alive:
                what = "the launcher had no room for its sockets, or no memory for an answer"
                raise SetupError("birth", what, hint="try again")
            words = self._launcher.last_words()
            self._launcher.is_lost = True
            raise LauncherError(f"the launcher died during the birth. {words}")
        message, fds = received
        if isinstance(message, messages.Born):
            self.pid, self._pid_inode = message.pid, message.inode
            if fds:
                self._pidfd = fds[0]
            return message
        if isinstance(message, messages.UnknownSpec):
            self._launcher.forget_spec(self._spec)
            raise ForgottenSpec(self.env_id)
        if isinstance(message, messages.NoDescriptors):
            raise DescriptorsExhausted(
                "nsbox's launcher", message.count, message.limit, _MORE_IN_LAUNCHER
            )
        if isinstance(message, messages.Failed):
            raise _setup_error(message.step, message.errno, message.message)
        raise LauncherError(f"the launcher answered a birth with {message!r}")

    def _abandon(self) -> None:
        """Close a connection whose birth failed, when nothing is left of the environment."""
        if self.pid:
            self.kill()
            self.await_end()
        self.close()

    def _verify(self, *, filtered: bool) -> None:
        try:
            missing = readback.missing_lock(self.pid, filtered=filtered)
        except OSError as error:
            raise _setup_error("verify", error.errno or 0, str(error)) from error
        if missing:
            raise SetupError("verify", f"its status does not say {missing!r}")

    # -- PID 1 ---------------------------------------------------------------------------------

    def ask(self, operation: bytes, request: bytes, fds: list[int]) -> Channel:
        """Ask PID 1 for an operation; its answer is on the channel.

        Raises:
            EnvironmentDied: PID 1 is gone, or does not listen.
            SyscallError: This process has no room for a socket.
        """
        try:
            return Channel(self._take_control(), operation, request, fds)
        except OSError as error:
            raise self.failed(error, "sendmsg") from error

    def begin(self, operation: bytes, request: bytes) -> Channel:
        """Do as `ask`, and wait for nothing; its channel does not, either.

        A request above `p.LARGEST_MESSAGE` waits for PID 1 all the same, and without `has_control`
        the launcher is waited for.

        Raises:
            OSError: PID 1 is gone.
            NsboxError: The launcher does not give its socket; see `request`.
        """
        return Channel(self._take_control(), operation, request, waits=False)

    @property
    def has_control(self) -> bool:
        """Whether PID 1's socket is here, and not in the launcher."""
        return self._control.fileno() >= 0

    def _take_control(self) -> Socket:
        """Return PID 1's socket, which the launcher may have had until now; raises as `request`."""
        if self._is_lent and not self.closing and not self.has_control:
            with self._control_lock:
                if not self.has_control:  # no other thread has just done so
                    fds = self.request(messages.Control(id=self.env_id))
                    self._control = protocol.adopt(fds[0])
        return self._control

    def failed(self, cause: OSError, call: str = "recvmsg") -> NsboxError:
        """Return the exception for an operation that `call` ends here, with its channel.

        The environment goes on, unless it is PID 1 that went away (`died`).
        """
        if self.closing or isinstance(cause, ConnectionError | TimeoutError):
            return self.died(cause)
        return cause if isinstance(cause, SyscallError) else SyscallError(call, cause.errno or 0)

    def died(self, cause: OSError) -> EnvironmentDied:
        """Return the exception for an operation under which PID 1 went away or fell silent.

        Or was not heard: what has become of the environment is not known then, and it is killed.
        """
        self.kill_for(cause)
        if not isinstance(cause, TimeoutError):
            self.await_end()
        return self.death()

    def kill_for(self, cause: OSError) -> None:
        """Kill it for what reading an answer of PID 1 has come to, unless it is gone by itself."""
        if isinstance(cause, TimeoutError):
            self.kill("PID 1 did not answer")
        elif isinstance(cause, BrokenAnswer):
            self.kill(str(cause))
        elif isinstance(cause, ConnectionError):
            # As a rule it is gone already. Or it had no memory, or no room, for an answer.
            self.kill("" if self.has_ended(_DYING) else "PID 1 closed a request without an answer")
        else:
            self.kill(f"PID 1 was not heard ({cause})")

    def death(self, outcome: Outcome | None = None) -> EnvironmentDied:
        """Return the exception that tells how the environment ended; None: as `end_outcome`."""
        what = f"environment {self.env_id}: {self.describe_end()}"
        return EnvironmentDied(what, outcome or self.end_outcome())

    def ask_to_end(self) -> Socket:
        """SIGTERM everything in it; return what `await_exit_notice` takes.

        Raises:
            EnvironmentDied: PID 1 is gone.
        """
        self._take_control()  # while that can be had
        self.closing = True  # before the signal: no command is said to have been ended by others
        return self.ask(p.TERMINATE, b"", []).socket

    def kill(self, cause: str = "") -> None:
        """SIGKILL PID 1, and so everything in the environment.

        `cause` is what `describe_end` will say; the first one stands, while it lives.
        """
        if not self.is_killed and self.supervision.end is None:
            self.cause = cause
        self.is_killed = True
        self.send_kill()

    def send_kill(self) -> None:
        """SIGKILL PID 1, and note nothing: as anybody outside could."""
        try:
            pidfd = self.open_pidfd()
        except ProcessLookupError:
            return
        except OSError:  # no room for a descriptor here; the launcher needs none
            self._have_killed()
            return
        try:
            signal.pidfd_send_signal(pidfd.fileno(), signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended just now
        except OSError:
            self._have_killed()
        finally:
            pidfd.close()

    def _have_killed(self) -> None:
        with suppress(OSError):  # the launcher is gone, and the environment with it
            self.supervision.tell(messages.Kill(id=self.env_id))

    def begin_end(self) -> None:
        """Have the environment end; `await_end` waits for it."""
        self.closing = True
        # First of all, whatever the launcher is doing just now: it dies while the launcher is told.
        self.kill()
        self.supervision.begin_end(is_reported=bool(self.running))

    # -- the launcher --------------------------------------------------------------------------

    def fileno(self) -> int:
        """Descriptor that hangs up when PID 1 has ended; -1 where there is none, or no more."""
        return self._control.fileno()

    def death_descriptor(self) -> int:
        """Descriptor that hangs up when PID 1 has ended; -1 once this is closed.

        Where the launcher has, or had, PID 1's it is the worker's, which the kernel ends with PID
        1. It hangs up as well when the worker has ended, or has closed it.
        """
        if self._is_lent and self.endpoints is not None:
            return self.endpoints.socket.fileno()
        return self._control.fileno()

    def request(self, request: messages.Request) -> list[Descriptor]:
        """Have the launcher do something to the environment; return the descriptors it gives.

        Raises:
            SetupError: It could not.
            EnvironmentDied: The environment is gone.
            LauncherError: It did not answer in time. It may do it later, so that the environment
                was killed.
            SyscallError: This process has no room for a socket.
        """
        name = type(request).__name__.lower()
        return self._check_answer(name, lambda: self.supervision.request(request))

    def _check_answer(self, what: str, ask: Callable[[], Answer | None]) -> list[Descriptor]:
        try:
            answer, fds = ask() or (None, [])
        except TimeoutError:
            self.kill(f"the launcher did not answer {what!r} within {END_DEADLINE:g} seconds")
            raise LauncherError(f"environment {self.env_id}: {self.describe_end()}") from None
        except SyscallError:
            raise
        except OSError:
            answer = None
        if isinstance(answer, messages.Failed):
            raise SetupError(what, answer.message, errno=answer.errno)
        if not isinstance(answer, messages.Done):
            self.kill()
            self.await_end()
            raise self.death()
        return fds

    def note_end(self) -> bool:
        """Whether PID 1 is gone; then `end` is told, which it is a moment later."""
        supervision = self.supervision
        if supervision.end is None:
            fd = self._control.fileno()
            # It says nothing but its first word.
            is_over = fd >= 0 and protocol.is_readable(fd, 0)
            if is_over or (fd < 0 and self._is_lent and self.has_ended(0)):
                self.await_end()
        return supervision.end is not None

    def await_end(self) -> bool:
        """Wait for the end of a killed environment; False when it does not come."""
        self.supervision.await_end()
        if self.supervision.end is not None and not self.supervision.unsaid:
            return True
        # Nobody else can say it; of a silent launcher it was waited for already.
        if not self.has_ended(0 if self.end is None else END_DEADLINE):
            return False
        self.supervision.end_unsaid()
        return True

    def has_ended(self, seconds: float) -> bool:
        """Whether PID 1 has ended within this time, by the kernel's word."""
        try:
            pidfd = self.open_pidfd()
        except ProcessLookupError:
            return True
        except OSError:
            return False  # there is no room to look
        try:
            return protocol.is_readable(pidfd.fileno(), seconds)
        finally:
            pidfd.close()

    def describe_end(self) -> str:
        """Say how the environment ended, for people."""
        return reports.describe_end(
            self.supervision.end, self.supervision.unsaid, self.cause, closing=self.closing
        )

    def end_outcome(self) -> Outcome | None:
        """Return what its end was, as far as the launcher has told; None: it has not."""
        return reports.end_outcome(self.supervision.end, self.cause if self.is_killed else "")

    def open_pidfd(self) -> FileIO:
        """Return a descriptor, for the caller to close, that is readable when PID 1 has ended.

        None is kept: thousands of environments would have as many. Another process that has got
        the number of PID 1 since has another inode (Linux 6.9; before, one is kept).

        Raises:
            ProcessLookupError: It is gone.
            OSError: There is no room for it.
        """
        if self._pidfd is not None:
            return as_file(os.dup, self._pidfd.fileno())
        if not self.pid:
            raise ProcessLookupError(errno.ESRCH, "it was not born")
        try:
            pidfd = as_file(os.pidfd_open, self.pid)
        except SyscallError as error:
            if error.errno != errno.ESRCH:
                raise
        else:
            if os.fstat(pidfd.fileno()).st_ino == self._pid_inode:
                return pidfd
            pidfd.close()
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def close(self) -> None:
        """Close the descriptors; the launcher then kills and removes what is left."""
        self.supervision.close()
        for end in (self._control, self._birth, *self._others):
            end.close()
        self.drop_endpoints()
        pidfd, self._pidfd = self._pidfd, None
        if pidfd is not None:
            pidfd.close()

    def __del__(self) -> None:
        # An interrupt came before anybody had it. With PID 1's socket in the launcher nothing is
        # closed here that would end it.
        if getattr(self, "_is_lent", False):
            supervision = self.supervision
            if supervision.end is None and not supervision.is_let_go:
                self.send_kill()

    def drop_endpoints(self) -> None:
        """Close what a clone of a worker has been given."""
        if self.endpoints is not None:
            self.endpoints.close()

    # -- accounting ----------------------------------------------------------------------------

    @property
    def reader(self) -> cgroups.UsageReader | None:
        """Of what its cgroups count, made for the first who asks; None where there are none."""
        if self._reader is None and self._cgroup:
            self._reader = cgroups.UsageReader(self._cgroup, self._launcher.absent_files)
        return self._reader

    def usage(self) -> Counters:
        """Return everything that can be read of its cgroups now; at its end, what was read then."""
        if self.supervision.end is not None:
            return self.supervision.end.usage
        try:
            return {} if (reader := self.reader) is None else reader.read()
        except OSError:
            return {}  # they have just been removed

    def memory_peak(self) -> int | None:
        """Return the bytes it has had at most, which costs one file of the ten."""
        if self.supervision.end is not None:
            return self.usage().get("memory_peak")
        try:
            return None if (reader := self.reader) is None else reader.memory_peak()
        except OSError:
            return None

    def counters(self) -> Counters:
        """Return what only grows, and what it costs less to read."""
        try:
            return {} if (reader := self.reader) is None else reader.counters()
        except OSError:
            return {}

    def cpu_usec(self) -> int | None:
        """Return the CPU time used so far, in microseconds."""
        try:
            return None if (reader := self.reader) is None else reader.cpu_usec()
        except OSError:
            return None


def await_exit_notice(notice: Socket | None, seconds: float) -> None:
    """Wait until all that was asked to end has ended, or the time is over; close `notice`."""
    if notice is not None:
        try:
            protocol.is_readable(notice.fileno(), seconds)
        finally:
            notice.close()
