# SPDX-License-Identifier: Apache-2.0
"""The least that an environment with a PID 1 in CPython can be: a starter process of that peer.

    python -I -S bare.py KIND FIRST_HOST_ID PATH...    # as root; see `peers.BareServer`

It is launcher, template and host in one. It clones itself, writes the id maps, and has PID 1 make
nsbox's own steps and run the program. With the KIND ``whole``, not ``steps``, it also makes the
cgroup with its limits, takes the program's output from pipes, reads the counters and removes all of
it. There is no message but a byte, no other process, no verdict, no check, no thread, and PID 1 can
do nothing else. What is imported is as little as in nsbox's template: it is copied with each clone.

The first line of stdin is the spec of the environments, marshalled, in hexadecimal digits; each
other line is a number of environments to make one after another, and is answered by a line when
all of them are gone.
"""

from __future__ import annotations

import gc
import marshal
import os
import sys
import time

KIND, FIRST_HOST_ID, *PATHS = sys.argv[1:]
sys.path[:0] = PATHS

from _socket import socketpair  # noqa: E402 - the C half, as in nsbox's template

from nsbox.isolation import etc, filesystem, landlock, namespaces, rootfs  # noqa: E402
from nsbox.launcher import inside  # noqa: E402
from nsbox.launcher.messages import Spec  # noqa: E402
from nsbox.linux import calls  # noqa: E402
from nsbox.linux import constants as c  # noqa: E402
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes  # noqa: E402
from nsbox.linux.prepared import Name, Program, run  # noqa: E402

if KIND == "whole":
    from nsbox.isolation import cgroups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from typing import NoReturn

    from nsbox.isolation.cgroups import EnvironmentCgroup
    from nsbox.linux.prepared import Entry

PROGRAM = "/bin/true"
WARM_UP = 10
FIRST_OWN = 100  # this process's descriptors, above those that a birth takes
RETRY = 0.0005  # seconds; a cgroup is busy for a moment after its last process


class Starter:
    """Makes environments one after another."""

    def __init__(self, spec: Spec, first_host_id: int) -> None:
        """Do once what nsbox's launcher does once: cgroup tree, layout, extent of /proc."""
        self._spec = spec
        # nsbox as root takes a network namespace that was made ahead; here are none.
        spec.namespaces |= c.CLONE_NEWNET
        self._next_id = first_host_id
        self.tree = None
        if KIND == "whole":
            self.tree = cgroups.Tree.for_process(os.getpid())
            self.tree.create()
        calls.unshare(c.CLONE_NEWNS)
        calls.mount(None, "/", None, c.MS_REC | c.MS_SLAVE)
        self._home = self._own(os.open("/proc/self/ns/mnt", os.O_RDONLY), 0)
        self._layout = self._own(rootfs.hold(spec.layout, None, etc.HostFiles()), 1)
        calls.setns(self._layout, c.CLONE_NEWNS)
        self._extent = filesystem.probe_proc()
        calls.setns(self._home, c.CLONE_NEWNS)
        null = self._own(os.open("/dev/null", os.O_RDWR), 2)
        for number in range(inside.LIFELINE, inside.FIRST_OTHER):
            os.dup2(null, number, inheritable=False)
        if landlock.is_available():
            os.dup2(landlock.make_ruleset(), inside.RULESET, inheritable=False)
        self._clone = calls.Clone(spec.namespaces)
        self._prepared: dict[tuple[int, ...], list[Entry]] = {}
        self._absent: set[object] = set()

    def _own(self, fd: int, place: int) -> int:
        return os.dup2(fd, FIRST_OWN + place, inheritable=False)

    def one(self) -> None:
        """An environment from nothing to nothing.

        Raises:
            RuntimeError: The program did not end with 0, or said something.
        """
        self._next_id += 1
        cgroup = tasks = None
        if self.tree is not None:
            cgroup = self.tree.make(f"bare-{self._next_id}", self._spec.cgroup_limits)
            tasks = cgroup.open_tasks()
        control, theirs = socketpair()
        maps, maps_write = os.pipe()
        os.dup2(maps, inside.SYNC, inheritable=False)
        entries = self._prepare(tasks or [])
        calls.setns(self._layout, c.CLONE_NEWNS)
        pid, pidfd = self._clone.make(-1 if cgroup is None else cgroup.clone_fd)
        if pid == 0:
            be_pid_1(theirs, maps_write, entries)
        calls.setns(self._home, c.CLONE_NEWNS)
        theirs.close()
        namespaces.write_id_maps(pid, self._spec.user_id, self._next_id)
        os.write(maps_write, inside.MAPPED)
        close_all([maps, maps_write, *(tasks or [])])
        output = b""
        if cgroup is not None:
            output = self._await_output(control, cgroup)
        status = control.recv(1)
        os.kill(pid, c.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)
        control.close()
        if cgroup is not None:
            cgroups.UsageReader(cgroup.paths, self._absent).read()
            while cgroup.try_remove():
                time.sleep(RETRY)
            cgroup.close()
        if status != b"\0" or output:
            raise RuntimeError(f"{PROGRAM} ended with {status!r} and said {output!r}")

    def _await_output(self, control: socket, cgroup: EnvironmentCgroup) -> bytes:
        control.recv(1)
        cgroups.UsageReader(cgroup.paths, self._absent).counters()
        pipes = [os.pipe() for _ in range(2)]
        send_bytes(control, b"r", [write for _, write in pipes])
        close_all([write for _, write in pipes])
        output = b"".join(os.read(read, 4096) for read, _ in pipes)
        close_all([read for read, _ in pipes])
        return output

    def _prepare(self, tasks: list[int]) -> list[Entry]:
        numbers = tuple(tasks)
        if numbers not in self._prepared:
            program = Program()
            inherited = inside.Inherited(self._extent, False, True, tasks, {}, Name("nsbox-"), {})
            for step in inside.STEPS[1:]:  # the first closes what is still needed here
                program.step = step.name
                step.run(program, self._spec, inherited)
            self._prepared[numbers] = program.entries
        return self._prepared[numbers]


def be_pid_1(control: socket, maps_write: int, entries: list[Entry]) -> NoReturn:
    """Make the steps, run the program once, and wait for the end."""
    try:
        os.close(maps_write)
        run(entries, [""])
        fds: list[int] = []
        if KIND == "whole":
            control.send(b"l")
            _, fds = receive_bytes(control, 1)
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds, 1)]
        child = os.posix_spawn(PROGRAM, [PROGRAM], {}, file_actions=actions, setsid=True)
        close_all(fds)
        _, status, _ = os.wait4(child, 0)
        control.send(bytes([min(status, 255)]))
        control.recv(1)
    finally:
        os._exit(1)


def main() -> None:
    """Serve until stdin ends."""
    fields = marshal.loads(bytes.fromhex(sys.stdin.readline()))  # noqa: S302 - the benchmark's
    starter = Starter(Spec.from_wire(fields), int(FIRST_HOST_ID))
    try:
        gc.disable()
        gc.collect()
        gc.freeze()
        count = WARM_UP
        while count:
            for _ in range(count):
                starter.one()
            os.write(1, b"done\n")
            count = int(sys.stdin.readline() or 0)
    finally:
        if starter.tree is not None:
            starter.tree.remove(5.0)


if __name__ == "__main__":
    main()
