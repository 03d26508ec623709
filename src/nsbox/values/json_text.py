# SPDX-License-Identifier: Apache-2.0
"""JSON of events and answers, on both sides; a part of the worker: imports nothing of nsbox."""

from __future__ import annotations

import json
import re
from itertools import accumulate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

DEPTH_MAX = 512
"""How deep lists and objects of an event and of an answer may be nested.

CPython's decoder recurses in C, as deep as the text is and sys.setrecursionlimit allows: by 3.11
that may be more than the stack has.
"""
_BEGIN = 4096
_PASSES = 8  # more than most texts are deep
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = {ord("["): 1, ord("]"): -1}
_LONE = re.compile(
    r"\\u[dD][89abAB]..(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


def encoder_of(*, ensure_ascii: bool) -> Callable[[object], str]:
    """Return what json.dumps does without NaN: that makes an encoder anew for each value."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, allow_nan=False)
    encode = encoder.encode
    try:
        # Not documented. Without its record of what it is in, many threads may share it.
        from _json import encode_basestring, encode_basestring_ascii, make_encoder

        escape = encode_basestring_ascii if ensure_ascii else encode_basestring
        quick = make_encoder(None, encoder.default, escape, None, ": ", ", ", False, False, False)
        if "".join(quick({"a": [1, "b"]}, 0)) != '{"a": [1, "b"]}':
            return encode
    except (ImportError, TypeError, ValueError):
        return encode

    def encode_quickly(value: object) -> str:
        try:
            return "".join(quick(value, 0))
        except (TypeError, ValueError, RecursionError):
            return encode(value)  # which tells what is wrong, a circle too

    return encode_quickly


def decode(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return what json.loads does, which takes NaN and Infinity besides; they are a ValueError."""
    try:
        value, end = _scan(text)
    except ValueError:
        end = -1
    return value if end == len(text) else json.loads(text, parse_constant=_refuse)


def decode_answer(data: bytes | memoryview) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of an answer, which nobody has looked at yet.

    Raises:
        ValueError: It is no JSON in UTF-8, is nested too deep, or has lone surrogates.
    """
    text = str(data, "utf-8")
    check_depth(text)
    # Of an escaped backslash none is left, so that each that is begins an escape.
    if "\\" in text and "\\u" in text and _LONE.search(text.replace("\\\\", "")):
        raise ValueError("it has a lone surrogate, which is no character")
    return decode(text)


def check_depth(text: str) -> None:
    """Raise ValueError when JSON is nested deeper than `DEPTH_MAX`, whatever else is wrong."""
    if len(text) > DEPTH_MAX and _has_many(text) and _is_deep(text.encode("utf-8", "replace")):
        raise ValueError(f"it is nested more than {DEPTH_MAX} deep")


def _has_many(text: str) -> bool:
    """Whether there may be brackets enough, in strings or not. Looking for a few is quick."""
    begin = text[:_BEGIN]
    if begin.count("[") + begin.count("{") > _BEGIN // 64:
        return True  # likely: the exact look takes less than 512 times this
    left = DEPTH_MAX
    for bracket in "[{":
        at = text.find(bracket)
        while at >= 0:
            left -= 1
            if left < 0:
                return True
            at = text.find(bracket, at + 1)
    return False


def _is_deep(data: bytes) -> bool:
    """Whether it is, by passes over all of it in C: where a parser would stop is not looked for."""
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = data.translate(_BRACKETS, _OTHERS)
    brackets = marks.translate(None, b'"')
    # When quotes come in pairs, no string has a bracket in it.
    if 2 * marks.count(b'""') == len(marks) - len(brackets):
        marks = brackets
    else:
        marks = b"".join(marks.split(b'"')[::2])
    left = DEPTH_MAX
    for _ in range(_PASSES):
        if len(marks) <= left:
            return False
        # Up to any place each innermost pair is over, but for one.
        if marks.count(b"[") - marks.count(b"[]") < left:
            return False
        marks = marks.replace(b"[]", b"")  # takes at most one level away
        left -= 1
    return any(map(left.__lt__, accumulate(map(_STEPS.__getitem__, marks))))


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_scan = json.JSONDecoder(parse_constant=_refuse).raw_decode
