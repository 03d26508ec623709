# SPDX-License-Identifier: Apache-2.0
"""The first steps of a worker that PID 1 forks.

It is forked at PID 1's start, with a socket and streams of its own, and waits for its function. In
a standby environment it warms up first. It has seen no data of any function until then.
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
    # The worker gets none of PID 1's descriptors.
    program.close_range(_CHANNEL + 1, c.CLOSE_RANGE_MAX)
    program.set_name(_NAME)
    program.call(os.setsid)
    program.call(pthread_sigmask, SIG_UNBLOCK, [c.SIGCHLD])
    return program


_FIRST_STEPS = _first_steps().entries


def fork_worker(fds: Sequence[int], image: Image | None, *, has_time: bool) -> int:
    """Return the pid of a new worker.

    Args:
        fds: Its socket, stdout and stderr; all above 3.
        image: The shared memory that pages are given back to after a time without events, or None.
        has_time: Whether to warm up first: the environment is on standby.
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
    standard.renew_stdin()  # the inherited open file is shared with every other clone
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.dup2(channel, _CHANNEL, inheritable=False)
    run(_FIRST_STEPS, [""])
    if has_time:
        prewarm.warm_up_inside()
    runtime.main(_CHANNEL, None if image is None else image.drop)
