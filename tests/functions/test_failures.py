# SPDX-License-Identifier: Apache-2.0
"""What functions do wrong, by accident or on purpose: a typed error each, and the right state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from tests.functions.conftest import MakeFunction
from tests.support import PATIENCE, is_over, wait_until

import nsbox
from nsbox import State
from nsbox.supervisor.launcher import running_launcher

EVERY_WAY = pytest.mark.parametrize(
    "options", [{}, {"reuse": "reset"}, {"start": "exec"}], ids=["keep", "reset", "exec"]
)


@EVERY_WAY
def test_an_exception(make_function: MakeFunction, options: dict[str, str]) -> None:
    env = make_function(
        """
        class Mine(Exception):
            pass
        def inner(text):
            raise Mine(text)
        def handler(event, context):
            if event:
                print("before", end="")
                inner(event)
            return "fine"
        """,
        **options,
    )
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke("grüße")
    error = caught.value
    assert (error.error_type, error.message) == ("Mine", "grüße")
    assert len(error.stack_trace) == 2, "the function's own frames alone"
    assert '"/var/task/app.py", line 9, in handler' in error.stack_trace[0]
    assert "raise Mine(text)" in error.stack_trace[1]
    assert error.invocation is not None
    assert error.invocation is env.last
    assert error.invocation.stdout == b"before"
    told = json.loads(error.invocation.payload)
    assert told["errorType"] == "Mine"
    assert told["requestId"] == error.invocation.request_id
    assert env.state is State.READY
    assert env.invoke("") == "fine"


CAUSES = """
def inner(key):
    return {}[key]
def handler(event, context):
    if event == "hidden":
        try:
            inner("a")
        except KeyError:
            raise ValueError("no a") from None
    if event == "notes":
        error = ValueError("no a")
        error.add_note("look there")
        raise error
    if event == "group":
        errors = []
        for key in "ab":
            try:
                inner(key)
            except KeyError as error:
                errors.append(error)
        raise ExceptionGroup("all of them", errors)
    try:
        inner("a")
    except KeyError as error:
        if event == "cause":
            raise ValueError("no a") from error
        raise ValueError("no a")
"""


@EVERY_WAY
def test_causes_are_in_stack_trace_and_log(
    make_function: MakeFunction, options: dict[str, str]
) -> None:
    env = make_function(CAUSES, **options)

    def fail(event: str) -> tuple[str, str, str]:
        with pytest.raises(nsbox.FunctionError) as caught:
            env.invoke(event)
        error = caught.value
        assert error.invocation is not None
        assert "guest/runtime" not in "".join(error.stack_trace), "the function's frames alone"
        log = error.invocation.stderr.decode()
        assert log.startswith(f"[ERROR] {error.error_type}: {error.message}\n")
        return "".join(error.stack_trace), log, error.error_type

    head = "Traceback (most recent call last):\n"
    words = {
        "cause": "The above exception was the direct cause of the following exception:",
        "context": "During handling of the above exception, another exception occurred:",
    }
    for event, between in words.items():
        trace, log, _ = fail(event)
        first, middle, second = trace.partition(f"\n{between}\n\n")
        assert middle
        assert first.startswith(head)
        assert first.endswith("KeyError: 'a'\n")
        assert "line 3, in inner" in first
        assert second.startswith(head)
        assert second.endswith("ValueError: no a\n")
        assert log == f"[ERROR] ValueError: no a\n{trace}"
    trace, log, _ = fail("hidden")
    assert "KeyError" not in trace + log
    assert trace.startswith('  File "/var/task/app.py", line 9, in handler\n')
    assert log == f"[ERROR] ValueError: no a\n{head}{trace}"
    trace, log, _ = fail("notes")
    assert trace.endswith("ValueError: no a\nlook there\n")
    assert log.endswith(trace)
    trace, log, kind = fail("group")
    assert kind == "ExceptionGroup"
    assert trace.startswith("  + Exception Group Traceback (most recent call last):\n")
    assert trace.count("KeyError") == 2
    assert trace.count("line 3, in inner") == 2
    assert log.endswith(trace)


@EVERY_WAY
def test_causes_of_an_import(make_function: MakeFunction, options: dict[str, str]) -> None:
    env = make_function(
        """
        try:
            {}["a"]
        except KeyError as error:
            raise ValueError("no a") from error
        """,
        **options,
    )
    heard: list[bytes] = []
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke(1, on_log=lambda _name, data: heard.append(data))
    trace = "".join(caught.value.stack_trace)
    assert "KeyError: 'a'\n\nThe above exception was the direct cause" in trace
    assert b"".join(heard).decode() == f"[ERROR] ValueError: no a\n{trace}"


LONG_WORDS = r"""
import sys
def turn(n):
    return back(n - 1)
