# SPDX-License-Identifier: Apache-2.0
"""`reset` against what leaves words for others in every place there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE, attack, wait_until

import nsbox
from nsbox import Outcome, State

pytestmark = pytest.mark.needs("userns")

# Everything that can be had inside, keys too, which only a dangerous policy gives.
POLICY = nsbox.SeccompPolicy.docker().allow_dangerous("add_key", "keyctl", "request_key")

LEAVE = """
import fcntl, signal, socket, time
def sys(name, *arguments):
    return attempt(getattr(os, name), *arguments)
for place in PLACES:
    deep = place
    for _ in range(150):
        deep += "/deep"
        os.mkdir(deep)
    open(f"{place}/.hidden", "w").write("word")
    os.link(f"{place}/.hidden", f"{place}/link")
    os.symlink("/etc", f"{place}/symlink")
    os.mkfifo(f"{place}/fifo")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind(f"{place}/socket")
    os.makedirs(f"{place}/locked/inner")
    os.chmod(f"{place}/locked/inner", 0)
    os.chmod(f"{place}/locked", 0)
    open(f"{place}/odd\\n\\udcff", "w").close()
    attempt(os.setxattr, place, "user.word", b"word")
    # An ACL for new files below, which is state of the directory.
    acl = bytes.fromhex("02000000" "01000700ffffffff" "04000700ffffffff" "20000700ffffffff")
    attempt(os.setxattr, place, "system.posix_acl_default", acl)
    fd = os.open(place, os.O_RDONLY)
    attempt(fcntl.ioctl, fd, 0x40086602, (0x40 | 0x80).to_bytes(8, "little"))
    os.close(fd)
    os.utime(place, (1234567890, 1234567890))
    os.chmod(place, 0o700)
libc.mq_open(b"/left", os.O_CREAT | os.O_RDWR, 0o600, None)
libc.shmget(0x4c454654, 4096, 0o1600)
libc.semget(0x4c454654, 1, 0o1600)
libc.msgget(0x4c454654, 0o1600)
key = [syscall(248, b"user", b"left%d" % -ring, b"word", 4, ring) for ring in (-3, -4, -5)]
persistent = syscall(250, 22, -1, -3)
if isinstance(persistent, int):
    syscall(248, b"user", b"leftp", b"word", 4, persistent)
kept = socket.socket(socket.AF_UNIX)
kept.bind("\\0left")
kept.listen()
tcp = socket.socket()
tcp.bind(("127.0.0.1", 7777))
tcp.listen()
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            for fd in range(3):
                os.dup2(os.open("/dev/null", os.O_RDWR), fd)
            while True:
                time.sleep(1000)
        os._exit(0)
answer = [isinstance(item, int) for item in key]
"""

LOOK = """
import fcntl, socket, time
def bound(family, address):
    with socket.socket(family) as one:
        return attempt(one.bind, address)
def flags(place):
    fd = os.open(place, os.O_RDONLY)
    try:
        return attempt(fcntl.ioctl, fd, 0x80086601, bytes(8))
    finally:
        os.close(fd)
def search(ring, name):
    return syscall(250, 10, ring, b"user", name, 0)
def tree(place):
    # All below it but what is bound there, as an interpreter below the host's /tmp is.
    found = []
    for top, directories, files in os.walk(place):
        directories[:] = [n for n in directories if not os.path.ismount(os.path.join(top, n))]
        found += [os.path.join(top, n) for n in directories + files]
    return sorted(set(found) - set(WAYS))
places = [*PLACES, "/dev/mqueue"]
answer = {
    "tree": [tree(place) for place in places],
    "xattrs": [attempt(os.listxattr, place) for place in places],
    "flags": [str(flags(place)) for place in PLACES],
    "old times": [place for place in places if abs(os.stat(place).st_mtime - time.time()) > 1e7
                  or abs(os.stat(place).st_atime - time.time()) > 1e7],
    "modes": [os.stat(place).st_mode for place in places],
    "mq": libc.mq_open(b"/left", os.O_RDWR),
    "sysv": [libc.shmget(0x4c454654, 0, 0), libc.semget(0x4c454654, 0, 0),
             libc.msgget(0x4c454654, 0)],
    "keys": [search(ring, b"left%d" % -ring) for ring in (-3, -4, -5)]
            + [search(-3, b"leftp"), search(-4, b"leftp")],
    "abstract": bound(socket.AF_UNIX, "\\0left"),
    "tcp": bound(socket.AF_INET, ("127.0.0.1", 7777)),
    "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
    "mine": [line for line in read("/proc/self/status").splitlines()
             if line.startswith(("Umask", "Sig", "Shd", "Seccomp", "Cpus_allowed_list"))],
    "nice": [os.nice(0), os.sched_getscheduler(0), read("/proc/self/oom_score_adj")],
    "limits": read("/proc/self/limits"),
    "cwd": os.getcwd(),
    "environment": sorted(os.environ),
}
"""
PLACES = ["/tmp", "/dev/shm", "/scratch"]


@pytest.fixture
def env() -> Iterator[nsbox.ExecutionEnvironment]:
    mounts = [nsbox.Mount.tmpfs("/scratch")]
    with nsbox.ExecutionEnvironment(seccomp=POLICY, mounts=mounts) as one:
        yield one


def look(env: nsbox.ExecutionEnvironment) -> dict[str, Any]:
    ways = attack(env, FIND_WAYS)
    found: dict[str, Any] = attack(env, LOOK, PLACES=PLACES, WAYS=ways)
    return found


# The directories on the way to what is bound below /tmp.
FIND_WAYS = """
mounts = [line.split()[4] for line in read("/proc/self/mountinfo").splitlines()]
answer = []
for mount in (mount for mount in mounts if mount.startswith("/tmp/")):
    while (mount := os.path.dirname(mount)) != "/tmp":
        answer.append(mount)
