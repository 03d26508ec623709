# SPDX-License-Identifier: Apache-2.0
"""Attacks by what is bound: set-id programs left on the host, and files of root's."""

from __future__ import annotations

import gc
import os
import stat
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tests.support import IS_ROOT, attack, x86_64_only

import nsbox
from nsbox import SeccompPolicy
from nsbox.functions.function import StartChoice
from nsbox.values.config import ProfileChoice

pytestmark = pytest.mark.needs("userns")

OWNER = 12345  # as root: somebody who is nobody on the host


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory of an ordinary user's: of this one, as root of another."""
    path = tmp_path / "shared"
    path.mkdir(mode=0o755)
    if IS_ROOT:
        os.chown(path, OWNER, 0)
    return path


@pytest.fixture
def fields(shared: Path) -> dict[str, Any]:
    """A writable bind, idmapped as root where the file system can be."""
    mount = nsbox.Mount.bind(shared, "/data", rw=True)
    try:
        nsbox.run(["true"], mounts=[mount]).check()
    except nsbox.SetupError as error:
        if error.step != "trees":
            raise
        shared.chmod(0o777)
        return {"mounts": [mount], "allow_missing": {"idmapped_mounts"}}
    return {"mounts": [mount]}


# Every call that gives a file a mode: each with the set-user-ID bit, then the set-group-ID bit.
MAKE_SET_ID = r"""
import ctypes, errno, os, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        raise OSError(ctypes.get_errno(), 'syscall')
def name(number):
    return f'/data/{number}-{bit:o}'.encode()
answer, bit = {}, 0
def attempt(label, function, *arguments):
    try:
        function(*arguments)
        said = 0
    except OSError as error:
        said = error.errno
    answer.setdefault(label, []).append(errno.errorcode.get(said, str(said)))
def plain(number):
    path = name(number)
    with open(path, 'wb') as file:
        file.write(b'#!/bin/sh\n')
    return path
def by_descriptor():
    with open(plain(2), 'rb') as file:
        os.fchmod(file.fileno(), 0o755 | bit)
def by_socket():
    with socket.socket(socket.AF_UNIX) as one:
        os.fchmod(one.fileno(), 0o777 | bit)
        one.bind(name(15))
def unnamed():
    fd = os.open('/data', os.O_TMPFILE | os.O_RDWR, 0o755 | bit)
    os.link(f'/proc/self/fd/{fd}', name(16), follow_symlinks=True)
def how(flags):
    return struct.pack('QQQ', flags, 0o755 | bit, 0)
for bit in (0o4000, 0o2000, 0o6000):
    mode = 0o755 | bit
    os.umask(0)
    attempt('chmod', os.chmod, plain(1), mode)
    attempt('fchmod', by_descriptor)
    attempt('fchmodat', syscall, 268, -100, plain(3), mode)
    attempt('fchmodat2', syscall, 452, -100, plain(4), mode, 0)
    attempt('high half', syscall, 90, plain(5), mode | 1 << 40)
    attempt('open', syscall, 2, name(6), os.O_CREAT | os.O_WRONLY, mode)
    attempt('openat', os.open, name(7), os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    attempt('creat', syscall, 85, name(8), mode)
    attempt('openat2', syscall, 437, -100, name(9), how(os.O_CREAT | os.O_WRONLY), 24)
    attempt('mknod', syscall, 133, name(10), 0o100000 | mode, 0)
    attempt('mknod 0', syscall, 133, name(11), mode, 0)
    attempt('mknodat', syscall, 259, -100, name(12), 0o100000 | mode, 0)
    attempt('fifo', syscall, 133, name(13), 0o010000 | mode, 0)
    attempt('io_uring', syscall, 425, 8, bytes(120))
    attempt('bind', by_socket)
    attempt('tmpfile', unnamed)
    capabilities = struct.pack('<5I', 0x2000001, 128, 0, 0, 0)
    attempt('setxattr', os.setxattr, plain(17), 'security.capability', capabilities)
    attempt('mkdir', os.mkdir, name(18), mode)
    attempt('directory', os.chmod, name(18), mode)
"""