def back(n):
    return turn(n - 1) if n else {}["a"]
class Meta(type):
    __name__ = 7
class Odd(Exception, metaclass=Meta):
    pass
def handler(event, context):
    if event == "name":
        raise type("E" * 10_000_000, (Exception,), {})("a")
    if event == "message":
        raise ValueError("\U0001f600" * 10_000_000)
    if event == "trace":
        sys.setrecursionlimit(200_000)
        try:
            turn(40_001)
        except KeyError as error:
            raise ValueError("deep") from error
    if event == "answer":
        return type("E" * 10_000_000, (), {})()
    if event == "bytes":
        raise ValueError("\udcff/\ud800")
    if event == "meta":
        raise Odd("a")
    return "fine"
"""


@EVERY_WAY
def test_long_and_strange_errors_are_cut(
    make_function: MakeFunction, options: dict[str, str]
) -> None:
    env = make_function(LONG_WORDS, **options, timeout=60 * PATIENCE)
    for event, kind, message in (
        ("name", "EEE", "a"),
        ("message", "ValueError", "\U0001f600" * 3),
        ("trace", "ValueError", "deep"),
        ("answer", "Runtime.MarshalError", "Unable to marshal response: Object of type EE"),
        ("bytes", "ValueError", r"\udcff/\ud800"),
        ("meta", "Odd", "a"),
    ):
        with pytest.raises(nsbox.FunctionError) as caught:
            env.invoke(event)
        error = caught.value
        assert error.error_type.startswith(kind)
        assert error.message.startswith(message)
        if event == "trace":
            trace = "".join(error.stack_trace)
            assert len(trace) < 1 << 17
            assert "  [...]\n" in trace
            assert trace.startswith("Traceback (most recent call last):\n")
            assert trace.endswith("ValueError: deep\n")
        assert env.state is State.READY
        assert env.invoke("") == "fine"


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_a_long_error_of_an_import_is_cut(make_function: MakeFunction, start: str) -> None:
    env = make_function("raise ImportError('x' * 10_000_000)", start=start)
    with pytest.raises(nsbox.FunctionError, match="Unable to import module 'app': xxx") as caught:
        env.invoke(1)
    assert caught.value.error_type == "Runtime.ImportModuleError"


@EVERY_WAY
@pytest.mark.parametrize("source", ["1 / 0", "import os; os._exit(3)", "import os; os.kill(0, 9)"])
def test_a_start_that_failed_is_not_tried_again(
    make_function: MakeFunction, source: str, options: dict[str, str]
) -> None:
    env = make_function(source, **options)
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke(1)
    assert caught.value.error_type in ("ZeroDivisionError", "Runtime.ExitError")
    with pytest.raises((nsbox.EnvironmentDied, nsbox.EnvironmentStateError)):
        env.invoke(1)
    assert env.state is State.DEAD
    assert env.last is None


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("import not_there", "Runtime.ImportModuleError", "No module named 'not_there'"),
        ("def handler(:", "Runtime.UserCodeSyntaxError", r"app\.py, line 1"),
        ("x = 1", "Runtime.HandlerNotFound", "'handler' missing on module 'app'"),
        ("handler = 7", "Runtime.HandlerNotFound", "'handler' missing"),
        ("1 / 0", "ZeroDivisionError", "division by zero"),
        ("raise SystemExit(4)", "Runtime.ExitError", "exit status 4"),
        ("import os; os._exit(3)", "Runtime.ExitError", "exit status 3"),
        ("import os; os.kill(os.getpid(), 11)", "Runtime.ExitError", "segmentation fault"),
    ],
)
@EVERY_WAY
def test_an_import_that_fails(
    make_function: MakeFunction, source: str, kind: str, message: str, options: dict[str, str]
) -> None:
    env = make_function(source, **options)
    with pytest.raises(nsbox.FunctionError, match=message) as caught:
        env.init()
    assert caught.value.error_type == kind
    assert caught.value.invocation is None
    wait_until(lambda: env.state is State.DEAD, "nothing of it is used")
    with pytest.raises(nsbox.EnvironmentStateError, match="dead"):
        env.invoke(1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("os._exit(3)", "exit status 3"),
        ("os._exit(0)", "without providing a reason"),
        ("sys.exit(5)", "exit status 5"),
        ("sys.exit('words')", "exit status 1"),
        ("os.kill(os.getpid(), 9)", "signal: killed"),
        ("os.abort()", "signal: aborted"),
        ("import ctypes; ctypes.string_at(0)", "segmentation fault"),
    ],
)
@EVERY_WAY
def test_an_exit(
    make_function: MakeFunction, code: str, message: str, options: dict[str, str]
) -> None:
    env = make_function(
        f"""
        import os, sys
        def handler(event, context):
            print("before", flush=True)
            {code}
        """,
        **options,
    )
    with pytest.raises(nsbox.FunctionError, match=message) as caught:
        env.invoke(1)
    assert caught.value.error_type == "Runtime.ExitError"
    assert caught.value.invocation is not None
    assert caught.value.invocation.stdout == b"before\n"
    wait_until(lambda: env.state is State.DEAD, "it is killed")


def make_greedy(make_function: MakeFunction, **options: str) -> nsbox.ExecutionEnvironment:
    """Make one whose function takes all the memory there is, if its event is true."""
    source = """
        def handler(event, context):
            kept = []
            while event:
                kept.append(bytearray(1 << 20))
    """
    limits = nsbox.Limits(memory_max=48 << 20)
    return make_function(source, limits=limits, timeout=60, **options)


@pytest.mark.needs("cgroup.memory")
@EVERY_WAY
def test_out_of_memory(make_function: MakeFunction, options: dict[str, str]) -> None:
    env = make_greedy(make_function, **options)
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke(1)
    assert caught.value.error_type in ("Runtime.OutOfMemory", "MemoryError")
    assert caught.value.error_type == "Runtime.OutOfMemory"
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@pytest.mark.needs("cgroup.memory")
def test_out_of_memory_that_the_worker_tells_before_the_launcher(
    make_function: MakeFunction,
) -> None:
    """v1 kills the fork alone, and its worker says so while the launcher still sleeps."""
    env = make_greedy(make_function, reuse="reset")
    env.invoke(0)
    launcher = running_launcher()
    assert launcher is not None
    wakes = threading.Timer(0.5, os.kill, (launcher.pid, signal.SIGCONT))
    os.kill(launcher.pid, signal.SIGSTOP)
    try:
        wakes.start()
        with pytest.raises(nsbox.FunctionError) as caught:
            env.invoke(1)
    finally:
        wakes.join()
    assert caught.value.error_type == "Runtime.OutOfMemory"
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@EVERY_WAY
def test_timeouts(make_function: MakeFunction, options: dict[str, str]) -> None:
    source = """
        import time, os
        def handler(event, context):
            print("before", flush=True)
            os.system("sleep 1000 &")
            time.sleep(1000)
    """
    env = make_function(source, **options)
    env.init()
    with pytest.raises(nsbox.InvokeTimeout, match=r"timed out after 0\.50 seconds") as caught:
        env.invoke(1, timeout=0.5)
    assert isinstance(caught.value, TimeoutError)
    invocation = caught.value.invocation
    assert invocation is not None
    assert (invocation.status, invocation.error_type) == ("timeout", "Sandbox.Timedout")
    assert invocation.stdout == b"before\n"
    wait_until(lambda: env.state is State.DEAD, "it is killed")
    # That no process of it is left is what every test's leak check looks for.
    env = make_function("while True: pass", init_timeout=0.3, **options)
    with pytest.raises(nsbox.InvokeTimeout, match=r"init timed out after 0\.30") as caught:
        env.invoke(1)
    assert caught.value.invocation is None
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@pytest.mark.parametrize(
    "answer", ["{1}", "object()", "float('nan')", "b''", "(a := []).append(a) or a"]
)
def test_an_answer_that_is_no_json_value(make_function: MakeFunction, answer: str) -> None:
    env = make_function(f"""
        def handler(event, context):
            return {answer} if event else "fine"
    """)
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke(1)
    assert caught.value.error_type == "Runtime.MarshalError"
    assert env.invoke(0) == "fine"


def test_exceptions_that_cannot_be_told(make_function: MakeFunction) -> None:
    env = make_function("""
        class Odd(Exception):
            def __str__(self):
                raise ValueError("no words")
        def handler(event, context):
            if event == 1:
                raise Odd
            if event == 2:
                raise ValueError("x" * 10_000_000)
            if event == 3:
                raise ValueError("\\ud800")
            if event == 4:
                handler(4, context)
    """)
    for event, kind in ((1, "Odd"), (2, "ValueError"), (3, "ValueError"), (4, "RecursionError")):
        with pytest.raises(nsbox.FunctionError) as caught:
            env.invoke(event)
        assert caught.value.error_type == kind
    assert env.invoke(0) is None


HOSTILE = """
import os, socket, struct, time
def frame(kind, number, data, size=None):
    return struct.pack("!cIQ", kind, len(data) if size is None else size, number) + data
