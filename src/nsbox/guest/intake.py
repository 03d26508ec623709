# SPDX-License-Identifier: Apache-2.0
"""The first steps of a worker that PID 1 forks: it is ready before anybody needs it.

It is forked as soon as PID 1 is, warms up what every invocation uses, and waits for its socket and
streams. Until then it has seen nothing of any function.
"""

from __future__ import annotations

import os

# The C halves, as in `linux.calls`.
from _signal import SIG_UNBLOCK, pthread_sigmask
from _socket import AF_UNIX, SOCK_SEQPACKET, socketpair
from _socket import socket as _Socket

from nsbox.guest import python_runtime, warm
from nsbox.isolation import privileges
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all_but, receive_bytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_CHANNEL = 3


def fork_worker(*, has_time: bool) -> tuple[int, _Socket]:
    """Return the pid of a new worker, and the socket on which it waits for its descriptors.

    With `has_time` it makes itself ready first; nobody waits for it yet.
    """
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        try:
            _wait(theirs, has_time=has_time)
        finally:
            os._exit(1)
    theirs.close()
    return pid, ours


def _wait(intake: _Socket, *, has_time: bool) -> NoReturn:
    # PID 1's descriptors are not the worker's to have.
    close_all_but((0, 1, 2, intake.fileno()))
    privileges.set_name("nsbox-worker")
    os.setsid()
    pthread_sigmask(SIG_UNBLOCK, [c.SIGCHLD])
    if has_time:
        warm.warm_up()
    data, fds = receive_bytes(intake, 1)
    if not data or len(fds) != 3:
        os._exit(0)
    channel, stdout, stderr = fds
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    if channel != _CHANNEL:
        os.dup2(channel, _CHANNEL, inheritable=False)
    close_all_but((0, 1, 2, _CHANNEL))
    python_runtime.main(_CHANNEL)
