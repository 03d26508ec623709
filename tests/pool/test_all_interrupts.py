# SPDX-License-Identifier: Apache-2.0
"""Interrupts at the places of all that waits or has a place: nothing is lost, and no state false.

Each case says what is interrupted and what must hold afterwards. A few places of each are tried;
`-m slow` tries ten thousand over all of them, and prints what it has seen as JSON.
"""

from __future__ import annotations

import gc
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from tests import leaks
from tests.interrupts import count_places, interrupt
from tests.support import PATIENCE, SLOW_MACHINE, wait_until

import nsbox
from nsbox.store import integrity
from nsbox.store.store import Store
from nsbox.supervisor.launcher import get_launcher

# What an interrupt lets go of is closed as the last reference to it goes, which Python tells.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # One that comes in a __del__ goes no further.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CLOSE_MOST = 2.0 * PATIENCE
"""Seconds that a close may take over its deadline."""
ONE: dict[str, Any] = {
    "max_environments": 1, "acquire_timeout": 2.0, "shutdown_grace": 0.0, "freeze_after": None,
}  # fmt: skip


class Case:
    """What is interrupted: what `prepare` returns; `check` must hold afterwards, and use it."""

    longest_close: ClassVar[float] = 0.0

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.count = 0

    def publish(self, number: int = 1, **options: Any) -> nsbox.FunctionVersion:
        (self.directory / "app.py").write_text(
            f"NUMBER = {number}\ndef handler(event, context):\n    return event\n"
        )
        return nsbox.Function(
            "app.handler", code=self.directory, timeout=30, init_timeout=30, **options
        ).publish()

    def close(self, pool: nsbox.WarmPool[Any]) -> None:
        begin = time.monotonic()
        thread = threading.Thread(target=pool.close, daemon=True)
        thread.start()
        thread.join(15 * PATIENCE)
        Case.longest_close = max(Case.longest_close, time.monotonic() - begin)
        assert not thread.is_alive(), "the pool does not close"
        assert time.monotonic() - begin < CLOSE_MOST

    def prepare(self) -> Callable[[], object]:
        self.count += 1
        return self.use

    def use(self) -> None:
        raise NotImplementedError

    def check(self) -> None:
        pass

    def end(self) -> None:
        pass


class Call(Case):
    """A warm call."""

    settings: ClassVar[dict[str, Any]] = {}
    options: ClassVar[dict[str, Any]] = {}

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        make: Any = nsbox.WarmPool
        self.pool: Any = make(self.source(), **ONE | self.settings)

    def source(self) -> nsbox.FunctionVersion | nsbox.Config:
        return self.publish(**self.options)

    def use(self) -> None:
        assert self.pool.invoke({"a": 1}) == {"a": 1}

    def check(self) -> None:
        self.use()
        stats = self.pool.stats()
        assert stats["Calls"] == stats["Invocations"] + stats["Throttles"]
        assert stats["Waiting"] == stats["ConcurrentExecutions"] == 0

    def end(self) -> None:
        self.close(self.pool)


class ColdCall(Call):
    options: ClassVar[dict[str, Any]] = {"reuse": "never"}


class ResetCall(Call):
    options: ClassVar[dict[str, Any]] = {"reuse": "reset"}


class ReplacedCall(Call):
    """Another environment has to be closed before the birth."""

    settings: ClassVar[dict[str, Any]] = {"shutdown_grace": 0.5}

    def use(self) -> None:
        self.count += 1
        assert self.pool.invoke(1, tenant=f"tenant-{self.count % 2}") == 1


class ThawedCall(Call):
    settings: ClassVar[dict[str, Any]] = {"freeze_after": 0.001}

    def prepare(self) -> Callable[[], object]:
        self.use()
        wait_until(self.is_frozen, "it is frozen")
        return self.use

    def is_frozen(self) -> bool:
        (function,) = self.pool.snapshot().functions
        return [env.state for env in function.environments] == ["frozen"]


class BytesCall(Call):
    settings: ClassVar[dict[str, Any]] = {"max_invocations": 1}

    def use(self) -> None:
        assert self.pool.invoke_bytes(b"1").payload == b"1"


class Submit(Call):
    def use(self) -> None:
        assert self.pool.submit(1).result(5 * PATIENCE) == 1


class Lease(Call):
    settings: ClassVar[dict[str, Any]] = {"max_invocations": 1}

    def source(self) -> nsbox.Config:
        return nsbox.Config()

    def use(self) -> None:
        with self.pool.acquire() as env:
            assert env.run(["true"]).returncode == 0


class ResetLease(Lease):
    settings: ClassVar[dict[str, Any]] = {"reuse": "reset"}