def handler(event, context):
    number = event["number"]
    say = lambda *words: os.write(3, frame(*words))
    {code}
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    "code",
    [
        "os.write(3, b'x' * 64)",
        "os.write(3, os.urandom(64))",
        "say(b'A', number + 1, b'1')",
        "say(b'A', number - 1, b'1')",
        "say(b'A', number, b'', 1 << 31)",
        "say(b'A', number, b'', (6 << 20) + 101)",
        "say(b'Y', number, b'')",
        "say(b'Y', number, b'x')",
        "say(b'B', number, b'{}')",
        "say(b'S', number, b'{}')",
        "say(b'E', number, b'no json')",
        "say(b'E', number, b'[]')",
        "say(b'E', number, b'{}')",
        "say(b'E', number, b'null')",
        "say(b'E', number, b'[' * 100_000)",
        'say(b\'E\', number, b\'{"errorType": 1, "errorMessage": 2, "stackTrace": 3}\')',
        "say(b'X', number, b'999999999')",
        "say(b'X', number, b'-1')",
        "say(b'X', number, b'')",
        "say(b'X', number, b'4991')",  # stopped by SIGSTOP: no status of what has ended
        "say(b'X', number, b'65535')",  # continued
        "say(b'X', number, b'127')",
        "say(b'X', number, '\\u0663'.encode())",
        r"""say(b'E', number, b'{"errorType": "\\ud800", "errorMessage": ""}')""",
        """say(b'E', number, b'{"errorType": "E", "errorMessage": NaN, "stackTrace": []}')""",
        "os.write(3, frame(b'A', number, b'1') + frame(b'A', number, b'2'))",
        "os.write(3, frame(b'A', number, b'1') + b'x')",
        "socket.socket(fileno=3).shutdown(socket.SHUT_RDWR)",
    ],
)
@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_broken_rules(make_function: MakeFunction, code: str, reuse: str) -> None:
    env = make_function(HOSTILE.format(code=code), timeout=20 * PATIENCE, reuse=reuse)
    with pytest.raises(nsbox.EnvironmentDied):
        env.invoke({"number": 2})
    assert env.state is State.DEAD
    with pytest.raises(nsbox.EnvironmentStateError, match=r"its worker .*; nsbox killed it"):
        env.invoke({"number": 2})


