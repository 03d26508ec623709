# SPDX-License-Identifier: Apache-2.0
"""The quick ways to and from JSON say what `json` says, of whatever they are given."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsbox.values import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
TEXTS = st.text(alphabet=' \n\t\ufeff{}[]",:0123456789.eE+-truefalsn', max_size=12)


def outcome(function: Any, value: object) -> tuple[object, ...]:
    """What a function returns, or raises, in words that can be compared."""
    try:
        return ("returned", repr(function(value)))
    except (TypeError, ValueError, RecursionError) as error:
        return (type(error), str(error))


@pytest.mark.parametrize("ensure_ascii", [True, False])
@given(value=VALUES)
def test_encoding_is_that_of_json(value: object, ensure_ascii: bool) -> None:
    def plainly(value: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)

    quick = json_text.encoder_of(ensure_ascii=ensure_ascii)
    assert outcome(quick, value) == outcome(plainly, value)


def test_what_is_no_json_is_told_as_json_tells_it() -> None:
    circle: list[Any] = []
    circle.append({"in": circle})
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    class Pair(tuple[int, int]):
        pass

    quick = json_text.encoder_of(ensure_ascii=True)
    for value in (circle, deep, {1, 2}, {(1, 2): 3}, b"bytes", math.nan, [math.inf], object):
        kind, words = outcome(quick, value)
        assert (kind, words) == outcome(lambda v: json.dumps(v, allow_nan=False), value)
        assert kind != "returned"
    for odd in ({1: 2, None: 3, False: 4, 0.5: 5}, Pair((1, 2)), "\ud800", (), {}, "", 10**400):
        assert quick(odd) == json.dumps(odd)


@given(text=VALUES.map(json.dumps) | TEXTS | TEXTS.map(lambda text: f" [{text}] "))
def test_decoding_is_that_of_json(text: str) -> None:
    if any(name in text for name in ("NaN", "Infinity")):
        return
    assert outcome(json_text.decode, text) == outcome(json.loads, text)


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}'])
def test_what_json_has_not_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no JSON"):
        json_text.decode(text)


def depth_of(text: str) -> int:
    """How deep its brackets are, letter by letter."""
    depth = most = 0
    is_inside = is_escaped = False
    for letter in text:
        if is_inside:
            if is_escaped:
                is_escaped = False
            elif letter == "\\":
                is_escaped = True
            elif letter == '"':
                is_inside = False
        elif letter == '"':
            is_inside = True
        elif letter in "[{":
            depth += 1
            most = max(most, depth)
        elif letter in "]}":
            depth -= 1
    return most


@given(text=VALUES.map(json.dumps), bound=st.integers(2, 9))
def test_depth_is_that_of_the_brackets(text: str, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "DEPTH_MAX", bound)
        patch.setattr(json_text, "_PASSES", 2)
        kind, _ = outcome(json_text.check_depth, text)
    assert (kind == "returned") == (depth_of(text) <= bound)


@pytest.mark.parametrize(
    "text",
    [
        '["]",' * 513,
        '["[",' * 513,
        '{"}":' * 513,
        '["\\"]",' * 513,
        '["\\\\",' * 513,
        '["",' * 513,
        "[" * 600 + '"' + "]" * 600 + '"',
        "[1,[2]," * 513,
    ],
)
def test_closing_brackets_in_strings_hide_no_depth(text: str) -> None:
    with pytest.raises(ValueError, match="more than 512 deep"):
        json_text.check_depth(text)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"a": [1, {"b": "]["}], "[": '"{'}] * 1000),
        json.dumps("[" * 1000),
        json.dumps(['\\"[' * 1000]),
        "[" * 512 + "]" * 512,
        '{"a":' * 512 + "1" + "}" * 512,
    ],
)
def test_what_is_wide_is_not_deep(text: str) -> None:
    json_text.check_depth(text)
    assert json_text.decode_answer(text.encode()) == json.loads(text)
