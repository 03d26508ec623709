# SPDX-License-Identifier: Apache-2.0
"""One environment for many commands: what stays, what goes, and every state it can be in."""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import PATIENCE, attack, processes_with, wait_until

import nsbox
from nsbox import Outcome, State

pytestmark = pytest.mark.needs("userns")

MANY = 100


def refuses(env: nsbox.ExecutionEnvironment, why: str, *others: Callable[[], object]) -> None:
    """Check that it takes no command, no file, and none of `others`."""
    for call in (
        lambda: env.run(["true"]),
        lambda: env.popen(["true"]),
        lambda: env.write_file("/tmp/x", b""),
        lambda: env.read_file("/tmp/x"),
        *others,
    ):
        with pytest.raises(nsbox.EnvironmentStateError, match=why):
            call()


# -- one after another ---------------------------------------------------------------------------


def test_many_commands_one_after_another(env: nsbox.ExecutionEnvironment) -> None:
    for number in range(MANY):
        line = f"echo {number} >> /tmp/log; echo {number} >&2; exit {number % 7}"
        result = env.run(["sh", "-c", line])
        assert (result.exit_code, result.stderr_text()) == (number % 7, f"{number}\n")
    assert env.read_file("/tmp/log").split() == [b"%d" % number for number in range(MANY)]
    # Nothing of a command stays in PID 1: neither a descriptor nor a zombie.
    assert (
        attack(env, "answer = sorted(filter(str.isdigit, os.listdir('/proc')), key=int)")[0] == "1"
    )
    found = attack(
        env,
        "known = (1, os.getpid())\n"
        "answer = [p for p in os.listdir('/proc') if p.isdigit() and int(p) not in known]",
    )
    assert found == []


def test_what_stays_and_what_does_not(env: nsbox.ExecutionEnvironment) -> None:
    env.run(["sh", "-c", "mkdir /tmp/d; echo kept > /tmp/d/f; echo shm > /dev/shm/s"]).check()
    env.run(["sh", "-c", "cd /tmp/d; export A=1; umask 077; ulimit -n 10; nice -n 5 true"])
    line = "cat /tmp/d/f /dev/shm/s; pwd; echo ${A-unset}; umask; test $(ulimit -n) -gt 10; echo $?"
    assert env.run(["sh", "-c", line]).text().split() == [
        "kept",
        "shm",
        "/tmp",
        "unset",
        "0022",
        "0",
    ]


DAEMONS = {
    "in the background": "sleep MARK & :",
    "nohup": "nohup sleep MARK >/dev/null 2>&1 & :",
    "setsid": "setsid sleep MARK & :",
    "setsid, forked twice": "(setsid sh -c 'sleep MARK & sleep MARK & exec sleep MARK' &) & :",
    "ignoring signals": "(trap '' TERM HUP INT; exec setsid sleep MARK) & :",
    "stopped": "sleep MARK & kill -STOP $!",
    "a daemon as daemon(3) makes one": (
        "python3 -c 'import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); "
        'os.chdir("/"); os.execvp("sleep", ["sleep", "MARK"])\''
    ),
    "holding the pipes open": "sleep MARK 2>&1 & echo out",
}


@pytest.mark.parametrize("how", DAEMONS)
def test_no_process_outlives_its_run(env: nsbox.ExecutionEnvironment, how: str) -> None:
    mark = f"62.{os.getpid()}"
    result = env.run(["sh", "-c", DAEMONS[how].replace("MARK", mark)], timeout=30)
    assert result.ok, result.evidence
    assert processes_with(mark) == [], "none at the moment at which run returns"
    assert env.run(["true"]).ok


# -- several at once -----------------------------------------------------------------------------


