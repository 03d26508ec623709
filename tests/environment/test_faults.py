# SPDX-License-Identifier: Apache-2.0
"""What fails under nsbox: no descriptor left, no space left, and every system call of a birth."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import IS_ROOT, host_program, name_of, wait_until

import nsbox
from nsbox.isolation import readback
from nsbox.linux import proc
from nsbox.supervisor import connection, requests
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

# -- descriptors ---------------------------------------------------------------------------------

FEW_DESCRIPTORS = """
import json, os, resource, sys
import nsbox

def descriptors():
    return sorted((fd, os.readlink(f"/proc/self/fd/{fd}"))
                  for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))

soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
nsbox.set_standby(0)  # whose descriptors are kept on purpose
nsbox.run(["true"]).check()  # every module is imported, the filter is compiled
warm = sys.argv[1] == "warm"
answers = []
for more in range(41):
    if not warm:
        nsbox.shutdown()
    before = descriptors()
    # The lowest number that is free now: descriptors are numbers below the limit.
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
    step = "birth"
    try:
        with nsbox.ExecutionEnvironment() as env:
            step = "write"
            env.write_file("/tmp/x", b"x")
            step = "run"
            assert env.run(["cat", "/tmp/x"], input=b"y").check().stdout == b"x"
        answer = "fine"
    except nsbox.NsboxError as error:
        answer = type(error).__name__
    except BaseException as error:
        answer = f"{step}: untyped {error!r}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if not warm:
        nsbox.shutdown()
    left = [item for item in descriptors() if item not in before]
    answers.append([more, answer, left])
    if warm or more % 10 == 0:
        nsbox.run(["true"]).check()  # and all is well when there is room again
print(json.dumps(answers))
"""


@pytest.mark.parametrize("launcher", ["warm", "cold"])
def test_no_descriptor_left_in_the_host(launcher: str) -> None:
    """At each step of a start the next descriptor is one too many."""
    pipe = subprocess.PIPE
    host = host_program(FEW_DESCRIPTORS, launcher, stdout=pipe, stderr=pipe)
    out, err = host.communicate(timeout=110)
    assert (host.returncode, err.decode()) == (0, "")
    answers = json.loads(out)
    assert [item for item in answers if "untyped" in item[1]] == []
    assert [item for item in answers if item[2]] == [], "descriptors left open"
    verdicts = [answer for _, answer, _ in answers]
    assert verdicts[0] != "fine"
    assert verdicts[-1] == "fine"
    first = verdicts.index("fine")
    assert set(verdicts[first:]) == {"fine"}, "what works with few works with more"


# -- space ---------------------------------------------------------------------------------------


def test_a_full_tmp(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env(tmp_size="1M")
    with pytest.raises(nsbox.SyscallError) as caught:
        env.write_file("/tmp/large", bytes(2 << 20))
    assert (caught.value.syscall, caught.value.errno) == ("write", errno.ENOSPC)
    result = env.run(["sh", "-c", "cat /dev/zero > /tmp/large"])
    assert result.exit_code == 1
    assert "No space left" in result.stderr_text()
    assert env.run(["sh", "-c", "rm /tmp/large; echo fine"]).text() == "fine\n"
    env.write_file("/tmp/small", b"x")
    assert env.read_file("/tmp/small") == b"x"


def test_no_inode_left_in_tmp(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env(tmp_size="1M")
    result = env.run(["sh", "-c", "i=0; while :> /tmp/$i; do i=$((i+1)); done; echo $i"])
    assert "No space left" in result.stderr_text()
    with pytest.raises(nsbox.SyscallError) as caught:
        env.write_file("/tmp/one-more", b"")
    assert caught.value.errno == errno.ENOSPC
    env.write_file("/tmp/0", b"there is room for bytes")
    assert env.read_file("/tmp/0") == b"there is room for bytes"


# -- a launcher that is silent ---------------------------------------------------------------------


def test_a_silent_launcher_makes_no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was asked may be done later, and how PID 1 ended is not known: both are said so."""
    monkeypatch.setattr(requests, "END_DEADLINE", 0.1)
    monkeypatch.setattr(connection, "END_DEADLINE", 0.1)
    asked, killed, other = (nsbox.ExecutionEnvironment() for _ in range(3))
    launcher = get_launcher().pid
    os.kill(launcher, signal.SIGSTOP)
    try:
        with pytest.raises(nsbox.LauncherError, match=r"did not answer 'freeze' within 0\.1 sec"):
            asked.freeze()
        with pytest.raises(nsbox.EnvironmentStateError, match="dead: the launcher did not answer"):
            asked.run(["true"])
        with killed.popen(["sleep", "60"]) as sleeper:
            os.kill(killed.pid, signal.SIGKILL)
            with pytest.raises(nsbox.EnvironmentDied, match="launcher did not say within") as died:
                sleeper.wait(5)
            assert died.value.outcome is None, "nobody has told it"
        assert killed.state is nsbox.State.DEAD
        with pytest.raises(nsbox.CleanupError, match="did not say within"):
            killed.close()
        assert other.run(["echo", "fine"], timeout=5).text() == "fine\n"
        asked.close(wait=False)
    finally:
        os.kill(launcher, signal.SIGCONT)
    other.close()
    wait_until(_has_no_environment, "it removes them when it goes on")


