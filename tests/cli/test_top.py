# SPDX-License-Identifier: Apache-2.0
"""`nsbox top`: samples for scripts, measured rates, a screen that is left as it was found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.terminals import ENVIRONMENT, NSBOX, Terminal, nsbox_run, start
from tests.support import PATIENCE

import nsbox

pytestmark = pytest.mark.needs("userns")

TOP = (*NSBOX, "top", "--interval", "0.1")
ENTER, LEAVE = b"\x1b[?1049h", b"\x1b[?1049l"
BUSY = "while :; do :; done"


def rows(output: bytes) -> dict[str, dict[str, str]]:
    """Return the environments of one sample by id, each with its cells by title."""
    lines = output.decode().splitlines()
    titles = lines[2].split()
    found = {}
    for line in lines[3:]:
        cells = line.split(maxsplit=len(titles) - 1)
        found[cells[0]] = dict(zip(titles, cells, strict=True))
    return found


def test_one_sample_tells_who_is_busy(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    idle, busy = make_env(), make_env()
    idle.freeze()
    with busy.popen(["sh", "-c", BUSY]):
        done = nsbox_run("top", "--once", "--interval", "0.3")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    found = rows(done.stdout)
    assert float(found[busy.id]["CPU%"]) > 0
    assert float(found[idle.id]["CPU%"]) == 0
    assert list(found).index(busy.id) < list(found).index(idle.id)
    assert found[idle.id]["STATE"] == "frozen"
    assert found[busy.id]["STATE"] == "running"
    assert found[busy.id]["PROCS"] == "2"
    assert float(found[busy.id]["MEMORY"].rstrip("M")) > 0
    assert found[busy.id]["HOST"].split()[0] == str(os.getpid())
    totals = done.stdout.decode().splitlines()[0]
    assert re.fullmatch(
        r"\d+ environments, \d+ frozen; \d+ processes; [\d.]+% CPU; [\d.]+M; "
        r"[\d.]+ born/s, [\d.]+ ended/s",
        totals,
    )
    assert int(totals.split()[0]) == len(found)


@pytest.mark.needs("root")
def test_the_code_of_a_function_is_shown(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text("def handler(event, context): return event")
    version = nsbox.Function("app.handler", code=code).publish(tmp_path / "store")
    with nsbox.ExecutionEnvironment(version) as env:
        found = rows(nsbox_run("top", "--once", "--interval", "0.05").stdout)
        assert version.code is not None
        assert found[env.id]["CODE"] == version.code.digest[:12]


def test_samples_follow_one_another_in_a_pipe(env: nsbox.ExecutionEnvironment) -> None:
    with start("top", "--interval", "0.05") as top:
        assert top.stdout is not None
        seen = 0
        for line in top.stdout:
            seen += line.startswith(env.id.encode())
            if seen == 3:
                break
        top.send_signal(signal.SIGINT)
        _, errors = top.communicate(timeout=30 * PATIENCE)
        assert (top.returncode, errors) == (0, b"")


def test_a_reader_that_has_gone_ends_it() -> None:
    with start("top", "--interval", "0.05") as top:
        assert top.stdout is not None
        top.stdout.readline()
        top.stdout.close()
        assert top.wait(30 * PATIENCE) != 0


@pytest.mark.parametrize("key", [b"q", b"\x03"])
def test_a_key_leaves_and_the_terminal_is_as_before(
    env: nsbox.ExecutionEnvironment, key: bytes
) -> None:
    with Terminal(["sh", "-c", 'stty -g; "$@"; echo "status=$?"; stty -g', "sh", *TOP]) as terminal:
        before = terminal.expect(b"\n").strip()
        terminal.expect(ENTER)
        for _ in range(2):
            terminal.expect(env.id.encode())
        assert not terminal.local_flags() & termios.ECHO
        terminal.enter(key)
        terminal.expect(LEAVE)
        assert terminal.expect(b"status=0\r\n")
        assert terminal.expect(b"\n").strip() == before
        assert terminal.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals) -> None:
    with Terminal(TOP) as terminal:
        terminal.expect(ENTER)
        terminal.expect(b"environments, ")
        os.kill(terminal.pid, number)
        terminal.expect(LEAVE)
        assert terminal.wait() == (0 if number == signal.SIGINT else -number)
        assert terminal.local_flags() & termios.ECHO


def test_lines_fit_into_a_small_terminal(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    for _ in range(3):
        make_env()
    with Terminal(TOP, size=(5, 30)) as terminal:
        terminal.expect(b"\x1b[H")
        shown = terminal.expect(b"\x1b[J")
        lines = shown.removesuffix(b"\x1b[J").split(b"\r\n")
        assert len(lines) == 4
        assert max(len(line.replace(b"\x1b[K", b"")) for line in lines) <= 29
        terminal.enter(b"q")
        assert terminal.wait() == 0


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9", "soon"])
def test_wrong_intervals(interval: str) -> None:
    done = nsbox_run("top", "--once", "--interval", interval)
    assert done.returncode == 125
    assert b"interval" in done.stderr
    assert done.stdout == b""


def test_names_that_would_speak_to_the_terminal_do_not(tmp_path: Path) -> None:
    """A process names itself: to be listed it only has to be a child of such a one."""
    program = tmp_path / "host.py"
    program.write_text(
        "import ctypes, sys, nsbox\n"
        "with nsbox.ExecutionEnvironment() as env:\n"
        "    ctypes.CDLL(None).prctl(15, b'\\x1b]0;x\\x07', 0, 0, 0)\n"
        "    print(env.id, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as host:
        assert host.stdout is not None
        name = host.stdout.readline().strip()
        for words in (("ps",), ("top", "--once", "--interval", "0.05")):
            output = nsbox_run(*words).stdout
            assert name in output
            assert b"\x1b" not in output
            assert b"?]0;x?" in output
        host.communicate()
