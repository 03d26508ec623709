# SPDX-License-Identifier: Apache-2.0
"""The quick ways to and from JSON say what `json` says, of whatever they are given."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import gc
import json
import math
import re
import sys
import uuid
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

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


class Text(str):
    __slots__ = ()


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    YES = "yes"


class Pair(NamedTuple):
    left: int
    right: int


@dataclasses.dataclass
class Point:
    x: int


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


CIRCLE: list[Any] = []
CIRCLE.append({"in": CIRCLE})
ODD_VALUES: list[Any] = [
    *(math.nan, math.inf, -math.inf, [1.5, math.nan], {"a": -math.inf}),
    *(0, -0, True, None, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**63) - 1, 10**400, -(10**30)),
    *(0.0, -0.0, 0.1, 1e15, 1e16, 123456789012345.6, 1e-4, 1e-5, 9.9e-5, 5e-324, 1e23, 1e22),
    *(1.7976931348623157e308, 2.5, -3.75, 100.0, 0.000123, 1e-7, 0.1 + 0.2, 4503599627370496.5),
    *("", "\0\b\t\n\f\r\x1f \x7f\x80", '"\\/', "\u2028\ufeff\uffff", "\U0001f600\U0010ffff"),
    *("\ud800", "\udc00\ud800", ["ok", "\ud83d"], {"\udfff": 1}, "seven77\u00e9", "e" * 9 + '"'),
    *({1: 2}, {None: 3, False: 4, 0.5: 5}, {(1, 2): 3}, {1: 1, "1": 2}, {b"k": 1}, {Word.YES: 1}),
    *((), (1, (2,)), [], {}, [[]], [{}], {"": {}}, Pair(1, 2), {1, 2}, frozenset(), b"bytes"),
    *(Text("text"), {Text("key"): 1}, Color.RED, Level.LOW, [Word.YES], Point(1), 1j, ...),
    *(datetime.date(2026, 1, 2), datetime.datetime(2026, 1, 2), uuid.UUID(int=7)),
    *(decimal.Decimal("1.5"), collections.OrderedDict(a=1), collections.defaultdict(int, a=1)),
    *(range(3), iter([1]), object, nested(199), nested(200), nested(201), nested(300)),
    *(CIRCLE, nested(100_000)),
]  # fmt: skip
ODD_TEXTS = [
    *("NaN", "[1, Infinity]", '{"a": -Infinity}', "nan", "1e400", "-1e400", "1e-400", "-0", "-0.0"),
    *("9223372036854775808", "18446744073709551616", "-9223372036854775809", "1" * 300, "1" * 5000),
    *("0.1000000000000000055511151231257827021181583404541015625", "9007199254740993.0", "1E5"),
    *("5e-324", "2.2250738585072011e-308", "1.7976931348623157e308", "1e23", "12345678901234567e3"),
    *('"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\ud83dx"', '"\\\\ud800"'),
    *('{"a": 1, "b": 2, "a": 3}', '{"a": [], "": 1, "": 2}', "{1: 2}", "{'a': 1}", '{"a": 1,}'),
    *("", "[1,]", "01", ".5", "1.", "+1", "-", "0x1", "1_000", "1 2", "[1 2]", "nul", "TRUE"),
    *('"\\u0000"', '"\t"', '"\x7f\x80"', '"\\x"', '"\\/"', '"\\u12"'),
    *("[", "]", "\x0b1", "\xa01", "\ufeff1", " 1\n\t\r"),
    *("[" * 511 + "]" * 511, "[" * 512 + "]" * 512, '{"a":' * 512 + "1" + "}" * 512),
]  # fmt: skip


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Without what is compiled and without msgspec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_compiled", None)
        patch.setattr(json_text, "quick_decoder", lambda **_: None)
        yield


def dumped(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def refuse_halves(value: object) -> None:
    """Raise ValueError for what cannot be written as UTF-8."""
    half = re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False))
    if half is not None:
        words = f"it has the lone surrogate \\u{ord(half[0]):04x}, which is no character"
        raise ValueError(words)


def dumped_in_ascii(value: object) -> bytes:
    text = json.dumps(value, allow_nan=False)
    refuse_halves(json.loads(text))
    return text.encode()


ENCODERS: Any = (json_text.encode_event, dumped_in_ascii), (json_text.encode_answer, dumped)


def compare(functions: Any, value: object) -> None:
    """Call each of the pairs, with what is quick and without, and expect the same."""
    for ours, theirs in functions:
        expected = outcome(theirs, value)
        assert outcome(ours, value) == expected
        with plainly():
            assert outcome(ours, value) == expected


def plainly_decoded(text: str) -> Any:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@given(value=VALUES)
def test_encoding_is_that_of_json(value: object) -> None:
    compare(ENCODERS, value)


def test_odd_values_are_encoded_and_refused_as_by_json() -> None:
    for value in ODD_VALUES:
        compare(ENCODERS, value)
        compare(ENCODERS, {"in": [value, 1]})


@pytest.mark.needs("json")
def test_plain_values_are_encoded_by_what_is_compiled() -> None:
    from nsbox.values import _json

    for value in ([{"a": 1, "b": [1.5, "\u00e9", None, True]}] * 9, "x", -1, 0.1, (), nested(200)):
        assert _json.encode(value) == dumped(value)
        assert _json.encode_ascii(value) == dumped_in_ascii(value)
    for other in (math.nan, 2**63, {1: 2}, "\ud800", Text("x"), Level.LOW, nested(201), CIRCLE):
        assert _json.encode(other) is _json.encode_ascii(other) is None


@pytest.mark.needs("json")
@given(value=st.floats() | st.decimals(-(10**17), 10**17, places=6).map(float))
def test_floats_are_encoded_as_repr_does(value: float) -> None:
    from nsbox.values import _json

    assert _json.encode(value) == (repr(value).encode() if math.isfinite(value) else None)


def answer(text: str) -> Any:
    """What `decode_answer` is to return: that is no place for what cannot be written as UTF-8."""
    value = plainly_decoded(text)
    refuse_halves(value)
    return value


def decode_event(text: str) -> Any:
    return json_text.decode_event(text.encode())


def decode_answer(text: str) -> Any:
    return json_text.decode_answer(text.encode())


DECODERS: Any = (decode_event, plainly_decoded), (decode_answer, answer)


@given(text=VALUES.map(json.dumps) | TEXTS | TEXTS.map(lambda text: f" [{text}] "))
def test_decoding_is_that_of_json(text: str) -> None:
    compare(DECODERS, text)
    compare(DECODERS, text + " " * json_text.LARGE)


def test_odd_texts_are_decoded_and_refused_as_by_json() -> None:
    assert json_text.quick_decoder(may_import=True) is not None
    for text in ODD_TEXTS:
        compare(DECODERS, text)
        compare(DECODERS, text + " " * json_text.LARGE)


def test_what_is_no_utf_8_is_refused() -> None:
    for data in (b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\xe2\x82', b"\xff1"):
        for padded in (data, memoryview(b" " * json_text.LARGE + data)):
            for decode in (json_text.decode_event, json_text.decode_answer):
                with pytest.raises(UnicodeDecodeError, match="can't decode byte"):
                    decode(padded)


def test_events_and_answers_have_a_depth() -> None:
    for depth in (512, 513):
        for value in (nested(depth), {"a": nested(depth - 1)}):
            data = json.dumps(value).encode()
            for padded in (data, data + b" " * json_text.LARGE):
                call = partial(json_text.decode_answer, padded)
                if depth == 512:
                    assert call() == value
                else:
                    with pytest.raises(ValueError, match="more than 512 deep"):
                        call()
            if depth == 512:
                assert json_text.encode_event(value) == data
            else:
                with pytest.raises(ValueError, match="more than 512 deep"):
                    json_text.encode_event(value)


def test_the_collector_is_as_it_was() -> None:
    large = b"[1]" + b" " * json_text.LARGE
    for switch in (gc.disable, gc.enable):
        switch()
        was = gc.isenabled()
        json_text.decode_event(large)
        with contextlib.suppress(ValueError):
            json_text.decode_answer(large + b"}")
        assert gc.isenabled() is was


def test_a_library_that_decodes_otherwise_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (None, SimpleNamespace(), SimpleNamespace(json=SimpleNamespace(decode=str))):
        monkeypatch.setitem(sys.modules, "msgspec", module)
        for may_import in (True, False):
            assert json_text.quick_decoder.__wrapped__(may_import=may_import) is None


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


@pytest.mark.needs("json")
@given(
    text=VALUES.map(json.dumps) | st.text(alphabet='[]{}"\\,: \u00fb\u015b', max_size=80),
    bound=st.integers(0, 40),
)
def test_what_is_deep_is_never_taken_for_shallow(text: str, bound: int) -> None:
    from nsbox.values import _json

    is_shallow = _json.is_shallow(memoryview(text.encode()), bound)
    if depth_of(text) > bound:
        assert not is_shallow
    else:  # what is opened is counted before what is closed, in eight bytes at once
        assert is_shallow or depth_of(text) > bound - 8


@given(text=VALUES.map(json.dumps), bound=st.integers(2, 9))
def test_depth_is_that_of_the_brackets(text: str, bound: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "DEPTH_MAX", bound)
        patch.setattr(json_text, "_PASSES", 2)
        kind, _ = outcome(json_text.check_depth, text.encode())
        with plainly():
            assert outcome(json_text.check_depth, text.encode())[0] == kind
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
        json_text.check_depth(text.encode())


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
    json_text.check_depth(text.encode())
    assert json_text.decode_answer(text.encode()) == json.loads(text)