# -- a file system that does not answer ----------------------------------------------------------


UNANSWERED = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
import nsbox
from nsbox.linux import calls, constants as c

source = sys.argv[1]
calls.unshare(c.CLONE_NEWNS)
calls.mount(None, "/", None, c.MS_REC | c.MS_SHARED)  # so that the launcher sees later mounts
nsbox.set_standby(0)
config = nsbox.Config(mounts=(nsbox.Mount.bind(source, "/data"),))
with nsbox.ExecutionEnvironment(config):
    pass  # the plan is made, and the launcher holds the layout
server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
calls.mount("none", source, "fuse", 0, options)  # nobody reads its requests
with ThreadPoolExecutor(2) as threads:
    hung = threads.submit(nsbox.ExecutionEnvironment, config)
    try:
        for _ in range(3):
            print(threads.submit(nsbox.run, ["echo", "fine"]).result(5).text(), end="")
        print("it waits" if not hung.done() else hung.result())
    finally:
        os.close(server)  # whoever waits gets an error
    try:
        hung.result(5)
    except nsbox.SetupError as error:
        print(error)
"""


@pytest.mark.needs("root")
def test_a_source_that_does_not_answer_stops_its_caller_alone(tmp_path: Path) -> None:
    if not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE in this kernel")
    host = host_program(UNANSWERED, str(tmp_path), stdout=subprocess.PIPE)
    out = host.communicate(timeout=60)[0].decode()
    assert out.startswith("fine\nfine\nfine\nit waits\nstep 'layout' failed: "), out
    assert str(tmp_path) in out


# -- system calls of a birth ---------------------------------------------------------------------

# Call, error, and how many of them are made to fail one by one. strace counts the calls of each
# process by itself: those of the launcher, and those of the clone.
INJECTED = [
    ("clone3", "EAGAIN", 1),
    ("setns", "EPERM", 4),
    ("unshare", "ENOSPC", 1),
    ("mount", "ENOMEM", 14),
    ("umount2", "EBUSY", 1),
    ("pivot_root", "EINVAL", 1),
    ("open_tree", "EMFILE", 2),
    ("move_mount", "EINVAL", 2),
    ("mount_setattr", "EPERM", 2),
    ("close_range", "EINVAL", 3),
    ("setsid", "EPERM", 1),
    ("sethostname", "EPERM", 1),
    ("setgroups", "EPERM", 1),
    ("setresgid", "EPERM", 1),
    ("setresuid", "EPERM", 1),
    ("prlimit64", "EPERM", 6),
    ("prctl", "EINVAL", 50),
    ("capset", "EPERM", 1),
    ("seccomp", "ENOMEM", 1),
    ("keyctl", "EDQUOT", 1),
    ("chdir", "EACCES", 2),
    ("getcwd", "ENOENT", 1),
    ("mkdir", "ENOSPC", 4),
    ("openat", "EMFILE", 8),
    ("write", "EIO", 6),
    ("socketpair", "EMFILE", 1),
    ("pidfd_open", "EMFILE", 1),
    ("fchmod", "EPERM", 1),
]
FEW = {"clone3", "mount", "pivot_root", "umount2", "setresuid", "capset", "seccomp", "prctl"}


def namespaces_of(pid: int) -> dict[str, str]:
    return {
        name: os.readlink(f"/proc/{pid}/ns/{name}")
        for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
    }


def assert_complete(env: nsbox.ExecutionEnvironment) -> None:
    """Look from outside whether an environment is a whole sandbox."""
    assert readback.missing_lock(env.pid, filtered=True) == ""
    if IS_ROOT:
        own, inside = namespaces_of(os.getpid()), namespaces_of(env.pid)
        assert [name for name in own if own[name] == inside[name]] == []
        status = Path(f"/proc/{env.pid}/status").read_text()
        uids = status.partition("\nUid:\t")[2].partition("\n")[0].split()
        assert "0" not in uids
        assert status.partition("\nGroups:\t")[2].partition("\n")[0].strip() == ""
    # From inside: the root is the new one, read-only, and nothing of the host's is there.
    script = """hostname; id -u; id -g; ls /
        find /sys -mindepth 1 -maxdepth 2 ! -path /sys/fs ! -path /sys/fs/cgroup
        touch /x 2>&1; cat /proc/1/environ /proc/1/mem 2>&1; ulimit -c"""
    text = env.run(["sh", "-c", script]).text()
    lines = text.splitlines()
    assert lines[1:3] == ["1000", "1000"], text
    on_the_way = {sys.prefix.split("/")[1]}  # to the interpreter, which may be in a home
    assert not ({"root", "home", "boot", "srv"} - on_the_way) & set(lines), text
    assert "/sys" not in text, "but the own cgroup, where there is a limit"
    assert "Read-only" in text, text
    assert text.count("Permission denied") == 2, "PID 1 is not dumpable"
    assert lines[-1] == "0", text


def attach_strace(launcher: int, call: str, error: str, number: int) -> subprocess.Popen[bytes]:
    """Have the kernel refuse the `number`th `call` of launcher, template, and each clone."""
    # Of functions, too, when tests before have used some.
    templates = [pid for pid in proc.children(launcher) if name_of(pid) == "nsbox-template"]
    processes = [word for pid in (launcher, *templates) for word in ("-p", str(pid))]
    tracer = subprocess.Popen(
        ["strace", "-f", *processes, "-o", "/dev/null", "-e", f"trace={call}",
         "-e", f"inject={call}:error={error}:when={number}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert tracer.stderr is not None
    for _ in (launcher, *templates):
        line = tracer.stderr.readline()  # "strace: Process 123 attached"
        if b"attached" not in line:
            tracer.kill()
            tracer.communicate()
            pytest.skip(f"strace cannot be used here: {line.decode().strip()}")
    return tracer


def detach(tracer: subprocess.Popen[bytes]) -> None:
    tracer.send_signal(signal.SIGINT)
    tracer.communicate(timeout=30)


def birth_with(call: str, error: str, number: int) -> str:
    """Return the name of the exception of a birth with an injected error, or "whole"."""
    launcher = get_launcher()
    tracer = attach_strace(launcher.pid, call, error, number)
    try:
        env = nsbox.ExecutionEnvironment()
    except nsbox.NsboxError as failure:
        return type(failure).__name__
    finally:
        detach(tracer)
    with env:
        assert_complete(env)
    return "whole"


def check_call(call: str, error: str, count: int) -> list[str]:
    seen = []
    for number in range(1, count + 1):
        nsbox.run(
            ["true"]
        ).check()  # layouts and filters are there, so that a birth is all there is
        try:
            verdict = birth_with(call, error, number)
        except AssertionError as failure:
            raise AssertionError(f"{call} number {number}: {failure}") from failure
        seen.append(verdict)
        wait_until(_has_no_environment, f"{call} number {number}: nothing stays")
    nsbox.run(["true"]).check()
    assert set(seen) <= {"whole", "SetupError", "LauncherError", "EnvironmentDied"}, seen
    return seen


def _has_no_environment() -> bool:
    launcher = get_launcher()  # another one, where an error ended it
    for tree in set(launcher.hello.trees.values()):
        if any(os.path.isdir(f"{tree}/{name}") for name in os.listdir(tree)):
            return False
    return True


@pytest.mark.needs("strace")
@pytest.mark.parametrize("call", sorted(FEW))
def test_a_birth_fails_or_is_whole(call: str) -> None:
    error, count = next((error, count) for name, error, count in INJECTED if name == call)
    seen = check_call(call, error, min(count, 3))
    assert set(seen) == {"SetupError"}, "no birth can do without one of these"


@pytest.mark.needs("strace", "landlock")
def test_a_birth_without_its_further_belt_fails() -> None:
    assert check_call("landlock_restrict_self", "EINVAL", 1) == ["SetupError"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.needs("strace")
@pytest.mark.parametrize(("call", "error", "count"), INJECTED)
def test_every_call_of_a_birth_fails_once(call: str, error: str, count: int) -> None:
    check_call(call, error, count)
