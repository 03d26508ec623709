# SPDX-License-Identifier: Apache-2.0
"""What guests say at a terminal of the host, and what they call themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.cli.terminals import NSBOX, Terminal, nsbox_run
from tests.support import wait_until

import nsbox
from nsbox.cli.ps import live_environments

CODE = r"""
import sys
ODD = "a\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\rforged\u202edrawkcab\u2066"
def answer(event, context):
    sys.stderr.buffer.write(b"log \x1b[31m \xc2\x9b2J \x9b2J \t\n")
    return ODD
def fail(event, context):
    raise ValueError(ODD)
"""
FORGE = """
import os, sys, time
def call(name):
    with open("/proc/self/comm", "w") as file:
        file.write(name)
call("nsbox-launcher")
for name in ("nsbox-deadbeef", "a) R 1 (b", "x\\ny\\x1b[2J"):
    if os.fork() == 0:
        call(name)
        print("named", flush=True)
        time.sleep(600)
time.sleep(600)
"""


@pytest.mark.parametrize("handler", ["answer", "fail"])
def test_codes_reach_no_terminal(tmp_path: Path, handler: str) -> None:
    (tmp_path / "app.py").write_text(CODE)
    words = ("invoke", f"app.{handler}", "--code", str(tmp_path), "--quiet")
    with Terminal([*NSBOX, *words]) as terminal:
        assert terminal.wait() == (handler == "fail")
        seen = terminal.seen
    assert b"owned" in seen
    text = seen.decode()
    assert not [letter for letter in text if letter not in "\r\n\t" and not letter.isprintable()]
    assert "\r" not in text.replace("\r\n", "")
    assert (r"\u001b[31m" in text) == (handler == "answer")
    assert (r"\x9b2J" in text) == (handler == "answer"), "a byte that is no UTF-8"
    done = nsbox_run(*words)
    if handler == "answer":
        assert done.stderr == b"log \x1b[31m \xc2\x9b2J \x9b2J \t\n", "to a pipe as it is"
        assert "\x9b2J\x7f" in done.stdout.decode()
    else:
        assert "\x1b]0;owned\x07" in done.stderr.decode()


def test_messages_of_nsbox_with_words_of_others() -> None:
    with Terminal([*NSBOX, "run", "--quiet", "--", "no\x1b[2J\x9b2Jsuch"]) as terminal:
        assert terminal.wait() == 127
        assert rb"no\u001b[2J\u009b2Jsuch" in terminal.seen.replace(b"\\x", b"\\u00")
        assert b"\x1b" not in terminal.seen


def test_rows_of_ps_and_top_cannot_be_forged() -> None:
    with nsbox.ExecutionEnvironment() as env, env.popen(["python3", "-c", FORGE]) as process:
        assert process.stdout is not None
        heard = b""
        while heard.count(b"named") < 3:
            heard += process.stdout.read(100) or b""
        wait_until(lambda: any(one["id"] == env.id for one in live_environments()), "it is seen")
        found = list(live_environments())
        assert "deadbeef" not in {one["id"] for one in found}
        own = next(one for one in found if one["id"] == env.id)
        assert own["processes"] == 5
        assert own["pid"] == env.pid
        for words in (("ps",), ("top", "--once", "--interval", "0.05")):
            shown = nsbox_run(*words).stdout.decode()
            assert env.id in shown
            assert "deadbeef" not in shown
            assert "\x1b" not in shown


def test_the_name_of_a_host_program_makes_no_row() -> None:
    program = (
        "import nsbox\n"
        "open('/proc/self/comm', 'w').write('x\\n12345678 \\x1b[2J')\n"
        "with nsbox.ExecutionEnvironment() as env:\n"
        "    print(env.id, flush=True)\n"
        "    input()\n"
    )
    with Terminal([sys.executable, "-c", program]) as terminal:
        name = terminal.expect(b"\n").split()[0].decode()
        for words in (("ps",), ("top", "--once", "--interval", "0.05")):
            shown = nsbox_run(*words).stdout.decode()
            rows = [line for line in shown.splitlines() if name in line]
            assert len(rows) == 1
            assert "x?12345678 ?[2J" in rows[0]
        terminal.enter(b"\n")
        assert terminal.wait() == 0
