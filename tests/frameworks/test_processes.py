# SPDX-License-Identifier: Apache-2.0
"""nsbox in processes that were started in unusual ways, and in those of multiprocessing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.frameworks.work import EXPECTED
from tests.support import PATIENCE, SOURCE, host_program

pytestmark = pytest.mark.needs("userns")

REPOSITORY = str(Path(__file__).resolve().parents[2])


def run_program(
    text: str, *, prefix: tuple[str, ...] = (), flags: tuple[str, ...] = ("-W", "error")
) -> str:
    """Run a program outside, started by the shell's words `prefix`; return what it prints."""
    done = subprocess.run(
        [*prefix, sys.executable, *flags, "-c", text],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=100 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


PLAIN = "import json\nfrom tests.frameworks.work import everything\nprint(json.dumps(everything()))"
SHELL = ("sh", "-c")
STARTS = {
    "descriptors": (*SHELL, 'ulimit -n 256; exec "$@"', "sh"),
    "no stdin": (*SHELL, 'exec "$@" <&-', "sh"),
    "umask": (*SHELL, 'umask 077; exec "$@"', "sh"),
    "no directory": (*SHELL, 'd=$(mktemp -d); cd "$d"; rmdir "$d"; exec "$@"', "sh"),
    "no SIGINT": (*SHELL, 'trap "" INT; exec "$@"', "sh"),
    "no SIGCHLD": (*SHELL, 'trap "" CHLD; exec "$@"', "sh"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_process_that_was_started_so(name: str) -> None:
    assert json.loads(run_program(PLAIN, prefix=STARTS[name])) == EXPECTED


def test_few_descriptors_are_told_of_and_refused_where_more_were_named() -> None:
    text = """
import nsbox
result = nsbox.run(["sh", "-c", "ulimit -Hn"]).check()
assert result.text().strip() == "256"
assert result.protections["rlimit.nofile"].in_force
assert "hard limit" in result.protections["rlimit.nofile"].detail
try:
    nsbox.run(["true"], limits=nsbox.Limits(open_files=1024))
except nsbox.ConfigError as raised:
    assert str(raised).startswith("open_files: 1024 is over"), raised
else:
    raise AssertionError("not refused")
"""
    run_program(text, prefix=STARTS["descriptors"])


def test_a_default_timeout_of_sockets_is_not_for_those_of_nsbox() -> None:
    """Nor for the ends of them that others have: it makes sockets that do not wait."""
    text = f"import socket\nsocket.setdefaulttimeout(0.001)\n{PLAIN}"
    assert json.loads(run_program(text)) == EXPECTED


def test_without_poll_it_is_refused_by_name() -> None:
    text = """
import select, nsbox
del select.poll, select.epoll  # as eventlet does
try:
    nsbox.run(["true"])
except nsbox.LauncherError as raised:
    assert "eventlet" in str(raised), raised
else:
    raise AssertionError("not refused")
"""
    run_program(text)


def test_development_mode() -> None:
    assert json.loads(run_program(PLAIN, flags=("-X", "dev", "-W", "error"))) == EXPECTED


POOLS = """
import json, multiprocessing, sys
from tests.frameworks.work import everything, blocking, function
if __name__ == "__main__":
    method, used_before = sys.argv[1:] if len(sys.argv) > 1 else (METHOD, USED)
    if used_before:
        everything()
    context = multiprocessing.get_context(method)
    with context.Pool(2, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(everything, range(3), chunksize=1)))
"""


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, used_before: bool, tmp_path: Path) -> None:
    """Its workers are daemonic, may have no children of its own making, and end without atexit."""
    program = tmp_path / "program.py"
    program.write_text(POOLS.replace("METHOD", repr(method)).replace("USED", repr(used_before)))
    done = subprocess.run(
        [sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=100 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [EXPECTED] * 3
    assert done.stderr == ""


def test_a_pool_that_lives_while_the_process_forks() -> None:
    """The child is refused by name and can make its own; the parent goes on; nothing is ended."""
    text = """
import os, nsbox
from tests.frameworks.work import function
with function() as echo, nsbox.WarmPool(echo, max_environments=2) as pool:
    assert pool.invoke(1) == 1
    env = nsbox.ExecutionEnvironment()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for error, call in (
                (nsbox.PoolError, lambda: pool.invoke(2)),
                (nsbox.PoolError, lambda: pool.submit(2)),
                (nsbox.EnvironmentStateError, lambda: env.run(["true"])),
            ):
                try:
                    call()
                except error as raised:
                    assert str(os.getppid()) in str(raised), raised
                else:
                    raise AssertionError(call)
            with nsbox.WarmPool(echo, max_environments=1) as own:
                assert own.invoke(3) == 3
            env.close()
            pool.close()
            status = 0
        finally:
            nsbox.shutdown()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert pool.invoke(4) == 4
    assert env.run(["true"]).ok
    env.close()
"""
    run_program(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_that_are_killed_leave_nothing(number: signal.Signals) -> None:
    """The fixture that looks for leaks is the judge."""
    process = host_program(
        """
        import time, nsbox
        pool = nsbox.WarmPool(max_environments=2, provisioned=2)
        env = nsbox.ExecutionEnvironment()
        running = env.popen(["sleep", "1000"])
        print("ready", flush=True)
        time.sleep(1000)
        """,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(30 * PATIENCE) == -number
