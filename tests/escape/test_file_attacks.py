# SPDX-License-Identifier: Apache-2.0
"""Attacks by files: planted links and special files, and the host's own files and sockets."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import attack

import nsbox
from nsbox.isolation.etc import STATE
from nsbox.supervisor.plan import interpreter_prefixes

pytestmark = pytest.mark.needs("userns")

PREFIXES = interpreter_prefixes()
"""What of the host is bound besides /usr: the interpreter's own directories."""

PLANTED = {
    "link to a file": ("ln -s /etc/passwd /tmp/x", "/tmp/x", "ELOOP"),
    "link to a masked file": ("ln -s /proc/1/environ /tmp/x", "/tmp/x", "ELOOP"),
    "link to a descriptor": ("ln -s /proc/self/fd/0 /tmp/x", "/tmp/x", "ELOOP"),
    "link to itself": ("ln -s x /tmp/x", "/tmp/x", "ELOOP"),
    "dangling link": ("ln -s /tmp/gone /tmp/x", "/tmp/x", "ELOOP"),
    "link in the middle": ("ln -s /etc /tmp/d", "/tmp/d/passwd", "ELOOP"),
    "root link in the middle": ("ln -s /proc/1/root /tmp/d", "/tmp/d/etc/passwd", "ELOOP"),
    "magic link": ("true", "/proc/self/exe", "ELOOP"),
    "magic root": ("true", "/proc/1/root/etc/passwd", "ELOOP EACCES EPERM"),
    "magic cwd": ("true", "/proc/self/cwd/tmp/x", "ELOOP"),
    "FIFO": ("mkfifo /tmp/x", "/tmp/x", "EINVAL ENXIO"),
    "directory": ("mkdir /tmp/x", "/tmp/x", "EINVAL EISDIR"),
    "socket": (
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"/tmp/x\")'",
        "/tmp/x",
        "ENXIO",
    ),
    "device": ("true", "/dev/zero", "EINVAL"),
    "terminal": ("true", "/dev/ptmx", "ELOOP EINVAL"),
    "below a file": ("touch /tmp/x", "/tmp/x/y", "ENOTDIR"),
    "no permission": ("echo 1 > /tmp/x; chmod 0 /tmp/x", "/tmp/x", "EACCES"),
}


def refused(result: pytest.ExceptionInfo[nsbox.SyscallError]) -> str:
    return errno.errorcode[result.value.errno or 0]


@pytest.mark.parametrize("what", PLANTED)
def test_planted_files_are_not_opened(env: nsbox.ExecutionEnvironment, what: str) -> None:
    prepare, path, expected = PLANTED[what]
    env.run(["sh", "-c", prepare]).check()
    with pytest.raises(nsbox.SyscallError) as caught:
        env.read_file(path)
    assert refused(caught) in expected.split()
    with pytest.raises(nsbox.SyscallError) as caught:
        env.write_file(path, b"from outside")
    assert refused(caught) in [*expected.split(), "EROFS", "EACCES", "EPERM"]
    assert env.run(["sh", "-c", "test ! -e /tmp/gone"]).ok
    assert env.run(["true"]).ok


def test_a_fifo_with_a_reader_is_not_written(env: nsbox.ExecutionEnvironment) -> None:
    env.run(["mkfifo", "/tmp/x"]).check()
    with env.popen(["cat", "/tmp/x"]) as reader:
        with pytest.raises(nsbox.SyscallError) as caught:
            env.write_file("/tmp/x", b"secret")
        assert refused(caught) in ("EINVAL", "ENXIO")
        reader.kill()
        reader.wait(10)
        assert reader.stdout is not None
        assert reader.stdout.read() == b""


def test_a_hard_link_to_the_userland_cannot_be_made(env: nsbox.ExecutionEnvironment) -> None:
    code = "answer = [attempt(os.link, p, '/tmp/x') for p in ('/etc/passwd', '/usr/bin/env')]"
    assert set(attack(env, code)) <= {"EXDEV", "EPERM"}


def test_links_that_change_while_a_file_is_written(env: nsbox.ExecutionEnvironment) -> None:
    """The race of CVE-2024-28189: a directory that turns into a link and back."""
    code = """
import os
os.mkdir('/tmp/a'); os.mkdir('/tmp/b'); os.symlink('/tmp/b', '/tmp/l')
print('go', flush=True)
import ctypes
libc = ctypes.CDLL(None)
while True:
    libc.renameat2(-100, b'/tmp/a', -100, b'/tmp/l', 2)
"""
    with env.popen(["python3", "-c", code]) as racer:
        assert racer.stdout is not None
        racer.stdout.readline()
        refusals = set()
        for _ in range(200):
            try:
                env.write_file("/tmp/a/file", b"x")
            except nsbox.SyscallError as error:
                refusals.add(error.errno)
    assert refusals <= {errno.ELOOP, errno.EAGAIN, errno.EXDEV, errno.ENOENT}
    assert env.run(["ls", "/tmp/b"]).text() == "", "never written through the link"


