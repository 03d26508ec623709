# SPDX-License-Identifier: Apache-2.0
"""Environments that live, as their launcher knows them, and what the host asks of them."""

from __future__ import annotations

import os
import signal
from _socket import socket as Socket

from nsbox.errors import NsboxError
from nsbox.isolation.sigstop import Stopper
from nsbox.launcher import messages, protocol
from nsbox.launcher.steps import failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nsbox.launcher.birth import Birth


class Environment:
    """An environment the launcher is parent of.

    Attributes:
        id: Its id.
        host: Where the host has asked for it, until all of its birth is over: the end of this
            ends the environment. Then -1.
        reply: Where the host waits to hear of its end, a descriptor, or -1.
        pid: Its PID 1.
        is_over: Whether it has ended, and its number may be another process's.
        awaits: What is to come on `host` (`messages.GiveBirth`).
        cgroup: Its cgroup, or None.
        host_id: Uid and gid it has outside.
        control: The host's end of its control socket, once the host has given it away, or -1.
        oom_event: Readable when v1's OOM killer struck, or -1.
        oom_notices: How often it did; the environment is ended at the first.
        is_reported: Whether somebody wants its counters once it has ended.
        is_let_go: Whether the host wants to know nothing of its end.
    """

    def __init__(self, birth: Birth, pid: int) -> None:
        self.id = birth.env_id
        self.host = birth.host
        self.reply = -1
        self.pid = pid
        self.is_over = False
        self.awaits = birth.awaits
        self.cgroup = birth.cgroup
        self.host_id = birth.host_id
        self.control = -1
        self.oom_event = -1
        self.oom_notices = 0
        self.is_reported = True
        self.is_let_go = False
        self._stopper = Stopper(pid)

    def kill(self) -> None:
        """SIGKILL PID 1, and so everything in it."""
        if not self.is_over:  # it is a child that was not waited for: the number is its own
            os.kill(self.pid, signal.SIGKILL)

    def freeze(self) -> None:
        """Stop every process of it."""
        if self.cgroup is not None and self.cgroup.can_freeze:
            self.cgroup.freeze()
        else:
            self._stopper.stop()

    def thaw(self) -> None:
        """Let them run again."""
        if self.cgroup is not None and self.cgroup.can_freeze:
            self.cgroup.thaw()
        else:
            self._stopper.go_on()

    def note_end(self) -> None:
        """Note that PID 1 has ended, and so have all of its processes."""
        self.is_over = True
        self._stopper.go_on()

    def release(self) -> None:
        """Close what was kept of it: it is removed."""
        if self.control >= 0:
            os.close(self.control)
            self.control = -1


_FORGOTTEN = messages.Gone(status=None, usage={}, leaked=[])
_ACTS = {
    messages.Freeze: Environment.freeze,
    messages.Thaw: Environment.thaw,
}


class Requests:
    """What the host asks of environments, each time on a socket of its own.

    Attributes:
        living: Environments by id, until what they had is removed.
    """

    def __init__(self, channel: Socket) -> None:
        self._channel = channel
        self.living: dict[str, Environment] = {}
        self._ended: dict[str, messages.Gone] = {}  # until the host asks, or lets go of it

    def fileno(self) -> int:
        """Descriptor that is readable when there is something to `serve`."""
        return self._channel.fileno()

    def serve(self) -> bool:
        """Do what is asked; False when the host is gone."""
        try:
            received = protocol.receive(self._channel, is_small=True)
        except OSError:
            return True  # no room for the socket of its answer, which is closed
        if received is None:
            return False
        request, fds = received
        if not isinstance(request, messages.Request):
            raise TypeError(f"{request!r} is no request")
        environment = self.living.get(request.id)
        host = fds[0] if fds else -1
        is_end = isinstance(request, messages.Close)
        if environment is None or (environment.is_over and not is_end):
            ended = self._ended.get(request.id, _FORGOTTEN)
            if is_end:
                self._ended.pop(request.id, None)
            protocol.reply(host, ended)
        elif isinstance(request, messages.Close):
            environment.is_let_go = host < 0  # nobody waits for it any more
            if host >= 0:
                environment.reply = host
            environment.is_reported = host >= 0 and request.is_reported
            environment.kill()
        elif isinstance(request, messages.Kill):
            environment.kill()
        elif isinstance(request, messages.Control):
            if error := protocol.answer(host, messages.Done(), environment.control):
                protocol.answer(host, messages.Failed(**failure("control", error)))
            os.close(host)
        else:
            act, name = _ACTS[type(request)], type(request).__name__.lower()
            protocol.reply(host, outcome(name, lambda: act(environment)))
        return True

    def conclude(self, environment: Environment, report: messages.Gone) -> None:
        """Tell, or keep, how an environment has ended."""
        del self.living[environment.id]
        if not protocol.reply(environment.reply, report) and not environment.is_let_go:
            self._ended[environment.id] = report


def outcome(kind: str, act: Callable[[], None]) -> messages.Message:
    """Return the answer to a request that `act` fulfils."""
    try:
        act()
    except (OSError, NsboxError) as error:
        return messages.Failed(**failure(kind, error))
    return messages.Done()
