# SPDX-License-Identifier: Apache-2.0
"""The host's side of the launcher: start it once, ask it for births, notice its death.

The host process never forks: it may have forty threads. The launcher is started by
posix_spawn(3) with an empty environment, in a session of its own (Ctrl-C is not for it).
"""

from __future__ import annotations

import atexit
import errno
import importlib.util
import logging
import os
import re
import resource
import select
import signal
import socket
import sys
import threading
import traceback
from _socket import socket as Socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from typing import Any, Final

import nsbox
from nsbox.errors import (
    ConfigError,
    EnvironmentStateError,
    LauncherError,
    PoolClosed,
    SetupError,
    SyscallError,
    UnsupportedHostError,
)
from nsbox.launcher import messages, protocol, spawn
from nsbox.launcher.messages import Hello, Spec
from nsbox.linux import proc
from nsbox.linux.descriptors import as_file, pipe_files
from nsbox.supervisor.idmaps import given_range, write_launcher_maps
from nsbox.values.result import EnvironmentDied

_log = logging.getLogger("nsbox")

START_DEADLINE: Final = 30.0
"""Seconds the launcher may take to say hello."""
_EXIT_SECONDS: Final = 5.0  # seconds the interpreter waits at its exit until all is removed
_SPECS_NOTED: Final = 1024
_FEWEST_DESCRIPTORS: Final = spawn.FIRST_FREE + 16
_REAP: Final = 1.0  # seconds from the launcher's last word to its exit status


