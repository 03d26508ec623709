# SPDX-License-Identifier: Apache-2.0
"""The launcher process: an event loop that gives birth to environments and sees them out.

It never sees a command, its environment variables or its data (docs/threat-model.md): later
environments are clones of its memory.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
import time

from nsbox.errors import NsboxError
from nsbox.isolation import cgroups, filesystem, namespaces, privileges, readback, userland
from nsbox.isolation.network import NetworkPool
from nsbox.launcher import identity, janitor, wire
from nsbox.launcher.birth import Birth, describe_error
from nsbox.linux import calls, proc
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from nsbox.linux.program import Entry

NETWORKS_READY = 4
LAYOUTS_KEPT = 8
SPECS_KEPT = 32
_REMOVAL_DEADLINE = 5.0  # seconds a cgroup may stay busy (containers/common PR 858)
_REMOVAL_RETRY = 0.005
_QUIET = 0.002  # seconds without a request before network namespaces are made ahead of need


class _Environment:
    """An environment the launcher is parent of."""

    def __init__(self, birth: Birth, supervision: socket.socket) -> None:
        self.birth: Birth | None = birth
        self.id: str = birth.spec["id"]
        self.supervision: socket.socket | None = supervision
        self.pid = birth.pid
        self.pidfd = birth.pidfd
        self.cgroup = birth.cgroup
        self.host_id = birth.host_id
        self.takes_id = birth.takes_id
        self.oom_event = -1
        self.out_of_memory = False
        self.stopped: list[int] = []


class Server:
    """The launcher's state and loop."""

    def __init__(
        self, channel: socket.socket, host: int, done: int, settings: dict[str, Any]
    ) -> None:
        self._channel = channel
        self._host = host
        self._done = done
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poll = select.epoll()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._environments: dict[int, _Environment] = {}
        self._layouts: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self._lifeline, self._lifeline_write = os.pipe()

        own_namespace = not identity.is_privileged()
        if own_namespace:
            calls.unshare(c.CLONE_NEWUSER)
            wire.send(channel, {"kind": "user-namespace", "pid": os.getpid()})
            if wire.receive(channel) is None:
                os._exit(0)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        calls.unshare(c.CLONE_NEWNS)
        # Slave: what the operator mounts later is seen here, nothing here is seen there.
        calls.mount(None, "/", None, c.MS_REC | c.MS_SLAVE)
        self.home_mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        # Without root it could not come back from one: its own belongs to the user namespace
        # it left (setns(2)). Environments get theirs from clone3 then.
        self.networks = None if own_namespace else NetworkPool(NETWORKS_READY)
        self.identity = identity.choose(
            own_namespace=own_namespace, id_range=settings.get("id_range")
        )
        self.ids = self.identity.ids
        self.may_drop_groups = self.identity.may_drop_groups
        self.prepared: dict[str, dict[str, list[Entry]]] = {}
        self._proc_extent = ""
        self._tree = cgroups.Tree.for_process(os.getpid())
        self._candidates = self._tree.candidates
        self._janitor = -1
        # Before the first directory is made: whoever kills this process at any later moment finds
        # somebody who removes it.
        self._start_janitor()
        capabilities = self._tree.capabilities()
        gc.collect()
        gc.freeze()
        wire.send(
            channel,
            {
                "kind": "hello",
                "pid": os.getpid(),
                "privileged": not own_namespace,
                "ids": self.identity.kind,
                "drops_groups": self.may_drop_groups,
                "networks_ready": self.networks is not None,
                "namespaces": [
                    name
                    for name, file in zip(namespaces.FLAGS, namespaces.FILES, strict=True)
                    if os.path.exists(f"/proc/self/ns/{file}")
                ],
                "cgroups": capabilities,
                "trees": self._tree.paths,
            },
        )

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Serve until the host is gone."""
        self._watch(self._channel.fileno(), self._on_request)
        self._watch(self._host, self._leave)
        while True:
            for fd, _ in self._poll.poll(self._wait_time()):
                handler = self._handlers.get(fd)
                if handler is not None:
                    handler()
                    break  # it may have closed descriptors that the rest of the list names
            else:
                self._on_idle()

    def _wait_time(self) -> float | None:
        if self.networks is not None and self.networks.wants_more and not self._timers:
            return _QUIET
        if self._timers:
            return max(0.0, min(self._timers)[0] - time.monotonic())
        return None

    def _on_idle(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, action in due:
            action()
        if not due and self.networks is not None and self.networks.wants_more:
            self.networks.add()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.EPOLLIN)

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _leave(self) -> NoReturn:
        """End: the host is gone. Environments are killed and reaped; the janitor does the rest."""
        for environment in self._environments.values():
            signal.pidfd_send_signal(environment.pidfd, signal.SIGKILL)
        deadline = time.monotonic() + 2.0
        while self._environments and time.monotonic() < deadline:
            for fd, _ in self._poll.poll(0.1):
                ended = self._environments.pop(fd, None)
                if ended is not None:
                    os.waitpid(ended.pid, 0)
                    self._forget(fd)
        os._exit(0)

    def _start_janitor(self) -> None:
        if self._candidates:
            self._janitor = janitor.start(self._candidates, self._done)
            self._watch(self._janitor, self._on_janitor_exit)

    def _on_janitor_exit(self) -> None:
        self._forget(self._janitor)
        os.waitid(os.P_PIDFD, self._janitor, os.WEXITED)
        os.close(self._janitor)
        self._start_janitor()

    # -- births --------------------------------------------------------------------------------

    def _on_request(self) -> None:
        try:
            received = wire.receive(self._channel)
        except OSError:
            return  # no room for its sockets, which are closed: the host reads that as the end
        if received is None:
            self._leave()
        spec, (control, supervision_fd) = received
        supervision = socket.socket(fileno=supervision_fd)
        try:
            birth = Birth(self, spec, control, self._lifeline)
        except OSError as error:
            os.close(control)
            self._answer(supervision, {"kind": "failed", **describe_error("prepare", error)})
            supervision.close()
            return
        try:
            birth.run_launcher_side()
        except (OSError, NsboxError, ValueError) as error:
            self._abort(birth)
            self._answer(supervision, {"kind": "failed", **describe_error(birth.step, error)})
            supervision.close()
            return
        finally:
            os.close(control)
        environment = _Environment(birth, supervision)
        self._environments[birth.pidfd] = environment
        self._watch(birth.sync.fileno(), lambda: self._on_birth_news(environment))
        self._watch(supervision_fd, lambda: self._on_supervision(environment))
        self._watch(birth.pidfd, lambda: self._on_exit(environment))
        born = {
            "kind": "born",
            "pid": birth.pid,
            "host_id": birth.host_id,
            "cgroup": birth.cgroup.paths if birth.cgroup is not None else {},
        }
        self._answer(supervision, born, [birth.pidfd])

    def _abort(self, birth: Birth) -> None:
        """Remove what the launcher's steps had made when one of them failed."""
        if birth.pid:
            signal.pidfd_send_signal(birth.pidfd, signal.SIGKILL)
            os.waitpid(birth.pid, 0)
            os.close(birth.pidfd)
        if birth.cgroup is not None:
            self._remove_cgroup(birth.cgroup, lambda _left: None)
        if birth.takes_id and self.ids is not None:
            self.ids.give_back(birth.host_id)
        birth.close()

    def make_cgroup(self, spec: dict[str, Any]) -> cgroups.EnvironmentCgroup | None:
        """Make the cgroup of an environment, or None where no hierarchy is usable."""
        if not self._tree.paths:
            return None
        return self._tree.make(spec["id"], spec["cgroup_limits"])

    def layout(self, wanted: dict[str, Any]) -> int:
        """Return the mount namespace of a layout, built anew when a source was replaced."""
        key = json.dumps(wanted, sort_keys=True)
        stamps = [
            (status.st_dev, status.st_ino) for status in map(os.stat, userland.sources(wanted))
        ]
        known = self._layouts.pop(key, None)
        if known is not None and known[1] != stamps:
            os.close(known[0])
            known = None
        if known is None:
            known = (userland.hold(wanted), stamps)
            if len(self._layouts) >= LAYOUTS_KEPT:
                oldest = next(iter(self._layouts))
                os.close(self._layouts.pop(oldest)[0])
        self._layouts[key] = known  # the most recently used last
        return known[0]

    def proc_extent(self, layout: int) -> str:
        """Return how much of a /proc environments can have; found out once."""
        if not self._proc_extent:
            calls.setns(layout, c.CLONE_NEWNS)
            try:
                self._proc_extent = filesystem.probe_proc()
            finally:
                namespaces.come_home(self.home_mounts, c.CLONE_NEWNS)
        return self._proc_extent

    def remember(self, key: str, shared: dict[str, list[Entry]]) -> None:
        """Keep the prepared calls of a spec for the next birth of the same."""
        if len(self.prepared) >= SPECS_KEPT:
            self.prepared.clear()
        self.prepared[key] = shared

    def _on_birth_news(self, environment: _Environment) -> None:
        """Hear of the end of a birth: EOF when the environment has locked itself in."""
        birth = environment.birth
        if birth is None:
            return
        try:
            data = birth.sync.recv(4096)
        except ConnectionResetError:
            # It ended before it had read all that was sent to it; what it said comes after.
            data = birth.sync.recv(4096)
        self._forget(birth.sync.fileno())
        birth.close()
        environment.birth = None
        if not data:
            self._watch_memory(environment)
            return
        if environment.supervision is not None:
            self._answer(environment.supervision, {"kind": "failed", **json.loads(data)})
        self._kill(environment)

    # -- life ----------------------------------------------------------------------------------

    def _watch_memory(self, environment: _Environment) -> None:
        """End the whole environment when v1's OOM killer takes a part; v2 does so by itself."""
        if environment.cgroup is None:
            return
        event = environment.cgroup.oom_eventfd()
        if event is not None:
            environment.oom_event = event
            self._watch(event, lambda: self._on_oom(environment))

    def _on_oom(self, environment: _Environment) -> None:
        os.eventfd_read(environment.oom_event)
        environment.out_of_memory = True
        self._kill(environment)

    def _on_supervision(self, environment: _Environment) -> None:
        supervision = environment.supervision
        if supervision is None:
            return
        received = wire.receive(supervision)
        if received is None:
            self._forget(supervision.fileno())
            supervision.close()
            environment.supervision = None
            self._kill(environment)
            return
        kind = received[0]["kind"]
        try:
            if kind == "close":
                self._kill(environment)
                return  # "gone" is the answer
            if kind == "freeze":
                self._freeze(environment)
            elif kind == "thaw":
                self._thaw(environment)
            elif kind == "verify":
                missing = readback.missing_lock(environment.pid, filtered=True)
                if missing:
                    raise OSError(errno.EPERM, f"its status does not say {missing!r}")
        except OSError as error:
            self._answer(supervision, {"kind": "failed", **describe_error(kind, error)})
        else:
            self._answer(supervision, {"kind": "done"})

    def _freeze(self, environment: _Environment) -> None:
        if environment.cgroup is not None and environment.cgroup.can_freeze:
            environment.cgroup.freeze()
            return
        # No freezer: stop every process, until a pass finds none running. Init goes first, so
        # that it does not see its children stop.
        for _ in range(100):
            alive = [environment.pid, *proc.descendants(environment.pid)]
            running = [pid for pid in alive if pid not in environment.stopped]
            if not running:
                return
            for pid in running:
                try:
                    os.kill(pid, signal.SIGSTOP)
                except ProcessLookupError:
                    continue
                environment.stopped.append(pid)
        raise OSError(errno.EBUSY, "it makes processes faster than they can be stopped")

    def _thaw(self, environment: _Environment) -> None:
        if environment.cgroup is not None and environment.cgroup.can_freeze:
            environment.cgroup.thaw()
            return
        for pid in reversed(environment.stopped):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        environment.stopped.clear()

    # -- ends ----------------------------------------------------------------------------------

    def _kill(self, environment: _Environment) -> None:
        try:
            signal.pidfd_send_signal(environment.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _on_exit(self, environment: _Environment) -> None:
        _, status = os.waitpid(environment.pid, 0)
        if environment.birth is not None:
            self._on_birth_news(environment)
        del self._environments[environment.pidfd]
        self._forget(environment.pidfd)
        os.close(environment.pidfd)
        report: dict[str, Any] = {"kind": "gone", "status": status, "usage": {}, "leaked": []}
        if environment.oom_event >= 0:
            self._forget(environment.oom_event)
            os.close(environment.oom_event)

        def finish(left: list[str]) -> None:
            report["leaked"] = left
            if environment.takes_id and self.ids is not None:
                self.ids.give_back(environment.host_id)
            if environment.supervision is not None:
                self._forget(environment.supervision.fileno())
                self._answer(environment.supervision, report)
                environment.supervision.close()
                environment.supervision = None

        if environment.cgroup is None:
            finish([])
            return
        usage = report["usage"] = environment.cgroup.read_usage()
        if environment.out_of_memory:
            # Killed at the kernel's notice of it, before the kernel had chosen its own victim.
            usage["oom_kills"] = max(1, usage["oom_kills"] or 0)
        self._remove_cgroup(environment.cgroup, finish)

    def _remove_cgroup(
        self, cgroup: cgroups.EnvironmentCgroup, then: Callable[[list[str]], None]
    ) -> None:
        deadline = time.monotonic() + _REMOVAL_DEADLINE

        def attempt(delay: float = _REMOVAL_RETRY) -> None:
            left = cgroup.try_remove()
            now = time.monotonic()
            if left and now < deadline:
                self._timers.append((now + delay, lambda: attempt(min(delay * 2, 0.5))))
            else:
                cgroup.close()
                then(left)

        attempt()

    def _answer(
        self, supervision: socket.socket, message: dict[str, Any], fds: list[int] | None = None
    ) -> None:
        try:
            wire.send(supervision, message, fds or [])
        except OSError:
            pass  # the host let go of the environment; its end of the socket reads as EOF


def main(channel_fd: int, done: int, host_pid: int, settings: dict[str, Any]) -> NoReturn:
    """Run the launcher on an inherited socket. Called by `nsbox.launcher.main`."""
    channel = socket.socket(fileno=channel_fd)
    for fd in (channel_fd, done):
        os.set_inheritable(fd, False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The soft limit is the host's, and an environment takes several descriptors here; what
    # environments may open is set at their birth.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    privileges.set_name("nsbox-launcher")
    try:
        host = os.pidfd_open(host_pid)
        if os.getppid() != host_pid:
            os._exit(0)  # the host died meanwhile, and its number may be another's
        Server(channel, host, done, settings).run()
    except Exception as error:  # noqa: BLE001 - the host is told whatever it was
        import traceback  # needed once at most, and it is half as large as the rest

        text = "".join(traceback.format_exception(error))
        try:
            wire.send(
                channel,
                {"kind": "fatal", "text": text[-8192:], **describe_error("launcher", error)},
            )
        except OSError:
            sys.stderr.write(text)
    os._exit(1)
