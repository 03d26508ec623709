# SPDX-License-Identifier: Apache-2.0
"""The first steps of a worker that PID 1 forks: it is ready before anybody needs it.

It is forked as soon as PID 1 is, with a socket and streams of its own, warms up what every
invocation uses, and waits for its function. Until then it has seen nothing of any.
"""

from __future__ import annotations

import os

# The C half, as in `linux.calls`.
from _signal import SIG_UNBLOCK, pthread_sigmask

from nsbox.guest import prewarm, runtime, standard
from nsbox.linux import constants as c
from nsbox.linux.prepared import Name, Program, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from nsbox.linux.image import Image

_CHANNEL = 3
_NAME = Name("nsbox-worker")


def _first_steps() -> Program:
    program = Program()
    # PID 1's descriptors are not the worker's to have.
    program.close_range(_CHANNEL + 1, c.CLOSE_RANGE_MAX)
    program.set_name(_NAME)
    program.call(os.setsid)
    program.call(pthread_sigmask, SIG_UNBLOCK, [c.SIGCHLD])
    return program


_FIRST_STEPS = _first_steps().entries


def fork_worker(fds: Sequence[int], image: Image | None, *, has_time: bool) -> int:
    """Return the pid of a new worker.

    Args:
        fds: Its socket, stdout and stderr, all above its own numbers.
        image: What to give memory back to when it is idle.
        has_time: It makes itself ready first; nobody waits for it yet.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _work(*fds, image=image, has_time=has_time)
        finally:
            os._exit(1)
    return pid


def _work(
    channel: int, stdout: int, stderr: int, *, image: Image | None, has_time: bool
) -> NoReturn:
    standard.renew_stdin()  # it was the template's, and with it every other clone's
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.dup2(channel, _CHANNEL, inheritable=False)
    run(_FIRST_STEPS, [""])
    if has_time:
        prewarm.warm_up_inside()
    runtime.main(_CHANNEL, None if image is None else image.drop)