def test_several_commands_at_once(env: nsbox.ExecutionEnvironment) -> None:
    """Each has its own pipes and its own end, whatever the order."""
    processes = [env.popen(["cat"]) for _ in range(10)]
    try:
        for number, process in enumerate(processes):
            assert process.stdin is not None
            process.stdin.write(b"%d" % number)
        assert len({process.pid for process in processes}) == 10
        assert [process.poll() for process in processes] == [None] * 10
        for number, process in reversed(list(enumerate(processes))):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            assert process.wait(10).ok
            assert process.stdout.read() == b"%d" % number
    finally:
        for process in processes:
            process.close()


def test_the_end_of_one_leaves_the_children_of_another(env: nsbox.ExecutionEnvironment) -> None:
    mark, other = f"63.{os.getpid()}", f"64.{os.getpid()}"
    with env.popen(["sh", "-c", f"sleep {mark} & echo up; wait"]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        wait_until(lambda: processes_with(mark), "its child runs")
        assert env.run(["sh", "-c", f"setsid sleep {other} & :"]).ok
        assert processes_with(other) == []
        assert len(processes_with(mark)) == 1
    assert processes_with(mark) == []


def test_runs_of_many_threads_in_one_environment(env: nsbox.ExecutionEnvironment) -> None:
    def work(number: int) -> bytes:
        return env.run(["sh", "-c", f"cat; exit {number}"], input=b"%d" % number).stdout

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(work, range(36))) == [b"%d" % number for number in range(36)]


# -- popen ---------------------------------------------------------------------------------------