def test_written_files_have_no_set_id_bit(env: nsbox.ExecutionEnvironment) -> None:
    for mode in (0o4755, 0o2755, 0o1777, -1, 1 << 20, True, "755"):
        with pytest.raises(nsbox.ConfigError, match="mode"):
            env.write_file("/tmp/x", b"", mode=mode)  # type: ignore[arg-type]
    env.write_file("/tmp/x", b"#!/bin/sh\necho it runs\n", mode=0o755)
    assert env.run(["/tmp/x"]).text() == "it runs\n"
    assert attack(env, "s = os.stat('/tmp/x'); answer = [s.st_mode & 0o7777, s.st_uid]") == [
        0o755,
        1000,
    ]


def test_a_file_that_shrinks_or_grows_while_it_is_read(env: nsbox.ExecutionEnvironment) -> None:
    code = """
import os
fd = os.open('/tmp/x', os.O_RDWR | os.O_CREAT)
print('go', flush=True)
while True:
    os.ftruncate(fd, 4 << 20)
    os.ftruncate(fd, 0)
"""
    with env.popen(["python3", "-c", code]) as racer:
        assert racer.stdout is not None
        racer.stdout.readline()
        for _ in range(50):
            assert len(env.read_file("/tmp/x")) <= 4 << 20


def test_files_of_the_host_are_not_there(env: nsbox.ExecutionEnvironment, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    paths = [
        str(secret), "/etc/shadow", "/etc/gshadow", "/etc/ssh", "/etc/machine-id", "/root", "/run",
        "/var/run/docker.sock", "/run/docker.sock", "/run/systemd", "/var/log", "/boot",
        "/sys/kernel", "/sys/class", "/sys/devices", "/mnt", "/media", "/srv", "/lost+found",
        "/proc/1/root/etc/shadow", "/.dockerenv",
    ]  # fmt: skip
    found = attack(
        env,
        "answer = {'there': [p for p in paths if os.path.lexists(p) and "
        "not (os.path.isdir(p) and not os.listdir(p))], 'root': sorted(os.listdir('/'))}",
        paths=[path for path in paths if not any(p.startswith(path) for p in PREFIXES)],
    )
    assert found["there"] == []
    state = set(attack(env, "answer = os.path.isdir('/var/lib') and os.listdir('/var/lib') or []"))
    assert state <= {os.path.basename(path) for path in STATE}
    # An interpreter's prefix outside /usr may add its first directory.
    usual = {"bin", "dev", "etc", "home", "lib", "lib32", "lib64", "libx32", "proc", "run", "sbin",
             "sys", "tmp", "usr", "var", "opt"}  # fmt: skip
    assert set(found["root"]) <= usual | {prefix.split("/")[1] for prefix in PREFIXES}
    for prefix in PREFIXES:
        # Of the directories on the way to it nothing else is there, and most cannot be listed.
        siblings = env.run(["ls", "-A", os.path.dirname(prefix)]).text().split()
        nearby = {os.path.basename(p) for p in PREFIXES if p != prefix} | {os.path.basename(prefix)}
        assert set(siblings) <= nearby | {p.split("/")[2] for p in PREFIXES if p.count("/") > 2}
    accounts = attack(env, "answer = [read('/etc/passwd'), read('/etc/group')]")
    for text in accounts:
        assert {line.partition(":")[0] for line in text.splitlines()} <= {
            "root",
            "sandbox",
            "nobody",
            "nogroup",
        }


def test_nothing_of_the_host_shows_in_mount_sources(env: nsbox.ExecutionEnvironment) -> None:
    """Not even names: where the bind mounts come from could tell a user's name or a project."""
    mounts = env.run(["cat", "/proc/self/mounts"]).text()
    assert "/proc/1" not in mounts
    # Apart from where this clone is, which the interpreter of the tests is in.
    repository = str(Path(__file__).resolve().parents[2])
    assert "nsbox" not in mounts.replace(sys.prefix, "").replace(repository, "")
    assert "overlay" not in mounts or "upperdir" not in mounts


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    """Servers of the host: an abstract socket and one on the loopback interface."""
    name = f"nsbox-bait-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as local, socket.socket(socket.AF_INET) as inet:
        local.bind("\0" + name)
        local.listen()
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        yield name, inet.getsockname()[1]


_DIAL = """
        import socket
        def dial(family, address, kind=socket.SOCK_STREAM):
            with socket.socket(family, kind) as s:
                s.settimeout(3)
                return attempt(s.connect, address)
"""


def test_sockets_of_the_host_are_out_of_reach(
    env: nsbox.ExecutionEnvironment, listener: tuple[str, int]
) -> None:
    name, port = listener
    found = attack(
        env,
        _DIAL + """
        answer = {
            'abstract': dial(socket.AF_UNIX, chr(0) + name),
            'loopback': dial(socket.AF_INET, ('127.0.0.1', port)),
            'outside': dial(socket.AF_INET, ('192.0.2.1', 80)),
            'metadata': dial(socket.AF_INET, ('169.254.169.254', 80)),
            'datagram': dial(socket.AF_INET, ('192.0.2.1', 53), socket.SOCK_DGRAM),
            'six': attempt(dial, socket.AF_INET6, ('2001:db8::1', 80)),
            'interfaces': [n for _, n in socket.if_nameindex()],
            'sockets': [l for l in read('/proc/net/unix').splitlines()[1:] if name in l],
        }
        """,
        name=name, port=port,
    )  # fmt: skip
    assert found.pop("interfaces") == ["lo"]
    assert found.pop("sockets") == []
    assert found["abstract"] == found["loopback"] == "ECONNREFUSED"
    unreachable = {"ENETUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT"}
    assert {found[n] for n in ("outside", "metadata", "datagram", "six")} <= unreachable, found


@pytest.mark.needs("landlock")
def test_abstract_sockets_of_the_host_are_out_of_reach_in_its_network(
    make_env: Callable[..., nsbox.ExecutionEnvironment], listener: tuple[str, int]
) -> None:
    name, port = listener
    env = make_env(network="host")
    assert env.protections["landlock"].in_force
    found = attack(
        env,
        _DIAL + """
        import os, signal
        with socket.socket(socket.AF_UNIX) as own:
            own.bind('')
            own.listen()
            answer = {
                'host': dial(socket.AF_UNIX, chr(0) + name),
                'own': dial(socket.AF_UNIX, own.getsockname()),
                'loopback': dial(socket.AF_INET, ('127.0.0.1', port)),
            }
        child = os.fork()
        if child == 0:
            signal.pause()
        answer['child'] = attempt(os.kill, child, signal.SIGKILL)
        """,
        name=name, port=port,
    )  # fmt: skip
    assert found == {"host": "EPERM", "own": None, "loopback": None, "child": None}


def test_loopback_works_and_is_private(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    first, second = make_env(), make_env()
    serve = """
import socket
s = socket.create_server(('127.0.0.1', 4711)); print('up', flush=True)
while True:
    c, _ = s.accept(); c.send(b'hello'); c.close()
"""
    dial = "import socket; print(socket.create_connection(('127.0.0.1', 4711), 3).recv(9))"
    with first.popen(["python3", "-c", serve]) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        assert first.run(["python3", "-c", dial]).text() == "b'hello'\n"
        assert "ConnectionRefused" in second.run(["python3", "-c", dial]).stderr_text()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", 4711), 3)


def test_files_of_one_environment_are_not_in_another(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    first, second = make_env(), make_env()
    first.write_file("/tmp/mine", b"1")
    first.run(["sh", "-c", "echo 2 > /dev/shm/mine"]).check()
    for path in ("/tmp/mine", "/dev/shm/mine"):
        assert first.run(["test", "-e", path]).ok
        assert not second.run(["test", "-e", path]).ok
        assert not os.path.exists(path)


def test_a_writable_bind_is_only_what_it_says(tmp_path: Path) -> None:
    """Links planted in a shared directory lead nowhere but to the environment's own files."""
    shared = tmp_path / "shared"
    shared.mkdir()
    (tmp_path / "outside").write_text("secret")
    mount = nsbox.Mount.bind(shared, "/data", rw=True)
    with nsbox.ExecutionEnvironment(mounts=[mount], allow_missing={"idmapped_mounts"}) as env:
        env.run(["sh", "-c", "ln -s ../outside /data/up; ln -s /etc/shadow /data/shadow"])
        assert not env.run(["cat", "/data/up"]).ok
        assert not env.run(["cat", "/data/../outside"]).ok
        with pytest.raises(nsbox.SyscallError):
            env.read_file("/data/shadow")


def test_reads_and_writes_at_the_same_time(env: nsbox.ExecutionEnvironment) -> None:
    """Each operation has a channel of its own: no answer goes to somebody else."""
    wrong: list[object] = []

    def work(number: int) -> None:
        data = bytes([number]) * (1000 * number + 1)
        for _ in range(10):
            env.write_file(f"/tmp/{number}", data)
            if env.read_file(f"/tmp/{number}") != data:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
