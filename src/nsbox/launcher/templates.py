# SPDX-License-Identifier: Apache-2.0
"""The launcher's end of its template process: start it, send it births, hear of them."""

from __future__ import annotations

import collections
import marshal
import os

from nsbox.errors import SyscallError
from nsbox.launcher import protocol, spawn
from nsbox.linux.descriptors import close_all, receive_message, send_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from nsbox.launcher.birth import Birth

SPECS_KEPT = 32
_ENTERED = ("user", "mnt")  # namespaces that the template enters, in this order


class TemplateGone(SyscallError):
    """A template process has ended.

    Attributes:
        template: Which.
    """

    def __init__(self, template: TemplateProcess, number: int) -> None:
        super().__init__("sendmsg", number, "the template process")
        self.template = template


class TemplateProcess:
    """A template that runs, and the births under way in it.

    Attributes:
        kind: What its clones can do (`nsbox.launcher.template.main`).
        pid: Its process id.
        pending: Births that it has not answered yet, the oldest first.
        is_introduced: Whether `introduce` was called.
    """

    def __init__(self, kind: str, words: Sequence[str], lifeline: int) -> None:
        """Start it, and do not wait for it.

        Args:
            kind: For those who look for it.
            words: Command line after the role (`nsbox.launcher.main`).
            lifeline: Descriptor that reads as ended when the launcher is gone.
        """
        self.kind = kind
        self._words = os.fsencode("\0".join(("", *words, "")))
        self.pending: collections.deque[Birth] = collections.deque()
        self._known: dict[str, None] = {}
        self._channel, theirs = protocol.pair()
        try:
            self.pid = spawn.start("template", words, [lifeline, theirs.fileno()], [])
        except BaseException:
            self._channel.close()
            raise
        finally:
            theirs.close()
        self.is_introduced = False

    def fileno(self) -> int:
        """Descriptor that is readable when a birth is answered."""
        return self._channel.fileno()

    def introduce(self, extent: str, *, drop_groups: bool) -> None:
        """Have it enter the namespaces of this process; once, before the first birth.

        Args:
            extent: How much of a /proc environments can have (`filesystem.probe_proc`).
            drop_groups: Whether setgroups(2) is allowed here.
        """
        fds = [os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC) for kind in _ENTERED]
        try:
            self._send(("hello", extent.encode(), drop_groups), fds)
        finally:
            close_all(fds)
        self.is_introduced = True

    def send_birth(self, birth: Birth) -> None:
        """Have `birth` cloned; the answer comes later.

        Raises:
            TemplateGone: It has ended.
            OSError: The spec is too large for one message.
        """
        key, spec = birth.spec.key, birth.spec
        if key not in self._known:
            if len(self._known) >= SPECS_KEPT:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._send(("forget", oldest))
            self._send(("spec", key, spec.to_wire(), birth.known.cgroup_view))
            self._known[key] = None
        fds = [birth.control, birth.layout]
        if has_cgroup := birth.cgroup_fd >= 0:
            fds.append(birth.cgroup_fd)
        if has_network := birth.network >= 0:
            fds.append(birth.network)
        message = (
            *("birth", key, birth.env_id, birth.host_id),
            *(list(birth.trees), has_cgroup, has_network, birth.awaits == "taker"),
        )
        self._send(message, [*fds, *birth.trees.values(), *birth.tasks])
        self.pending.append(birth)

    def receive(self) -> tuple[int, int, dict[str, Any] | None] | None:
        """Return pid, pidfd and failure of the oldest pending birth; None when it is gone."""
        try:
            data, fds = receive_message(self._channel)
        except ConnectionError:
            return None
        if not data:
            return None
        pid, failed = marshal.loads(data)  # noqa: S302 - from a process of ours, not from inside
        return pid, fds[0] if fds else -1, failed

    def has_made(self, pid: int) -> bool:
        """Whether a child that no template has told of may be a clone of this one."""
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                return self._words in file.read()  # a clone has that of its template
        except OSError:
            return True

    def close(self) -> None:
        """Close the descriptors; a template that still runs ends then."""
        self._channel.close()

    def _send(self, message: tuple[Any, ...], fds: Sequence[int] = ()) -> None:
        data = marshal.dumps(message)
        try:
            send_bytes(self._channel, data, fds)
        except ConnectionError as error:
            raise TemplateGone(self, error.errno or 0) from error