class Companions:
    """The environments that are closed with a launcher: standby ones, by key of their kind.

    From any thread: whoever takes one out has it alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, deque[Any]] = {}

    def keys(self) -> list[str]:
        """Return the kinds, the first one used first."""
        with self._lock:
            return list(self._kept)

    def values(self) -> list[list[Any]]:
        """Return the environments of each kind."""
        return [self.of(key) for key in self.keys()]

    def of(self, key: str) -> list[Any]:
        """Return those of a kind, the oldest first."""
        with self._lock:
            return list(self._kept.get(key, ()))

    def take(self, key: str) -> Any | None:  # noqa: ANN401
        """Remove and return the oldest of a kind; None: there is none."""
        with self._lock:
            kept = self._kept.get(key)
            return kept.popleft() if kept else None

    def take_all(self, key: str) -> list[Any]:
        """Remove a kind and return its environments."""
        with self._lock:
            return list(self._kept.pop(key, ()))

    def take_old(self, key: str, moment: float) -> list[Any]:
        """Take out those that were asked for before `moment`, and note that the kind is used."""
        with self._lock:
            kept = self._kept.setdefault(key, deque())
            old = []
            while kept and kept[0].asked_at <= moment:
                old.append(kept.popleft())
            return old

    def put(self, key: str, companion: Any, most: int) -> bool:  # noqa: ANN401
        """Add one; False: there are `most` already."""
        with self._lock:
            kept = self._kept.setdefault(key, deque())
            if len(kept) >= most:
                return False
            kept.append(companion)
            return True

    def remove(self, key: str, companion: Any) -> bool:  # noqa: ANN401
        """Remove this one; False: another thread has."""
        with self._lock:
            kept = self._kept.get(key, ())
            if companion not in kept:
                return False
            self._kept[key].remove(companion)
            return True

    def close(self) -> None:
        """Close all."""
        for key in self.keys():
            for companion in self.take_all(key):
                companion.close()


class Launcher:
    """A running launcher process.

    Attributes:
        hello: What it found out about this host (see `nsbox.launcher`).
        pid: Its process id.
        is_lost: Whether somebody has seen its end before the kernel tells it.
        companions: What is closed with it: standby environments by key of their spec.
        absent_files: Control files that cgroups of its environments do not have (`UsageReader`).
    """

    def __init__(self) -> None:
        """Start a launcher and wait for its hello.

        Raises:
            UnsupportedHostError: A user or mount namespace cannot be made here.
            LauncherError: It did not start.
        """
        if not hasattr(select, "poll"):
            raise LauncherError(
                "select.poll is gone, by which nsbox waits: eventlet's monkey_patch() takes it "
                "away; use threads, asyncio or gevent (docs/frameworks.md)"
            )
        self._owner = os.getpid()
        self._specs_sent: set[str] = set()
        self.is_lost = False
        self.companions = Companions()
        self.absent_files: set[object] = set()
        self._lock = threading.Lock()
        self._lock_of_requests = threading.Lock()
        self._started: list[int] = []  # its process, as soon as there is one
        given: list[Socket | FileIO] = []  # its ends
        try:
            self._channel, theirs = protocol.pair()
            given.append(theirs)
            # Births may have to wait for their turn, all else that is asked does not.
            self._requests, theirs = protocol.pair()
            given.append(theirs)
            self._done, done_write = pipe_files()
            given.append(done_write)
            _expect_own_proc()
            self._id_range = given_range()
            _expect_room()
            fds = [end.fileno() for end in given]
            self.pid = _spawn(fds, self._id_range, self._started)
            self._pidfd = as_file(os.pidfd_open, self.pid)
            _close_ends(given)
            self.hello = self._await_hello()
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they may have copies of the ends
            _close_ends(given)
            self.close()
            if isinstance(error, OSError):
                raise LauncherError(f"the launcher could not be started: {error}") from error
            raise

    def _await_hello(self) -> Hello:
        self._channel.settimeout(START_DEADLINE)
        while True:
            try:
                received = protocol.receive(self._channel)
            except TimeoutError:
                raise LauncherError(
                    f"the launcher said nothing for {START_DEADLINE:g} seconds"
                ) from None
            except OSError as error:
                raise LauncherError(f"the launcher's start was not heard: {error}") from error
            if received is None:
                raise LauncherError(f"the launcher ended before it said hello: {self._how_ended()}")
            message = received[0]
            if isinstance(message, messages.UserNamespace):
                self._write_maps(message.pid)
            elif isinstance(message, Hello):
                self._channel.settimeout(None)
                return message
            else:
                raise _start_failure(message)

    def _how_ended(self) -> str:
        """Say how it ended, for people; it is reaped by `close`."""
        if protocol.is_readable(self._pidfd.fileno(), _REAP):
            with suppress(ChildProcessError):  # a SIGCHLD handler of the host program has taken it
                how = os.waitid(
                    os.P_PIDFD, self._pidfd.fileno(), os.WEXITED | os.WNOHANG | os.WNOWAIT
                )
                if how is not None and how.si_code == os.CLD_EXITED:
                    return f"exit status {how.si_status}"
                if how is not None:
                    return f"signal {how.si_status} ended it"
        return "it closed its socket"

    def _write_maps(self, pid: int) -> None:
        try:
            write_launcher_maps(pid, self._id_range)
            protocol.send(self._channel, messages.Mapped())
        except (OSError, ConfigError, UnsupportedHostError) as error:
            # Files of a process that ends meanwhile are gone, or root's (proc(5)).
            if not isinstance(error, OSError) and self.alive:
                raise
            raise LauncherError(f"the launcher's id maps could not be written: {error}") from error

    @property
    def alive(self) -> bool:
        """Whether this process started it and it still runs."""
        if self.is_lost or self._owner != os.getpid():
            return False
        # The kernel closes a dying process's files before its pidfd says that it is dead: the
        # socket's hang-up comes first, and nobody else is asked in vain meanwhile.
        with self._lock:
            if self._channel.fileno() < 0:
                return False  # closed by another thread
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            poll.register(self._channel, 0)  # POLLHUP is always told
            try:
                return not poll.poll(0)
            except OSError as error:
                raise SyscallError("poll", error.errno or 0) from error

    def request_birth(
        self,
        env_id: str,
        spec: Spec,
        fds: Sequence[int],
        awaits: str = "",
        *,
        is_brief: bool = False,
    ) -> None:
        """Ask for an environment.

        Args:
            env_id: Its id.
            spec: What it is to be.
            fds: Its control socket, and where the answer is to come.
            awaits: What is to come on that socket after the answer: ``"taker"``, ``"attachments"``
                or nothing. Until then the environment ends when this end of it is closed.
            is_brief: It is for one command (`protocol.scarcity`).

        The spec itself travels once, its key always. The launcher may forget it ("unknown-spec"):
        then `forget_spec` and ask again.

        Raises:
            ConfigError: The configuration is too large for one message.
            LauncherError: The launcher is gone.
            SetupError: What is to be bound is not there; or the kernel takes no message with
                descriptors now (ETOOMANYREFS).
        """
        key = spec.key
        message = messages.GiveBirth(
            id=env_id,
            key=key,
            spec=None if key in self._specs_sent else spec.to_wire(),
            sources=_look_at(spec.sources),
            awaits=awaits,
            is_brief=is_brief,
        )
        try:
            with self._lock:
                protocol.send(self._channel, message, fds)
        except ValueError as error:
            raise ConfigError(f"the configuration is too large: {error}") from error
        except ConnectionError as error:
            raise LauncherError(f"the launcher is gone: {error}") from error
        except OSError as error:
            if error.errno == errno.EBADF:  # closed by another thread
                raise LauncherError(f"the launcher is gone: {error}") from error
            text = error.strerror or str(error)
            raise SetupError("birth", text, errno=error.errno or 0) from error
        if len(self._specs_sent) >= _SPECS_NOTED:
            self._specs_sent.clear()
        self._specs_sent.add(key)

    def ask(self, request: messages.Request, answer: int = -1) -> None:
        """Ask something of an environment that was born; it is answered on a descriptor, if given.

        Raises:
            OSError: The launcher is gone, or another process's.
        """
        if self._owner != os.getpid():
            raise ProcessLookupError(errno.ESRCH, "the launcher is the parent process's")
        fds = [] if answer < 0 else [answer]
        with self._lock_of_requests:
            protocol.send(self._requests, request, fds)

    def forget_spec(self, spec: Spec) -> None:
        """Have the next `request_birth` send the spec again."""
        self._specs_sent.discard(spec.key)

    def last_words(self) -> str:
        """Return what a launcher that failed has said of it, or ""."""
        with self._lock:
            if self._channel.fileno() < 0 or not protocol.is_readable(self._channel.fileno(), 0.1):
                return ""
            received = protocol.receive(self._channel)
        return "" if received is None else getattr(received[0], "text", "")

    def close(self) -> None:
        """End the launcher and wait until nothing of it or its environments is left.

        May be called again, where it was interrupted, and of one that has not come to its hello.
        """
        self.companions.close()
        made = vars(self)
        for name, lock in (("_channel", self._lock), ("_requests", self._lock_of_requests)):
            if (channel := made.get(name)) is not None:
                with suppress(OSError):  # it is gone already
                    # Ends a send that waits for room; only then is nobody else at the descriptor.
                    channel.shutdown(socket.SHUT_RDWR)
                with lock:
                    channel.close()
        done = made.get("_done")
        # EOF comes when the launcher and its janitor are both gone.
        if done is not None and not done.closed:
            if self._started and not protocol.is_readable(done.fileno(), _EXIT_SECONDS):
                what = "the launcher %d had not cleaned up after %g s"
                _log.warning(what, self._started[0], _EXIT_SECONDS)
            done.close()
        for pid in self._started:
            try:
                pidfd = made.get("_pidfd") or as_file(os.pidfd_open, pid)
            except OSError:
                _end_child(pid)
            else:
                # Its descriptors are closed a moment before it can be reaped.
                protocol.is_readable(pidfd.fileno(), _REAP)
                _unreaped.append(pidfd)
            self._started = []
            _reap_orphans()
        _reap()

    def abandon(self) -> None:
        """Close the descriptors only: in a forked child of the host, whose launcher it is not."""
        self.companions.close()
        for end in (self._channel, self._requests, self._done, self._pidfd):
            end.close()


def _end_child(pid: int) -> None:
    """End and reap a launcher that has no pidfd."""
    with suppress(ProcessLookupError, ChildProcessError):  # a SIGCHLD handler has taken it
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reap_orphans() -> None:
    """Reap what a launcher has left, where orphans are this process's.

    It is PID 1 of a container, or a subreaper (PR_SET_CHILD_SUBREAPER(2const)): nobody else would.
    """
    with suppress(OSError):  # the kernel lists no children
        for pid in proc.children(os.getpid()):
            with suppress(OSError):  # it is gone
                if _ORPHAN.fullmatch(proc.read_stat(pid).comm):
                    with as_file(os.pidfd_open, pid) as pidfd:
                        if protocol.is_readable(pidfd.fileno(), _REAP):
                            os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG)


_ORPHAN: Final = re.compile(r"nsbox-(janitor|template|[0-9a-f]{8})")
_unreaped: Final[list[FileIO]] = []
"""Pidfds of launchers that were closed. One that a debugger holds, or the kernel is late with, is
reaped when the next is started or closed."""


def _reap() -> None:
    for pidfd in tuple(_unreaped):
        # A SIGCHLD handler of the host program may have taken it, or another thread.
        with suppress(ChildProcessError, ValueError):
            if os.waitid(os.P_PIDFD, pidfd.fileno(), os.WEXITED | os.WNOHANG) is None:
                continue
        with suppress(ValueError):
            _unreaped.remove(pidfd)
        pidfd.close()


def _look_at(sources: Sequence[str]) -> str:
    """Say what is at these paths. Of a file system that does not answer, only the caller waits."""
    words = []
    try:
        for found in map(os.stat, sources):
            words.append(f"{found.st_dev}:{found.st_ino}")
    except OSError as error:
        text = f"{error.strerror}: {error.filename!r}"
        raise SetupError("layout", text, errno=error.errno or 0) from error
    return " ".join(words)


def import_paths() -> list[str]:
    """Return the directories that hold nsbox and the extension modules the launcher imports.

    Raises:
        LauncherError: A package is not installed.
    """
    paths = [os.path.dirname(os.path.dirname(os.path.abspath(nsbox.__file__)))]
    for name, remedy in (("_prctl", "python-prctl"), ("cgroupspy", "cgroupspy")):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:
            raise LauncherError(f"the package {remedy} is not installed; pip install {remedy}")
        directory = os.path.dirname(found.origin)
        paths.append(os.path.dirname(directory) if found.submodule_search_locations else directory)
    return list(dict.fromkeys(paths))


def _close_ends(ends: list[Socket | FileIO]) -> None:
    for end in ends:
        end.close()


def _spawn(fds: list[int], id_range: tuple[int, int] | None, started: list[int]) -> int:
    if not sys.executable:
        raise LauncherError("sys.executable is not set: nsbox needs the interpreter's path")
    words = [str(os.getpid()), ":".join(map(str, id_range or ())), *import_paths()]
    return spawn.start("launcher", words, fds, started)


def _start_failure(message: messages.Message) -> Exception:
    if not isinstance(message, messages.Fatal):
        return LauncherError(f"the launcher said {message!r} before its hello")
    if message.step == "id-range":
        return ConfigError(f"NSBOX_ID_RANGE: {message.message}; name a part of that, or unset it")
    kind = {"user-namespace": "user", "mount-namespace": "mount"}.get(message.step)
    if message.message == proc.CHROOT or (kind and proc.is_in_chroot()):
        return UnsupportedHostError("namespace.user", proc.CHROOT, LEAVE_CHROOT)
    if kind:
        why = NAMESPACES_USED_UP if message.errno == errno.ENOSPC else _why_no_namespace()
        return UnsupportedHostError(f"namespace.{kind}", message.message, why)
    what = f"the launcher failed to start, at the step {message.step!r}: {message.message}"
    # Where no call has failed it is a fault of nsbox's own, which a traceback tells.
    return LauncherError(what if message.errno else f"{what}\n{message.text}")


def _expect_room() -> None:
    """Raise LauncherError when the descriptors of a start can have no numbers here."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit < _FEWEST_DESCRIPTORS:
        raise LauncherError(
            f"the limit of open files is {limit} (RLIMIT_NOFILE, ulimit -n), and a launcher's "
            f"start needs {_FEWEST_DESCRIPTORS}: raise it"
        )