def set_ids(place: Path) -> list[str]:
    """Return what has a set-id bit below a directory."""
    found = [place, *place.rglob("*")]
    return [str(path) for path in found if os.lstat(path).st_mode & (stat.S_ISUID | stat.S_ISGID)]


def assert_refused(answer: dict[str, list[str]], shared: Path) -> None:
    assert set_ids(shared) == []
    assert answer.pop("mkdir") == ["0"] * 3, "the kernel ignores the bits"
    assert answer.pop("openat2") == ["ENOSYS"] * 3
    assert answer.pop("tmpfile")[0] in ("EPERM", "EOPNOTSUPP")
    assert answer.pop("setxattr")[0] in ("EPERM", "EOPNOTSUPP", "ENOTSUP", "ENOSYS")
    assert set(map(tuple, answer.values())) == {("EPERM",) * 3}, answer


@x86_64_only
@pytest.mark.parametrize("profile", ["strict", "default", "docker"])
def test_no_set_id_program_is_left_in_a_bind(
    fields: dict[str, Any], shared: Path, profile: ProfileChoice
) -> None:
    with nsbox.ExecutionEnvironment(seccomp=profile, **fields) as env:
        assert env.protections["set_id_bits"].in_force
        assert_refused(attack(env, MAKE_SET_ID), shared)


@x86_64_only
def test_nor_with_calls_that_were_allowed_by_name(fields: dict[str, Any], shared: Path) -> None:
    policy = SeccompPolicy.default().allow_dangerous("chmod", "openat", "mknod", "io_uring_setup")
    with nsbox.ExecutionEnvironment(seccomp=policy, **fields) as env:
        assert_refused(attack(env, MAKE_SET_ID), shared)


