# SPDX-License-Identifier: Apache-2.0
"""The template process: what every environment is a clone of.

It imports what PID 1 needs and no more, handles no events but births, and touches as little of
its memory as it can: after each clone, each page that either side writes to is copied. The clones
are the launcher's children, not the template's (CLONE_PARENT).

A *birth* arrives as one message with the descriptors it needs; the answer is the clone's pid and
pidfd, or the step that failed. Both ends are trusted and of one interpreter, hence `marshal`: the
package json would be a tenth of the memory of every environment.
"""

from __future__ import annotations

import gc
import marshal
import os

# The C halves of `signal` and `socket`, as in `linux.calls`.
from _signal import SIG_DFL, SIGINT, signal
from _socket import AF_UNIX, SOCK_SEQPACKET
from _socket import socket as _Socket
from fcntl import F_DUPFD_CLOEXEC, fcntl

from nsbox.guest import processes
from nsbox.guest.init import Init, Runtime
from nsbox.guest.protocol import failure_word
from nsbox.guest.reset import reset
from nsbox.isolation import landlock, namespaces, privileges
from nsbox.launcher import inside
from nsbox.launcher.messages import Spec
from nsbox.launcher.steps import failure
from nsbox.linux import calls, image
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all, receive_message, send_bytes
from nsbox.linux.prepared import Name, Program, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from nsbox.linux.prepared import Entry

    _Prepared = dict[tuple[int, ...], list[Entry]]


_THREAD_COUNTS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
)  # fmt: skip


_SETTLED = 3
"""Births after which a template writes to few pages that it has not written to before."""


class _Failure(Exception):
    """A step of a birth failed."""

    def __init__(self, step: str, error: BaseException) -> None:
        super().__init__(step)
        self.step = step
        self.error = error