def _expect_own_proc() -> None:
    """Check that /proc tells of this process, and so of the launcher.

    Raises:
        UnsupportedHostError: It does not.
    """
    try:
        number = os.readlink("/proc/self")
    except FileNotFoundError:
        number = ""
    if number != str(os.getpid()):
        is_there = os.path.lexists("/proc/self")
        raise UnsupportedHostError(
            "namespace.pid",
            "/proc is that of another pid namespace" if is_there else "no /proc",
            "Mount that of this one (unshare --mount-proc, or mount -t proc proc /proc).",
        )


def _why_no_namespace() -> str:
    """Return why the kernel makes no user namespace for this process, and what to do."""
    with open("/proc/self/uid_map") as file:
        extents = [tuple(map(int, line.split())) for line in file]
    if not any(first <= os.geteuid() < first + count for first, _, count in extents):
        return "The user namespace of this process has no id for it: map one (unshare -r)."
    if proc.read_status()["Seccomp"] != "0":
        return (
            "Either unprivileged user namespaces are switched off here, or the seccomp filter "
            "around this process refuses them; 'nsbox doctor' names the remedies."
        )
    return "Unprivileged user namespaces are switched off here; 'nsbox doctor' names the remedy."


NAMESPACES_USED_UP: Final = (
    "No more namespaces may be made: raise /proc/sys/user/max_*_namespaces, of this user namespace "
    "and of each around it (namespaces(7)); 0 switches a kind off."
)
LEAVE_CHROOT: Final = (
    "Start it outside, or make that directory a root with bwrap or systemd-nspawn."
)


