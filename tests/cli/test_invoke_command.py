# SPDX-License-Identifier: Apache-2.0
"""`nsbox invoke`: answers, logs, the report line, exit statuses, what a user may get wrong."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from tests.cli.terminals import ENVIRONMENT, nsbox_run, start
from tests.support import PATIENCE

CODE = """
import os, sys, time

count = 0

def handler(event, context):
    global count
    count += 1
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return {"event": event, "count": count, "A": os.environ.get("A")}

def fail(event, context):
    raise ValueError("no such fruit")

def leave(event, context):
    os._exit(3)

def stay(event, context):
    print("I stay", flush=True)
    time.sleep(600)

def fill(event, context):
    return len(bytearray(1 << 30))

def lie(event, context):
    raise SystemExit("not an answer")
"""
REPORT = re.compile(
    r"REPORT RequestId: [0-9a-f-]{36}\tDuration: [\d.]+ ms\tBilled Duration: \d+ ms\t"
    r"(?:Memory Size: (\d+) MB\t)?(?:Max Memory Used: (\d+) MB\t)?"
    r"(?:Init Duration: [\d.]+ ms\t)?(?:Status: (\w+)\t)?(?:Error Type: ([\w.]+)\t)?"
)
TIMEOUT = str(30 * PATIENCE)

pytestmark = pytest.mark.needs("userns")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a directory with `app.py`; what is published goes to a store of the test's own."""
    monkeypatch.setitem(ENVIRONMENT, "NSBOX_STORE", str(tmp_path / "store"))
    (tmp_path / "code").mkdir()
    (tmp_path / "code/app.py").write_text(CODE)
    return str(tmp_path / "code")


def words(handler: str, code: str, *more: str) -> list[str]:
    limits = ["--timeout", TIMEOUT] if "--timeout" not in more else []
    return ["invoke", handler, "--code", code, "-q", *limits, *more]


def reports(stderr: bytes) -> list[re.Match[str]]:
    lines = [line for line in stderr.decode().splitlines() if line.startswith("REPORT")]
    found = [REPORT.fullmatch(line) for line in lines]
    assert all(found), lines
    return [match for match in found if match]


def test_the_answer_is_on_stdout_and_the_log_on_stderr(code: str) -> None:
    done = nsbox_run(*words("app.handler", code, "--env", "A=pear"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == b'{"event": {}, "count": 1, "A": "pear"}\n'
    assert sorted(done.stderr.splitlines()) == [b"to stderr", b"to stdout"]


def test_event_from_stdin_and_from_a_file(code: str, tmp_path: Path) -> None:
    done = nsbox_run(*words("app.handler", code, "--event", "-"), data='["Bär", 1]'.encode())
    assert json.loads(done.stdout)["event"] == ["Bär", 1]
    (tmp_path / "event").write_text('{"fruit": "fig"}\n')
    done = nsbox_run(*words("app.handler", code, "--event", str(tmp_path / "event")))
    assert json.loads(done.stdout)["event"] == {"fruit": "fig"}


def test_stdin_is_left_alone_unless_it_is_the_event(code: str) -> None:
    done = nsbox_run(*words("app.handler", code), data=b"no JSON")
    assert (done.returncode, json.loads(done.stdout)["event"]) == (0, {})


@pytest.mark.parametrize(
    ("reuse", "counts"), [("keep", [1, 2, 3]), ("reset", [1, 1, 1]), ("never", [1, 1, 1])]
)
def test_repeated_invocations_find_what_the_policy_leaves(
    code: str, reuse: str, counts: list[int]
) -> None:
    done = nsbox_run(*words("app.handler", code, "--repeat", "3", "--reuse", reuse, "--report"))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["count"] for line in done.stdout.splitlines()] == counts
    assert len(reports(done.stderr)) == 3


@pytest.mark.needs("cgroup.memory")
def test_report_has_size_and_peak_of_memory(code: str) -> None:
    done = nsbox_run(*words("app.handler", code, "--report", "--memory", "100M"))
    (report,) = reports(done.stderr)
    size, peak, status, kind = report.groups()
    assert (size, status, kind) == ("100", None, None)
    assert 0 < int(peak) <= 100
    assert "Init Duration: " in report[0]


def test_without_a_limit_the_report_tells_no_size(code: str) -> None:
    done = nsbox_run(*words("app.handler", code, "--report", "--memory", "none"))
    (report,) = reports(done.stderr)
    assert report[1] is None


def test_an_exception_is_status_1_with_type_message_and_trace(code: str) -> None:
    done = nsbox_run(*words("app.fail", code, "--report", "--repeat", "3"))
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()  # the first that fails is the last
    answer = json.loads(line)
    assert (answer["errorType"], answer["errorMessage"]) == ("ValueError", "no such fruit")
    assert "in fail" in answer["stackTrace"][-1]
    text = done.stderr.decode()
    assert "[ERROR] ValueError: no such fruit\nTraceback (most recent call last):\n" in text
    assert '  File "/var/task/app.py", line ' in text
    (report,) = reports(done.stderr)
    assert report[3] == "error"
    assert answer["requestId"] in report[0]


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        ("app.leave", "Runtime.ExitError"),
        ("app.lie", "Runtime.ExitError"),
        ("app.none", "Runtime.HandlerNotFound"),
        ("none.handler", "Runtime.ImportModuleError"),
        pytest.param("app.fill", "Runtime.OutOfMemory", marks=pytest.mark.needs("cgroup.memory")),
    ],
)
@pytest.mark.parametrize("mode", ["clone", "exec"])
def test_other_failures_of_the_function_are_status_1(
    code: str, handler: str, kind: str, mode: str
) -> None:
    limits = ["--memory", "64M"] if handler == "app.fill" else []  # soon full
    done = nsbox_run(*words(handler, code, "--start", mode, *limits))
    assert (done.returncode, json.loads(done.stdout)["errorType"]) == (1, kind), done.stderr


