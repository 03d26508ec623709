# SPDX-License-Identifier: Apache-2.0
"""Exceptions, results and values cross a process pool, and are copied, as what they are."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE

import nsbox
from nsbox import errors

INVOCATION = nsbox.Invocation(
    request_id="r", payload=b'{"errorType": "E"}', stderr=b"log", duration_seconds=0.25
)
RESULT = nsbox.Result(
    argv=("false",),
    outcome=nsbox.Outcome.EXITED,
    returncode=1,
    stderr=b"\xff",
    evidence="exit status 1",
    usage=nsbox.Usage(wall_seconds=0.5),
    protections=nsbox.Protections((nsbox.Protection("seccomp", True, "default"),)),
)
EXAMPLES: list[errors.NsboxError] = [
    errors.NsboxError("a", 1),
    errors.ConfigError("memory_max: no"),
    errors.UnsupportedHostError("cgroup.memory", "no delegation", "ask root"),
    errors.SetupError("clone", "no", errno=1, hint="doctor"),
    errors.DescriptorsExhausted("this process", 200, 256, "raise it"),
    errors.LauncherError("gone"),
    errors.StoreError("/store", "spoiled"),
    errors.CredentialsError("role", "none"),
    errors.SyscallError("pivot_root", 13, "/x"),
    errors.SyscallError("pivot_root", 13),
    errors.EnvironmentStateError("closed"),
    errors.CommandStartError("prog", 2, "No such file"),
    errors.InvokeError("no"),
    nsbox.FunctionError("KeyError", "'x'", ["  File\n"], INVOCATION),
    nsbox.FunctionError("KeyError", "'x'"),
    nsbox.InvokeTimeout("late", INVOCATION),
    nsbox.EnvironmentDied("gone", nsbox.Outcome.OOM_KILLED),
    errors.PoolError("no"),
    errors.Throttled("full", reason="full", retry_after=2.0),
    errors.PoolTimeout("late"),
    errors.PoolClosed("closed"),
    errors.CleanupError(["/sys/fs/cgroup/x"]),
    nsbox.CommandFailed(RESULT),
]
WAYS: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *(
        lambda value, protocol=protocol: pickle.loads(pickle.dumps(value, protocol))  # noqa: S301
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    ),
]


def seen(error: BaseException) -> dict[str, Any]:
    """All that can be seen of an exception."""
    names = ("errno", "strerror", "filename", "args")
    attributes = {name: getattr(error, name, None) for name in names}
    return {**attributes, **vars(error), "class": type(error), "str": str(error)}


def test_every_class_has_an_example() -> None:
    public = [getattr(nsbox, name) for name in nsbox.__all__]
    classes = {
        kind for kind in public if inspect.isclass(kind) and issubclass(kind, errors.NsboxError)
    }
    assert classes == {type(error) for error in EXAMPLES}


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_exceptions_are_copied_whole(error: errors.NsboxError) -> None:
    error.add_note("a note")
    for way in WAYS:
        again = way(error)
        assert again is not error
        assert seen(again) == seen(error)
    del error.__notes__


def test_subclasses_of_others_are_copied_too() -> None:
    again = pickle.loads(pickle.dumps(Mine(7, "more")))  # noqa: S301
    assert (type(again), again.number, str(again)) == (Mine, 7, "no place: more")


class Mine(errors.PoolError):
    def __init__(self, number: int, detail: str) -> None:
        super().__init__(f"no place: {detail}")
        self.number = number


def test_values_are_copied_and_equal(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text("def handler(event, context): return event")
    limits = nsbox.Limits(memory_max="64M", cpu_max=0.5)
    function = nsbox.Function("app.handler", code=code, layers=[code], limits=limits)
    version = function.publish(tmp_path / "store")
    values: list[Any] = [
        RESULT,
        INVOCATION,
        limits,
        nsbox.Config(limits=limits, mounts=(nsbox.Mount.bind("/usr/share", "/data"),)),
        nsbox.IoMax(device="8:0", rbps=1 << 20),
        function,
        version,
        version.for_tenant("a"),
        nsbox.SeccompPolicy.strict(),
        nsbox.Credentials(
            access_key_id="a", secret_access_key="b", expires_at=datetime(2030, 1, 1, tzinfo=UTC)
        ),
        nsbox.PoolStats(Calls=1),
        nsbox.PoolEvent(kind="created", environment="e", function="f", version="v"),
        *nsbox.State,
        *nsbox.Outcome,
        *nsbox.Retirement,
    ]
    for value in values:
        for way in WAYS:
            assert way(value) == value
    again = pickle.loads(pickle.dumps(version))  # noqa: S301
    assert again.code_path == version.code_path
    again.verify()


POOL = """
import multiprocessing
import pathlib
import sys
from concurrent.futures import ProcessPoolExecutor

import nsbox

def fail(what, code):
    if what == "command":
        return nsbox.run(["false"], check=True)
    if what == "start":
        return nsbox.run(["no-such-program"])
    if what == "config":
        return nsbox.Limits(memory_max="lots")
    if what == "result":
        return nsbox.run(["echo", "fig"])
    version = nsbox.Function("app.handler", code=code, timeout=0.3).publish()
    with nsbox.ExecutionEnvironment(version) as env:
        return env.invoke(what)

if __name__ == "__main__":
    method, code = sys.argv[1:]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        result = pool.submit(fail, "result", code).result(60)
        assert (result.stdout, result.protections["seccomp"].in_force) == (b"fig\\n", True)
        error = pool.submit(fail, "command", code).exception(60)
        assert type(error) is nsbox.CommandFailed, error
        assert error.result.exit_code == 1
        error = pool.submit(fail, "start", code).exception(60)
        assert (error.argv0, error.exit_code) == ("no-such-program", 127)
        error = pool.submit(fail, "config", code).exception(60)
        assert type(error) is nsbox.ConfigError, error
        error = pool.submit(fail, "boom", code).exception(60)
        assert (error.error_type, error.message) == ("ZeroDivisionError", "division by zero")
        assert b"ZeroDivisionError" in error.invocation.payload
        error = pool.submit(fail, "for ever", code).exception(60)
        assert type(error) is nsbox.InvokeTimeout, error
        assert error.invocation.status == "timeout"
        version = nsbox.Function("app.handler", code=code).publish()
        assert pool.submit(pathlib.Path.exists, pathlib.Path(version.code_path)).result(60)
        assert pool.submit(nsbox.FunctionVersion.verify, version).result(60) is None
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_they_cross_a_process_pool(tmp_path: Path, method: str) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text("def handler(event, _):\n  while event: 1 / len(event[4:])\n")
    script = tmp_path / "script.py"
    script.write_text(POOL)
    words = [sys.executable, "-W", "error", str(script), method, str(code)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.needs("userns")
def test_what_is_of_one_process_is_refused_by_name() -> None:
    """As by Ray and Dask, which pickle whatever a task is given."""
    with nsbox.WarmPool() as pool, nsbox.ExecutionEnvironment() as env:
        handle = nsbox.AsyncWarmPool()
        handle._pool = pool
        with env.popen(["true"]) as process:
            for kept, remedy in (
                (pool, "make one there"),
                (handle, "make one there"),
                (env, "make one there"),
                (process, "send its Result"),
            ):
                for send in (pickle.dumps, copy.copy, copy.deepcopy):
                    if (kept, send) != (handle, copy.copy):  # copies no pool
                        with pytest.raises(TypeError, match=f"belongs to the process .*{remedy}"):
                            send(kept)
