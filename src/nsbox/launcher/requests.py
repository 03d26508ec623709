# SPDX-License-Identifier: Apache-2.0
"""What the host asks of environments that were born, each time on a socket of its own."""

from __future__ import annotations

import errno
from _socket import AF_UNIX, SOCK_SEQPACKET
from _socket import socket as Socket

from nsbox.isolation import readback
from nsbox.launcher import protocol
from nsbox.launcher.steps import failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from nsbox.launcher.instance import Environment


class Requests:
    """The launcher's end of the socket that all of them come on.

    Attributes:
        living: Environments by id, until what they had is removed.
    """

    def __init__(self, channel: Socket) -> None:
        self._channel = channel
        self.living: dict[str, Environment] = {}
        self._ended: dict[str, dict[str, Any]] = {}  # until the host asks, or lets go of it

    def fileno(self) -> int:
        """Descriptor that is readable when there is something to `serve`."""
        return self._channel.fileno()

    def serve(self) -> bool:
        """Do what is asked; False when the host is gone."""
        try:
            received = protocol.receive(self._channel)
        except OSError:
            return True  # no room for the socket of its answer, which is closed
        if received is None:
            return False
        request, fds = received
        kind, env_id = request["kind"], request["id"]
        environment = self.living.get(env_id)
        # Told what it is, it need not ask the kernel.
        host = Socket(AF_UNIX, SOCK_SEQPACKET, 0, fds[0]) if fds else None
        if environment is None or (environment.pidfd < 0 and kind != "close"):
            ended = self._ended.get(env_id, {"kind": "gone"})
            if kind == "close":
                self._ended.pop(env_id, None)
            reply(host, ended)
        elif kind == "close":
            environment.is_let_go = host is None  # nobody waits for it any more
            environment.reply = host or environment.reply
            environment.is_reported = host is not None and request["is_reported"]
            environment.kill()
        elif kind == "kill":
            environment.kill()
        else:
            acts = {
                "freeze": environment.freeze,
                "thaw": environment.thaw,
                "verify": lambda: _verify(environment.pid),
            }
            reply(host, outcome(kind, acts[kind]))
        return True

    def conclude(self, environment: Environment, report: dict[str, Any]) -> None:
        """Tell, or keep, how an environment has ended."""
        del self.living[environment.id]
        if environment.reply is not None:
            reply(environment.reply, report)
        elif not environment.is_let_go:
            self._ended[environment.id] = report


def answer(host: Socket, message: dict[str, Any], fds: Sequence[int] = ()) -> bool:
    """Send an answer; False when the host has closed its end."""
    try:
        protocol.send(host, message, fds)
    except OSError:
        return False
    return True


def reply(host: Socket | None, message: dict[str, Any]) -> None:
    """Send the only answer there will be, if somebody waits for one."""
    if host is not None:
        answer(host, message)
        host.close()


def outcome(kind: str, act: Callable[[], None]) -> dict[str, Any]:
    """Return the answer to a request that `act` fulfils."""
    try:
        act()
    except OSError as error:
        return {"kind": "failed", **failure(kind, error)}
    return {"kind": "done"}


def _verify(pid: int) -> None:
    missing = readback.missing_lock(pid, filtered=True)
    if missing:
        raise OSError(errno.EPERM, f"its status does not say {missing!r}")
