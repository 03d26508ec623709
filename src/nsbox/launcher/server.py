# SPDX-License-Identifier: Apache-2.0
"""The launcher process: an event loop that gives birth to environments and sees them out.

It never sees a command, its environment variables or its data (docs/threat-model.md): later
environments are clones of its memory.
"""

from __future__ import annotations

import errno
import functools
import os
import resource
import select
import signal
import socket
import sys
import time
from _socket import AF_UNIX, SOCK_SEQPACKET
from _socket import socket as Socket

from nsbox.errors import NsboxError
from nsbox.isolation import cgroups, landlock, namespaces, privileges
from nsbox.isolation.network import NetworkPool
from nsbox.launcher import identity, janitor, protocol
from nsbox.launcher.birth import Birth
from nsbox.launcher.instance import Environment
from nsbox.launcher.layouts import KnownSpecs, Layouts
from nsbox.launcher.requests import Requests, answer, outcome, reply
from nsbox.launcher.steps import failure
from nsbox.launcher.templates import TemplateGone, TemplateProcess
from nsbox.linux import calls, proc
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

NETWORKS_READY = 4
TEMPLATES_KEPT = 4  # besides that of commands; one for each set of preloaded modules
# A socket queues few messages (net.unix.max_dgram_qlen): more births at once could have launcher
# and template each wait for the other to read.
_BIRTHS_AT_ONCE = 4
_REMOVAL_DEADLINE = 5.0  # seconds a cgroup may stay busy (containers/common PR 858)
_REMOVAL_RETRY = 0.005
_QUIET = 0.002  # seconds without a request before network namespaces are made ahead of need


