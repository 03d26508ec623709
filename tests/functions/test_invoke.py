# SPDX-License-Identifier: Apache-2.0
"""Invocations: where code comes from, events and answers, contexts, logs, states."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.functions.conftest import MakeFunction
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox import State
from nsbox.functions.exchange import PendingCall

ECHO = """
def handler(event, context):
    return event
"""
WAIT_FOR_FILE = """
import os, time
def handler(event, context):
    print("begun", flush=True)
    while not os.path.exists("/tmp/go"):
        time.sleep(0.005)
    return "gone"
"""
MEBIBYTE = 1 << 20


# -- where code comes from -----------------------------------------------------------------------


def test_a_handler_from_a_directory(make_function: MakeFunction) -> None:
    env = make_function("""
        import os
        def handler(event, context):
            return {"got": event, "file": __file__, "cwd": os.getcwd(), "name": __name__}
    """)
    told = {"got": {"x": 1}, "file": "/var/task/app.py", "cwd": "/var/task", "name": "app"}
    assert env.invoke({"x": 1}) == told


def test_a_handler_of_a_package_in_a_zip_file(tmp_path: Path) -> None:
    archive = tmp_path / "code.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("shop/__init__.py", "")
        file.writestr("shop/words.py", "WORD = 'zipped'")
        file.writestr("shop/main.py", "from .words import WORD\ndef run(e, c): return [WORD, e]")
    version = nsbox.Function("shop.main.run", code=archive).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke(3) == ["zipped", 3]


def test_a_handler_of_an_importable_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "importable_here.py").write_text("def f(event, context): return __file__")
    monkeypatch.syspath_prepend(tmp_path)
    version = nsbox.Function("importable_here.f").publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke(None) == "/var/task/importable_here.py"


def test_layers_are_importable_and_later_ones_win(
    publish: Callable[..., nsbox.FunctionVersion], tmp_path: Path
) -> None:
    for number in (1, 2):
        place = tmp_path / f"layer-{number}" / "python"
        place.mkdir(parents=True)
        (place / "both.py").write_text(f"VALUE = {number}")
        (place / f"only_{number}.py").write_text("")
    version = publish(
        """
        import os, both, only_1, only_2
        def handler(event, context):
            return [both.VALUE, both.__file__, sorted(os.listdir("/opt/python"))]
        """,
        layers=[tmp_path / "layer-1", tmp_path / "layer-2"],
    )
    with nsbox.ExecutionEnvironment(version) as env:
        files = ["both.py", "only_1.py", "only_2.py"]
        assert env.invoke(None) == [2, "/opt/python/both.py", files]


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_code_cannot_be_changed_from_inside(make_function: MakeFunction, start: str) -> None:
    env = make_function(
        """
        def handler(path, context):
            try:
                open(path, "w")
            except OSError as error:
                return error.errno
        """,
        start=start,
    )
    assert env.invoke("/var/task/app.py") in (13, 30)
    assert env.invoke("/var/task/new.py") in (13, 30)


# -- what a handler is told ----------------------------------------------------------------------


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_environment_variables(make_function: MakeFunction, start: str) -> None:
    env = make_function(
        """
        import os
        AT_IMPORT = dict(os.environ)
        def handler(event, context):
            return [AT_IMPORT, dict(os.environ)]
        """,
        env={"GREETING": "grüße", "EMPTY": ""},
        start=start,
    )
    at_import, now = env.invoke(None)
    assert at_import == now
    assert (now["GREETING"], now["EMPTY"]) == ("grüße", "")
    assert now["_HANDLER"] == "app.handler"
    assert now["LAMBDA_TASK_ROOT"] == "/var/task"
    assert now["AWS_LAMBDA_FUNCTION_NAME"] == "app-handler"
    assert now["PATH"]
    assert not [name for name in now if name.startswith(("NSBOX", "PYTEST", "SUDO"))]


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_the_context(
    make_function: MakeFunction, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where it is another day.
    monkeypatch.setenv("TZ", "AHEAD-24" if time.gmtime().tm_hour >= 12 else "BEHIND+24")
    time.tzset()
    today = time.strftime("%Y/%m/%d", time.gmtime())
    env = make_function(
        """
        FIELDS = ("aws_request_id", "function_name", "function_version", "memory_limit_in_mb",
                  "log_group_name", "log_stream_name", "invoked_function_arn", "identity",
                  "client_context", "tenant_id")
        def handler(event, context):
            left = context.get_remaining_time_in_millis()
            context.log("logged")
            return {**{name: getattr(context, name) for name in FIELDS}, "left": left}
        """,
        name="shop",
        tenant="acme",
        start=start,
        limits=nsbox.Limits(memory_max=256 * MEBIBYTE),
        allow_missing={"cgroup.memory"},
        timeout=60,
    )
    told = env.invoke(None, request_id="my-id", client_context={"custom": {"a": "ü\0"}})
    left = told.pop("left")
    version = told.pop("function_version")
    assert 0 < left <= 60_000
    assert re.fullmatch("[0-9a-f]{8,64}", version)
    monkeypatch.undo()
    time.tzset()
    stream = told.pop("log_stream_name")
    day, _, rest = stream.partition("/[")
    assert day in (today, time.strftime("%Y/%m/%d", time.gmtime())), "in UTC, wherever the host is"
    assert rest == f"{version}]{env.id}"
    assert told == {
        "aws_request_id": "my-id",
        "function_name": "shop",
        "memory_limit_in_mb": "256",
        "log_group_name": "/aws/lambda/shop",
        "invoked_function_arn": f"arn:aws:lambda:local:000000000000:function:shop:{version}",
        "identity": None,
        "client_context": {"custom": {"a": "ü\0"}},
        "tenant_id": "acme",
    }
    assert env.last is not None
    assert env.last.request_id == "my-id"
    assert env.last.stdout == b"logged"
    told = env.invoke(None, timeout=2)
    assert told["left"] <= 2000
    assert told["client_context"] is None
    first, second = (env.invoke(None)["aws_request_id"] for _ in range(2))
    assert first != second
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first)


# -- events and answers --------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, 0, -1.5, 10**300, "", "grüße 🐟 \u2028 \0 \"\\", [], {},
    {"": {"a": [1, [2, [3, {"b": None}]]]}}, [[]] * 100,
]  # fmt: skip


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_any_json_value_there_and_back(make_function: MakeFunction, start: str) -> None:
    env = make_function(ECHO, start=start)
    for value in VALUES:
        assert env.invoke(value) == value
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    assert env.invoke(deep) == deep


@pytest.mark.parametrize(
    ("start", "reuse"), [("clone", "keep"), ("exec", "keep"), ("clone", "reset")]
)
@pytest.mark.parametrize("size", [1 << 16, 1 << 20, 6 << 20])
def test_large_events_and_answers(
    make_function: MakeFunction, size: int, start: str, reuse: str
) -> None:
    env = make_function(ECHO, start=start, reuse=reuse, timeout=30)
    payload = b'"' + b"x" * (size - 2) + b'"'
    assert len(payload) == size
    for _ in range(2):
        invocation = env.invoke_bytes(payload)
        assert invocation.payload == payload


def test_an_event_that_is_too_large(make_function: MakeFunction) -> None:
    env = make_function(ECHO)
    with pytest.raises(nsbox.ConfigError, match="event: 6291457 bytes"):
        env.invoke_bytes(b" " * ((6 << 20) - 1) + b"12")
    with pytest.raises(nsbox.ConfigError, match="event"):
        env.invoke("x" * (6 << 20))
    assert env.invoke(1) == 1


def test_an_answer_that_is_too_large(make_function: MakeFunction) -> None:
    env = make_function("""
        def handler(event, context):
            return "x" * event
    """)
    most = (6 << 20) + 100
    assert len(env.invoke(most - 2)) == most - 2
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke(most - 1)
    assert caught.value.error_type == "Function.ResponseSizeTooLarge"
    assert str(most) in caught.value.message
    assert env.state is State.READY
    assert env.invoke(1) == "x"


@pytest.mark.parametrize(
    "event", [{1, 2}, object(), float("nan"), b"bytes", {"a": float("inf")}, [lambda: 0],
              "\ud800", {"\udfff": 1}, ["\ud83d\ude00", "\ude00\ud83d"]],
)  # fmt: skip
def test_an_event_that_is_no_json_value(make_function: MakeFunction, event: object) -> None:
    env = make_function(ECHO)
    with pytest.raises(nsbox.ConfigError, match="event"):
        env.invoke(event)
    assert env.invoke(1) == 1


@pytest.mark.parametrize("options", [{}, {"preload": ["msgspec"]}, {"start": "exec"}])
def test_events_and_answers_are_those_of_the_standard_library(
    make_function: MakeFunction, options: dict[str, Any]
) -> None:
    """Byte for byte, whatever encodes and decodes them, and what is wrong is told in its words."""

    def dumped(value: object) -> bytes:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    def outcome(function: Callable[..., bytes], *arguments: object) -> bytes | str:
        try:
            return function(*arguments)
        except (TypeError, ValueError) as error:
            return str(error)
        except nsbox.FunctionError as error:
            return error.message.partition(": ")[2]

    env = make_function(
        """
        def handler(event, context):
            return eval(event["answer"]) if "answer" in event else event
        """,
        timeout=30,
        **options,
    )

    def payload(event: bytes) -> bytes:
        return env.invoke_bytes(event).payload

    row = {"id": 2**64, "name": "M\u00fcller \U0001f600\n", "paid": 1e16, "due": [-0.25, None]}
    for value in ([row], [row] * 3000):
        assert env.invoke(value) == value
        assert env.last is not None
        assert env.last.payload == dumped(value)
    for answer in (
        *("2**64", "10**400", "(1, (2.0,))", "{1: 2, None: 3}", "float('nan')", "[float('inf')]"),
        *("'\\ud800'", "{(1, 2): 3}", "b'bytes'", "{1, 2}", "[1] * 99999", "[{'a': 1e-5}] * 9999"),
    ):
        event = dumped({"answer": answer})
        assert outcome(payload, event) == outcome(dumped, eval(answer))  # noqa: S307
    for text in ("[NaN]", "[1,]", '{"a": 1, "a": 2}', "[-0, 1e999]", "[] 1"):
        for whole in (text, text + " " * (1 << 16)):
            found = outcome(lambda text: dumped(json.loads(text, parse_constant=refuse)), whole)
            assert outcome(payload, whole.encode()) == found


def test_a_program_reads_an_event_as_json_dumps_writes_it() -> None:
    with nsbox.ExecutionEnvironment(nsbox.Function(command=["cat"]).publish()) as env:
        for event in (
            {"a": ["\u00e9\U0001f600\x7f", 1e16, 0.5, None]},
            [{"n": n} for n in range(9)],
        ):
            assert env.invoke(event) == event
            assert env.last is not None
            assert env.last.payload == json.dumps(event).encode()


def test_bytes_that_are_no_json(make_function: MakeFunction) -> None:
    """They are the caller's, who is told by the function's own parser, as by AWS Lambda."""
    env = make_function(ECHO)
    for payload in (b"", b"{", b"\xff", b"[" * 500, b"\0\0\0\0"):
        with pytest.raises(nsbox.FunctionError) as caught:
            env.invoke_bytes(payload)
        assert caught.value.error_type == "Runtime.UnmarshalError"
    assert env.invoke(1) == 1
    with pytest.raises(nsbox.ConfigError, match="nested more than 512 deep"):
        env.invoke_bytes(b"[" * 100_000)
    for half in (b'"\\ud800"', b'["\\\\", "\\uDFFF"]', b'"\\ud83d\\u0020"'):
        with pytest.raises(nsbox.ConfigError, match=r"event: it has the lone surrogate \\u[dD]"):
            env.invoke_bytes(half)
    for whole in (b'"\\ud83d\\uDE00"', b'"\\\\ud800"', '"\ud55c\U0001f600"'.encode()):
        assert env.invoke_bytes(whole).json() == json.loads(whole)
    assert env.invoke("\ud55c\U0001f600") == "\ud55c\U0001f600"
    with pytest.raises(nsbox.ConfigError, match="must be bytes"):
        env.invoke_bytes("1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"request_id": "a\0b"},
        {"request_id": 7},
        {"request_id": "\ud800"},
        {"request_id": "two\nlines"},
        {"client_context": {"a": object()}},
        {"client_context": {"a": "\udc00"}},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": "1"},
    ],
)
def test_a_wrong_argument_changes_nothing(
    make_function: MakeFunction, options: dict[str, Any]
) -> None:
    env = make_function(ECHO, reuse="never")
    with pytest.raises(nsbox.ConfigError, match=next(iter(options))):
        env.invoke(1, **options)
    assert env.invoke(2) == 2, "it has not been used up"


# -- logs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_each_invocation_has_its_own_log(
    make_function: MakeFunction, start: str, reuse: str
) -> None:
    env = make_function(
        """
        import os, sys
        print("at import")
        def handler(event, context):
            print("out", event, end="")
            sys.stderr.write(f"err {event}")
            os.write(1, b"|raw")
            os.system("printf '|child'")
        """,
        start=start,
        reuse=reuse,
    )
    env.init()
    seen: list[tuple[str, bytes]] = []
    for number in (1, 2):
        seen.clear()
        invocation = env.invoke_bytes(b"%d" % number, on_log=lambda *item: seen.append(item))
        # print() without a newline is in the buffer of the stream until the handler returns.
        assert sorted(invocation.stdout.split(b"|")) in (
            [b"child", b"out %d" % number, b"raw"],
            [b"", b"childout %d" % number, b"raw"],
        )
        assert invocation.stderr == b"err %d" % number
        for name in ("stdout", "stderr"):
            heard = b"".join(data for stream, data in seen if stream == name)
            of_import = b"at import\n" if (number, name) == (1, "stdout") else b""
            assert getattr(invocation, f"init_{name}") == of_import
            assert heard == of_import + getattr(invocation, name)


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_a_flood_of_log_is_capped_and_stops_nothing(
    make_function: MakeFunction, reuse: str
) -> None:
    env = make_function(
        """
        import sys
        def handler(event, context):
            for _ in range(64):
                print("x" * 65536)
                print("y" * 65536, file=sys.stderr)
            return "z" * 1_000_000
        """,
        reuse=reuse,
        limits=nsbox.Limits(output_max=10_000),
        timeout=60,
    )
    total = 0

    def count(_: str, data: bytes) -> None:
        nonlocal total
        total += len(data)

    for _ in range(2):
        total = 0
        invocation = env.invoke_bytes(b"1", on_log=count)
        assert len(invocation.payload) == 1_000_002
        assert invocation.stdout == b"x" * 10_000
        assert invocation.stderr == b"y" * 10_000
        assert total == 2 * 64 * 65537


def test_an_exception_of_the_callback_is_the_callers(make_function: MakeFunction) -> None:
    env = make_function("""
        def handler(event, context):
            print("said", flush=True)
            return 1
    """)

    def fail(_: str, __: bytes) -> None:
        raise ValueError("of the callback")

    with pytest.raises(ValueError, match="of the callback"):
        env.invoke(1, on_log=fail)
    # Whether its answer had come by then nobody knows, so that it serves no other.
    wait_until(lambda: env.state is State.DEAD, "it is killed")


# -- states --------------------------------------------------------------------------------------


def test_busy(make_function: MakeFunction) -> None:
    env = make_function(WAIT_FOR_FILE, timeout=30 * PATIENCE, reuse="never")
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(env.invoke, 1, on_log=lambda *_: begun.set())
        try:
            assert begun.wait(20 * PATIENCE)
            with pytest.raises(nsbox.EnvironmentStateError, match="busy"):
                env.invoke(2)
            with pytest.raises(nsbox.EnvironmentStateError, match="busy"):
                env.init()
        finally:
            # The answer may come, and end the environment, before PID 1 says that it has written.
            with contextlib.suppress(nsbox.EnvironmentDied):
                env.write_file("/tmp/go", b"")
        assert answer.result() == "gone"


def test_commands_and_files_beside_invocations(make_function: MakeFunction) -> None:
    env = make_function("""
        import os
        def handler(event, context):
            return [os.path.exists("/tmp/more"), open("/tmp/in").read()]
    """)
    env.write_file("/tmp/in", b"content")
    assert env.run(["cat", "/var/task/app.py"]).stdout.startswith(b"\nimport os")
    assert env.invoke(None) == [False, "content"]
    assert env.run(["sh", "-c", "echo > /tmp/more"]).ok
    assert env.invoke(None) == [True, "content"]


def test_use_after_close(make_function: MakeFunction) -> None:
    env = make_function(ECHO)
    assert env.invoke(1) == 1
    env.close()
    for call in (lambda: env.invoke(1), lambda: env.invoke_bytes(b"1"), env.init):
        with pytest.raises(nsbox.EnvironmentStateError, match="closed"):
            call()
    assert env.last is not None


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_close_under_an_invocation(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(WAIT_FOR_FILE, timeout=60 * PATIENCE, reuse=reuse)
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(env.invoke, 1, on_log=lambda *_: begun.set())
        assert begun.wait(20 * PATIENCE)
        env.close()
        with pytest.raises(nsbox.InvokeError):
            answer.result(20 * PATIENCE)
    assert env.state is State.CLOSED


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_a_frozen_one_is_thawed_by_the_next_call(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(ECHO, reuse=reuse)
    states = [env.state]
    env.freeze()
    states.append(env.state)
    assert env.invoke(1) == 1
    states.append(env.state)
    assert states == [State.READY, State.FROZEN, State.READY]
    env.freeze()
    assert env.invoke(2) == 2


def test_no_function(env: nsbox.ExecutionEnvironment) -> None:
    with pytest.raises(nsbox.EnvironmentStateError, match="belongs to no function"):
        env.invoke(1)
    assert env.last is None


def test_a_clone_does_not_fit_to_a_rootfs(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(ECHO)
    version = nsbox.Function("app.handler", code=tmp_path, rootfs=tmp_path).publish()
    with pytest.raises(nsbox.ConfigError, match="start='exec'"):
        nsbox.ExecutionEnvironment(version)


def test_init_is_done_once_and_by_whoever_is_first(make_function: MakeFunction) -> None:
    source = """
        import os
        print("imported")
        def handler(event, context):
            return os.getpid()
    """
    env = make_function(source)
    env.init()
    env.init()
    first = env.invoke_bytes(b"1")
    second = env.invoke_bytes(b"1")
    assert first.payload == second.payload
    assert first.init_seconds is not None
    assert second.init_seconds is None
    assert make_function(source).invoke(1) == first.json()


@pytest.mark.parametrize(
    ("start", "reuse", "size"),
    [("clone", "keep", 1), ("clone", "reset", 1), ("clone", "keep", 100_000), ("exec", "keep", 1)],
)
@pytest.mark.parametrize(
    "work",
    [
        "pass",
        "time.sleep(0.1)",  # the host begins to read meanwhile
        "os.write(1, b'of the import' * 20000)",  # more than a pipe holds
        "os.system('echo of the import >&2')",
        "os.write(1, b'of the import'); os.close(1); os.open('/dev/null', os.O_WRONLY)",
    ],
)
def test_the_log_of_the_import_is_told_from_that_of_the_first_event(
    make_function: MakeFunction, work: str, start: str, reuse: str, size: int
) -> None:
    env = make_function(
        f"""
        import os, sys, time
        print("of the import")
        sys.stderr.write("of the import")
        {work}

        def handler(event, context):
            print("of the event")
            sys.stderr.write("of the event")
            return len(event)
        """,
        start=start,
        reuse=reuse,
        timeout=60,
        init_timeout=60,
    )
    told: list[tuple[str, bytes]] = []
    event = f'"{"x" * size}"'.encode()
    first = env.invoke_bytes(event, on_log=lambda name, data: told.append((name, data)))
    second = env.invoke_bytes(event)
    assert first.json() == second.json() == size
    stdout = b"" if "close" in work else b"of the event\n"
    assert (first.stdout, first.stderr) == (stdout, b"of the event")
    assert (second.stdout, second.stderr) == (stdout, b"of the event")
    for written in (first.init_stdout, first.init_stderr):
        assert written.startswith(b"of the import")
        assert b"event" not in written
    assert second.init_stdout == second.init_stderr == b""
    for name, init, own in (
        ("stdout", first.init_stdout, first.stdout),
        ("stderr", first.init_stderr, first.stderr),
    ):
        assert b"".join(data for stream, data in told if stream == name) == init + own


@pytest.mark.parametrize("is_first_large", [False, True])
def test_what_an_import_wrote_long_before_is_told_with_the_first_event(
    make_function: MakeFunction, is_first_large: bool
) -> None:
    env = make_function(
        """
        import os
        print("of the import")
        os.write(2, b"x" * 100_000)

        def handler(event, context):
            print("of the event")
        """,
        limits=nsbox.Limits(output_max=70_000),
        timeout=60,
        init_timeout=60,
    )
    env.init()
    told: list[tuple[str, bytes]] = []
    event = b"1" if not is_first_large else b'"' + b"x" * 100_000 + b'"'
    first = env.invoke_bytes(event, on_log=lambda name, data: told.append((name, data)))
    assert first.init_stdout == b"of the import\n"
    assert first.init_stderr == b"x" * 70_000
    assert b"".join(d for name, d in told if name == "stdout") == b"of the import\nof the event\n"
    assert env.invoke_bytes(event).init_stdout == b""


def test_a_callback_hears_an_import_that_fails(make_function: MakeFunction) -> None:
    env = make_function(
        """
        print("before", flush=True)
        raise ValueError("in the import")
        """
    )
    told: list[bytes] = []
    with pytest.raises(nsbox.FunctionError, match="in the import"):
        env.invoke(1, on_log=lambda _, data: told.append(data))
    assert b"before\n" in told  # its place among stderr's is not told: they are two pipes


def test_an_event_that_came_with_the_start_has_its_own_time(make_function: MakeFunction) -> None:
    env = make_function(
        """
        import time
        time.sleep(0.5)
        def handler(event, context):
            return context.get_remaining_time_in_millis()
        """,
        init_timeout=60,
    )
    first = env.invoke_bytes(b"1", timeout=30)
    assert (first.init_seconds or 0) >= 0.5
    assert first.json() > 29_000 - 1000 * first.duration_seconds
    slow = make_function(
        """
        import time
        def handler(event, context):
            time.sleep(60)
        """
    )
    with pytest.raises(nsbox.InvokeTimeout, match=r"Task timed out after 0\.10 seconds") as caught:
        slow.invoke(1, timeout=0.1)
    assert caught.value.invocation is not None


def test_the_report_line(make_function: MakeFunction) -> None:
    env = make_function(
        """
        def handler(event, context):
            if event:
                raise ValueError
        """,
        limits=nsbox.Limits(memory_max=128 * MEBIBYTE),
        allow_missing={"cgroup.memory"},
        timeout=30,
    )
    first, second = env.invoke_bytes(b"0", request_id="a"), env.invoke_bytes(b"0", request_id="b")
    with pytest.raises(nsbox.FunctionError):
        env.invoke(1, request_id="c")
    third = env.last
    assert third is not None
    number = r"\d+\.\d\d ms\t"
    times = rf"Duration: {number}Billed Duration: \d+ ms\t"
    memory = r"Memory Size: 128 MB\t(Max Memory Used: \d+ MB\t)?"
    begin = "REPORT RequestId: "
    assert re.fullmatch(rf"{begin}a\t{times}{memory}Init Duration: {number}", first.report())
    assert re.fullmatch(rf"{begin}b\t{times}{memory}", second.report())
    assert re.fullmatch(rf"{begin}c\t{times}{memory}Status: error\t.*", third.report())
    assert first.billed_milliseconds >= (first.duration_seconds + (first.init_seconds or 0)) * 1000


@pytest.mark.needs("cgroup.memory")
def test_the_memory_of_the_next_event_is_not_told_of_the_last(make_function: MakeFunction) -> None:
    env = make_function(
        """
        import time
        def handler(event, context):
            taken = bytearray(event << 20)
            print("taken", flush=True)
            if event:
                time.sleep(60)
        """,
        timeout=60,
    )
    env.invoke(0)
    heard = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        options: dict[str, Any] = {"on_log": lambda _name, _data: heard.set()}
        following = threads.submit(env.invoke, 50, **options)
        assert heard.wait(PATIENCE)
        last = env.last
        env.close(wait=False)
        with pytest.raises(nsbox.NsboxError):
            following.result(PATIENCE)
    assert last is not None
    assert last.memory_peak_mb is None


@pytest.mark.needs("cgroup.memory")
def test_the_most_memory_is_reported(make_function: MakeFunction) -> None:
    env = make_function(
        """
        def handler(event, context):
            return len(bytearray(event << 20))
        """,
        timeout=30,
    )
    small = env.invoke_bytes(b"0").memory_peak_mb
    large = env.invoke_bytes(b"50").memory_peak_mb
    assert small is not None
    assert large is not None
    assert large >= 50 > small


# -- plain programs ------------------------------------------------------------------------------


def command_env(*command: str, **options: Any) -> nsbox.ExecutionEnvironment:
    return nsbox.ExecutionEnvironment(nsbox.Function(command=command, **options).publish())


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_a_plain_program(reuse: str) -> None:
    with command_env("/bin/cat", reuse=reuse) as env:
        for value in ({"x": [1, "ü"]}, "y" * 1_000_000):
            assert env.invoke(value) == value


def test_what_a_plain_program_is_told() -> None:
    script = 'cat >/dev/null; echo "log $A" >&2; echo "[\\"$A\\", \\"$AWS_REQUEST_ID\\"]"'
    seen: list[tuple[str, bytes]] = []
    with command_env("sh", "-c", script, env={"A": "1"}) as env:
        assert env.invoke(1, request_id="r", on_log=lambda *item: seen.append(item)) == ["1", "r"]
        assert env.last is not None
        assert env.last.stderr == b"log 1\n"
        assert seen == [("stderr", b"log 1\n")]
        assert env.last.report().startswith("REPORT RequestId: r\tDuration: ")


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("exit 3", "Runtime.ExitError", "exit status 3"),
        ("kill -SEGV $$", "Runtime.ExitError", "signal"),
        ("echo no json", "Runtime.MarshalError", "no JSON"),
        ("true", "Runtime.MarshalError", "no JSON"),
        ("yes | head -c 7000000", "Function.ResponseSizeTooLarge", "maximum"),
    ],
)
def test_how_a_plain_program_fails(script: str, kind: str, message: str) -> None:
    with command_env("sh", "-c", f"case $(cat) in 1) {script};; *) echo 2;; esac") as env:
        with pytest.raises(nsbox.FunctionError, match=message) as caught:
            env.invoke(1)
        assert caught.value.error_type == kind
        assert caught.value.invocation is env.last
        assert env.last is not None
        assert json.loads(env.last.payload)["errorType"] == kind
        assert env.invoke(2) == 2


def test_an_answer_of_a_plain_program_beyond_output_max_names_that_limit() -> None:
    limits = nsbox.Limits(output_max=100_000)
    with command_env("head", "-c", "100001", "/dev/zero", limits=limits) as env:
        with pytest.raises(nsbox.FunctionError, match="stdout is over 100000 bytes") as caught:
            env.invoke(1)
        assert caught.value.error_type == "Function.ResponseSizeTooLarge"


def test_the_log_of_a_plain_program_comes_while_it_runs_and_has_no_limit() -> None:
    heard: list[bytes] = []
    script = """
        read stop; echo begun >&2
        while [ ! -e /tmp/heard ]; do sleep 0.01; done
        head -c 300000 /dev/zero >&2; echo '"done"'
    """
    limits = nsbox.Limits(output_max=100_000)
    with command_env("sh", "-c", script, limits=limits, timeout=20 * PATIENCE) as env:

        def on_log(name: str, data: bytes) -> None:
            assert name == "stderr"
            if not heard:
                env.write_file("/tmp/heard", b"")
            heard.append(data)

        assert env.invoke(1, on_log=on_log) == "done"
        assert b"".join(heard) == b"begun\n" + bytes(300_000)
        assert env.last is not None
        assert env.last.stderr == b"begun\n" + bytes(99_994), "of the record it is the beginning"


def test_a_plain_program_that_takes_too_long() -> None:
    with command_env("sleep", "60") as env:
        with pytest.raises(nsbox.InvokeTimeout, match=r"timed out after 0\.20 seconds"):
            env.invoke(1, timeout=0.2)
        wait_until(lambda: env.state is State.DEAD, "it is killed")
        with pytest.raises(nsbox.EnvironmentStateError, match="dead"):
            env.invoke(1)


def test_a_limit_that_handlers_do_not_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("def handler(event, context): return event\n")
    limits = nsbox.Limits(cpu_time=1)
    version = nsbox.Function("app.handler", code=tmp_path, limits=limits).publish()
    with pytest.raises(nsbox.ConfigError, match="limits: cpu_time is of commands"):
        nsbox.ExecutionEnvironment(version)


@pytest.mark.static
def test_a_log_written_in_single_bytes_takes_no_more_memory_than_its_bytes() -> None:
    count = 200_000
    pieces = [bytes([number]) for number in range(256)]
    call = PendingCall(1, 1.0, "", count, None)
    tracemalloc.start()
    try:
        for number in range(count):
            call.log("stdout", pieces[number & 0xFF])
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(call.logged("stdout")) == count
    assert held < 2 * count
