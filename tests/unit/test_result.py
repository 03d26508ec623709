# SPDX-License-Identifier: Apache-2.0
"""Result, Outcome, Usage, Protections: frozen values and what they say of themselves."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsbox import CommandFailed, Outcome, Protection, Protections, Result, Usage
from nsbox.errors import CommandStartError, NsboxError, SetupError, SyscallError

pytestmark = pytest.mark.static

LAYERS = Protections(
    (
        Protection("namespace.pid", True, "its own"),
        Protection("cgroup.memory", False, "no delegation"),
        Protection("cgroup.cpu", False, "no limit was asked for", wanted=False),
    )
)


def result(outcome: Outcome = Outcome.EXITED, returncode: int = 0, **more: object) -> Result:
    return Result(argv=("prog", "-x"), outcome=outcome, returncode=returncode, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("outcome", "returncode", "exit_code", "number", "ok"),
    [
        (Outcome.EXITED, 0, 0, None, True),
        (Outcome.EXITED, 3, 3, None, False),
        (Outcome.EXITED, 137, 137, None, False),  # an exit code is no signal
        (Outcome.SIGNALED, -11, None, signal.SIGSEGV, False),
        (Outcome.SIGNALED, -40, None, 40, False),  # a real-time signal has no name
        (Outcome.TIMED_OUT, -9, None, signal.SIGKILL, False),
        (
            Outcome.OOM_KILLED,
            0,
            0,
            None,
            False,
        ),  # a child died; that the parent went on is no success
        (Outcome.OUTPUT_LIMIT, 0, 0, None, False),
    ],
)
def test_exit_code_and_signal_exclude_each_other(
    outcome: Outcome, returncode: int, exit_code: int | None, number: int | None, ok: bool
) -> None:
    value = result(outcome, returncode)
    assert (value.exit_code, value.signal, value.ok) == (exit_code, number, ok)


def test_check_returns_the_result_or_raises_with_it() -> None:
    good = result()
    assert good.check() is good
    bad = result(Outcome.EXITED, 2, evidence="exit status 2")
    with pytest.raises(CommandFailed, match="'prog' failed: exit status 2") as caught:
        bad.check()
    assert caught.value.result is bad


def test_streams_are_bytes_with_text_helpers() -> None:
    value = result(stdout=b"caf\xc3\xa9 \xff", stderr=b"\xe2\x82\xac")
    assert value.text() == "caf\u00e9 \ufffd"
    assert value.stderr_text() == "\u20ac"
    with pytest.raises(UnicodeDecodeError):
        value.text(errors="strict")


@given(st.binary(), st.binary(), st.sampled_from(Outcome), st.integers(-64, 255))
def test_to_dict_is_json_and_loses_nothing(
    stdout: bytes, stderr: bytes, outcome: Outcome, returncode: int
) -> None:
    value = result(outcome, returncode, stdout=stdout, stderr=stderr, protections=LAYERS)
    back = json.loads(json.dumps(value.to_dict()))

    def decode(stream: str | dict[str, str]) -> bytes:
        if isinstance(stream, str):
            return stream.encode()
        return base64.b64decode(stream["base64"])

    assert decode(back["stdout"]) == stdout
    assert decode(back["stderr"]) == stderr
    assert Outcome(back["outcome"]) is outcome
    assert back["returncode"] == returncode
    assert (back["exit_code"] is None) == (back["signal"] is not None)
    assert back["argv"] == ["prog", "-x"]
    words = dataclasses.replace(result(), argv=("prog", os.fsdecode(b"\xff"))).to_dict()["argv"]
    assert words == ["prog", {"base64": base64.b64encode(b"\xff").decode()}]


def test_to_dict_has_every_field() -> None:
    made = result(protections=LAYERS, usage=Usage(wall_seconds=0.5)).to_dict()
    names = {item.name for item in dataclasses.fields(Result)}
    assert names <= set(made)
    assert made["usage"]["wall_seconds"] == 0.5
    assert set(made["usage"]) == {item.name for item in dataclasses.fields(Usage)}
    assert made["protections"]["cgroup.memory"] == {
        "name": "cgroup.memory", "in_force": False, "detail": "no delegation", "wanted": True,
    }  # fmt: skip


def test_results_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        result().outcome = Outcome.EXITED  # type: ignore[misc]


def test_cpu_seconds_needs_both_halves() -> None:
    assert Usage(cpu_user_seconds=1.0, cpu_system_seconds=0.5).cpu_seconds == 1.5
    assert Usage(cpu_user_seconds=1.0).cpu_seconds is None
    assert Usage().cpu_seconds is None


def test_protections_are_a_read_only_mapping() -> None:
    assert list(LAYERS) == ["namespace.pid", "cgroup.memory", "cgroup.cpu"]
    assert len(LAYERS) == 3
    assert LAYERS["namespace.pid"].in_force
    assert [layer.name for layer in LAYERS.missing] == ["cgroup.memory"]
    assert "seccomp" not in LAYERS
    assert LAYERS.get("seccomp") is None
    with pytest.raises(KeyError):
        LAYERS["seccomp"]
    with pytest.raises(TypeError):
        LAYERS["seccomp"] = LAYERS["namespace.pid"]  # type: ignore[index]


def test_outcome_values_are_words_for_json_and_shells() -> None:
    assert {outcome.value for outcome in Outcome} == {
        "exited", "signaled", "timed_out", "cpu_timed_out", "oom_killed", "output_limit",
        "seccomp_killed", "killed",
    }  # fmt: skip


def test_repr_leaves_out_the_long_part() -> None:
    assert "no delegation" not in repr(result(protections=LAYERS))


# -- messages of errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (SyscallError("mount", 1, "/proc"), "mount on /proc: Operation not permitted (EPERM)"),
        (SyscallError("setns", 22), "setns: Invalid argument (EINVAL)"),
        (SyscallError("x", 9999), "x: Unknown error 9999 (9999)"),
        (SetupError("clone", "no", errno=1, hint="Do so."), "step 'clone' failed: no. Do so."),
        (SetupError("clone", "no"), "step 'clone' failed: no"),
    ],
)
def test_message(error: NsboxError, text: str) -> None:
    assert str(error) == text


def test_system_call_errors_are_os_errors_of_one_type() -> None:
    error = SyscallError("open", 13, "/x")
    assert isinstance(error, OSError)
    assert type(error) is SyscallError, "not turned into PermissionError"
    assert (error.errno, error.syscall, error.filename) == (13, "open", "/x")


@pytest.mark.parametrize(("number", "code"), [(2, 127), (20, 127), (13, 126), (8, 126), (40, 126)])
def test_start_errors_have_the_shells_exit_codes(number: int, code: int) -> None:
    assert CommandStartError("prog", number, "why").exit_code == code
