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

from nsbox.errors import LauncherError, NsboxError, SyscallError
from nsbox.isolation import landlock, namespaces, privileges
from nsbox.launcher import identity, janitor, messages, protocol
from nsbox.launcher.birth import Birth
from nsbox.launcher.instance import Environment, Requests, outcome
from nsbox.launcher.resources import Resources
from nsbox.launcher.steps import failure
from nsbox.launcher.templates import TemplateGone, TemplateProcess
from nsbox.linux import calls, proc, questions
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, NoReturn

    from nsbox.isolation.cgroups import EnvironmentCgroup
    from nsbox.launcher.layouts import KnownSpec

TEMPLATES_KEPT = 4  # besides that of commands; one for each set of preloaded modules
# A socket queues few messages (net.unix.max_dgram_qlen): more births at once could have launcher
# and template each wait for the other to read.
_BIRTHS_AT_ONCE = 4
_REMOVAL_DEADLINE = 5.0  # seconds a cgroup may stay busy (containers/common PR 858)
_REMOVAL_RETRY = 0.005
_QUIET = 0.002  # seconds without a request before network namespaces are made ahead of need
_PASSING = (OSError, NsboxError, ValueError, MemoryError)
"""What ends the request or birth that it is met by. Everything else ends the launcher."""
_MOST_FAILURES = 200  # events in a row, after which it does: each is waited after, 20 s in all
_RETRY = 1.0  # seconds after which a janitor is started that could not be


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
        """Take what was inherited; `start` does the rest.

        Args:
            channel: Where the host asks for births.
            requests: Where it asks about environments.
            host: Its pidfd.
            done: For the janitor (`janitor.start`).
            host_pid: The host's number.
            paths: What is imported from.
            id_range: First host id and count, as the operator wants them; None for the default.
        """
        self._channel = channel
        self._requests = Requests(requests)
        self._host_pid = host_pid
        self._paths = paths
        self._id_range = id_range
        self._host = host
        self._done = done
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poll = select.epoll()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._environments: dict[int, Environment] = {}
        self._standby: dict[int, float] = {}
        self._templates: dict[str, TemplateProcess] = {}
        self._lifeline, self._lifeline_write = os.pipe()
        self._janitor = -1
        self._signals = -1
        # By pid: what is done at the end of a child. It is reaped there, so that no number of a
        # child that is known is ever another process's.
        self._children: dict[int, Callable[[], None]] = {}
        self._has_unknown_end = False
        self.step = ""

    # -- the start -----------------------------------------------------------------------------

    def start(self) -> None:
        """Run `STEPS`; an exception leaves `step` at the one that failed."""
        for name, run in STEPS:
            self.step = name
            run(self)
        self.step = "run"

    def _start_template(self) -> None:
        # Before this process enters a user namespace: what executes inside one has its files in
        # /proc owned by that namespace's root, who outside is the user (fs/proc/base.c,
        # task_dump_owner), so that PID 1's would be open to commands that have the same id.
        template = self._find_template("")
        # Since Linux 6.9 an inode names a process for good; before, all pidfds have the same one.
        pidfd = os.pidfd_open(template.pid)
        self._has_pid_inodes = os.fstat(self._host).st_ino != os.fstat(pidfd).st_ino
        os.close(pidfd)

    def _enter_user_namespace(self) -> None:
        self._own_namespace = not identity.is_privileged()
        if self._own_namespace:
            calls.unshare(c.CLONE_NEWUSER)

    def _await_id_maps(self) -> None:
        if self._own_namespace:
            protocol.send(self._channel, messages.UserNamespace(pid=os.getpid()))
            if protocol.receive(self._channel) is None:
                self._leave()
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)

    def _enter_mount_namespace(self) -> None:
        calls.unshare(c.CLONE_NEWNS)
        self._mounts = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def _expect_no_chroot(self) -> None:
        identity.expect_no_chroot(self._mounts)

    def _follow_mounts(self) -> None:
        # Slave: what the operator mounts later is seen here, nothing here is seen there.
        calls.mount(None, "/", None, c.MS_REC | c.MS_SLAVE)

    def _check_id_range(self) -> None:
        if self._id_range is not None and not self._own_namespace:
            identity.expect_mapped(*self._id_range)

    def _gather_resources(self) -> None:
        chosen = identity.choose(own_namespace=self._own_namespace, id_range=self._id_range)
        # Without root it could not come back from a network namespace: its own belongs to the user
        # namespace it left (setns(2)). Environments get theirs from clone3 then.
        self._resources = Resources(chosen, self._mounts, has_networks=not self._own_namespace)

    def _start_janitor(self) -> None:
        candidates = self._resources.tree.candidates
        if candidates:
            self._janitor = janitor.start(candidates, self._done)
            self._children[self._janitor] = self._on_janitor_exit

    def _say_hello(self) -> None:
        tree, chosen = self._resources.tree, self._resources.identity
        hello = messages.Hello(
            pid=os.getpid(),
            privileged=not self._own_namespace,
            ids=chosen.kind,
            drops_groups=chosen.may_drop_groups,
            networks_ready=self._resources.networks is not None,
            namespaces=[
                name
                for name, file in zip(namespaces.FLAGS, namespaces.FILES, strict=True)
                if questions.exists(f"/proc/self/ns/{file}")
            ],
            landlock=landlock.is_available(),
            cgroups=tree.capabilities(),  # it makes the directories
            trees=tree.paths,
        )
        protocol.send(self._channel, hello)

    def _watch_all(self) -> None:
        self._watch(self._channel.fileno(), self._on_request)
        self._watch(self._requests.fileno(), self._on_ask)
        self._watch(self._host, self._leave)
        self._signals = calls.signalfd([c.SIGCHLD])
        self._watch(self._signals, self._on_child)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> NoReturn:
        """Serve until the host is gone."""
        self._see_ends()  # of those that have ended before
        try:
            self._resources.layouts.look_ahead()  # the host decides meanwhile what to ask for
        except OSError:
            pass  # then it is read when it is needed
        failures = 0
        while True:
            # One event at a time: its handler may close descriptors that others are about, and
            # the kernel serves those that are ready in turn (epoll(7)), so that none starves.
            ready = self._poll.poll(self._wait_time(), 1)
            try:
                if ready:
                    self._handle(ready[0][0])
                else:
                    self._on_idle()
                failures = 0
            except LauncherError:
                raise  # host and launcher are of different versions
            except _PASSING:
                failures += 1
                if failures == _MOST_FAILURES:
                    raise
                time.sleep(failures / 1000)
                self._timers.append((0.0, self._see_ends))  # one may have been missed

    def _handle(self, fd: int) -> None:
        handler = self._handlers.get(fd)
        if handler is None:
            self._poll.unregister(fd)  # `_forget` could not
        else:
            handler()

    def _wait_time(self) -> float | None:
        networks = self._resources.networks
        if networks is not None and networks.wants_more and not self._timers:
            return _QUIET
        moments = [moment for moment, _ in self._timers]
        # All live equally long, so that the first to come is the first to go.
        moments += [next(iter(self._standby.values()))] if self._standby else []
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _on_idle(self) -> None:
        now = time.monotonic()
        due = [timer for timer in self._timers if timer[0] <= now]
        for timer in due:
            self._timers.remove(timer)  # one by one: an exception leaves the others
            timer[1]()
        for pid in [pid for pid, end in self._standby.items() if end <= now]:
            del self._standby[pid]
            self._environments[pid].kill()
        networks = self._resources.networks
        if not due and networks is not None and networks.wants_more:
            networks.prepare()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        try:
            self._poll.register(fd, select.EPOLLIN)
        except OSError as error:
            raise SyscallError("epoll_ctl", error.errno or 0) from error
        self._handlers[fd] = handler

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            try:
                self._poll.unregister(fd)
            except OSError:
                pass  # as a rule it is closed next, which does the same

    def end_templates(self) -> None:
        """End and reap all: their next parent might not (a host that is PID 1 of a container)."""
        for template in self._templates.values():
            _end_child(template.pid)

    def _leave(self) -> NoReturn:
        """End: the host is gone. Environments are killed and reaped; the janitor does the rest."""
        self.end_templates()
        for environment in self._environments.values():
            environment.kill()
        deadline = time.monotonic() + 2.0
        while self._environments and (left := deadline - time.monotonic()) > 0:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                self._environments.pop(pid, None)
            elif protocol.is_readable(self._signals, left):
                os.read(self._signals, calls.CHILD.size)
        os._exit(0)

    def _on_janitor_exit(self) -> None:
        if os.waitpid(self._janitor, os.WNOHANG)[0]:
            del self._children[self._janitor]
            self._restart_janitor()

    def _restart_janitor(self) -> None:
        try:
            self._start_janitor()
        except OSError:
            self._timers.append((time.monotonic() + _RETRY, self._restart_janitor))

    # -- children ------------------------------------------------------------------------------

    def _on_child(self) -> None:
        # Equal signals are merged: it names one that has ended, and there may be others.
        _, pid = calls.CHILD.unpack(os.read(self._signals, calls.CHILD.size))
        handler = self._children.get(pid)
        if handler is not None:
            handler()  # it may have been seen before, and its number given to another since
        self._see_ends()

    def _see_ends(self) -> None:
        """Call the handlers of all children that have ended."""
        self._has_unknown_end = False
        while self._children:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None:
                return
            handler = self._children.get(ended.si_pid)
            if handler is not None:
                handler()
            elif any(template.pending for template in self._templates.values()):
                # A clone that the template has not told of yet: it hides others until then.
                self._has_unknown_end = True
                return
            else:  # one that no template can tell of any more
                os.waitpid(ended.si_pid, os.WNOHANG)

    # -- births --------------------------------------------------------------------------------

    def _find_template(self, kind: str) -> TemplateProcess:
        template = self._templates.pop(kind, None)
        if template is None:
            idle = [other for other in self._templates.values() if other.kind and not other.pending]
            for other in idle[: max(0, len(idle) - TEMPLATES_KEPT + 1)]:
                self._end_template(other)
            words = [str(self._host_pid), kind, *self._paths]
            made = template = TemplateProcess(kind, words, self._lifeline)
            try:
                self._watch(made.fileno(), lambda: self._on_born(made))
            except OSError:
                _end_child(made.pid)
                made.close()
                raise
            self._children[made.pid] = lambda: self._on_template_exit(made)
        self._templates[kind] = template  # the most recently used last
        return template

    def _on_request(self) -> None:
        try:
            received = protocol.receive(self._channel)
        except OSError:
            return  # no room for its sockets, which are closed: the host reads that as a refusal
        if received is None:
            self._leave()
        request, (control, host) = received
        if not isinstance(request, messages.GiveBirth):
            raise TypeError(f"{request!r} asks for no birth")
        known: KnownSpec | messages.Message
        try:
            known = self._find_spec(request, (control, host))
        except _PASSING as error:
            known = messages.Failed(**failure("birth", error))
        if isinstance(known, messages.Message):
            protocol.reply(host, known)
            os.close(control)
            return
        birth = Birth(self._resources, known, request, control, host)
        try:
            birth.run_launcher_side()
            birth.step = "clone"
            self._send_to_template(birth)
        except TemplateGone as error:
            self._replace_template(error.template, also=birth)
        except _PASSING as error:
            self._abort(birth, failure(birth.step, error))

    def _find_spec(
        self, request: messages.GiveBirth, fds: Sequence[int]
    ) -> KnownSpec | messages.Message:
        """Return what is asked for, or why it is refused."""
        scarce = protocol.scarcity(fds, is_brief=request.is_brief)
        if scarce is not None:
            count, limit = scarce
            return messages.NoDescriptors(count=count, limit=limit)
        return self._resources.specs.find(request.key, request.spec) or messages.UnknownSpec()

    def _send_to_template(self, birth: Birth) -> None:
        template = self._find_template(birth.spec.runtime)
        if not template.is_introduced:
            extent = self._resources.layouts.proc_extent(birth.layout)
            drops_groups = self._resources.identity.may_drop_groups
            template.introduce(extent, drop_groups=drops_groups)
        template.send_birth(birth)
        if len(template.pending) >= _BIRTHS_AT_ONCE:
            self._hear_requests(False)

    def _hear_requests(self, wanted: bool) -> None:
        channel = self._channel.fileno()
        if wanted and channel not in self._handlers:
            try:
                self._watch(channel, self._on_request)
            except OSError:
                self._timers.append((0.0, lambda: self._hear_requests(True)))
        elif not wanted:
            self._forget(channel)

    def _on_born(self, template: TemplateProcess) -> None:
        try:
            received = template.receive()
        except OSError:
            received = None  # no room for the pidfd: it is lost, and so is what came with it
        if received is None:
            self._replace_template(template)
            return
        birth = template.pending.popleft()
        birth.close()
        pid, pidfd, failed = received
        environment = Environment(birth, pid)
        try:
            self._hear_requests(True)
            inode = os.fstat(pidfd).st_ino if failed is None else 0
            if failed is None:
                self._watch_birth(environment)
        except _PASSING as error:
            failed = failure("birth", error)
        if failed is None:
            self._adopt(environment, birth, inode, pidfd)
        elif pid:
            self._forget_birth(environment)
            _end_child(pid)
        if pidfd >= 0:
            os.close(pidfd)
        if failed is not None:
            self._abort(birth, failed)
        if self._has_unknown_end:
            self._see_ends()

    def _watch_birth(self, environment: Environment) -> None:
        """Watch what is to be watched of it but its end; what fails is undone by `_forget_birth`.

        v1's OOM killer takes a part, and then the whole is ended; v2 does so by itself.
        """
        cgroup = environment.cgroup
        if cgroup is not None and (event := cgroup.oom_eventfd()) is not None:
            environment.oom_event = event
            self._watch(event, lambda: self._on_oom(environment))
        if environment.awaits:
            self._watch(environment.host, lambda: self._on_host(environment))

    def _forget_birth(self, environment: Environment) -> None:
        if environment.oom_event >= 0:
            self._forget(environment.oom_event)
            os.close(environment.oom_event)
            environment.oom_event = -1
        if environment.host >= 0:
            self._forget(environment.host)

    def _adopt(self, environment: Environment, birth: Birth, inode: int, pidfd: int) -> None:
        """Tell the host of an environment that is watched."""
        pid = environment.pid
        self._environments[pid] = environment
        self._requests.living[environment.id] = environment
        self._children[pid] = lambda: self._on_exit(environment)
        if environment.awaits == "taker":
            self._standby[pid] = time.monotonic() + protocol.STANDBY_LIFE
        cgroup = environment.cgroup
        born = messages.Born(
            pid=pid,
            inode=inode,
            host_id=environment.host_id,
            cgroup=cgroup.paths if cgroup is not None else {},
        )
        is_heard = not protocol.answer(birth.host, born, -1 if self._has_pid_inodes else pidfd)
        if not is_heard:
            environment.is_let_go = True
            environment.kill()
        if not is_heard or not environment.awaits:
            self._settle(environment)

    def _replace_template(self, template: TemplateProcess, also: Birth | None = None) -> None:
        """Start another and send it the births under way, each once more; environments live on."""
        self._end_template(template)
        births = [*template.pending, *([also] if also else [])]
        template.pending.clear()
        failed: dict[str, Any] | None = None
        try:
            for pid in proc.children(os.getpid()):
                # A clone that it could not tell of any more; another's may be told of next.
                if pid not in self._children and template.has_made(pid):
                    _end_child(pid)
        except OSError as error:  # it ends when the host closes its socket
            failed = failure("clone", error)
        for birth in births:
            try:
                if birth.is_second_attempt:
                    raise OSError(errno.ESRCH, "the template process died, and so did the next")
                birth.is_second_attempt = True
                if failed is None:
                    self._send_to_template(birth)
            except _PASSING as error:
                self._abort(birth, failure("clone", error))
            else:
                if failed is not None:
                    self._abort(birth, failed)
        self._hear_requests(True)
        self._see_ends()

    def _on_template_exit(self, template: TemplateProcess) -> None:
        if os.waitid(os.P_PID, template.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self._replace_template(template)

    def _end_template(self, template: TemplateProcess) -> None:
        del self._templates[template.kind]
        del self._children[template.pid]
        self._forget(template.fileno())
        _end_child(template.pid)
        template.close()

    def _abort(self, birth: Birth, failed: dict[str, Any]) -> None:
        """Remove what the launcher's steps had made, then tell the host what failed."""
        birth.close()

        def finish(_left: Sequence[str]) -> None:
            self._resources.give_back_id(birth.host_id)
            protocol.reply(birth.host, messages.Failed(**failed))

        if birth.cgroup is None:
            finish(())
        else:
            self._remove_cgroup(birth.cgroup, finish)

    # -- life ----------------------------------------------------------------------------------

    def _on_oom(self, environment: Environment) -> None:
        environment.oom_notices += os.eventfd_read(environment.oom_event)
        environment.kill()

    def _on_host(self, environment: Environment) -> None:
        """Hear of a birth that is not over: its taker, attachments, or that nobody wants it."""
        if environment.host < 0:
            return
        host = Socket(AF_UNIX, SOCK_SEQPACKET, 0, environment.host)
        try:
            received = protocol.receive(host)
        except OSError:
            return  # no memory: it is there to be read again
        finally:
            host.detach()
        if received is None:
            environment.is_let_go = True
            self._settle(environment)
            environment.kill()
            return
        message, fds = received
        was_standby = self._standby.pop(environment.pid, None) is not None
        if isinstance(message, messages.Keep):
            if was_standby:
                self._standby[environment.pid] = time.monotonic() + protocol.STANDBY_LIFE
            return
        if isinstance(message, messages.Attach):  # who attaches something has taken it
            if fds:
                environment.control = fds[0]
            layouts, pid = self._resources.layouts, environment.pid
            act = functools.partial(layouts.attach, pid, message.mounts)
            protocol.answer(environment.host, outcome("attach", act))
        self._settle(environment)

    def _settle(self, environment: Environment) -> None:
        """Close the socket of a birth that is over, or of an environment that has ended."""
        if environment.host >= 0:
            self._forget(environment.host)
            os.close(environment.host)
            environment.host = -1

    def _on_ask(self) -> None:
        if not self._requests.serve():
            self._forget(self._requests.fileno())  # the host's own end is seen besides

    # -- ends ----------------------------------------------------------------------------------

    def _on_exit(self, environment: Environment) -> None:
        pid, status = os.waitpid(environment.pid, os.WNOHANG)
        if not pid:
            return
        del self._environments[pid], self._children[pid]
        self._standby.pop(pid, None)
        environment.note_end()
        report = messages.Gone(status=status, usage={}, leaked=[])

        def finish(left: list[str]) -> None:
            report.leaked = left
            self._resources.give_back_id(environment.host_id)
            self._requests.conclude(environment, report)
            # What nobody waits for.
            self._forget_birth(environment)
            self._settle(environment)
            environment.release()

        if environment.cgroup is None:
            finish([])
            return
        if environment.is_reported and not environment.is_let_go:
            try:
                report.usage = environment.cgroup.read_usage()
            except OSError:
                pass  # what became of it is told all the same
            report.usage["oom_notices"] = environment.oom_notices
        self._remove_cgroup(environment.cgroup, finish)

    def _remove_cgroup(self, cgroup: EnvironmentCgroup, then: Callable[[list[str]], None]) -> None:
        deadline = time.monotonic() + _REMOVAL_DEADLINE

        def attempt(delay: float = _REMOVAL_RETRY) -> None:
            try:
                left = cgroup.try_remove()
            except _PASSING:
                left = list(cgroup.paths.values())
            now = time.monotonic()
            if left and now < deadline:
                self._timers.append((now + delay, lambda: attempt(min(delay * 2, 0.5))))
            else:
                cgroup.close()
                then(left)

        attempt()


STEPS = (
    ("template", Server._start_template),
    ("user-namespace", Server._enter_user_namespace),
    ("id-maps", Server._await_id_maps),
    ("mount-namespace", Server._enter_mount_namespace),
    ("chroot", Server._expect_no_chroot),
    ("mounts", Server._follow_mounts),
    ("id-range", Server._check_id_range),
    ("resources", Server._gather_resources),
    # Before the first directory is made: whoever kills this process at any later moment finds
    # somebody who removes it.
    ("janitor", Server._start_janitor),
    ("events", Server._watch_all),
    ("hello", Server._say_hello),
)
"""The launcher's start, in order; `messages.Fatal` has the name of one that fails."""


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
    server: Server | None = None
    try:
        requests = socket.socket(fileno=requests_fd)
        for fd in (channel_fd, requests_fd, done):
            os.set_inheritable(fd, False)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # The soft limit is the host's, and an environment takes several descriptors here; what
        # environments may open is set at their birth.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        privileges.set_name("nsbox-launcher")
        host = os.pidfd_open(host_pid)
        if os.getppid() != host_pid:
            os._exit(0)  # the host died meanwhile, and its number may be another's
        server = Server(channel, requests, host, done, host_pid, paths, _parse_range(id_range))
        server.start()
        server.run()
    except Exception as error:  # noqa: BLE001 - the host is told whatever it was
        import traceback  # needed once at most, and it is half as large as the rest

        text = "".join(traceback.format_exception(error))
        step = "" if server is None else server.step
        try:
            fatal = messages.Fatal(text=text[-8192:], **failure(step, error))
            protocol.send(channel, fatal)
        except OSError:
            sys.stderr.write(text)
        if server is not None:
            server.end_templates()
    os._exit(1)
