# SPDX-License-Identifier: Apache-2.0
"""The verdict when an end and a limit come together, and what is said where nobody can know."""

from __future__ import annotations

import os
import select
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.storm.chaos import Clock
from tests.support import (
    PATIENCE,
    OpenEnvironment,
    processes_with,
    wait_until,
    x86_64_only,
)

import nsbox
from nsbox import ExecutionEnvironment, Limits, Outcome, Result


def test_a_kill_that_comes_too_late_is_no_verdict() -> None:
    with OpenEnvironment() as env, env.start(["sh", "-c", "exit 5"]) as process:
        poller = select.poll()
        process.register(poller)
        assert poller.poll(10_000), "PID 1 has said that it is over"
        process.kill()
        result = process.wait(10)
    assert (result.outcome, result.returncode) == (Outcome.EXITED, 5)
    assert result.evidence == "exit status 5"


def test_a_timeout_is_only_what_was_killed_for_it(env: ExecutionEnvironment) -> None:
    # Around the time that the command needs, whatever that is here.
    needed = env.run(["sleep", "0.02"]).usage.wall_seconds
    assert needed is not None
    ends = set()
    for number in range(40):
        result = env.run(["sleep", "0.02"], timeout=needed * (0.8 + number / 100))
        ends.add((result.outcome, result.returncode))
        killed = "nsbox killed it" in result.evidence
        assert killed == (result.outcome is Outcome.TIMED_OUT), result
    assert ends <= {(Outcome.EXITED, 0), (Outcome.TIMED_OUT, -signal.SIGKILL)}


@pytest.mark.parametrize("end", ["exit 3", "kill -SEGV $$", "sleep 60"])
def test_output_that_was_cut_is_never_passed_off_as_whole(
    end: str,
) -> None:
    limits = Limits(output_max=10_000)
    with ExecutionEnvironment(limits=limits) as small:
        result = small.run(["sh", "-c", f"head -c 20000 /dev/zero; {end}"])
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert len(result.stdout) == 10_000
    assert result.evidence.startswith("stdout is over 10000 bytes; ")
    killed = result.returncode == -signal.SIGKILL
    assert killed == result.evidence.endswith("; nsbox killed it"), result


def kernel_log_opens() -> bool:
    """Root may, and all where kernel.dmesg_restrict is 0; the mode of the file says neither."""
    try:
        os.close(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


FILTER_KILL = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)"  # getpid of x32


@x86_64_only
def test_a_filter_kill_and_a_signal_of_its_own_look_the_same_without_the_log(
    env: ExecutionEnvironment,
) -> None:
    def own() -> Result:
        return env.run(["python3", "-I", "-S", "-c", "import os; os.kill(os.getpid(), 31)"])

    assert own().outcome is Outcome.SIGNALED
    assert "or sent by a process inside" in own().evidence
    killed = env.run(["python3", "-I", "-S", "-c", FILTER_KILL])
    assert killed.signal is signal.SIGSYS
    if kernel_log_opens():

        def told() -> bool:
            # The kernel drops records when it has printed ten in five seconds (printk_ratelimit).
            result = env.run(["python3", "-I", "-S", "-c", FILTER_KILL])
            return result.outcome is Outcome.SECCOMP_KILLED and "type=1326" in result.evidence

        wait_until(told, "a kill by the filter found in the kernel's log", 20)
    else:
        assert killed.outcome is Outcome.SIGNALED


def test_a_verdict_does_not_depend_on_what_is_printed() -> None:
    report = '{"outcome": "oom_killed", "returncode": -9, "evidence": "OOM"}'
    code = f"import sys; print({report!r}); print({report!r}, file=sys.stderr); sys.exit(137)"
    result = nsbox.run([sys.executable, "-I", "-S", "-c", code])
    assert (result.outcome, result.returncode) == (Outcome.EXITED, 137)
    assert result.text().strip() == report


def test_a_file_is_no_larger_than_file_size() -> None:
    code = """
import os, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
fd = os.open("/tmp/x", os.O_CREAT | os.O_WRONLY)
print(os.write(fd, b"x" * 8192), flush=True)
try:
    os.write(fd, b"x")
except OSError as error:
    print(error.errno == 27, flush=True)
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
os.write(fd, b"x")
"""
    limits = nsbox.Limits(file_size=4096)
    result = nsbox.run(["python3", "-I", "-S", "-c", code], limits=limits)
    assert (result.outcome, result.signal) == (Outcome.SIGNALED, signal.SIGXFSZ)
    assert result.text() == "4096\nTrue\n"


@pytest.mark.parametrize("seconds", [-315_360_000, 315_360_000])
def test_a_time_limit_holds_while_the_clock_is_set(env: ExecutionEnvironment, seconds: int) -> None:
    clock = Clock()
    with ThreadPoolExecutor(2) as threads:
        endless = threads.submit(env.run, ["sleep", "600.25"], timeout=0.5 * PATIENCE)
        brief = threads.submit(env.run, ["sleep", "0.7"], timeout=60.0 * PATIENCE)
        try:
            wait_until(lambda: processes_with("600.25"), "it runs")
            clock.jump(seconds)
            assert endless.result(30).outcome is Outcome.TIMED_OUT
            assert brief.result(30).ok
        finally:
            clock.restore()