class _Holder:
    """This process's launcher, if one runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._launcher: Launcher | None = None

    def get(self) -> Launcher:
        with self._lock:
            if _unreaped:
                _reap()
            if self._launcher is not None and not self._launcher.alive:
                words = self._launcher.last_words()
                told = f": {words.strip()}" if words else ""
                _log.warning(
                    "the launcher %d has died; starting another%s", self._launcher.pid, told
                )
                self._close()
            if self._launcher is None:
                self._launcher = Launcher()
            return self._launcher

    def running(self) -> Launcher | None:
        with self._lock:
            launcher = self._launcher
            return launcher if launcher is not None and launcher.alive else None

    def shutdown(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._launcher is not None:
            self._launcher.close()
            self._launcher = None  # afterwards: whoever is interrupted closes it again

    def forget(self) -> None:
        """In a forked child: the launcher is the parent's, and another thread had the lock."""
        self._lock = threading.Lock()
        launcher, self._launcher = self._launcher, None
        if launcher is not None:
            launcher.abandon()


_holder = _Holder()


def get_launcher() -> Launcher:
    """Return this process's launcher, started on first use and anew when it has died.

    Raises:
        As `Launcher`.
    """
    return _holder.get()


def running_launcher() -> Launcher | None:
    """Return this process's launcher if it runs."""
    return _holder.running()


def shutdown() -> None:
    """End the launcher and with it every environment of this process; both start anew on use."""
    _holder.shutdown()


_ENDED_BY_EXIT: Final = (
    EnvironmentDied,
    EnvironmentStateError,
    LauncherError,
    PoolClosed,
    SetupError,
)
_is_ending = False


def begin_exit() -> None:
    """Have no traceback printed of calls that the end of the interpreter ends.

    At that point only daemon threads are left, which are ended in the middle of what they do. One
    that was waiting in a call of nsbox has that raised first: its `except` and `finally` run, as
    ever; what it does not catch is no news. Everything else goes to `threading.excepthook` as it
    was. May be called again.
    """
    global _is_ending  # noqa: PLW0603 - an interpreter ends once
    if _is_ending:
        return
    _is_ending = True
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, _ENDED_BY_EXIT):
            before(args)

    threading.excepthook = hook


@atexit.register
def _exit() -> None:
    begin_exit()
    shutdown()


os.register_at_fork(after_in_child=_holder.forget)