def test_an_end_of_a_fork_where_there_are_none(make_function: MakeFunction) -> None:
    env = make_function(HOSTILE.format(code="say(b'X', number, b'256')"), timeout=20 * PATIENCE)
    with pytest.raises(nsbox.EnvironmentDied, match="answers what was not asked"):
        env.invoke({"number": 2})


def test_a_worker_without_its_socket(make_function: MakeFunction) -> None:
    env = make_function(HOSTILE.format(code="os.close(3)"), timeout=20 * PATIENCE)
    with pytest.raises(nsbox.EnvironmentDied, match="closed its socket"):
        env.invoke({"number": 2})
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@pytest.mark.parametrize(
    "answer",
    ["no json", "", "[" * 100_000, "\ud800", "NaN", "[-Infinity]", '{"a": Infinity}', '"\\ud800"',
     '["\\ud83d\\ude00\\ude00"]', '"\\ud83d\\\\\\ude00"', "[" * 513 + "]" * 513,
     '{"a":' * 513 + "1" + "}" * 513],
)  # fmt: skip
def test_an_answer_by_hand_that_is_no_json(make_function: MakeFunction, answer: str) -> None:
    code = f"say(b'A', number, {answer.encode(errors='surrogatepass')!r})"
    env = make_function(HOSTILE.format(code=code))
    with pytest.raises(nsbox.FunctionError) as caught:
        env.invoke({"number": 2})
    assert caught.value.error_type == "Runtime.MarshalError"
    assert env.last is not None
    with pytest.raises(nsbox.FunctionError, match="is no JSON"):
        env.last.json()


