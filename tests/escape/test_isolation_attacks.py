# SPDX-License-Identifier: Apache-2.0
"""What must differ from the host and between two environments: namespaces, IPC, keys, processes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import IS_ROOT, attack

import nsbox
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

FILES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time")

MakeEnv = Callable[..., nsbox.ExecutionEnvironment]


def namespaces_here() -> list[str]:
    return [name for name in FILES if os.path.exists(f"/proc/self/ns/{name}")]


def test_every_namespace_is_its_own_seen_from_inside(make_env: MakeEnv) -> None:
    code = "answer = {n: os.readlink('/proc/self/ns/' + n) for n in names}"
    names = namespaces_here()
    first, second = (attack(make_env(), code, names=names) for _ in range(2))
    host = {name: os.readlink(f"/proc/self/ns/{name}") for name in names}
    for name in names:
        assert len({first[name], second[name], host[name]}) == 3, name


@pytest.mark.skipif(not IS_ROOT, reason="PID 1 is not dumpable: only root may look at it")
def test_every_namespace_is_its_own_seen_from_outside(make_env: MakeEnv) -> None:
    launcher = get_launcher().pid
    pids: list[int | str] = ["self", launcher, make_env().pid, make_env().pid]
    for name in namespaces_here():
        links = [os.readlink(f"/proc/{pid}/ns/{name}") for pid in pids]
        assert len(set(links[2:])) == 2, name
        assert not set(links[2:]) & set(links[:2]), name


def test_processes_of_others_are_not_seen(make_env: MakeEnv) -> None:
    first, second = make_env(), make_env()
    with first.popen(["sleep", "4321"]):
        found = attack(
            second,
            """
            answer = [int(p) for p in os.listdir('/proc') if p.isdigit()]
            answer = [sorted(answer), [attempt(os.kill, n, 0) for n in range(3, 400)], os.getpid()]
            """,
        )
    pids, kills, own = found
    assert pids == [1, own]
    assert {result for n, result in enumerate(kills, 3) if n != own} == {"ESRCH"}


def test_system_v_and_posix_queues_are_private(make_env: MakeEnv) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    key = 0x6E736278
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    try:
        first, second = make_env(seccomp="docker"), make_env(seccomp="docker")
        code = """
        answer = [attempt(lambda: libc.shmget(key, 4096, 0o666)),
                  libc.shmget(key, 4096, 0o3666) >= 0,
                  libc.mq_open(b'/queue', 0o302, 0o666, None) >= 0]
        """
        # Each may make the key anew, exclusively: it is there neither from the host nor the other.
        assert attack(first, code, key=key) == [-1, True, True]
        assert attack(second, code, key=key) == [-1, True, True]
        assert attack(first, "answer = len(read('/proc/sysvipc/shm').splitlines())") == 2
    finally:
        libc.shmctl(segment, 0, None)


def test_keyrings_are_fresh(make_env: MakeEnv) -> None:
    """Even where the filter lets keyctl through, the caller's session keyring is not there."""
    policy = nsbox.SeccompPolicy.named("docker").allow_dangerous("keyctl")
    found = attack(
        make_env(seccomp=policy),
        """
        session = syscall(250, 0, -3, 0)
        buffer = ctypes.create_string_buffer(4096)
        size = syscall(250, 11, -3, buffer, 4096)
        answer = [session, size, attempt(read, '/proc/keys')]
        """,
    )
    session, size, keys = found
    if session != "ENOSYS":  # a kernel without keyrings
        assert size == 0, "nothing is in the session keyring"
    assert keys in ("", "ENOENT", "EACCES")


def test_host_name_and_clock_offsets_are_its_own(make_env: MakeEnv) -> None:
    env = make_env()
    assert env.run(["uname", "-n"]).text() == "sandbox\n"
    found = attack(
        env,
        """
        def write(name, text):
            with open('/proc/self/' + name, 'wb', buffering=0) as file:
                file.write(text)
        import time
        answer = [attempt(write, 'timens_offsets', b'monotonic 100 0'),
                  attempt(write, 'uid_map', b'0 1000 1'), attempt(write, 'setgroups', b'allow'),
                  attempt(time.clock_settime, time.CLOCK_REALTIME, 0.0),
                  attempt(time.clock_settime, time.CLOCK_MONOTONIC, 0.0)]
        """,
    )
    assert set(found) <= {"EACCES", "EROFS", "EPERM", "ENOENT", "EINVAL"}, found


def test_environments_are_marked_for_people_outside(env: nsbox.ExecutionEnvironment) -> None:
    assert Path(f"/proc/{env.pid}/comm").read_text() == f"nsbox-{env.id}\n"


def test_not_dumpable_seen_from_outside(env: nsbox.ExecutionEnvironment) -> None:
    """The owner of a non-dumpable process's files in /proc is root (proc(5))."""
    assert os.stat(f"/proc/{env.pid}/environ").st_uid == 0


def test_the_launcher_of_another_environment_is_not_the_parent(
    env: nsbox.ExecutionEnvironment,
) -> None:
    found = attack(env, "answer = [os.getppid(), read('/proc/1/stat').split(')')[1].split()[1]]")
    assert found == [1, "0"]


def test_supplementary_groups(env: nsbox.ExecutionEnvironment) -> None:
    groups = attack(env, "answer = os.getgroups()")
    if get_launcher().hello.drops_groups:
        assert groups in ([], [1000])
    else:
        assert "caller's groups remain" in env.protections["identity"].detail