def test_popen_pipes_are_live(env: nsbox.ExecutionEnvironment) -> None:
    code = "while read line; do echo got $line; echo err $line >&2; done; exit 3"
    with env.popen(["sh", "-c", code]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for number in range(3):
            process.stdin.write(b"%d\n" % number)
            assert select.select([process.stdout], [], [], 10)[0]
            assert process.stdout.read(100) == b"got %d\n" % number
            assert process.stderr.read(100) == b"err %d\n" % number
        assert process.poll() is None
        with pytest.raises(TimeoutError):
            process.wait(0.01)
        process.stdin.close()
        result = process.wait(10)
        assert (result.outcome, result.exit_code) == (Outcome.EXITED, 3)
        assert process.poll() is process.wait() is result
        process.kill()
        process.send_signal(signal.SIGTERM)  # nobody is hit by it any more
        assert process.wait().exit_code == 3


def test_popen_kill_and_signals(env: nsbox.ExecutionEnvironment) -> None:
    with env.popen(["sleep", "60"]) as process:
        process.send_signal(signal.SIGTERM)
        result = process.wait(10)
        assert (result.outcome, result.signal) == (Outcome.SIGNALED, signal.SIGTERM)
    code = "trap 'echo told; exit 4' USR1; echo ready; while :; do sleep 0.01; done"
    with env.popen(["sh", "-c", code]) as process:
        assert process.stdout is not None
        assert process.stdout.read(100) == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.wait(10).exit_code == 4
        assert process.stdout.read(100) == b"told\n"
    with env.popen(["sh", "-c", "trap '' TERM; sleep 60 & wait"]) as process:
        process.kill()
        assert process.wait(10).outcome is Outcome.KILLED


def test_a_command_that_a_thread_waits_for_hears_signals_and_is_killed(
    env: nsbox.ExecutionEnvironment,
) -> None:
    results: list[nsbox.Result] = []
    code = "trap 'echo heard' USR1; echo ready; while :; do sleep 0.01; done"
    process = env.popen(["sh", "-c", code])
    assert process.stdout is not None
    waiters = [threading.Thread(target=lambda: results.append(process.wait())) for _ in range(2)]
    for waiter in waiters:
        waiter.start()
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == b"heard\n"
    assert process.poll() is None
    process.kill()
    for waiter in waiters:
        waiter.join(20 * PATIENCE)
    assert [result.outcome for result in results] == [Outcome.KILLED] * 2
    process.close()


def test_popen_let_go_of_is_killed(env: nsbox.ExecutionEnvironment) -> None:
    mark = f"65.{os.getpid()}"
    with env.popen(["sleep", mark]):
        wait_until(lambda: processes_with(mark), "it runs")
    assert processes_with(mark) == []


# -- freeze --------------------------------------------------------------------------------------


def test_a_frozen_environment_runs_no_instruction(env: nsbox.ExecutionEnvironment) -> None:
    """A loop counts in shared memory and on a pipe: neither changes between two looks."""
    code = "i=0; while :; do i=$((i+1)); echo $i; done"
    with env.popen(["sh", "-c", code]) as process:
        assert process.stdout is not None
        out = process.stdout.fileno()
        assert os.read(out, 10)
        env.freeze()
        assert env.state is State.FROZEN
        os.set_blocking(out, False)
        before = env.usage().cpu_user_seconds
        try:
            while os.read(out, 1 << 16):
                pass
        except BlockingIOError:
            pass  # what it had written before
        assert not select.select([out], [], [], 0.2)[0], "it writes on"
        if before is not None:
            after = env.usage().cpu_user_seconds
            assert after is not None
            assert after - before < 0.02, "it computes on"
        refuses(env, "frozen", env.freeze)
        env.thaw()
        assert select.select([out], [], [], 10)[0], "it goes on"
        env.thaw()  # does nothing to what is not frozen
    assert env.run(["true"]).ok


def test_a_frozen_environment_is_closed(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    mark = f"66.{os.getpid()}"
    env = make_env()
    process = env.popen(["sleep", mark])
    env.freeze()
    env.close()
    assert env.state is State.CLOSED
    assert processes_with(mark) == []
    assert process.wait(10).outcome is Outcome.KILLED
    process.close()


# -- usage ---------------------------------------------------------------------------------------


def test_usage_counts_the_whole_life(env: nsbox.ExecutionEnvironment) -> None:
    first = env.usage()
    line = "i=0; while test $i -lt 30000; do i=$((i+1)); done"
    result = env.run(["sh", "-c", line]).check()
    second = env.usage()
    assert result.usage.wall_seconds is not None
    assert result.usage.wall_seconds > 0
    assert result.usage.cpu_user_seconds is not None
    if first.cpu_user_seconds is not None and second.cpu_user_seconds is not None:
        assert second.cpu_user_seconds >= first.cpu_user_seconds
    if second.memory_peak_bytes is not None:
        assert second.memory_peak_bytes > 0


# -- files ---------------------------------------------------------------------------------------


def test_files_of_every_size_come_back(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env(tmp_size="64M")
    for size in (0, 1, 4095, 4096, 1 << 18, (1 << 18) + 1, 20 << 20):
        data = os.urandom(min(size, 4096)) * (size // 4096 + 1)
        data = data[:size]
        env.write_file("/tmp/x", data)
        assert env.read_file("/tmp/x", max_bytes=size) == data
        if size:
            with pytest.raises(nsbox.SyscallError, match="EFBIG"):
                env.read_file("/tmp/x", max_bytes=size - 1)
    env.write_file("/tmp/x", b"short")
    assert env.read_file("/tmp/x") == b"short", "nothing stays of the longer one"


def test_a_name_that_changes_its_file_while_it_is_read(env: nsbox.ExecutionEnvironment) -> None:
    """Read is either file, whole; a link put in its place is refused."""
    code = """
import os
for name in ("a", "b"):
    with open(f"/tmp/{name}", "w") as file:
        file.write(name * 1000000)
os.link("/tmp/a", "/tmp/x")
print("go", flush=True)
while True:
    for name in ("a", "b"):
        os.link(f"/tmp/{name}", "/tmp/y"); os.rename("/tmp/y", "/tmp/x")
        try:
            os.unlink("/tmp/y")
        except FileNotFoundError:
            pass
    os.symlink("/etc/passwd", "/tmp/y"); os.rename("/tmp/y", "/tmp/x")
"""
    whole = {b"a" * 1000000, b"b" * 1000000}
    with env.popen(["python3", "-c", code]) as racer:
        assert racer.stdout is not None
        assert racer.stdout.read(100) == b"go\n"
        for _ in range(60):
            try:
                found = env.read_file("/tmp/x")
            except nsbox.SyscallError as error:
                refused = error
            else:
                assert found in whole
                continue
            assert refused.errno == errno.ELOOP
        assert racer.poll() is None


# -- states --------------------------------------------------------------------------------------


def test_use_after_close(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env()
    process = env.popen(["sleep", "60"])
    env.close()
    assert env.state is State.CLOSED
    env.close()
    env.close(wait=False)
    refuses(env, "closed", env.freeze, env.thaw, env.usage)
    assert process.wait(10).outcome is Outcome.KILLED
    process.close()
    assert "closed" in repr(env)


def test_a_command_of_an_environment_closed_without_waiting(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env()
    with env.popen(["sleep", "60"]) as process:
        env.close(wait=False)
        assert process.wait(10).outcome is Outcome.KILLED
        assert process.poll() is process.wait()


def test_a_command_ended_by_the_close_has_its_counters(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env()
    is_counted = env.usage().cpu_seconds is not None
    with env.popen(["sh", "-c", "echo; sleep 60"]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"
        env.close()
        result = process.wait(10)
    assert result.outcome is Outcome.KILLED
    assert (result.usage.cpu_seconds is not None) is is_counted


def test_close_while_a_run_is_under_way(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    """The run is told the truth: it was killed because its environment was closed."""
    for _ in range(10):
        env = make_env()
        mark = f"67.{os.getpid()}"
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(env.run, ["sleep", mark])
            wait_until(lambda: processes_with(mark), "it runs")  # noqa: B023 - called at once
            env.close()
            try:
                result = future.result(10)
            except nsbox.EnvironmentDied as error:
                # Its process was seen before the caller had been told that it is started.
                evidence = str(error)
            else:
                assert result.outcome is Outcome.KILLED
                evidence = result.evidence
        assert "closed" in evidence


def test_close_from_many_threads(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: env.close(), range(8))) == [None] * 8
    assert env.state is State.CLOSED


def test_states_of_a_life(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env()
    seen = [env.state]
    env.freeze()
    seen.append(env.state)
    env.thaw()
    seen.append(env.state)
    os.kill(env.pid, signal.SIGKILL)
    wait_until(lambda: env.state is State.DEAD, "its death is noticed")
    seen.append(env.state)
    for call in (lambda: env.run(["true"]), env.freeze, env.thaw):
        with pytest.raises(nsbox.EnvironmentStateError, match="dead"):
            call()
    env.usage()  # the last there is
    env.close()
    seen.append(env.state)
    assert seen == [State.READY, State.FROZEN, State.READY, State.DEAD, State.CLOSED]


def test_death_while_frozen(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env()
    env.freeze()
    os.kill(env.pid, signal.SIGKILL)
    wait_until(lambda: env.state is State.DEAD, "v2's freezer lets SIGKILL through", 10)
    with pytest.raises(nsbox.EnvironmentStateError, match="dead"):
        env.thaw()


# -- threads -------------------------------------------------------------------------------------


def test_the_thread_that_made_it_may_end() -> None:
    """PR_SET_PDEATHSIG is about the thread that made the child (prctl(2)): here it is nobody's."""
    nsbox.shutdown()  # so that the launcher too is started by the thread that ends
    made: list[nsbox.ExecutionEnvironment] = []
    processes: list[nsbox.Process] = []

    def make() -> None:
        made.append(nsbox.ExecutionEnvironment())
        processes.append(made[0].popen(["cat"]))

    thread = threading.Thread(target=make)
    thread.start()
    tid = thread.native_id
    thread.join()
    wait_until(lambda: not Path(f"/proc/self/task/{tid}").exists(), "the thread is gone")
    env, process = made[0], processes[0]
    assert env.run(["echo", "still here"]).text() == "still here\n"
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"me too")
    process.stdin.close()
    assert process.wait(10).ok
    assert process.stdout.read() == b"me too"
    process.close()
    env.close()