@pytest.mark.parametrize(
    "answer", ['"\\ud83d\\ude00"', '"\\\\ud800"', "[" * 512 + "]" * 512, '"' + "[" * 600 + '"']
)
def test_an_answer_by_hand_that_is_json(make_function: MakeFunction, answer: str) -> None:
    code = f"say(b'A', number, {answer.encode()!r})"
    env = make_function(HOSTILE.format(code=code))
    assert env.invoke({"number": 2}) == json.loads(answer)


DEEP = """
import sys, nsbox
sys.setrecursionlimit(1_000_000)
def refused(kind, call, value):
    try:
        call(value)
    except kind as error:
        assert "nested more than 512 deep" in str(error), error
    else:
        raise AssertionError(value)
version = nsbox.Function("app.handler", code=sys.argv[1]).publish()
with nsbox.ExecutionEnvironment(version) as env:
    refused(nsbox.FunctionError, env.invoke, {"number": 2})
with nsbox.ExecutionEnvironment(version) as env:
    event = []
    for _ in range(511):
        event = [event]
    assert env.invoke(event) == event
    refused(nsbox.ConfigError, env.invoke, [event])
    refused(nsbox.ConfigError, env.invoke_bytes, b"[" * 3_000_000)
    assert env.state is nsbox.State.READY
"""


