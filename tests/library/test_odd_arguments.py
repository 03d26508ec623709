# SPDX-License-Identifier: Apache-2.0
"""Arguments that make no sense: each is refused by a `ConfigError`, or means what it says."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support import publish_app

import nsbox
from nsbox.pool.settings import PoolSettings

ODD = [
    1e300, float("nan"), float("inf"), -1, -1.5, 2**31, 2**63, 2**64, 10**400, True, 0, -0.0, 1j,
    "", "x\0y", "\ud800", "\n", "1" * 5000, b"x", b"\0", [], (), {}, [1], ["a\0b"], [b"\xff"],
    {"a": 1}, {1: "a"}, {"a": "b\0"}, {"a\0": "b"}, {"a=b": "c"}, {"": "x"}, object(), range(3),
    nsbox.Outcome.EXITED,
]  # fmt: skip


def untyped(what: str, call: Callable[[Any], object], values: list[Any] = ODD) -> list[str]:
    """Return what of `call` with odd values was no error of nsbox's."""
    found = []
    for value in values:
        try:
            call(value)
        except (nsbox.NsboxError, TimeoutError):
            continue
        except Exception as error:  # noqa: BLE001 - the finding
            found.append(f"{what}, a {type(value).__name__}: {error!r:.80}")
    return found


def with_one(call: Callable[..., Any], name: str, **others: object) -> Callable[[Any], Any]:
    return lambda value: call(**others, **{name: value})


@pytest.mark.static
@pytest.mark.parametrize("kind", [nsbox.Limits, nsbox.Config, nsbox.Function, nsbox.Mount])
def test_fields(kind: type[Any], tmp_path: Path) -> None:
    (tmp_path / "app.py").touch()
    needed: dict[type[Any], dict[str, Any]] = {
        nsbox.Function: {"handler": "app.handler", "code": str(tmp_path)},
        nsbox.Mount: {"type": "bind", "source": str(tmp_path), "destination": "/data"},
    }
    others = needed.get(kind, {})
    found = []
    for field in dataclasses.fields(kind):
        if field.init:
            rest = {name: value for name, value in others.items() if name != field.name}
            found += untyped(field.name, with_one(kind, field.name, **rest))
    assert found == []


ENTRY: dict[str, Any] = {"names": ["read"], "action": "SCMP_ACT_ALLOW"}
ARGUMENT: dict[str, Any] = {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}


def profile(where: str, key: str, value: object) -> dict[str, Any]:
    """Return a profile with one odd value, of the profile, its entry, or a part of that."""
    whole: dict[str, Any] = {"defaultAction": "SCMP_ACT_ERRNO"}
    if where == "profile":
        return whole | {key: value}
    part: dict[str, Any] = {"entry": {key: value}, "args": {"args": [ARGUMENT | {key: value}]}}
    return whole | {"syscalls": [ENTRY | part.get(where, {where: {key: value}})]}


PLACES = [
    *(("profile", key) for key in (
        "defaultAction", "defaultErrnoRet", "architectures", "archMap", "flags", "syscalls")),
    *(("entry", key) for key in (*ENTRY, "errnoRet", "args", "includes", "excludes")),
    *((side, key) for side in ("includes", "excludes") for key in ("caps", "arches", "minKernel")),
    *(("args", key) for key in (*ARGUMENT, "valueTwo")),
]  # fmt: skip


@pytest.mark.static
def test_profiles() -> None:
    read = nsbox.SeccompPolicy.from_oci
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    values = [*ODD, [[]], [{}], ["amd64", []], 10**5000, deep, "[" * 100_000]
    found = untyped("source", read, [*values, '{"x": ' + "1" * 9999 + "}"])
    for where, key in PLACES:
        found += untyped(key, read, [profile(where, key, v) for v in values])
    for name in ("allow_dangerous", "machine"):
        found += untyped(name, with_one(partial(read, profile("profile", "flags", [])), name))
    assert found == []


@pytest.mark.needs("userns")
def test_pools(tmp_path: Path) -> None:
    version = publish_app(tmp_path, "def handler(event, context): return event")

    def make(**settings: Any) -> None:
        nsbox.WarmPool(version, **settings).close()

    found = []
    for name in PoolSettings.__annotations__:
        if name != "blank":  # the old name of `standby`
            found += untyped(name, with_one(make, name))
    with nsbox.ExecutionEnvironment(version) as env:
        call: Callable[..., Any] = partial(env.invoke, 1)
        for name in set(inspect.signature(env.invoke).parameters) - {"event"}:
            found += untyped(f"invoke {name}", with_one(call, name))
    with nsbox.WarmPool(version, max_environments=1) as pool:
        call = partial(pool.invoke, 1)
        for name in ("timeout", "tenant", "env", "files", "credentials", "role"):
            found += untyped(f"pool's invoke {name}", with_one(call, name))
        found += untyped("event", pool.invoke) + untyped("payload", pool.invoke_bytes)
        found += untyped("events", lambda events: list(pool.map(events)))
        found += untyped("map timeout", lambda seconds: list(pool.map([1], timeout=seconds)))
        found += untyped("submit", lambda event: pool.submit(event).result(30))
        found += untyped("provision", pool.provision)
    assert found == []


@pytest.mark.needs("userns")
def test_calls(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env()

    def popen(**arguments: Any) -> None:
        env.popen(["true"], **arguments).close()

    # A number may be an open descriptor of this process, or end the test with what it is about.
    streams = [value for value in ODD if not isinstance(value, int) or value > 1 << 20]
    found = untyped("argv", env.run) + untyped("argv[0]", lambda value: env.run([value]))
    for name in ("input", "timeout", "env", "cwd", "cpu_time"):
        found += untyped(f"run {name}", with_one(partial(env.run, ["true"]), name))
    for name in ("stdin", "stdout", "stderr"):
        found += untyped(f"run {name}", with_one(partial(env.run, ["true"]), name), [*streams, -1])
    found += untyped("popen stdin", with_one(popen, "stdin"), streams)
    found += untyped("popen tty", with_one(popen, "tty"))
    found += untyped("read path", env.read_file)
    found += untyped("max_bytes", with_one(partial(env.read_file, "/etc/passwd"), "max_bytes"))
    found += untyped("write path", partial(env.write_file, data=b""))
    found += untyped("data", partial(env.write_file, "/tmp/x"))
    found += untyped("mode", with_one(partial(env.write_file, "/tmp/x", b""), "mode"))
    with env.popen(["true"], stdin=None, stdout=None, stderr=None) as process:
        found += untyped("signal", process.send_signal)
        process.wait(1e300)
        found += untyped("wait", process.wait)
    found += untyped("standby", nsbox.set_standby, [value for value in ODD if value != 0])
    assert found == []