"""


def test_reset_leaves_nothing(env: nsbox.ExecutionEnvironment) -> None:
    before = look(env)
    assert look(env) == before
    for _ in range(2):
        assert all(attack(env, LEAVE, PLACES=PLACES)), "the attack has left its keys"
        dirty = look(env)
        for name in ("tree", "old times", "modes", "mq", "sysv", "keys"):
            assert dirty[name] != before[name], name
        env.reset()
        after = look(env)
        assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    assert env.state is State.READY


def test_commands_that_run_are_killed_and_say_so(env: nsbox.ExecutionEnvironment) -> None:
    processes = [env.popen(["sh", "-c", "trap '' TERM; sleep 1000 & wait"]) for _ in range(3)]
    try:
        env.reset()
        for process in processes:
            result = process.wait(30 * PATIENCE)
            assert result.outcome is Outcome.KILLED
            assert result.evidence == "its environment was reset; nsbox killed it"
    finally:
        for process in processes:
            process.close()
    assert env.run(["sh", "-c", "kill -9 $$"]).outcome is Outcome.SIGNALED
    assert env.run(["echo", "on"]).text() == "on\n"


LAX = nsbox.SeccompPolicy.default().allow_dangerous("setpriority", "sched_setscheduler")


@pytest.mark.parametrize(
    "change",
    [
        "os.setpriority(os.PRIO_PROCESS, 1, 5)",
        "os.setpriority(os.PRIO_USER, 0, 5)",
        "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
        "os.sched_setscheduler(1, os.SCHED_BATCH, os.sched_param(0))",
    ],
)
def test_slowing_down_who_comes_next(
    make_env: Callable[..., nsbox.ExecutionEnvironment], change: str
) -> None:
    """Commands inherit PID 1's priority, and nobody may raise it again; with a filter that lets."""
    env = make_env(seccomp=LAX)
    attack(env, change)
    with pytest.raises(nsbox.EnvironmentStateError, match="not permitted"):
        env.reset()
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@pytest.mark.parametrize(
    "hide",
    [
        "os.rename('/tmp/in', '/tmp/out'); os.makedirs('/tmp/in/scratch')",
        "os.rename('/tmp/in', '/tmp/out')",
        "os.rename('/tmp/in', '/tmp/out'); os.symlink('out', '/tmp/in')",
    ],
)
def test_a_mount_that_is_hidden(
    make_env: Callable[..., nsbox.ExecutionEnvironment], hide: str
) -> None:
    """What cannot be found cannot be emptied: then nobody is to have it."""
    env = make_env(mounts=[nsbox.Mount.tmpfs("/tmp/in/scratch")])
    attack(env, f"open('/tmp/in/scratch/word', 'w').close(); {hide}")
    try:
        env.reset()
    except nsbox.EnvironmentStateError:
        wait_until(lambda: env.state is State.DEAD, "it is killed")
    else:
        found = env.run(["find", "/tmp", "-name", "word"])
        assert found.stdout == b""


