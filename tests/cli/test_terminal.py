# SPDX-License-Identifier: Apache-2.0
"""`nsbox run` and `nsbox shell` at a real terminal."""

from __future__ import annotations

import os
import signal
import termios
import time
from collections.abc import Iterator

import pytest
from tests.cli.terminals import NSBOX, Terminal
from tests.support import processes_with, wait_until

RUN = (*NSBOX, "run", "-q", "--")
LOOP = "while :; do sleep 0.02; done"


@pytest.fixture
def bash() -> Iterator[Terminal]:
    """A shell with job control, its prompt ``P> ``."""
    shell = ["bash", "--norc", "--noprofile", "-i"]
    with Terminal(shell, env={"PS1": "P> ", "TERM": "dumb"}) as terminal:
        terminal.expect(b"P> ")
        yield terminal
        terminal.enter(b"\nexit 0\nexit 0\n")  # the first only warns of stopped jobs
        terminal.wait()


def line(*words: str) -> bytes:
    quoted = " ".join(word if word.isalnum() else f"'{word}'" for word in words)
    return quoted.encode() + b"\n"


def test_it_has_a_terminal_of_its_own_of_the_same_size() -> None:
    script = "tty; stty size; test -t 0 -a -t 1 -a -t 2 && echo all; echo $TERM; exit 6"
    with Terminal([*RUN, "sh", "-c", script], size=(31, 101)) as terminal:
        assert terminal.expect(b"vt100\r\n") == b"/dev/pts/0\r\n31 101\r\nall\r\nvt100\r\n"
        assert terminal.wait() == 6


def test_the_size_follows() -> None:
    script = f"trap 'stty size; exit 0' WINCH; echo ready; {LOOP}"
    with Terminal([*RUN, "bash", "-c", script]) as terminal:
        terminal.expect(b"ready")
        terminal.resize(17, 71)
        terminal.expect(b"17 71")
        assert terminal.wait() == 0


def test_control_c_goes_in_as_a_byte() -> None:
    script = f"trap 'echo got; exit 7' INT; echo ready; {LOOP}"
    with Terminal([*RUN, "sh", "-c", script]) as terminal:
        terminal.expect(b"ready")
        terminal.enter(b"\x03")
        terminal.expect(b"got")
        assert terminal.wait() == 7


def test_typed_lines_and_the_end_of_input_arrive() -> None:
    with Terminal([*RUN, "cat"]) as terminal:
        time.sleep(0.3)
        terminal.enter(b"hello\n")
        terminal.expect(b"hello\r\nhello\r\n")
        terminal.enter(b"\x04")
        assert terminal.wait() == 0


def test_all_output_comes_before_the_end() -> None:
    with Terminal([*RUN, "seq", "1", "20000"]) as terminal:
        text = terminal.expect(b"\r\n20000\r\n")
        assert text.count(b"\r\n") == 20000
        assert terminal.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_terminal_is_restored_when_a_signal_ends_it(number: int) -> None:
    with Terminal([*RUN, "sh", "-c", "echo ready; sleep 50"]) as terminal:
        before = terminal.local_flags()
        terminal.expect(b"ready")
        assert not terminal.local_flags() & termios.ICANON
        os.kill(terminal.pid, number)
        assert terminal.wait() == 128 + number
        assert terminal.local_flags() & (termios.ICANON | termios.ECHO | termios.ISIG) == (
            before & (termios.ICANON | termios.ECHO | termios.ISIG)
            or termios.ICANON | termios.ECHO | termios.ISIG
        )


def test_the_terminal_is_restored_when_the_start_fails() -> None:
    with Terminal([*RUN, "nosuchprogram"]) as terminal:
        terminal.expect(b"cannot execute")
        assert terminal.wait() == 127
        assert terminal.local_flags() & termios.ICANON


def test_a_timeout_restores_too() -> None:
    argv = [*NSBOX, "run", "--timeout", "0.3", "--", "sh", "-c", "sleep 50"]
    with Terminal(argv) as terminal:
        terminal.expect(b"nsbox: timed out")
        assert terminal.wait() == 124
        assert terminal.local_flags() & termios.ICANON


def test_control_z_suspends_and_fg_goes_on(bash: Terminal) -> None:
    # Quotes in the middle of words keep the echo of the typed line from matching.
    loop = "i=0; while [ $i -lt 15 ]; do sleep 0.05; i=$((i+1)); done"
    bash.enter(line(*RUN, "sh", "-c", f'echo rea""dy; {loop}; echo fi""n'))
    bash.expect(b"ready")
    bash.enter(b"\x1a")
    bash.expect(b"Stopped")
    bash.expect(b"P> ")
    bash.enter(b"stty -a | grep -o -e '-icanon'; echo mo''de\n")
    assert b"-icanon\r\n" not in bash.expect(b"mode\r\n")
    time.sleep(1.2)  # it would be over by now, were it not frozen
    assert b"fin" not in bash.seen
    bash.enter(b"fg; echo status=$?\n")
    bash.expect(b"fin")
    bash.expect(b"status=0")


def test_control_z_in_an_orphaned_group_does_not_hang() -> None:
    # The session leader itself: nobody is there who could continue it.
    with Terminal([*RUN, "sh", "-c", "echo ready; read line; echo got $line"]) as terminal:
        terminal.expect(b"ready")
        terminal.enter(b"\x1a")
        time.sleep(0.2)
        terminal.enter(b"on\n")
        terminal.expect(b"got on")
        assert terminal.wait() == 0


def test_pipes_at_a_terminal_are_not_translated(bash: Terminal) -> None:
    bash.enter(line(*RUN, "printf", r"a\nb\n")[:-1] + b" | od -An -c; echo do''ne\n")
    assert b"a  \\n   b  \\n" in bash.expect(b"done\r\n")
    bash.enter(
        line(*RUN, "sh", "-c", "echo error >&2; echo out")[:-1] + b" 2>/dev/null; echo en''d\n"
    )
    assert b"error\r\n" not in bash.expect(b"end\r\n").split(b"\n", 1)[1]


def test_in_the_background_it_runs_until_it_is_fetched(bash: Terminal) -> None:
    bash.enter(line(*RUN, "sh", "-c", 'echo rea""dy; read l; echo g""ot $l')[:-1] + b" &\n")
    bash.expect(b"ready")
    bash.enter(b"jobs\n")
    bash.expect(b"Running")
    bash.enter(b"fg\n")
    time.sleep(0.3)
    bash.enter(b"it\n")
    bash.expect(b"got it")
    bash.expect(b"P> ")  # what is typed before is not for the shell but for nsbox, still there


def test_shell_is_interactive_with_job_control() -> None:
    with Terminal([*NSBOX, "shell", "-q"], env={"SHELL": "/bin/bash"}) as terminal:
        terminal.expect(b"$ ")
        mark = f"50.{os.getpid()}"
        terminal.enter(f"sleep {mark}\n".encode())
        wait_until(lambda: processes_with(mark), "it is in the foreground")
        terminal.enter(b"\x1a")
        terminal.expect(b"Stopped")
        terminal.enter(b"kill -KILL %1; sleep 0.2; exit 9\n")
        assert terminal.wait() == 9
        assert terminal.local_flags() & termios.ICANON


def test_shell_that_is_not_there_falls_back() -> None:
    with Terminal([*NSBOX, "shell", "-q"], env={"SHELL": "/opt/bin/nosuchshell"}) as terminal:
        terminal.expect(b"$ ")
        terminal.enter(b"echo $((6 * 7))x; exit 0\n")
        terminal.expect(b"42x")
        assert terminal.wait() == 0