class Provision(Call):
    def prepare(self) -> Callable[[], object]:
        self.count += 1
        return lambda: self.pool.provision(self.count % 2)


class Publish(Call):
    settings: ClassVar[dict[str, Any]] = {"provisioned": 1}

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.versions = [Case.publish(self, number) for number in (1, 2)]
        super().__init__(directory)

    def publish(self, number: int = 1, **options: Any) -> nsbox.FunctionVersion:
        return self.versions[0]

    def prepare(self) -> Callable[[], object]:
        self.count += 1
        return lambda: self.pool.publish(self.versions[self.count % 2])


class AddFunction(Case):
    """Another function with places of its own: it can be called, or they are others' again."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.first, self.second = self.publish(1), self.publish(2)
        self.added: list[nsbox.PoolFunction[Any]] = []

    def prepare(self) -> Callable[[], object]:
        self.pool = nsbox.WarmPool(self.first, **ONE | {"max_environments": 3})
        assert self.pool.invoke(1) == 1
        return lambda: self.added.append(self.pool.function(self.second, reserved=2, provisioned=1))

    def check(self) -> None:
        if not self.added:
            self.added.append(self.pool.function(self.second, reserved=2))
        assert self.added.pop().invoke(1) == self.pool.invoke(1) == 1
        self.close(self.pool)


class MakePool(Case):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.version = self.publish()
        self.pools: list[nsbox.WarmPool[Any]] = []

    def use(self) -> None:
        self.pools.append(nsbox.WarmPool(self.version, **ONE, provisioned=1))

    def check(self) -> None:
        while self.pools:
            pool = self.pools.pop()
            assert pool.invoke(1) == 1
            self.close(pool)


class WithPool(MakePool):
    def use(self) -> None:
        with nsbox.WarmPool(self.version, **ONE) as pool:
            pool.invoke(1)


class ClosePool(MakePool):
    """It is closed once more afterwards."""

    grace = 0.0

    def prepare(self) -> Callable[[], object]:
        pool = nsbox.WarmPool(self.version, **ONE | {"shutdown_grace": self.grace})
        pool.submit(1).result(5 * PATIENCE)
        self.pools.append(pool)
        return lambda: self.interrupted(pool)

    def interrupted(self, pool: nsbox.WarmPool[Any]) -> None:
        pool.close()

    def check(self) -> None:
        self.close(self.pools.pop())


class ClosePoolGracefully(ClosePool):
    grace = 1.0


class KillPool(ClosePool):
    def interrupted(self, pool: nsbox.WarmPool[Any]) -> None:
        pool.close(drain=False)


class ShutDown(ClosePool):
    def interrupted(self, pool: nsbox.WarmPool[Any]) -> None:
        pool.shutdown(self.count % 2 == 0, cancel_futures=True)


class Commands(Case):
    """A command; the environment serves others, and nothing runs in it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.env = nsbox.ExecutionEnvironment()

    def use(self) -> None:
        self.env.run(["cat"], input=b"in", timeout=9 * PATIENCE)

    def check(self) -> None:
        if self.env.state is nsbox.State.FROZEN:
            self.env.thaw()
        assert self.env.run(["true"], timeout=5 * PATIENCE).returncode == 0
        assert not psutil.Process(self.env.pid).children()

    def end(self) -> None:
        self.env.close()


class Terminal(Commands):
    def use(self) -> None:
        with self.env.popen(["true"], tty=(24, 80)) as process:
            process.wait(5 * PATIENCE)


class Wait(Commands):
    """Whoever waits once more has the result."""

    argv, outcome = ["true"], nsbox.Outcome.EXITED

    def prepare(self) -> Callable[[], object]:
        self.process = self.env.popen(self.argv)
        return self.interrupted

    def interrupted(self) -> None:
        self.process.wait(5 * PATIENCE)

    def check(self) -> None:
        assert self.process.wait(5 * PATIENCE).outcome is self.outcome
        self.process.close()
        super().check()


class Kill(Wait):
    argv, outcome = ["sleep", "9"], nsbox.Outcome.KILLED

    def interrupted(self) -> None:
        self.process.kill()

    def check(self) -> None:
        self.process.kill()
        super().check()


class CloseProcess(Kill):
    def interrupted(self) -> None:
        self.process.close()


class Files(Commands):
    def use(self) -> None:
        self.env.write_file("/tmp/x", b"x" * 100_000)
        self.env.read_file("/tmp/x")


class Reset(Commands):
    def use(self) -> None:
        self.env.reset()


class Freeze(Commands):
    def use(self) -> None:
        self.env.freeze()


class Thaw(Commands):
    def prepare(self) -> Callable[[], object]:
        self.env.freeze()
        return self.env.thaw


