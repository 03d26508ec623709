# SPDX-License-Identifier: Apache-2.0
"""What is offered to threads is offered to event loops, under the same names and parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict, Unpack, get_args, get_origin, is_typeddict

import pytest

import nsbox
from nsbox.pool.settings import PoolSettings

pytestmark = pytest.mark.static

# On a loop nothing is to be entered but by ``async with``; the twins are for pools of threads' own.
_OTHERWISE = {"invoke_async", "invoke_bytes_async", "map_async", "acquire_async"}


def public(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """Return the parameters by name, those of ``**options: Unpack[...]`` one by one."""
    told: dict[str, str] = {}
    for name, item in list(inspect.signature(function).parameters.items())[1:]:
        if item.kind is not inspect.Parameter.VAR_KEYWORD:
            told[name] = str(item.annotation)
            continue
        annotation = inspect.unwrap(function).__annotations__[item.name]
        names = eval(annotation, inspect.unwrap(function).__globals__)  # noqa: S307
        (fields,) = get_args(names)
        assert get_origin(names) is Unpack
        assert is_typeddict(fields)
        told |= dict.fromkeys(fields.__annotations__, "")
    return told


def same(one: Callable[..., Any], other: Callable[..., Any], *, but: str = "") -> None:
    """Check that both take the same; an event of one more kind is no difference."""
    assert set(parameters(one)) - {but} == set(parameters(other)) - {but}, (one, other)


def test_async_pool_has_what_the_pool_has() -> None:
    assert public(nsbox.AsyncWarmPool) == public(nsbox.WarmPool) - _OTHERWISE | {
        "pool",
        "max_environments",
    }
    for name in public(nsbox.WarmPool) - _OTHERWISE:
        theirs, ours = getattr(nsbox.WarmPool, name), getattr(nsbox.AsyncWarmPool, name)
        # Of `WarmPool.map` the timeout is that of the answers; here that is `asyncio.timeout`'s.
        same(theirs, ours, but="timeout" if name == "map" else "")


@pytest.mark.parametrize("kind", [nsbox.PoolFunction, nsbox.ExecutionEnvironment])
def test_twins_take_the_same(kind: type) -> None:
    twins = {name for name in public(kind) if name.endswith("_async")}
    assert {"invoke_async", "invoke_bytes_async"} <= twins
    for name in twins:
        plain = name.removesuffix("_async")
        same(getattr(kind, plain), getattr(kind, name), but="timeout" if plain == "map" else "")


def test_both_pools_take_the_same_settings() -> None:
    settings = {name: ref.__forward_arg__ for name, ref in PoolSettings.__annotations__.items()}
    hints = inspect.unwrap(nsbox.WarmPool.__init__).__annotations__
    given = list(inspect.signature(nsbox.WarmPool).parameters)
    assert given[0] == "source"
    assert set(given[1:]) == {*settings, "reuse"}
    assert {name: hints[name] for name in settings} == settings
    assert parameters(nsbox.AsyncWarmPool.__init__).keys() == {*given}


class _Fields(TypedDict, total=False):
    more: int


def test_the_comparison_sees_a_difference() -> None:
    def one(self: object, event: object, *, timeout: float) -> None: ...

    def two(self: object, event: object, **options: Unpack[_Fields]) -> None: ...

    with pytest.raises(AssertionError):
        same(one, two)
