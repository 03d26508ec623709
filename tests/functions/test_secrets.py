# SPDX-License-Identifier: Apache-2.0
"""A function's secrets are in its own environment alone; and how many functions leave nothing."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from tests import leaks
from tests.functions.conftest import MakeFunction
from tests.support import name_of, wait_until

import nsbox
from nsbox.launcher.server import TEMPLATES_KEPT
from nsbox.linux import proc
from nsbox.supervisor.launcher import get_launcher


@pytest.fixture
def one_standby() -> Iterator[None]:
    nsbox.set_standby(1)
    yield
    nsbox.set_standby(0)
    get_launcher().companions.close()


def holds(pid: int, words: list[bytes]) -> list[bytes]:
    """Return those of `words` that are in a process's memory."""
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
            return [word for data in regions(maps, memory) for word in words if word in data]
    except (FileNotFoundError, ProcessLookupError):
        return []  # a fork that has answered and ended: by open, or by read (ESRCH)


def regions(maps: IO[str], memory: IO[bytes]) -> Iterator[bytes]:
    """Yield what can be read of each mapping."""
    for line in maps:
        span, modes = line.split(maxsplit=2)[:2]
        first, last = (int(word, 16) for word in span.split("-"))
        if modes[0] != "r" or line.endswith(("[vvar]\n", "[vsyscall]\n")):
            continue
        memory.seek(first)
        data = bytearray()
        while len(data) < last - first:
            try:
                more = memory.read(last - first - len(data))
            except OSError:
                break  # a page behind the end of its file
            if not more:
                break
            data += more
        yield bytes(data)


def children_of(parent: int) -> list[int]:
    return [process.pid for process in leaks.children(parent)]


def everything_below(pid: int) -> list[int]:
    return [item for child in children_of(pid) for item in (child, *everything_below(child))]


@pytest.mark.needs("root")
@pytest.mark.usefixtures("one_standby")
@pytest.mark.parametrize("reuse", ["keep", "reset"])
def test_secrets_are_in_no_other_process(make_function: MakeFunction, reuse: str) -> None:
    env_word, event_word, code_word = (f"SECRET-{secrets.token_hex(16)}" for _ in range(3))
    first = make_function(
        f"""
        import os
        KEPT = "{code_word}"
        EVENTS = []
        def handler(event, context):
            EVENTS.append(event)
            return [os.environ["WORD"], event, KEPT]
        """,
        env={"WORD": env_word},
        reuse=reuse,
    )
    assert first.invoke(event_word) == [env_word, event_word, code_word]
    # What comes with one invocation goes the same way.
    late_word, key_word, file_word = (f"SECRET-{secrets.token_hex(16)}" for _ in range(3))
    first.invoke(
        event_word,
        env={"LATE": late_word},
        credentials=nsbox.Credentials(access_key_id="AK", secret_access_key=key_word),
        files={"in/file": file_word.encode()},
    )
    words = [
        word.encode() for word in (env_word, event_word, code_word, late_word, key_word, file_word)
    ]
    inside = everything_below(first.pid)
    held = {word for pid in inside for word in holds(pid, words)}
    # The event of a reset one was in a fork that has ended; else the search would find nothing.
    assert {words[0], words[2]} <= held
    assert reuse == "reset" or words[1] in held
    second = make_function("def handler(event, context): return event")
    assert second.invoke(1) == 1
    launcher = get_launcher().pid
    wait_until(lambda: len(standby_pids()) > 0, "a standby environment is born")
    others = [launcher, *everything_below(launcher)]
    others = [pid for pid in others if pid not in inside]
    # PID 1 writes the files, and is not told the rest.
    assert first.pid in others
    assert second.pid in others
    assert set(standby_pids()) <= set(others)
    names = {leaks.processes()[pid].name for pid in children_of(launcher)}
    assert "nsbox-template" in names
    found = {pid: set(holds(pid, words)) for pid in others}
    found[first.pid] -= {words[5]}
    assert found == {pid: set() for pid in others}


