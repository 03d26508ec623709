# SPDX-License-Identifier: Apache-2.0
"""What fails under nsbox: no descriptor left, no space left, who does not answer.

System calls that fail are those of tests/faults.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import host_program, wait_until

import nsbox
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
with nsbox.ExecutionEnvironment() as env:
    env.run(["true"]).check()  # every module is imported, the filter is compiled
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


# -- descriptors of the launcher -----------------------------------------------------------------


def kept_by(launcher: int) -> list[str]:
    """Return what descriptors a launcher has, but for what is ahead of need."""
    links = []
    for fd in os.listdir(f"/proc/{launcher}/fd"):
        try:
            links.append(os.readlink(f"/proc/{launcher}/fd/{fd}").partition(":")[0])
        except OSError:
            continue
    return sorted(link for link in links if link not in ("mnt", "net"))


def test_a_full_table_of_descriptors_ends_births_alone() -> None:
    """However many of them a birth finds room for."""
    launcher = get_launcher()
    with nsbox.ExecutionEnvironment() as before:
        nsbox.run(["true"]).check()
        start = kept_by(launcher.pid)
        limits = resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE)
        taken = set(map(int, os.listdir(f"/proc/{launcher.pid}/fd")))
        free = min(set(range(len(taken) + 1)) - taken)
        try:
            for more in range(4):
                now = (free + more, limits[1])
                resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, now)
                with pytest.raises((nsbox.SetupError, nsbox.DescriptorsExhausted)):
                    nsbox.ExecutionEnvironment()
        finally:
            resource.prlimit(launcher.pid, resource.RLIMIT_NOFILE, limits)
        assert get_launcher() is launcher
        assert before.run(["echo", "fine"], timeout=10).text() == "fine\n"
        nsbox.run(["true"]).check()
        wait_until(lambda: kept_by(launcher.pid) <= start, f"as before: {start}")


def _has_no_environment() -> bool:
    launcher = get_launcher()  # another one, where an error ended it
    for tree in set(launcher.hello.trees.values()):
        if any(os.path.isdir(f"{tree}/{name}") for name in os.listdir(tree)):
            return False
    return True