class Server:
    """The launcher's state and loop."""

    def __init__(
        self,
        channel: socket.socket,
        requests: socket.socket,
        host: int,
        done: int,
        host_pid: int,
        paths: Sequence[str],
        id_range: tuple[int, int] | None,
    ) -> None:
        self._channel = channel
        self._requests = Requests(requests)
        self._host_pid = host_pid
        self._paths = paths
        self._host = host
        self._done = done
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poll = select.epoll()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._environments: dict[int, Environment] = {}
        self._blanks: dict[int, float] = {}
        self._lifeline, self._lifeline_write = os.pipe()

        # Before this process enters a user namespace: what executes inside one has its files in
        # /proc owned by that namespace's root, who outside is the user (fs/proc/base.c,
        # task_dump_owner), so that PID 1's would be open to commands that have the same id.
        self._templates: dict[str, TemplateProcess] = {}
        template = self._find_template("")
        # Since Linux 6.9 an inode names a process for good; before, all pidfds have the same one.
        self._has_pid_inodes = os.fstat(host).st_ino != os.fstat(template.pidfd).st_ino
        own_namespace = not identity.is_privileged()
        if own_namespace:
            calls.unshare(c.CLONE_NEWUSER)
            protocol.send(channel, {"kind": "user-namespace", "pid": os.getpid()})
            if protocol.receive(channel) is None:
                os._exit(0)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        calls.unshare(c.CLONE_NEWNS)
        mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        identity.expect_no_chroot(mounts)
        # Slave: what the operator mounts later is seen here, nothing here is seen there.
        calls.mount(None, "/", None, c.MS_REC | c.MS_SLAVE)
        self.layouts = Layouts(mounts)
        # Without root it could not come back from one: its own belongs to the user namespace
        # it left (setns(2)). Environments get theirs from clone3 then.
        self.networks = None if own_namespace else NetworkPool(NETWORKS_READY)
        self.identity = identity.choose(own_namespace=own_namespace, id_range=id_range)
        self.ids = self.identity.ids
        self._proc_extent = ""
        self._tree = cgroups.Tree.for_process(os.getpid())
        self._specs = KnownSpecs(self._tree)
        self._candidates = self._tree.candidates
        self._janitor = self._janitor_pid = -1
        # Before the first directory is made: whoever kills this process at any later moment finds
        # somebody who removes it.
        self._start_janitor()
        capabilities = self._tree.capabilities()
        protocol.send(
            channel,
            {
                "kind": "hello",
                "pid": os.getpid(),
                "privileged": not own_namespace,
                "ids": self.identity.kind,
                "drops_groups": self.identity.may_drop_groups,
                "networks_ready": self.networks is not None,
                "namespaces": [
                    name
                    for name, file in zip(namespaces.FLAGS, namespaces.FILES, strict=True)
                    if os.path.exists(f"/proc/self/ns/{file}")
                ],
                "landlock": landlock.is_available(),
                "cgroups": capabilities,
                "trees": self._tree.paths,
            },
        )

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Serve until the host is gone."""
        self._watch(self._channel.fileno(), self._on_request)
        self._watch(self._requests.fileno(), self._on_ask)
        self._watch(self._host, self._leave)
        self.layouts.look_ahead()  # the host decides meanwhile what to ask for
        while True:
            # One event at a time: its handler may close descriptors that others are about, and
            # the kernel serves those that are ready in turn (epoll(7)), so that none starves.
            ready = self._poll.poll(self._wait_time(), 1)
            if ready:
                self._handlers[ready[0][0]]()
            else:
                self._on_idle()

    def _wait_time(self) -> float | None:
        if self.networks is not None and self.networks.wants_more and not self._timers:
            return _QUIET
        moments = [moment for moment, _ in self._timers]
        # All live equally long, so that the first to come is the first to go.
        moments += [next(iter(self._blanks.values()))] if self._blanks else []
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _on_idle(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, action in due:
            action()
        for pidfd in [pidfd for pidfd, end in self._blanks.items() if end <= now]:
            del self._blanks[pidfd]
            self._environments[pidfd].kill()
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
            self._janitor_pid, self._janitor = janitor.start(self._candidates, self._done)
            self._watch(self._janitor, self._on_janitor_exit)

    def _on_janitor_exit(self) -> None:
        self._forget(self._janitor)
        os.waitid(os.P_PIDFD, self._janitor, os.WEXITED)
        os.close(self._janitor)
        self._start_janitor()

    # -- births --------------------------------------------------------------------------------

    def _find_template(self, kind: str) -> TemplateProcess:
        template = self._templates.get(kind)
        if template is None:
            idle = [other for other in self._templates.values() if other.kind and not other.pending]
            for other in idle[: max(0, len(idle) - TEMPLATES_KEPT + 1)]:
                self._end_template(other)
            words = [str(self._host_pid), kind, *self._paths]
            template = self._templates[kind] = TemplateProcess(kind, words, self._lifeline)
            self._watch(template.fileno(), lambda: self._on_born(template))
            self._watch(template.pidfd, lambda: self._replace_template(template))
        return template

    def _on_request(self) -> None:
        try:
            received = protocol.receive(self._channel)
        except OSError:
            return  # no room for its sockets, which are closed: the host reads that as the end
        if received is None:
            self._leave()
        request, (control, host_fd) = received
        # Told what it is, it need not ask the kernel.
        host = Socket(AF_UNIX, SOCK_SEQPACKET, 0, host_fd)
        scarce = protocol.scarcity((control, host_fd), is_brief="brief" in request)
        if scarce is not None:
            count, limit = scarce
            reply(host, {"kind": "no-descriptors", "count": count, "limit": limit})
            os.close(control)
            return
        known = self._specs.find(request["key"], request.get("spec"))
        if known is None:
            reply(host, {"kind": "unknown-spec"})
            os.close(control)
            return
        birth = Birth(self, known, request, control, host)
        try:
            birth.run_launcher_side()
            birth.step = "clone"
            self._send_to_template(birth)
        except TemplateGone as error:
            self._replace_template(error.template, also=birth)
        except (OSError, NsboxError, ValueError) as error:
            self._abort(birth, failure(birth.step, error))

    def _send_to_template(self, birth: Birth) -> None:
        template = self._find_template(birth.spec["runtime"])
        if not template.is_introduced:
            extent = self.layouts.proc_extent(birth.layout)
            template.introduce(extent, drop_groups=self.identity.may_drop_groups)
        template.send_birth(birth)
        if len(template.pending) >= _BIRTHS_AT_ONCE:
            self._hear_requests(False)

    def _hear_requests(self, wanted: bool) -> None:
        channel = self._channel.fileno()
        if wanted and channel not in self._handlers:
            self._watch(channel, self._on_request)
        elif not wanted:
            self._forget(channel)

    def _on_born(self, template: TemplateProcess) -> None:
        received = template.receive()
        if received is None:
            self._replace_template(template)
            return
        birth = template.pending.popleft()
        birth.close()
        self._hear_requests(True)
        pid, pidfd, failed = received
        if failed is not None:
            if pid:
                _end_child(pid)
                os.close(pidfd)
            self._abort(birth, failed)
            return
        environment = Environment(birth, pid, pidfd)
        self._environments[pidfd] = environment
        self._requests.living[birth.env_id] = environment
        self._watch(pidfd, lambda: self._on_exit(environment))
        self._watch_memory(environment)
        if birth.awaits == "taker":
            self._blanks[pidfd] = time.monotonic() + protocol.BLANK_LIFE
        born = {
            "kind": "born",
            "pid": pid,
            "host_id": birth.host_id,
            "cgroup": birth.cgroup.paths if birth.cgroup is not None else {},
            "inode": os.fstat(pidfd).st_ino,
        }
        is_heard = answer(birth.host, born, [] if self._has_pid_inodes else [pidfd])
        if birth.awaits and is_heard:
            self._watch(birth.host.fileno(), lambda: self._on_host(environment))
            return
        birth.host.close()
        environment.host = None
        if not is_heard:
            environment.is_let_go = True
            environment.kill()

    def _replace_template(self, template: TemplateProcess, also: Birth | None = None) -> None:
        """Start another and send it the births under way, each once more; environments live on."""
        self._end_template(template)
        known = {environment.pid for environment in self._environments.values()}
        known |= {self._janitor_pid, *(other.pid for other in self._templates.values())}
        for pid in proc.children(os.getpid()):
            # A clone that it could not tell of any more.
            if pid not in known:
                _end_child(pid)
        for birth in [*template.pending, *([also] if also else [])]:
            try:
                if birth.is_second_attempt:
                    raise OSError(errno.ESRCH, "the template process died")
                birth.is_second_attempt = True
                self._send_to_template(birth)
            except OSError as error:
                self._abort(birth, failure("clone", error))
        self._hear_requests(True)

    def _end_template(self, template: TemplateProcess) -> None:
        del self._templates[template.kind]
        self._forget(template.fileno())
        self._forget(template.pidfd)
        _end_child(template.pid)
        template.close()

    def _abort(self, birth: Birth, failed: dict[str, Any]) -> None:
        """Remove what the launcher's steps had made, then tell the host what failed."""
        birth.close()

        def finish(_left: Sequence[str]) -> None:
            if birth.takes_id and self.ids is not None:
                self.ids.give_back(birth.host_id)
            reply(birth.host, {"kind": "failed", **failed})

        if birth.cgroup is None:
            finish(())
        else:
            self._remove_cgroup(birth.cgroup, finish)

    def make_cgroup(self, env_id: str, limits: dict[str, Any]) -> cgroups.EnvironmentCgroup | None:
        """Make the cgroup of an environment, or None where no hierarchy is usable."""
        return self._tree.make(env_id, limits) if self._tree.paths else None

    # -- life ----------------------------------------------------------------------------------

    def _watch_memory(self, environment: Environment) -> None:
        """End the whole environment when v1's OOM killer takes a part; v2 does so by itself."""
        if environment.cgroup is None:
            return
        event = environment.cgroup.oom_eventfd()
        if event is not None:
            environment.oom_event = event
            self._watch(event, lambda: self._on_oom(environment))

    def _on_oom(self, environment: Environment) -> None:
        environment.oom_notices += os.eventfd_read(environment.oom_event)
        environment.kill()

    def _on_host(self, environment: Environment) -> None:
        """Hear of a birth that is not over: its taker, its furniture, or that nobody wants it."""
        host = environment.host
        if host is None:
            return
        received = protocol.receive(host)
        if received is None:
            environment.is_let_go = True
            self._settle(environment)
            environment.kill()
            return
        kind = received[0]["kind"]
        is_blank = self._blanks.pop(environment.pidfd, None) is not None
        if kind == "keep" and is_blank:
            self._blanks[environment.pidfd] = time.monotonic() + protocol.BLANK_LIFE
        elif kind == "furnish":  # who furnishes it has taken it
            mounts = received[0]["mounts"]
            act = functools.partial(self.layouts.furnish, environment.pid, mounts)
            answer(host, outcome(kind, act))
        if kind != "keep":
            self._settle(environment)

    def _settle(self, environment: Environment) -> None:
        """Close the socket of a birth that is over, or of an environment that has ended."""
        if environment.host is not None:
            self._forget(environment.host.fileno())
            environment.host.close()
            environment.host = None

    def _on_ask(self) -> None:
        if not self._requests.serve():
            self._forget(self._requests.fileno())  # the host's own end is seen besides

    # -- ends ----------------------------------------------------------------------------------

    def _on_exit(self, environment: Environment) -> None:
        _, status = os.waitpid(environment.pid, 0)
        del self._environments[environment.pidfd]
        self._blanks.pop(environment.pidfd, None)
        self._forget(environment.pidfd)
        os.close(environment.pidfd)
        environment.pidfd = -1
        report: dict[str, Any] = {"kind": "gone", "status": status, "usage": {}, "leaked": []}
        if environment.oom_event >= 0:
            self._forget(environment.oom_event)
            os.close(environment.oom_event)

        def finish(left: list[str]) -> None:
            report["leaked"] = left
            if environment.takes_id and self.ids is not None:
                self.ids.give_back(environment.host_id)
            self._settle(environment)
            self._requests.conclude(environment, report)

        if environment.cgroup is None:
            finish([])
            return
        if environment.is_reported and not environment.is_let_go:
            usage = report["usage"] = environment.cgroup.read_usage()
            usage["oom_notices"] = environment.oom_notices
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


def _end_child(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _parse_range(text: str) -> tuple[int, int] | None:
    first, _, count = text.partition(":")
    return (int(first), int(count)) if text else None


def main(
    channel_fd: int, requests_fd: int, done: int, host_pid: int, id_range: str, paths: Sequence[str]
) -> NoReturn:
    """Run the launcher on inherited descriptors. Called by `nsbox.launcher.main`."""
    channel = socket.socket(fileno=channel_fd)
    requests = socket.socket(fileno=requests_fd)
    for fd in (channel_fd, requests_fd, done):
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
        Server(channel, requests, host, done, host_pid, paths, _parse_range(id_range)).run()
    except Exception as error:  # noqa: BLE001 - the host is told whatever it was
        import traceback  # needed once at most, and it is half as large as the rest

        text = "".join(traceback.format_exception(error))
        try:
            protocol.send(
                channel,
                {"kind": "fatal", "text": text[-8192:], **failure("launcher", error)},
            )
        except OSError:
            sys.stderr.write(text)
    os._exit(1)