def standby_pids() -> list[int]:
    kept = {f"nsbox-{link.env_id}" for kind in get_launcher().companions.values() for link in kind}
    processes = leaks.processes()
    return [pid for pid, process in processes.items() if process.name in kept]


@pytest.mark.usefixtures("one_standby")
def test_a_standby_environment_is_of_no_version(
    publish: Callable[..., nsbox.FunctionVersion],
) -> None:
    source = "import os\ndef handler(event, context): return [%d, os.listdir('/var/task')]"
    versions = [publish(source % number) for number in (1, 2)]
    taken = 0
    for number in (0, 1, 0, 1):
        known = {link.env_id for kind in get_launcher().companions.values() for link in kind}
        with nsbox.ExecutionEnvironment(versions[number]) as env:
            taken += env.id in known
            assert env.invoke(None) == [number + 1, ["app.py"]]
    assert taken == 3, "all but the first"


# -- preload -------------------------------------------------------------------------------------


def test_preloaded_modules_are_there_before_the_import(make_function: MakeFunction) -> None:
    source = """
        import sys
        BEFORE = "fractions" in sys.modules
        def handler(event, context):
            from fractions import Fraction
            return [BEFORE, str(Fraction(event))]
    """
    assert make_function(source).invoke("0.5") == [False, "1/2"]
    assert make_function(source, preload=["fractions"]).invoke("0.5") == [True, "1/2"]


def test_a_preloaded_module_that_is_missing(publish: Callable[..., nsbox.FunctionVersion]) -> None:
    version = publish("def handler(event, context): return event", preload=["not_there_at_all"])
    with pytest.raises(nsbox.NsboxError, match="not_there_at_all"):
        nsbox.ExecutionEnvironment(version)


def test_the_template_that_was_used_last_is_kept(
    publish: Callable[..., nsbox.FunctionVersion],
) -> None:
    def templates() -> dict[str, int]:
        found = {}
        for pid in proc.children(get_launcher().pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if name_of(pid) == "nsbox-template" and b"template" in words:
                found[words[words.index(b"template") + 2].decode()] = pid
        return found

    modules = ["bisect", "colorsys", "keyword", "opcode", "token"]
    versions = [publish("def handler(event, context): pass", preload=[name]) for name in modules]
    assert len(versions) == TEMPLATES_KEPT + 1
    for version in versions[:-1]:
        nsbox.ExecutionEnvironment(version).close()
    before = templates()["python,bisect"]
    nsbox.ExecutionEnvironment(versions[0]).close()
    nsbox.ExecutionEnvironment(versions[-1]).close()
    kept = templates()
    assert kept["python,bisect"] == before
    assert "python,colorsys" not in kept
    assert "python,token" in kept


# -- many ----------------------------------------------------------------------------------------


def memory_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def warm(env: nsbox.ExecutionEnvironment, count: int) -> None:
    for number in range(count):
        assert env.invoke(number) == number


def never(version: nsbox.FunctionVersion, count: int) -> None:
    for number in range(count):
        with nsbox.ExecutionEnvironment(version) as env:
            assert env.invoke(number) == number


@pytest.mark.parametrize(
    ("warm_calls", "births"),
    [(500, 30), pytest.param(10_000, 500, marks=pytest.mark.slow)],
)
def test_many_leave_nothing(
    publish: Callable[..., nsbox.FunctionVersion], warm_calls: int, births: int
) -> None:
    """Counts are compared by the check that surrounds every test."""
    source = "def handler(event, context): return event"
    version = publish(source)
    once = publish(source, reuse="never")
    launcher = get_launcher().pid
    with nsbox.ExecutionEnvironment(version) as env:
        warm(env, 100)
        never(once, 20)
        before = [memory_of(launcher), memory_of(os.getpid())]
        warm(env, warm_calls)
        never(once, births)
        after = [memory_of(launcher), memory_of(os.getpid())]
    assert [now - then < 1 << 20 for now, then in zip(after, before, strict=True)] == [True, True]
    assert get_launcher().pid == launcher
