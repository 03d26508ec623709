# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, made ahead of need and never used twice.

Making one takes the kernel about 0.6 ms, a fifth of a birth, and entering a ready one 2 us. A
namespace that has served an environment is never given to another: its /proc/sys/net and queues
would be state of the first (docs/architecture.md, Traps).
"""

from __future__ import annotations

import os

from nsbox.isolation.namespaces import come_home
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.interfaces import set_link_up


class NetworkPool:
    """Empty network namespaces with loopback up. For a single-threaded process."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._ready: list[int] = []
        self._is_refused = False

    @property
    def wants_more(self) -> bool:
        """Whether fewer than `size` are ready, and more could be made lately."""
        return len(self._ready) < self._size and not self._is_refused

    def prepare(self) -> None:
        """Make one more ahead of need; where that fails, none before the next is taken."""
        try:
            self._add()
        except OSError:
            self._is_refused = True

    def _add(self) -> None:
        calls.unshare(c.CLONE_NEWNET)
        try:
            set_link_up("lo")
            self._ready.append(os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        finally:
            come_home(self._home, c.CLONE_NEWNET)

    def take(self) -> int:
        """Return the descriptor of a fresh namespace; the caller closes it."""
        self._is_refused = False
        if not self._ready:
            self._add()
        return self._ready.pop()