class BriefRun(Case):
    def use(self) -> None:
        nsbox.run(["cat"], input=b"in", timeout=9 * PATIENCE)


class PublishCode(Case):
    """Of new code: it is whole or not there, and nothing unfinished is left."""

    def prepare(self) -> Callable[[], object]:
        self.count += 1
        return lambda: self.publish(1000 + self.count)

    def check(self) -> None:
        self.publish(1000 + self.count).verify()
        kept = os.listdir(os.environ["NSBOX_STORE"])
        assert not [name for name in kept if name.startswith(("tmp-", "trash-", "bad-"))]


class Collect(PublishCode):
    def prepare(self) -> Callable[[], object]:
        super().prepare()()
        return lambda: Store().collect(max_age=0.0)

    def check(self) -> None:
        Store().collect(max_age=9e9)  # which ends what was begun
        super().check()


CASES: list[type[Case]] = [
    Call, ColdCall, ResetCall, ReplacedCall, ThawedCall, BytesCall, Submit, Lease, ResetLease,
    Provision, Publish, AddFunction, MakePool, WithPool, ClosePool, ClosePoolGracefully, KillPool,
    ShutDown, Commands, Terminal, Wait, Kill, CloseProcess, Files, Reset, Freeze, Thaw, BriefRun,
    PublishCode, Collect,
]  # fmt: skip


def environments() -> int:
    names = [child.name for child in leaks.children(get_launcher().pid)]
    return len([name for name in names if name not in ("nsbox-template", "nsbox-janitor")])


def present() -> Counter[str]:
    """Count what may be lost."""
    threads = [thread.name for thread in threading.enumerate()]
    return Counter(
        descriptors=len(os.listdir("/proc/self/fd")),
        environments=environments(),
        children=len(leaks.children(os.getpid())),
        threads=len([name for name in threads if name not in ("nsbox-pool", "nsbox-pool-call")]),
    )


def left(before: Counter[str]) -> Counter[str]:
    """Return what there is more than before, once what goes by itself is gone."""
    deadline = time.monotonic() + 3 * PATIENCE
    while over := present() - before:
        if time.monotonic() > deadline:
            return over
        if time.monotonic() > deadline - 2 * PATIENCE:
            gc.collect()
        time.sleep(0.002)
    return over


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is not read again, as that of a function published a while ago."""
    monkeypatch.setattr(integrity, "_SETTLED", 0)
    get_launcher()


def attempt(case: Case, before: Counter[str], place: int, **how: Any) -> bool:
    is_interrupted = interrupt(case.prepare(), place, **how)
    case.check()
    assert not left(before), (type(case).__name__, place)
    return is_interrupted


def begin(kind: type[Case], directory: Path) -> tuple[Case, Counter[str], int]:
    """Return a case, what there is, and how many places it has."""
    case = kind(directory)
    for _ in range(2):
        case.prepare()()
        case.check()
    places = count_places(case.prepare())
    case.check()
    gc.collect()
    return case, present(), places


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_an_interrupt_loses_nothing(settled: None, tmp_path: Path, kind: type[Case]) -> None:
    case, before, places = begin(kind, tmp_path)
    tries = 2 if SLOW_MACHINE else 6
    for place in random.Random(11).sample(range(1, places + 1), min(places, tries)):
        attempt(case, before, place)
    case.end()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_interrupts_lose_nothing(settled: None, tmp_path: Path) -> None:
    """By SIGINT and as from another thread: each case in turn, until there are so many."""
    wanted = int(os.environ.get("NSBOX_INTERRUPTS", "200" if SLOW_MACHINE else "1500"))
    seed = int(os.environ.get("NSBOX_INTERRUPTS_SEED", "11"))
    moments = random.Random(seed)
    # Publication has lost a descriptor once in 1,200: Python swallows what is raised in a __del__.
    kinds = [kind for kind in CASES if kind is not PublishCode]
    each = max(1, min(400, wanted // len(kinds)))
    tried: Counter[str] = Counter()
    while tried.total() < wanted:
        for number, kind in enumerate(kinds):
            directory = tmp_path / f"{tried.total()}-{number}"
            directory.mkdir()
            case, before, places = begin(kind, directory)
            for place in moments.sample(range(1, places + 1), min(places, each)):
                raised = None if place % 2 else KeyboardInterrupt
                attempt(case, before, place, raised=raised)
                tried[kind.__name__] += 1
            case.end()
    report = {"seed": seed, "interrupts": tried.total(), "cases": tried, "left": 0}
    print(json.dumps(report | {"longest_close_seconds": round(Case.longest_close, 3)}))
