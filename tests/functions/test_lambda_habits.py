# SPDX-License-Identifier: Apache-2.0
"""What functions know from AWS Lambda: names of handlers, and the root handler of `logging`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.functions.conftest import MakeFunction

import nsbox
from nsbox.functions.function import ReuseChoice, StartChoice

LINE = re.compile(r"\[(\w+)\]\t\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z\t([^\t]*)\t(.*)")


def _lines(log: bytes) -> list[tuple[str, ...]]:
    """Return level, request id and message of each line, all of which must have the format."""
    found = [LINE.fullmatch(line) for line in log.decode().splitlines()]
    assert all(found), log
    return [match.groups() for match in found if match]


# -- handlers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize(
    ("file", "handler"),
    [
        ("src/app.py", "src/app.handler"),
        ("src/app.py", "src.app.handler"),
        ("my-app.py", "my-app.handler"),
        ("my-functions/2nd/lambda.py", "my-functions/2nd/lambda.handler"),
    ],
)
def test_names_of_handlers(tmp_path: Path, file: str, handler: str, start: StartChoice) -> None:
    code = tmp_path / "code"
    (code / file).parent.mkdir(parents=True)
    (code / file).write_text(
        "import os\ndef handler(event, context): return [event, __file__, os.environ['_HANDLER']]"
    )
    version = nsbox.Function(handler, code=code, start=start).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke(1) == [1, f"/var/task/{file}", handler]


def test_a_handler_in_a_directory_of_an_importable_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with_slash").mkdir()
    (tmp_path / "with_slash/app.py").write_text("def handler(event, context): return __name__")
    monkeypatch.syspath_prepend(tmp_path)
    version = nsbox.Function("with_slash/app.handler").publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke(None) == "with_slash.app"


@pytest.mark.parametrize(
    ("handler", "kind", "words"),
    [
        ("time.handler", "Runtime.BuiltInModuleConflict", "built-in module time as a handler"),
        ("src/none.handler", "Runtime.ImportModuleError", "module 'src/none': No module named"),
        ("src/app.other", "Runtime.HandlerNotFound", "'other' missing on module 'src/app'"),
    ],
)
def test_no_such_handler(tmp_path: Path, handler: str, kind: str, words: str) -> None:
    (tmp_path / "src").mkdir()
    for file in ("src/app.py", "time.py"):
        (tmp_path / file).write_text("def handler(event, context): return event")
    version = nsbox.Function(handler, code=tmp_path).publish()
    with (
        nsbox.ExecutionEnvironment(version) as env,
        pytest.raises(nsbox.FunctionError, match=words) as caught,
    ):
        env.invoke(1)
    assert caught.value.error_type == kind


# -- logging -------------------------------------------------------------------------------------

SNIPPET = """
import logging
logger = logging.getLogger()
logger.setLevel(logging.INFO)
logger.info("at import")
def handler(event, context):
    logger.info("got %s", event)
    logging.getLogger("library").warning("of a library")
    logger.debug("not wanted")
"""


@pytest.mark.parametrize(
    ("start", "reuse", "preload"),
    [
        ("clone", "keep", []),
        ("clone", "reset", []),
        ("clone", "keep", ["logging"]),
        ("exec", "keep", []),
        ("exec", "reset", []),
    ],
)
def test_the_snippet_of_aws(
    make_function: MakeFunction, start: StartChoice, reuse: ReuseChoice, preload: list[str]
) -> None:
    env = make_function(SNIPPET, start=start, reuse=reuse, preload=preload)
    env.init()
    for number in (1, 2):
        invocation = env.invoke_bytes(b"%d" % number, request_id=f"id-{number}")
        assert _lines(invocation.stdout) == [
            ("INFO", f"id-{number}", f"got {number}"),
            ("WARNING", f"id-{number}", "of a library"),
        ]
        assert invocation.stderr == b""
        of_import = [("INFO", "", "at import")] if number == 1 else []
        assert _lines(invocation.init_stdout) == of_import


def test_what_is_imported_in_the_handler_logs_too(make_function: MakeFunction) -> None:
    env = make_function("""
        import sys
        AT_IMPORT = "logging" in sys.modules, len(sys.meta_path)
        def handler(event, context):
            import logging
            logging.basicConfig(level=logging.DEBUG)  # nothing: the root has a handler
            logging.warning("words")
            loader = logging.__loader__
            return [*AT_IMPORT, len(sys.meta_path), len(logging.getLogger().handlers),
                    logging.__spec__.name, "class LogRecord" in loader.get_source("logging"),
                    vars(loader).keys() == vars(sys.modules["json"].__loader__).keys()]
    """)
    for number in (1, 2):
        assert env.invoke(None, request_id=str(number)) == [False, 4, 3, 1, "logging", True, True]
        assert env.last is not None
        assert _lines(env.last.stdout) == [("WARNING", str(number), "words")]


def test_an_exception_in_the_log(make_function: MakeFunction) -> None:
    env = make_function("""
        import logging
        def handler(event, context):
            try:
                1 / 0
            except ZeroDivisionError:
                logging.exception("it failed")
    """)
    invocation = env.invoke_bytes(b"1", request_id="mine")
    first, *others = invocation.stdout.decode().splitlines()
    assert _lines(first.encode()) == [("ERROR", "mine", "it failed")]
    assert others[0] == "Traceback (most recent call last):"
    assert others[-1] == "ZeroDivisionError: division by zero"


def test_a_module_of_ones_own_named_logging(tmp_path: Path) -> None:
    (tmp_path / "logging.py").write_text("WORD = 'mine'")
    (tmp_path / "app.py").write_text(
        "import logging\ndef handler(event, context): return logging.WORD"
    )
    version = nsbox.Function("app.handler", code=tmp_path).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke(None) == "mine"


def test_logs_of_threads_and_through_a_pool(publish: Callable[..., nsbox.FunctionVersion]) -> None:
    version = publish("""
        import logging, threading
        logging.getLogger().setLevel(logging.INFO)
        def handler(event, context):
            thread = threading.Thread(target=logging.info, args=("in a thread",))
            thread.start()
            thread.join()
            return context.aws_request_id
    """)
    with nsbox.WarmPool(version, max_environments=1) as pool:
        for _ in range(2):
            invocation = pool.invoke_bytes(b"null")
            assert _lines(invocation.stdout) == [("INFO", invocation.request_id, "in a thread")]
