#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Linux: triggers of pressure stall information (PSI) in an epoll instance that is waited on from outside.
#
# One would guess: an epoll descriptor is readable when something is ready in it (epoll(7)), so a program may wait
# for that with poll(2), select(2) or another epoll, and then ask the inner one what it is: an event loop that
# embeds another does nothing else. It is so for sockets, pipes, timers, pidfds, inotify.
#
# What happens: not for the triggers of /proc/pressure/* and of cgroups' *.pressure. The wait from outside ends as it
# should, and epoll_wait on the inner one then finds nothing, each time. To tell whether an epoll instance is
# readable the kernel polls each descriptor that it takes for ready, and polling a trigger is what takes its event
# away: the look is the delivery. A trigger that is waited on directly, by epoll_wait, at the same time tells of each.
# psi.rst says that poll(), select() and epoll() can be used, and nothing of this.
#
# Why it matters: a service that watches memory pressure this way sees the wake-ups, finds no reason for them, and
# goes on: no error anywhere, until the machine is out of memory. Wait on the instance that has the trigger, or on
# the trigger itself.
#
# Seen with Linux 6.18, Python 3.11 (the standard library alone); it keeps all CPUs busy for six seconds. A kernel
# that has no PSI, or does not let this user have triggers, is told so. Exit status 0: as described; 1: it has
# changed; 77: no triggers here.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/pressure.py" <<'PYTHON'
import os, platform, select, sys, time

SECONDS = 6
# 10 ms of 2 s in which a task waited for a CPU. Other windows are for CAP_SYS_RESOURCE.
TRIGGER = b"some 10000 2000000\0"


def arm():
    try:
        fd = os.open("/proc/pressure/cpu", os.O_RDWR | os.O_NONBLOCK)
        os.write(fd, TRIGGER)
    except OSError as error:
        print(f"no trigger here: {error}")
        sys.exit(77)
    return fd


def keep_busy():
    pid = os.fork()
    if pid == 0:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            pass
        os._exit(0)
    return pid


def main():
    print(f"Linux {platform.release()}, Python {platform.python_version()}, uid {os.getuid()}")
    plain, inner = select.epoll(), select.epoll()
    plain.register(arm(), select.EPOLLPRI)
    inner.register(arm(), select.EPOLLPRI)
    # The same by a pipe, to see that it is not the nesting.
    end, other_end = os.pipe()
    inner.register(end, select.EPOLLIN | select.EPOLLONESHOT)
    os.write(other_end, b"x")
    outer = select.poll()
    outer.register(inner, select.POLLIN)
    assert outer.poll(1000)
    piped = [fd for fd, _ in inner.poll(0)] == [end]

    children = [keep_busy() for _ in range(2 * os.cpu_count())]
    told = woken = found = 0
    over = time.monotonic() + SECONDS
    while time.monotonic() < over:
        if outer.poll(100):
            woken += 1
            found += len(inner.poll(0))
        told += len(plain.poll(0))
    for pid in children:
        os.waitpid(pid, 0)
    print(f"a pipe in the inner instance: {'found' if piped else 'not found'}")
    print(f"events of a trigger asked for directly: {told}")
    print(f"wake-ups by the other, through the outer poll: {woken}; found inside after them: {found}")
    return not (piped and told and woken and not found)


sys.exit(main())
PYTHON
/usr/bin/python3 "$place/pressure.py"
