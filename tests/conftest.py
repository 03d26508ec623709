# SPDX-License-Identifier: Apache-2.0
"""For all tests: the `needs` mark, the leak check around each of them, and common fixtures."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# tests/ is no installed package; its helpers are imported as tests.leaks and tests.support.
_REPOSITORY = str(Path(__file__).resolve().parent.parent)
if _REPOSITORY not in sys.path:
    sys.path.insert(0, _REPOSITORY)

from tests import leaks  # noqa: E402

import nsbox  # noqa: E402 - needs no path of ours, but stays with what does
from nsbox.host import features  # noqa: E402

# No database: a failing example is to be copied into the test that found it. No deadline: another
# program on the machine, or User-Mode Linux, would decide then what passes.
settings.register_profile(
    "nsbox", database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nsbox")

_must_run = frozenset(filter(None, os.environ.get("NSBOX_MUST_RUN", "").split(",")))
_probed: dict[str, tuple[bool, str]] = {}


def _probe(name: str) -> tuple[bool, str]:
    if name not in _probed:
        _probed[name] = features.probe(name)
    return _probed[name]


# The user's own store is none of the tests' business; processes that they start inherit this.
_store = tempfile.TemporaryDirectory(prefix="store-of-tests-")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-leak-check",
        action="store_true",
        help="look for what is left behind on the whole machine after each test, not each module",
    )
    parser.addoption(
        "--elsewhere",
        action="append",
        default=[],
        type=os.path.abspath,
        metavar="PATH",
        help="leave out the tests of this file or directory that need no cgroup; may be repeated",
    )
    parser.addoption(
        "--leak-grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="how long the teardown of what has been let go may take; default 5",
    )


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job: what tests start would ignore it, too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["NSBOX_STORE"] = os.path.join(_store.name, "store")
    # What there is, tests count; those about standby environments ask for them. Other programs that
    # tests start have them, as users' do.
    nsbox.set_standby(0)
    unknown = _must_run - set(features.NAMES)
    if unknown:
        raise pytest.UsageError(
            f"NSBOX_MUST_RUN: {', '.join(sorted(unknown))}: none of {', '.join(features.NAMES)}"
        )


def pytest_collection_finish() -> None:
    # Many tests collect garbage to see what is let go: without the thousands of items that there
    # are it takes a tenth of the time.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    _store.cleanup()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = tuple(map(Path, config.getoption("--elsewhere")))
    missing = [str(path) for path in elsewhere if not path.exists()]
    if missing:
        raise pytest.UsageError(f"--elsewhere: there is no {', '.join(missing)}")

    def is_left_out(item: pytest.Item) -> bool:
        if any(
            item.get_closest_marker(mark) and mark not in config.option.markexpr
            for mark in ("frameworks", "faults")
        ):
            return True  # what the first start may not be installed; the others take many minutes
        return any(map(item.path.is_relative_to, elsewhere)) and not _needs_a_cgroup(item)

    left_out = set(filter(is_left_out, items))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _needs_a_cgroup(item: pytest.Item) -> bool:
    names = (name for mark in item.iter_markers("needs") for name in mark.args)
    return any(name.startswith("cgroup") for name in names)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            if name not in features.NAMES:
                raise pytest.UsageError(f"needs({name!r}): none of {', '.join(features.NAMES)}")
            works, reason = _probe(name)
            if not works:
                text = f"{name}: {reason}"
                if name in _must_run:
                    pytest.fail(f"NSBOX_MUST_RUN names it, and it does not work: {text}")
                pytest.skip(text)


@pytest.fixture(scope="session")
def _temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A directory of this session alone for temporary files, so that a forgotten one is seen."""
    directory = str(tmp_path_factory.mktemp("tmpdir"))
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = directory
    yield directory
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="session", autouse=True)
def _launcher_ends_with_the_session(
    request: pytest.FixtureRequest, _temporary: str
) -> Iterator[None]:
    look = partial(leaks.snapshot, _temporary)
    before = look()
    yield
    if "nsbox.supervisor.launcher" in sys.modules:
        nsbox.shutdown()
    leaked = leaks.await_clean(before, look, request.config.getoption("--leak-grace"))
    # Modules imported meanwhile may keep a descriptor or a thread; the checks of each test have
    # seen to those.
    leaked.pop("descriptors", None)
    leaked.pop("threads", None)
    assert not leaked, f"left behind by the session: {leaked}"


@pytest.fixture(scope="module", autouse=True)
def _nothing_leaks_from_the_module(
    request: pytest.FixtureRequest, _launcher_ends_with_the_session: None, _temporary: str
) -> Iterator[None]:
    """Look at the whole machine: what is nobody's child or is in a place that all share."""
    if request.node.get_closest_marker("static"):
        yield
        return
    look = partial(leaks.snapshot, _temporary)
    before = look()
    yield
    leaked = leaks.await_clean(before, look, request.config.getoption("--leak-grace"))
    leaked.pop("descriptors", None)  # as above
    leaked.pop("threads", None)
    advice = "; --whole-leak-check tells which test"
    assert not leaked, f"left behind by {request.node.nodeid}: {leaked}{advice}"


@pytest.fixture(autouse=True)
def _nothing_leaks(
    request: pytest.FixtureRequest, _nothing_leaks_from_the_module: None, _temporary: str
) -> Iterator[None]:
    if request.node.get_closest_marker("static"):
        yield
        return
    whole = request.config.getoption("--whole-leak-check")
    look = partial(leaks.snapshot if whole else leaks.own, _temporary)
    before = look()
    yield
    leaked = leaks.await_clean(before, look, request.config.getoption("--leak-grace"))
    assert not leaked, f"left behind by the test: {leaked}"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A directory to bind, in which environments of any uid may write."""
    path = tmp_path / "out"
    path.mkdir()
    path.chmod(0o777)
    return path


@pytest.fixture
def env() -> Iterator[nsbox.ExecutionEnvironment]:
    """A ready default environment, closed afterwards."""
    with nsbox.ExecutionEnvironment() as environment:
        yield environment


@pytest.fixture
def make_env() -> Iterator[Callable[..., nsbox.ExecutionEnvironment]]:
    """A function that makes environments from fields of `Config`; all are closed afterwards."""
    made: list[nsbox.ExecutionEnvironment] = []

    def make(config: nsbox.Config | None = None, **fields: Any) -> nsbox.ExecutionEnvironment:
        made.append(nsbox.ExecutionEnvironment(config, **fields))
        return made[-1]

    yield make
    for environment in made:
        environment.close()