def test_a_timeout_is_status_124(code: str) -> None:
    done = nsbox_run(*words("app.stay", code, "--timeout", "0.2", "--report"))
    assert done.returncode == 124
    answer = json.loads(done.stdout)
    assert answer["errorType"] == "Sandbox.Timedout"
    assert answer["errorMessage"] == "Task timed out after 0.20 seconds"
    (report,) = reports(done.stderr)
    assert report.groups()[2:] == ("timeout", "Sandbox.Timedout")


def test_an_import_that_takes_too_long_is_status_124(code: str, tmp_path: Path) -> None:
    (tmp_path / "code/slow.py").write_text("import time; time.sleep(600)")
    done = nsbox_run(*words("slow.handler", code, "--init-timeout", "0.2", "--report"))
    assert done.returncode == 124
    assert json.loads(done.stdout)["errorMessage"] == "init timed out after 0.20 seconds"
    assert reports(done.stderr) == []  # there was no invocation


def test_a_plain_program(code: str) -> None:
    script = 'cat; echo "for $V" >&2'
    more = ["--event", "-", "--env", "V=me", "--report", "--timeout", TIMEOUT, "--code", code]
    done = nsbox_run(
        "invoke", "-q", *more, "--command", command=["sh", "-c", script], data=b'{"a":\n1}\n'
    )
    assert (done.returncode, done.stdout) == (0, b'{"a": 1}\n'), done.stderr
    assert done.stderr.startswith(b"for me\n")
    assert len(reports(done.stderr)) == 1
    done = nsbox_run("invoke", "-q", "--command", command=["sh", "-c", "echo no JSON"])
    assert done.returncode == 1
    assert json.loads(done.stdout)["errorType"] == "Runtime.MarshalError"


def test_layers_and_preload(code: str, tmp_path: Path) -> None:
    (tmp_path / "layer/python").mkdir(parents=True)
    (tmp_path / "layer/python/lib_of_layer.py").write_text("FRUIT = 'quince'")
    (tmp_path / "code/user.py").write_text(
        "import sys\nloaded = 'decimal' in sys.modules\nimport lib_of_layer\n"
        "def handler(event, context): return [lib_of_layer.FRUIT, loaded]"
    )
    layer = ["--layer", str(tmp_path / "layer")]
    done = nsbox_run(*words("user.handler", code, *layer))
    assert json.loads(done.stdout) == ["quince", False]
    done = nsbox_run(*words("user.handler", code, *layer, "--preload", "decimal"))
    assert json.loads(done.stdout) == ["quince", True]


def test_log_comes_while_the_function_runs_and_an_interrupt_ends_it(code: str) -> None:
    with start(*words("app.stay", code)) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"I stay\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20 * PATIENCE) == 130
        assert process.stdout is not None
        assert process.stdout.read() == b""
        assert b"Traceback" not in process.stderr.read()


def test_an_event_with_half_a_character_is_refused() -> None:
    done = nsbox_run("invoke", "--command", "--event", "-", command=["cat"], data=b'"\\ud800"')
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"--event '-': no JSON: event: it has the lone surrogate \\ud800" in done.stderr


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--event", "/nonexistent"], "--event '/nonexistent': No such file or directory"),
        (["--event", "/etc"], "--event '/etc': Is a directory"),
        (["--event", "-"], "--event '-': no JSON: "),
        (["--timeout", "0"], "--timeout: must be above zero"),
        (["--timeout", "901"], "--timeout: at most 900 seconds"),
        (["--init-timeout", "-1"], "--init-timeout: must be above zero"),
        (["--repeat", "0"], "'--repeat': 0 is not in the range"),
        (["--reuse", "sometimes"], "'sometimes' is not one of"),
        (["--preload", "a-b"], "--preload: 'a-b' is no module name"),
        (["--env", "A"], "--env 'A': must be NAME=VALUE"),
        (["--memory", "lots"], "--memory: 'lots' is no size"),
        (["--layer", "/nonexistent"], "layer '/nonexistent': no such file or directory"),
        (["--seccomp", "none"], "--seccomp 'none': must be strict"),
        (["--hostname", "box"], "No such option '--hostname'"),
        (["another"], "'another': give one handler"),
    ],
    ids=" ".join,
)
def test_what_the_user_gets_wrong_is_status_125(code: str, more: list[str], text: str) -> None:
    done = nsbox_run(*words("app.handler", code, *more), data=b"{")
    assert (done.returncode, done.stdout) == (125, b"")
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("nsbox: ")
    assert text in line


@pytest.mark.parametrize("handler", ["handler", "app.", "app/handler", "app.class"])
def test_a_handler_that_is_none(code: str, handler: str) -> None:
    done = nsbox_run(*words(handler, code))
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"give 'module.function'" in done.stderr


def test_an_event_over_the_limit_is_refused(code: str, tmp_path: Path) -> None:
    (tmp_path / "event").write_bytes(b'"' + b"x" * (6 << 20) + b'"')
    done = nsbox_run(*words("app.handler", code, "--event", str(tmp_path / "event")))
    assert done.returncode == 125
    assert b"more than 6291456 bytes" in done.stderr