def test_keys_that_cannot_be_taken_away(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env(seccomp=nsbox.SeccompPolicy.default().allow_dangerous("add_key"))
    with pytest.raises(nsbox.EnvironmentStateError, match="could not be reset"):
        env.reset()
    locked = make_env(seccomp=POLICY)
    # The user's keyring without any permission but to be seen.
    assert attack(locked, "answer = syscall(250, 5, -4, 0x01010000)") == 0
    with pytest.raises(nsbox.EnvironmentStateError, match="could not be reset"):
        locked.reset()


def test_binds_stay_as_they_are(
    make_env: Callable[..., nsbox.ExecutionEnvironment], tmp_path: Path
) -> None:
    """Never is a file of the host removed, whatever file system it is on."""
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    (shared / "kept").write_text("host")
    mounts = [
        nsbox.Mount.bind(shared, "/data", rw=True),
        nsbox.Mount.bind(shared, "/tmp/data", rw=True),
    ]
    env = make_env(mounts=mounts, allow_missing={"idmapped_mounts"})
    env.run(["sh", "-c", "echo > /tmp/x; echo > /data/more"]).check()
    env.reset()
    assert sorted(path.name for path in shared.iterdir()) == ["kept", "more"]
    assert env.run(["ls", "/tmp/x"]).exit_code != 0
    assert env.read_file("/tmp/data/kept") == b"host"


def test_fork_bomb(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env(limits=nsbox.Limits(pids_max=40))
    bomb = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"
    with env.popen(["python3", "-I", "-S", "-c", bomb], stdout=nsbox.DEVNULL) as process:
        env.reset()
        assert process.wait(30 * PATIENCE).outcome is Outcome.KILLED
    count = "import os; print(len([n for n in os.listdir('/proc') if n.isdigit()]))"
    assert env.run(["python3", "-I", "-S", "-c", count]).text() == "2\n"


def test_states(env: nsbox.ExecutionEnvironment) -> None:
    env.freeze()
    with pytest.raises(nsbox.EnvironmentStateError, match="thaw"):
        env.reset()
    env.thaw()
    env.reset()
    env.close()
    with pytest.raises(nsbox.EnvironmentStateError, match="closed"):
        env.reset()


def test_a_functions_environment_has_its_policy(tmp_path: Path) -> None:
    version = nsbox.Function(command=["cat"]).publish(tmp_path / "store")
    with nsbox.ExecutionEnvironment(version) as env:
        with pytest.raises(nsbox.EnvironmentStateError, match="reuse='reset'"):
            env.reset()
        assert env.invoke(1) == 1


@pytest.mark.parametrize("kind", ["handler", "command"])
def test_tmpfs_mounts_of_functions_are_emptied_too(tmp_path: Path, kind: str) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text(HANDLER)
    script = 'printf "[\\"%s\\"]" "$(ls /scratch)"; echo > /scratch/x'
    fields: dict[str, Any] = {"mounts": [nsbox.Mount.tmpfs("/scratch")], "reuse": "reset"}
    if kind == "handler":
        function = nsbox.Function("app.handler", code=code, **fields)
    else:
        function = nsbox.Function(command=["sh", "-c", script], **fields)
    version = function.publish(tmp_path / "store")
    with nsbox.ExecutionEnvironment(version) as env:
        first = env.invoke({})
        assert env.invoke({}) == first == env.invoke({})


def test_slowing_down_the_next_event_of_a_program(tmp_path: Path) -> None:
    code = "import os, sys; os.setpriority(os.PRIO_PROCESS, 1, 5); print(sys.stdin.read())"
    command = ["python3", "-I", "-S", "-c", code]
    function = nsbox.Function(command=command, reuse="reset", seccomp=LAX)
    version = function.publish(tmp_path / "store")
    with nsbox.ExecutionEnvironment(version) as env:
        with pytest.raises(nsbox.EnvironmentStateError, match="could not be reset"):
            env.invoke({})
        wait_until(lambda: env.state is State.DEAD, "it is killed")


HANDLER = """
import os
def handler(event, context):
    found = os.listdir("/scratch")
    open("/scratch/x", "w").close()
    return found
"""


# -- pools ---------------------------------------------------------------------------------------


def test_leases_of_a_pool_find_nothing() -> None:
    config = nsbox.Config(seccomp=LAX)
    with nsbox.WarmPool(config, reuse="reset", max_environments=1) as pool:
        with pool.acquire() as env:
            first = env.id
            env.write_file("/tmp/x", b"word")
            none = nsbox.DEVNULL
            process = env.popen(["sleep", "1000"], stdin=none, stdout=none, stderr=none)
        assert process.wait(30 * PATIENCE).outcome is Outcome.KILLED
        with pool.acquire() as env:
            assert env.id == first
            assert env.run(["ls", "-A", "/tmp"]).ok
            with pytest.raises(nsbox.SyscallError, match="ENOENT"):
                env.read_file("/tmp/x")
            attack(env, "os.setpriority(os.PRIO_PROCESS, 1, 5)")
        with pool.acquire() as env:
            assert env.id != first, "what cannot be reset is given to nobody"
        assert pool.stats()["Births"] == 2
        assert pool.stats()["Errors"] == 0
    with pytest.raises(nsbox.ConfigError, match="'reset'"):
        nsbox.WarmPool(reuse="sometimes")  # type: ignore[call-overload]
