# SPDX-License-Identifier: Apache-2.0
"""What an environment sees of cgroups: its own, which it cannot change, and nobody else's."""

from __future__ import annotations

import gc
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE, attack, x86_64_only

import nsbox
from nsbox.functions.function import StartChoice
from nsbox.values.config import ProfileChoice

pytestmark = pytest.mark.needs("userns")

PLACE = "/sys/fs/cgroup"

LOOK_AND_CHANGE = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def attempt(function, *arguments, **named):
    try:
        return 'done' if function(*arguments, **named) is None else 'done'
    except OSError as error:
        return errno.errorcode[error.errno]
def call(*arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    libc.syscall.restype = ctypes.c_long
    return errno.errorcode[ctypes.get_errno()] if libc.syscall(*words) == -1 else 'done'
def lines(path):
    with open(path) as file:
        return file.read().splitlines()
place, changed, directories, foreign = '/sys/fs/cgroup', {}, {}, []
there = os.path.isdir(place)
for directory, inner, files in os.walk(place):
    directories[directory] = len(files)
    for name in files:
        path = os.path.join(directory, name)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
            changed[attempt(os.open, path, flags)] = path
        seen = os.open(path, os.O_PATH)
        changed[attempt(os.open, f'/proc/self/fd/{seen}', os.O_WRONLY)] = 'reopened ' + path
        os.close(seen)
        changed[attempt(os.chmod, path, 0o777)] = 'chmod ' + path
        changed[attempt(os.truncate, path, 0)] = 'truncate ' + path
        if name in ('cgroup.procs', 'tasks', 'cgroup.threads'):
            foreign += [pid for pid in lines(path) if not os.path.exists('/proc/' + pid)]
    at = os.open(directory, os.O_RDONLY)
    changed[attempt(os.mkdir, 'new', dir_fd=at)] = 'mkdir ' + directory
    changed[attempt(os.rename, directory, directory + '2')] = 'rename ' + directory
    changed[attempt(os.rmdir, directory)] = 'rmdir ' + directory
    changed[attempt(os.chown, directory, os.getuid(), -1)] = 'chown ' + directory
    changed[attempt(os.utime, directory)] = 'utime ' + directory
    changed[attempt(os.setxattr, directory, 'user.a', b'b')] = 'setxattr ' + directory
    os.close(at)
attributes = ctypes.create_string_buffer((0).to_bytes(8, 'little') + (1).to_bytes(8, 'little'), 32)
uncovered = {}
for path in directories:
    raw = path.encode()
    uncovered[call(166, raw, 2)] = 'umount2 ' + path
    uncovered[call(165, None, raw, None, 32 | 4096, None)] = 'remount ' + path
    uncovered[call(442, -100, raw, 0, attributes, 32)] = 'mount_setattr ' + path
    uncovered[call(428, -100, raw, 1)] = 'open_tree ' + path
for kind in (b'cgroup', b'cgroup2'):
    uncovered[call(165, b'c', b'/tmp', kind, 0, None)] = 'a mount of its own'
mounts = [line.split() for line in lines('/proc/self/mountinfo')]
answer = {
    'there': there, 'changed': changed, 'directories': directories, 'foreign': foreign,
    'uncovered': uncovered, 'own': lines('/proc/self/cgroup'),
    'mounts': [[m[3], m[4], m[5]] for m in mounts if m[m.index('-') + 1].startswith('cgroup')],
}
"""


def assert_only_its_own(found: dict[str, Any]) -> None:
    """Nothing was changed, nothing of others is there, not even a name."""
    assert set(found["changed"]) <= {"EROFS", "EACCES", "EPERM", "EBUSY", "ENOTSUP"}, found
    assert set(found["uncovered"]) <= {"EPERM", "ENOSYS"}, found["uncovered"]
    assert found["foreign"] == []
    parts = [f"{PLACE}/{name}" for name in ("cpu", "cpuacct", "cpuset", "memory")]
    assert set(found["directories"]) <= {PLACE, *parts}, "no other's, nor the launcher's"
    # Without a limit of CPUs nothing is read of the hierarchies that have those.
    assert not any(found["directories"].get(path) for path in parts[:-1])
    for root, place, options in found["mounts"]:
        assert root == "/"
        assert place.startswith(PLACE)
        assert {"ro", "nosuid", "nodev"} <= set(options.split(","))
    for line in found["own"]:
        assert line.rpartition(":")[2] == "/", "the namespace hides where on the host it is"


@x86_64_only
@pytest.mark.parametrize("seccomp", ["strict", "docker"])
def test_only_the_own_cgroup_is_seen_and_none_is_written(seccomp: ProfileChoice) -> None:
    with nsbox.ExecutionEnvironment(seccomp=seccomp) as env:
        found = attack(env, LOOK_AND_CHANGE)
        is_limited = env.protections["cgroup.memory"].in_force
    assert found["there"] == is_limited, "where it has no limit there is nothing to see"
    assert_only_its_own(found)


@x86_64_only
@pytest.mark.parametrize("start", ["clone", "exec"])
def test_nor_by_a_function_or_in_a_pool(tmp_path: Path, start: StartChoice) -> None:
    body = textwrap.indent(LOOK_AND_CHANGE, "    ")
    (tmp_path / "app.py").write_text(f"def handler(event, context):\n{body}\n    return answer\n")
    version = nsbox.Function("app.handler", code=tmp_path, start=start).publish()
    with nsbox.WarmPool(version, max_environments=1) as pool:
        assert_only_its_own(pool.invoke({}, timeout=60 * PATIENCE))
    del pool, version
    gc.collect()  # a version holds a lock in the store


@pytest.mark.needs("cgroup.memory", "cgroup.cpu")
def test_what_is_seen_are_the_limits() -> None:
    limits = nsbox.Limits(memory_max="64M", cpu_max=0.5)
    names = {
        "memory.max": b"67108864", "memory/memory.limit_in_bytes": b"67108864",
        "cpu.max": b"50000 100000", "cpu/cpu.cfs_quota_us": b"50000",
    }  # fmt: skip
    with nsbox.ExecutionEnvironment(limits=limits) as env:
        for name, text in names.items():
            result = env.run(["cat", f"{PLACE}/{name}"])
            assert result.stdout.strip() in (text, b""), name
            names[name] = result.stdout
    assert sum(map(bool, names.values())) == 2


@pytest.mark.needs("cgroup.memory")
def test_without_a_limit_there_is_no_view() -> None:
    with nsbox.ExecutionEnvironment(limits=nsbox.Limits(memory_max=None)) as env:
        assert not env.run(["test", "-e", "/sys"]).ok