@x86_64_only
@pytest.mark.parametrize("start", ["clone", "exec"])
def test_nor_by_a_function_or_in_a_pool(
    fields: dict[str, Any],
    shared: Path,
    tmp_path: Path,
    start: StartChoice,
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    body = textwrap.indent(MAKE_SET_ID, "    ")
    (code / "app.py").write_text(f"def handler(event, context):\n{body}\n    return answer\n")
    version = nsbox.Function("app.handler", code=code, start=start, **fields).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert_refused(env.invoke({}), shared)
    for path in shared.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    with nsbox.WarmPool(version, max_environments=1) as pool:
        assert_refused(pool.invoke({}), shared)
    del env, pool, version
    gc.collect()  # a version holds a lock in the store


def test_modes_without_them_are_as_ever(fields: dict[str, Any], shared: Path) -> None:
    with nsbox.ExecutionEnvironment(**fields) as env:
        env.run(["sh", "-ec", "cd /data; touch a; chmod 1700 a; mkdir -m 700 b; mkfifo c"]).check()
        env.run(["sh", "-ec", "cd /data; cp a d; chmod 640 d; ln -s a link"]).check()
        env.write_file("/data/b/written", b"by the host")
        assert env.read_file("/data/b/written") == b"by the host"
        for path in ("/data/link", "/data/b/../link", "/proc/self/root/data/a"):
            with pytest.raises(nsbox.SyscallError):
                env.read_file(path)
    assert stat.S_IMODE(os.stat(shared / "a").st_mode) == 0o1700
    assert stat.S_IMODE(os.stat(shared / "d").st_mode) == 0o640


def test_without_writable_binds_files_of_its_own_can_have_them(tmp_path: Path) -> None:
    mount = nsbox.Mount.bind(tmp_path, "/data")
    with nsbox.ExecutionEnvironment(mounts=[mount]) as env:
        assert "set_id_bits" not in env.protections
        env.run(
            ["sh", "-ec", "cp /usr/bin/su /tmp; chmod 4755 /tmp/su; mkdir -m 2755 /tmp/d"]
        ).check()


@pytest.mark.needs("root")
def test_nothing_is_made_as_root(tmp_path: Path) -> None:
    """Files of root's are believed by many: cron, sshd, sudo, PATH."""
    tmp_path.chmod(0o755)
    mount = nsbox.Mount.bind(tmp_path, "/data", rw=True)
    with pytest.raises(nsbox.ConfigError, match=r"belongs to root.*chown -R nobody"):
        nsbox.run(["touch", "/data/x"], mounts=[mount])
    with nsbox.ExecutionEnvironment(mounts=[mount], allow_missing={"idmapped_mounts"}) as env:
        assert not env.run(["touch", "/data/x"]).ok, "others may not write"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("root", "idmapped_mounts")
def test_owner_and_group_of_what_is_made(shared: Path) -> None:
    """The group is never root's, though the source has it; root's own files stay root's."""
    (shared / "root's").write_text("secret")
    (shared / "root's").chmod(0o600)
    (shared / "mine").write_text("private")
    (shared / "mine").chmod(0o600)
    os.chown(shared / "mine", OWNER, 0)
    with nsbox.ExecutionEnvironment(mounts=[nsbox.Mount.bind(shared, "/data", rw=True)]) as env:
        env.run(["sh", "-ec", "cat /data/mine; echo 1 >> /data/mine; touch /data/new"]).check()
        assert not env.run(["cat", "/data/root's"]).ok
        assert env.run(["stat", "-c", "%u %g", "/data/new"]).text().split() == ["1000", "1000"]
    made = os.stat(shared / "new")
    assert made.st_uid == OWNER
    assert made.st_gid not in (0, OWNER)


@pytest.mark.needs("root", "idmapped_mounts")
def test_a_source_that_becomes_roots_is_refused_at_the_birth(shared: Path) -> None:
    config = nsbox.Config(mounts=[nsbox.Mount.bind(shared, "/data", rw=True)])
    with nsbox.ExecutionEnvironment(config) as env:
        env.run(["true"]).check()
    os.chown(shared, 0, 0)
    with pytest.raises(nsbox.SetupError, match="belongs to root"):
        nsbox.ExecutionEnvironment(config)


@pytest.mark.needs("root", "idmapped_mounts")
@pytest.mark.parametrize("owner", [0, OWNER])
def test_private_sources_of_roots_can_be_read(tmp_path: Path, owner: int) -> None:
    """What is bound itself is meant; what is private in a public directory of root's is not."""
    private, public = tmp_path / "private", tmp_path / "public"
    for place, mode in ((private, 0o700), (public, 0o755)):
        place.mkdir(mode=mode)
        (place / "file").write_text("private")
        (place / "file").chmod(0o600)
        os.chown(place / "file", owner, owner)
        os.chown(place, owner, owner)
    places = {"/private": private, "/public": public, "/file": public / "file"}
    mounts = [nsbox.Mount.bind(source, place) for place, source in places.items()]
    with nsbox.ExecutionEnvironment(mounts=mounts) as env:
        assert env.run(["cat", "/private/file", "/file"]).text() == "private" * 2
        assert env.run(["cat", "/public/file"]).ok is (owner != 0)
        assert env.run(["stat", "-c", "%u", "/private"]).text() == "1000\n"
        for path in ("/private/x", "/private/file", "/file"):
            assert not env.run(["sh", "-c", f"echo 1 >> {path}"]).ok


@pytest.mark.needs("root", "idmapped_mounts")
def test_two_environments_share_what_they_make(shared: Path) -> None:
    config = nsbox.Config(mounts=[nsbox.Mount.bind(shared, "/data", rw=True)])
    with nsbox.ExecutionEnvironment(config) as one, nsbox.ExecutionEnvironment(config) as other:
        one.run(["sh", "-ec", "umask 077; echo 1 > /data/x"]).check()
        other.run(["sh", "-ec", "cat /data/x; rm /data/x"]).check()