class Template:
    """The loop of the template process."""

    def __init__(self, channel: int, runtime: Runtime, *, has_image: bool) -> None:
        """Give what clones inherit the numbers of `inside`, and everything else higher ones.

        `has_image` says that clones are to share an image of its memory (`nsbox.linux.image`).
        """
        self._channel = _Socket(fileno=channel)
        # The numbers below are taken in turn, so that no descriptor lies on another's.
        os.dup2(0, inside.SYNC, inheritable=False)
        _renumber(_Socket(AF_UNIX, SOCK_SEQPACKET).detach(), inside.CONTROL)
        _renumber(calls.signalfd([c.SIGCHLD]), inside.SIGNALS)
        if landlock.is_available():
            _renumber(landlock.make_ruleset(), inside.RULESET)
        else:
            os.dup2(0, inside.RULESET, inheritable=False)
        os.dup2(0, inside.PAGEMAP, inheritable=False)
        self._home_network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._home_mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        # What is opened from here on is one birth's, and closed after it.
        self._first_own = self._home_mounts + 1
        # Made once, before all clones: their numbers are the same in each.
        self._init = Init(inside.CONTROL, inside.LIFELINE, inside.SIGNALS, runtime)
        self._runtime = runtime
        self._births_to_image = _SETTLED if has_image else 0
        self._has_image = False
        self._specs: dict[str, tuple[Spec, dict[str, str], _Prepared]] = {}
        self._clones: dict[int, calls.Clone] = {}
        self._extent = b""
        self._drop_groups = False
        # Of the clone being made.
        self._name = Name("nsbox-")
        self._is_standby = False
        self._pid, self._pidfd = 0, -1

    def run(self) -> NoReturn:
        """Serve until the launcher is gone."""
        while True:
            try:
                data, fds = receive_message(self._channel)
            except ConnectionError:
                os._exit(0)
            if not data:
                os._exit(0)
            message = marshal.loads(data)  # noqa: S302 - from the launcher
            if message[0] == "birth":
                self._answer_birth(message, fds)
                if self._births_to_image:
                    self._births_to_image -= 1
                    if not self._births_to_image:
                        self._runtime.image = image.take_when_tried()
                        self._has_image = self._runtime.image is not None
                        for _, _, prepared in self._specs.values():
                            prepared.clear()
            elif message[0] == "spec":
                _, key, fields, view = message
                self._specs[key] = (Spec.from_wire(fields), view, {})
            elif message[0] == "forget":
                del self._specs[message[1]]
            else:
                self._extent = message[1]
                self._drop_groups = message[2]
                self._enter(*fds)

    def _enter(self, user: int, mounts: int) -> None:
        """Enter the launcher's user namespace, unless it is the own one already, and its mounts."""
        if os.fstat(user).st_ino != os.stat("/proc/self/ns/user").st_ino:
            calls.setns(user, c.CLONE_NEWUSER)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        calls.setns(mounts, c.CLONE_NEWNS)
        os.dup2(mounts, self._home_mounts, inheritable=False)
        calls.close_range(self._first_own, c.CLOSE_RANGE_MAX)

    def _answer_birth(self, message: tuple[Any, ...], fds: list[int]) -> None:
        self._pid, self._pidfd, failed = 0, -1, None
        try:
            self._give_birth(message, fds)
        except _Failure as reason:
            failed = failure(reason.step, reason.error)
        try:
            answer = marshal.dumps((self._pid, failed))
            send_bytes(self._channel, answer, [self._pidfd] if self._pid else [])
        except OSError:
            os._exit(0)
        # Everything of this birth, so that the host reads its end when the clone is gone.
        os.dup2(0, inside.CONTROL, inheritable=False)
        calls.close_range(self._first_own, c.CLOSE_RANGE_MAX)

    def _give_birth(self, message: tuple[Any, ...], fds: list[int]) -> None:
        _, key, env_id, host_id, destinations, has_cgroup, has_network, self._is_standby = message
        spec, view, prepared = self._specs[key]
        control, layout, *rest = fds
        cgroup = rest.pop(0) if has_cgroup else -1
        network = rest.pop(0) if has_network else -1
        step = "prepare"
        try:
            # Descriptors get the lowest free numbers, so those of like births are the same.
            numbers = tuple(rest)
            entries = prepared.get(numbers)
            if entries is None:
                entries = prepared[numbers] = self._prepare(spec, view, destinations, rest)
            os.dup2(control, inside.CONTROL, inheritable=False)
            sync, sync_write = os.pipe()
            os.dup2(sync, inside.SYNC, inheritable=False)
            step = "clone"
            flags = spec.namespaces
            self._name.fill_in(env_id)
            self._clone(flags, entries, layout, cgroup, network)
            step = "id-maps"
            namespaces.write_id_maps(self._pid, spec.user_id, host_id)
            os.write(sync_write, inside.MAPPED)
        except (OSError, ValueError) as error:
            # A clone that is there already reads the end of the pipe, and ends.
            raise _Failure(step, error) from error

    def _prepare(
        self, spec: Spec, view: dict[str, str], destinations: list[str], fds: list[int]
    ) -> list[Entry]:
        tree_count = len(destinations)
        trees = dict(zip(destinations, fds[:tree_count], strict=True))
        inherited = inside.Inherited(
            self._extent.decode(), self._has_image, self._drop_groups, fds[tree_count:], trees,
            self._name, view,
        )  # fmt: skip
        program = Program()
        for step in inside.STEPS:
            program.step = step.name
            step.run(program, spec, inherited)
        return program.entries

    def _clone(
        self,
        flags: int,
        entries: list[Entry],
        layout: int,
        cgroup: int,
        network: int,
    ) -> None:
        clone = self._clones.get(flags)
        if clone is None:
            clone = self._clones[flags] = calls.Clone(flags | c.CLONE_PARENT)
        if network >= 0:
            calls.setns(network, c.CLONE_NEWNET)
        try:
            calls.setns(layout, c.CLONE_NEWNS)
            try:
                self._pid, self._pidfd = clone.make(cgroup)
                if self._pid == 0:
                    self._be_born(entries)
            finally:
                namespaces.come_home(self._home_mounts, c.CLONE_NEWNS)
        finally:
            if network >= 0:
                namespaces.come_home(self._home_network, c.CLONE_NEWNET)

    def _be_born(self, entries: list[Entry]) -> NoReturn:
        at = ["session"]
        pagemap = _open_pagemap() if self._has_image else -1
        try:
            run(entries, at)
            os.write(inside.CONTROL, self._extent)
        except BaseException as error:  # noqa: BLE001 - there is no caller to raise to
            try:
                os.write(inside.CONTROL, failure_word(**failure(at[0], error)))
            finally:
                os._exit(1)
        try:
            self._init.run(is_standby=self._is_standby, pagemap=pagemap)
        finally:
            os._exit(1)