def test_depth_is_bounded_whatever_the_recursion_limit_is(tmp_path: Path) -> None:
    say = (
        "if isinstance(event, list): return event\n    say(b'A', event['number'], b'[' * 3_000_000)"
    )
    source = HOSTILE.replace('    number = event["number"]\n', "").format(code=say)
    (tmp_path / "app.py").write_text(source)
    words = [sys.executable, "-c", DEEP, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 0, done.stderr


DEATHS = {
    "exit": ("os._exit(3)", "its worker had ended .exit status 3.; nsbox killed it"),
    "signal": ("os.kill(os.getpid(), 11)", "its worker had ended .SIGSEGV, not sent by nsbox."),
    "late": ("time.sleep(1000)", "an invocation timed out after 0.40 seconds; nsbox killed it"),
}


@EVERY_WAY
@pytest.mark.parametrize("name", DEATHS)
def test_after_a_death_the_next_call_says_why(
    make_function: MakeFunction, name: str, options: dict[str, str]
) -> None:
    code, cause = DEATHS[name]
    cause = cause.replace("its worker had", "(its worker|the fork of its worker) had")
    if options.get("reuse") == "reset":
        cause = cause.replace("SIGSEGV, not sent by nsbox", "signal: segmentation fault")
    source = f"import os, time\ndef handler(event, context):\n    {code}"
    env = make_function(source, **options, timeout=0.4 * PATIENCE)
    cause = cause.replace("0.40", f"{0.4 * PATIENCE:.2f}")
    with pytest.raises(nsbox.InvokeError):
        env.invoke(1)
    assert env.state is State.DEAD
    for call in (lambda: env.invoke(2), lambda: env.run(["true"]), env.init, env.freeze):
        with pytest.raises(nsbox.EnvironmentStateError, match=rf"is dead: {cause}"):
            call()
    usage = env.usage()
    assert usage.cpu_seconds is None or usage.cpu_seconds > 0
    assert usage.memory_peak_bytes is None or usage.memory_peak_bytes > 0


def test_after_an_import_that_failed(make_function: MakeFunction) -> None:
    env = make_function("{}['a']")
    with pytest.raises(nsbox.FunctionError):
        env.invoke(1)
    assert env.state is State.DEAD
    cause = r"its module was not imported .KeyError: 'a'.; nsbox killed it"
    with pytest.raises(nsbox.EnvironmentStateError, match=cause):
        env.invoke(1)


def test_a_worker_that_ends_between_two_calls_is_no_failure_of_the_second(
    make_function: MakeFunction,
) -> None:
    env = make_function("""
        import os, threading, time
        def handler(event, context):
            threading.Timer(0.05, os._exit, (3,)).start()
            return os.getpid()
    """)
    wait_until(psutil.Process(env.pid).children, "PID 1 has forked its worker")
    (worker,) = psutil.Process(env.pid).children()
    env.invoke(1)
    wait_until(lambda: is_over(worker.pid), "it has ended")
    with pytest.raises(nsbox.EnvironmentDied, match=r"its worker had ended .exit status 3."):
        env.invoke(2)
    assert env.state is State.DEAD


def test_a_call_of_an_environment_that_is_closed_meanwhile(make_function: MakeFunction) -> None:
    env = make_function("""
        import time
        def handler(event, context):
            print(1, flush=True)
            time.sleep(1000)
    """)
    failures: list[BaseException] = []
    is_called = threading.Event()

    def call() -> None:
        try:
            env.invoke(1, timeout=900, on_log=lambda *_: is_called.set())
        except BaseException as error:  # noqa: BLE001 - looked at below
            failures.append(error)

    env.init()
    thread = threading.Thread(target=call)
    thread.start()
    assert is_called.wait(60 * PATIENCE)
    env.close()
    thread.join()
    assert isinstance(failures[0], nsbox.EnvironmentDied)
    assert "it was closed" in str(failures[0])


def test_an_answer_before_it_was_asked(make_function: MakeFunction) -> None:
    """What one invocation says is never taken for the answer of the next."""
    env = make_function(
        """
        import os, struct, time
        def frame(kind, number, data):
            return struct.pack("!cIQ", kind, len(data), number) + data
        def handler(event, context):
            if event:
                os.write(3, frame(b"A", event, b'"true"'))
                os.write(3, frame(b"A", event + 1, b'"forged"'))
                time.sleep(1000)
            return "true"
        """,
        reuse="reset",
        timeout=20 * PATIENCE,
    )
    try:
        # Read at once with the first, seen before the next event, or killed before it was written.
        assert env.invoke(2) == "true"
        assert env.invoke(0) == "true"
    except nsbox.EnvironmentDied as error:
        assert "broke the rules" in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_an_answer_that_never_ends(make_function: MakeFunction, reuse: str) -> None:
    code = "say(b'A', number, b'[1, ', 1000)"
    env = make_function(HOSTILE.format(code=code), reuse=reuse)
    with pytest.raises(nsbox.InvokeTimeout):
        env.invoke({"number": 2}, timeout=0.5)
    wait_until(lambda: env.state is State.DEAD, "it is killed")


def test_an_import_that_talks_on_the_socket(make_function: MakeFunction) -> None:
    for data in (b"junk of any length", b"A" + bytes(12), b"Y" + bytes(12) + b"more"):
        env = make_function(f"import os, time\nos.write(3, {data!r})\ntime.sleep(1000)")
        with pytest.raises(nsbox.EnvironmentDied):
            env.invoke(1)
        wait_until(lambda: env.state is State.DEAD, "it is killed")  # noqa: B023 - called at once
