# SPDX-License-Identifier: Apache-2.0
"""What comes with one invocation, and is gone after it: variables, files, credentials."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import pytest
from tests.functions.conftest import MakeFunction
from tests.support import wait_until

import nsbox
from nsbox import State
from nsbox.functions.function import ReuseChoice

LOOK = """
import os
MODULE = dict(os.environ)
BOUND = os.listdir("/tmp")  # the interpreter's prefix may be there
def tree():
    found = [f"/tmp/{name}" for name in os.listdir("/tmp") if name not in BOUND]
    return sorted(found + [os.path.join(top, name) for place in found
                           for top, folders, files in os.walk(place) for name in folders + files])
def handler(event, context):
    if event == "raise":
        raise ValueError
    if isinstance(event, str) and event.startswith("exec:"):
        exec(event[5:])
    found = {}
    for place in tree():
        if os.path.isfile(place) and os.access(place, os.R_OK):
            with open(place, "rb") as file:
                found[place] = file.read().hex()
    return {"env": {name: value for name, value in os.environ.items() if MODULE.get(name) != value},
            "gone": sorted(set(MODULE) - set(os.environ)), "files": found, "tree": tree()}
"""
NOTHING: dict[str, object] = {"env": {}, "gone": [], "files": {}, "tree": []}
KEYS = nsbox.Credentials(access_key_id="AK", secret_access_key="SK", session_token="ST")
POLICIES = pytest.mark.parametrize("reuse", ["keep", "reset"])


# -- variables -----------------------------------------------------------------------------------


@POLICIES
def test_variables_are_of_one_invocation(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(LOOK, env={"BASE": "1", "OTHER": "2"}, reuse=reuse)
    added = {"BASE": "over", "NEW": "\xfc=\n\u20ac", "EMPTY": "", "ODD": os.fsdecode(b"\xff")}
    # What is no UTF-8 stays what it is, byte for byte.
    look = "exec:os.environ['ODD'] = os.environb[b'ODD'].hex() if 'ODD' in os.environ else ''"
    assert env.invoke(look, env=added)["env"] == {**added, "ODD": "ff"}
    assert env.invoke("look") == NOTHING
    assert env.invoke_bytes(b'"look"', env={"X": "1"}).json()["env"] == {"X": "1"}
    assert asyncio.run(env.invoke_async("look", env={"X": "2"}))["env"] == {"X": "2"}
    with pytest.raises(nsbox.FunctionError):
        env.invoke("raise", env={"X": "1"})
    assert env.invoke("look") == NOTHING


def test_variables_that_the_handler_changes_are_as_before(make_function: MakeFunction) -> None:
    env = make_function(LOOK, env={"BASE": "1"})
    change = "exec:os.environ['BASE'] = os.environ['NEW'] = 'changed'"
    assert env.invoke(change, env={"BASE": "2", "NEW": "3"})["env"] == {
        "BASE": "changed",
        "NEW": "changed",
    }
    assert env.invoke("look") == NOTHING
    env.invoke("exec:os.environ['KEPT'] = '1'", env={"X": "1"})
    assert env.invoke("look")["env"] == {"KEPT": "1"}, "what the handler does itself is kept"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_LAMBDA_FUNCTION_NAME": "x"}, "reserved; choose"),
        ({"_HANDLER": "x"}, "'_HANDLER' is reserved"),
        ({"AWS_REGION": "x"}, "reserved"),
        ({"LAMBDA_TASK_ROOT": "/"}, "reserved"),
        ({"AWS_SECRET_ACCESS_KEY": "hidden"}, "give credentials="),
        ({"AWS_SESSION_TOKEN": "hidden"}, "give credentials="),
        ({"A=B": "x"}, "variable name"),
        ({"": "x"}, "variable name"),
        ({"A": 1}, "must be text"),
        ({"A": "\0"}, "NUL"),
        ({"A": "x" * 4094}, "4097 bytes"),
        ([("A",)], "mapping"),
    ],
)
def test_wrong_variables(make_function: MakeFunction, variables: Any, words: str) -> None:
    env = make_function(LOOK)
    with pytest.raises(nsbox.ConfigError, match=words) as caught:
        env.invoke("look", env=variables)
    assert "hidden" not in str(caught.value)
    assert env.state is State.READY
    assert env.last is None, "nothing was sent"
    assert env.invoke("look", env={"A": "x" * 4093})["env"] == {"A": "x" * 4093}


# -- credentials ---------------------------------------------------------------------------------


@POLICIES
def test_credentials_are_of_one_invocation(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(LOOK, reuse=reuse, name="reader")
    told = {"AWS_ACCESS_KEY_ID": "AK", "AWS_SECRET_ACCESS_KEY": "SK", "AWS_SESSION_TOKEN": "ST"}
    assert env.invoke("look", credentials=KEYS)["env"] == told
    assert env.invoke("look") == NOTHING
    sts = {"AccessKeyId": "AK", "SecretAccessKey": "SK", "SessionToken": "ST"}
    assert env.invoke("look", credentials=sts, env={"X": "1"})["env"] == {**told, "X": "1"}  # type: ignore[arg-type]
    roles: list[str] = []

    def provider(role: str) -> nsbox.Credentials:
        roles.append(role)
        return KEYS

    assert env.invoke_bytes(b'"look"', credentials=provider).json()["env"] == told
    found = asyncio.run(env.invoke_async("look", credentials=provider, role="other"))
    assert found["env"] == told
    assert roles == ["reader", "other"]
    assert env.invoke("look") == NOTHING


def test_credentials_that_are_none(make_function: MakeFunction) -> None:
    env = make_function(LOOK)
    known: dict[str, nsbox.Credentials] = {}
    with pytest.raises(nsbox.CredentialsError, match=r"role 'r': KeyError") as caught:
        env.invoke("look", credentials=known.__getitem__, role="r")
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.role == "r"
    with pytest.raises(nsbox.ConfigError, match="got int"):
        env.invoke("look", credentials=7)  # type: ignore[arg-type]
    assert env.invoke("look") == NOTHING


# -- files ---------------------------------------------------------------------------------------


@POLICIES
def test_files_are_of_one_invocation(make_function: MakeFunction, reuse: str) -> None:
    env = make_function(LOOK, reuse=reuse)
    files: dict[str, bytes] = {
        "a": b"1",
        "in/deep/data.csv": b"x" * 300_000,
        "in/\xfc \n": b"",
        ".hidden": b"\0",
    }
    for _ in range(2):
        found = env.invoke("look", files=files)
        assert found["files"] == {f"/tmp/{name}": data.hex() for name, data in files.items()}
        assert set(found["tree"]) == {f"/tmp/{n}" for n in (*files, "in", "in/deep")}
        assert env.invoke("look") == NOTHING
    assert env.invoke_bytes(b'"look"', files={"b": b"2"}).json()["files"] == {"/tmp/b": "32"}
    assert asyncio.run(env.invoke_async("look", files={"c": b"3"}))["files"] == {"/tmp/c": "33"}
    with pytest.raises(nsbox.FunctionError):
        env.invoke("raise", files={"d": b"4"})
    assert env.invoke("look") == NOTHING
    assert env.state is State.READY


def test_files_on_a_loop_are_gone_before_the_next_event(make_function: MakeFunction) -> None:
    env = make_function(LOOK)
    files = {f"in/{number}": b"x" * 10_000 for number in range(100)}

    async def main() -> None:
        for _ in range(5):
            assert len((await env.invoke_async("look", files=files))["files"]) == 100
            assert await env.invoke_async("look") == NOTHING

    asyncio.run(main())


def test_files_of_an_invocation_that_is_killed(make_function: MakeFunction) -> None:
    env = make_function("import time\ndef handler(event, context): time.sleep(event)")
    with pytest.raises(nsbox.InvokeTimeout):
        env.invoke(1000, timeout=0.1, files={"a": b"1"})
    wait_until(lambda: env.state is State.DEAD, "it is killed")
    with pytest.raises(nsbox.EnvironmentStateError, match="dead"):
        env.invoke(0, files={"a": b"1"})
    other = make_function("import time\ndef handler(event, context): time.sleep(event)")

    async def main() -> None:
        task = asyncio.ensure_future(other.invoke_async(1000, timeout=900, files={"a": b"1"}))
        await asyncio.to_thread(wait_until, lambda: placed(other), "the file is there", 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def placed(env: nsbox.ExecutionEnvironment) -> bool:
    try:
        return env.read_file("/tmp/a") == b"1"
    except nsbox.SyscallError:
        return False


def test_files_are_gone_for_who_looks_through_pid_1(make_function: MakeFunction) -> None:
    env = make_function(LOOK)
    env.invoke("look", files={"a": b"1"})
    with pytest.raises(nsbox.SyscallError, match="ENOENT"):
        env.read_file("/tmp/a")


def test_files_beside_what_is_kept(make_function: MakeFunction) -> None:
    env = make_function(LOOK)
    env.invoke("exec:os.makedirs('/tmp/in'); open('/tmp/in/own', 'w').write('1')")
    assert set(env.invoke("look", files={"in/given": b"2"})["files"]) == {
        "/tmp/in/own",
        "/tmp/in/given",
    }
    assert env.invoke("look")["tree"] == ["/tmp/in", "/tmp/in/own"]
    # What the function makes of a file is its own: it may remove it, or put another thing there.
    env.invoke("exec:os.remove('/tmp/x'); os.mkdir('/tmp/x')", files={"x": b"1", "y": b"1"})
    assert env.invoke("look")["tree"] == ["/tmp/in", "/tmp/in/own", "/tmp/x"]


@pytest.mark.parametrize(
    "planted",
    [
        "os.symlink('/tmp/victim', '/tmp/name')",
        "os.link('/tmp/victim', '/tmp/name')",
        "os.mkfifo('/tmp/name')",
        "open('/tmp/name', 'w').write('old'); os.chmod('/tmp/name', 0)",
    ],
)
def test_what_is_planted_is_replaced(make_function: MakeFunction, planted: str) -> None:
    env = make_function(LOOK)
    env.invoke(f"exec:open('/tmp/victim', 'w').write('v'); {planted}")
    found = env.invoke("look", files={"name": b"new"})
    assert found["files"] == {"/tmp/name": b"new".hex(), "/tmp/victim": b"v".hex()}
    assert env.invoke("look")["tree"] == ["/tmp/victim"]


@pytest.mark.parametrize(
    ("planted", "error"),
    [
        ("os.symlink('/dev/shm', '/tmp/in')", "ENOTDIR"),
        ("os.makedirs('/tmp/in/name')", "EISDIR"),
        ("open('/tmp/in', 'w').close()", "ENOTDIR"),
        ("os.mkdir('/tmp/in', 0)", "EACCES"),
    ],
)
def test_planted_ways_are_not_gone(make_function: MakeFunction, planted: str, error: str) -> None:
    """The call fails, and the environment with it: none serves with half of its files."""
    env = make_function(LOOK)
    env.invoke(f"exec:{planted}")
    with pytest.raises(nsbox.SyscallError, match=f"in/name.*{error}"):
        env.invoke("look", files={"in/name": b"secret"})
    wait_until(lambda: env.state is State.DEAD, "it is killed")


def test_binds_below_tmp_are_not_entered(
    publish: Callable[..., nsbox.FunctionVersion], tmp_path: Any
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    mount = nsbox.Mount.bind(shared, "/tmp/shared", rw=True)
    version = publish(LOOK, mounts=[mount], allow_missing={"idmapped_mounts"})
    with nsbox.ExecutionEnvironment(version) as env:
        with pytest.raises(nsbox.SyscallError, match="EXDEV"):
            env.invoke("look", files={"shared/name": b"1"})
        assert list(shared.iterdir()) == []


def test_more_than_there_is_room_for(make_function: MakeFunction) -> None:
    env = make_function(LOOK, tmp_size="1M")
    with pytest.raises(nsbox.SyscallError, match="ENOSPC"):
        env.invoke("look", files={"a": bytes(2 << 20)})
    wait_until(lambda: env.state is State.DEAD, "it is killed")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"/etc/passwd": b""}, "relative"),
        ({"../x": b""}, "relative"),
        ({"a/../../x": b""}, "relative"),
        ({"./x": b""}, "relative"),
        ({"a//b": b""}, "relative"),
        ({"a/": b""}, "relative"),
        ({"": b""}, "relative"),
        ({"a\0b": b""}, "NUL"),
        ({"\udc80": b""}, "no UTF-8"),
        ({"x" * 256: b""}, "too long"),
        ({"/".join(["d"] * 17): b""}, "too long"),
        ({"/".join(["d" * 200] * 6): b""}, "too long"),
        ({"a": "text"}, "must be bytes"),
        ({"a": b"", "a/b": b""}, "'a' is a file"),
        ({str(n): b"" for n in range(257)}, "257 files"),
        ({"a": bytes(33 << 20), "b": bytes(32 << 20)}, "more than 67108864"),
        ([("a", b"")], "mapping"),
        ({7: b""}, "must be text"),
    ],
)
def test_wrong_files(files: Any, words: str) -> None:
    from nsbox.functions.request import InvocationRequest

    with pytest.raises(nsbox.ConfigError, match=words):
        InvocationRequest(b"{}", files=files)


# -- plain programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", ["keep", "reset", "never"])
def test_plain_programs_have_the_same(reuse: ReuseChoice, tmp_path: Any) -> None:
    files = "$(find /tmp -xdev -type f)"
    show = f'printf "[\\"%s\\",\\"%s\\",\\"%s\\"]" "$A" "$AWS_SECRET_ACCESS_KEY" "{files}"'
    function = nsbox.Function(command=["sh", "-c", show], env={"A": "1"}, reuse=reuse)
    version = function.publish(tmp_path / "store")
    env = nsbox.ExecutionEnvironment(version)
    try:
        found = env.invoke({}, env={"A": "2"}, credentials=KEYS, files={"in/x": b"1"})
        assert found == ["2", "SK", "/tmp/in/x"]
        if reuse == "never":
            assert env.state is State.CLOSED
            return
        assert env.invoke({}) == ["1", "", ""]
        found = asyncio.run(env.invoke_async({}, files={"y": b"1"}, env={"B": "1"}))
        assert found == ["1", "", "/tmp/y"]
        assert env.invoke_bytes(b"{}").json() == ["1", "", ""]
    finally:
        env.close()