def _open_pagemap() -> int:
    """Open, in a clone, what is the clone's own no more when it is not dumpable; else -1."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        return os.dup2(fd, inside.PAGEMAP, inheritable=False)
    except OSError:  # there is no /proc
        os.close(inside.PAGEMAP)
        return -1


def _renumber(fd: int, number: int) -> None:
    if fd != number:
        os.dup2(fd, number, inheritable=False)
        os.close(fd)


def _refuse(channel: int, step: str, error: Exception, *, only_one: bool) -> NoReturn:
    """Answer every birth, or `only_one` and end then, with what failed before it."""
    connection = _Socket(fileno=channel)
    answer = marshal.dumps((0, failure(step, error)))
    while True:
        data, fds = receive_message(connection)
        if not data:
            os._exit(0)
        close_all(fds)
        if marshal.loads(data)[0] == "birth":  # noqa: S302 - from the launcher
            send_bytes(connection, answer)
            if only_one:
                os._exit(1)


def _load_runtime(preload: list[str]) -> Runtime:
    """Import what functions' environments begin with: the worker, and what the operator names."""
    from importlib import import_module

    from nsbox.guest import bootstrap, prewarm

    # A clone has one thread only, and a process of many may not change its mount namespace
    # (setns(2)): what numerical libraries start threads by is told not to.
    os.environ.update(dict.fromkeys(_THREAD_COUNTS, "1"))
    for name in preload:
        import_module(name)
        if len(os.listdir("/proc/self/task")) > 1:
            raise RuntimeError(f"the module {name!r} starts threads, which no clone would have")
    for name in _THREAD_COUNTS:
        del os.environ[name]
    for _ in range(20):
        prewarm.warm_up()
    return Runtime(reset, bootstrap.fork_worker)


def main(lifeline: int, channel: int, kind: str) -> NoReturn:
    """Run the template on inherited descriptors. Called by `nsbox.launcher.main`.

    Args:
        lifeline: It has its number of `inside` already.
        channel: Socket to the launcher.
        kind: "" for environments of commands; for those of functions "python", and after it the
            modules to preload, with commas between them.
    """
    os.set_inheritable(lifeline, False)
    # The numbers of `inside` are taken by what clones inherit.
    channel = fcntl(channel, F_DUPFD_CLOEXEC, inside.FIRST_OTHER)
    os.environ.clear()  # what the dynamic linker was told is for no other program
    # A signal from inside reaches PID 1 only if it has a handler (pid_namespaces(7)).
    signal(SIGINT, SIG_DFL)
    privileges.set_name("nsbox-template")
    processes.remember_born()
    runtime = Runtime(reset)
    if kind:
        try:
            runtime = _load_runtime(kind.split(",")[1:])
        except Exception as error:  # noqa: BLE001 - modules may raise anything
            # What a system call has failed with may be over by the next birth.
            _refuse(channel, "preload", error, only_one=isinstance(error, OSError | MemoryError))
    try:
        # A preloaded module may have an allocator that expects zeros after MADV_DONTNEED.
        template = Template(channel, runtime, has_image=kind == "python")
        gc.disable()
        gc.collect()
        gc.freeze()
        template.run()
    except OSError as error:
        _refuse(channel, "template", error, only_one=True)
    finally:
        os._exit(1)
