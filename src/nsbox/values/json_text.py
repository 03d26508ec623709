# SPDX-License-Identifier: Apache-2.0
"""JSON of events and answers, on both sides; a part of the worker: imports nothing of nsbox.

What is said and read is what the standard library says and reads, its errors included. Quicker ways
are taken where they are there and say the same: `_json.c` encodes plain values, msgspec decodes
large texts, and the C half of `json`, which is there without the Python half, does the rest. That
half, which takes 10 ms to import, tells what is wrong.
"""

from __future__ import annotations

import gc
import sys
from functools import cache
from itertools import accumulate

try:
    from nsbox.values import _json as _compiled
except ImportError:  # it was not compiled; or this worker was executed, where no file of nsbox is
    _compiled = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, NoReturn

    Data = bytes | memoryview
    Decode = Callable[[Data], Any]


def _take_nothing(_value: object) -> None:
    """Encode no value, where there is no compiled code."""


encode_plain: Callable[[object], bytes | None] = (
    _compiled.encode_ascii if _compiled else _take_nothing
)
"""Encodes plain values as `encode_event` does, and returns None for all others."""

DEPTH_MAX = 512
"""How deep lists and objects of an event and of an answer may be nested.

CPython's decoder recurses in C, as deep as the text is and sys.setrecursionlimit allows: by 3.11
that may be more than the stack has.
"""
LARGE = 1 << 16
"""Bytes from which on it is worth to look for msgspec, and to keep the garbage collector still."""
_BEGIN = 4096
_PASSES = 8  # more than most texts are deep
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_OTHERS = bytes(set(range(256)) - set(b'[]{}"'))
_STEPS = {ord("["): 1, ord("]"): -1}
_TRIAL = b'[{"a": -0, "b": [-0.0, 18446744073709551616, 1e23, null], "a": "\\u00e9"}, true]'


def encode(value: object) -> bytes:
    """Return what json.dumps says, without NaN; lone surrogates, as in names of files, too.

    Raises:
        TypeError, ValueError, RecursionError: It is no JSON, as json.dumps tells it.
    """
    data = _compiled.encode_ascii(value) if _compiled else None
    return _encode_ascii(value).encode() if data is None else data


def encode_event(value: object) -> bytes:
    """Return what json.dumps says, without NaN and halves of characters, and not too deep.

    Raises:
        TypeError, ValueError, RecursionError: It is no JSON, as json.dumps tells it, has lone
            surrogates, or is nested deeper than `DEPTH_MAX`.
    """
    data = _compiled.encode_ascii(value) if _compiled else None
    if data is None:
        text = _encode_ascii(value)
        check_characters(text)  # what was encoded in C has none of them
        data = text.encode()
        check_depth(data)
    return data


def encode_answer(value: object) -> bytes:
    """Return what json.dumps says, without NaN and in UTF-8.

    Raises:
        TypeError, ValueError, RecursionError: It is no JSON, as json.dumps tells it.
    """
    data = _compiled.encode(value) if _compiled else None
    return _encode(value).encode() if data is None else data


def decode_event(data: Data) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of an event, of which the host has checked the depth.

    Raises:
        ValueError, RecursionError: It is no JSON in UTF-8, as json.loads tells it.
    """
    if len(data) < LARGE:
        return decode(str(data, "utf-8"))
    return _decode_large(data, quick_decoder(may_import=False), _decode_event)


def decode_answer(data: Data) -> Any:  # noqa: ANN401 - any JSON value
    """Return the value of an answer, which nobody has looked at yet.

    Raises:
        ValueError: It is no JSON in UTF-8, is nested too deep, or has lone surrogates.
    """
    if len(data) <= DEPTH_MAX:  # most answers: three calls less
        text = str(data, "utf-8")
        if "\\" in text:
            check_characters(text)
        try:
            value, end = _scan(text, 0)
            if end == len(text):
                return value
        except (ValueError, StopIteration):
            pass
        return _read_by_library(text)
    check_depth(data)
    if len(data) < LARGE:
        return _decode_answer(data)
    return _decode_large(data, quick_decoder(may_import=True), _decode_answer)


def decode(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Return what json.loads does, which takes NaN and Infinity besides; they are a ValueError."""
    try:
        value, end = _scan(text, 0)
        if end == len(text):
            return value
    except (ValueError, StopIteration):
        pass
    return _read_by_library(text)


def _read_by_library(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Read what the C half alone did not: with space around it, or wrong, which the error tells."""
    import json

    return json.loads(text, parse_constant=_refuse)


@cache
def quick_decoder(*, may_import: bool) -> Decode | None:
    """Return how msgspec decodes, if it is there, or was imported, and does as json."""
    try:
        if may_import:
            import msgspec
        else:
            msgspec = sys.modules["msgspec"]
        import json

        library: Decode = msgspec.json.decode
        return library if repr(library(_TRIAL)) == repr(json.loads(_TRIAL)) else None
    except Exception:  # noqa: BLE001 - another module of that name may do anything
        return None


def check_depth(data: Data) -> None:
    """Raise ValueError when JSON is nested deeper than `DEPTH_MAX`, whatever else is wrong."""
    if len(data) <= DEPTH_MAX or (_compiled and _compiled.is_shallow(data, DEPTH_MAX)):
        return
    if _has_many(data := bytes(data)) and _is_deep(data):
        raise ValueError(f"it is nested more than {DEPTH_MAX} deep")


def check_characters(text: str) -> None:
    """Raise ValueError when a string of JSON has half of a pair of surrogates, as an escape."""
    # One letter is found in far less time than two.
    if "\\" not in text or ("\\ud" not in text and "\\uD" not in text):
        return
    whole = text.replace("\\\\", " ")
    ends = [find(word) for word in ("\\ud", "\\uD") for find in (whole.find, whole.rfind)]
    found = [end for end in ends if end >= 0]
    if found:
        # What is between as one string: pairs become characters in C, and UTF-8 has no halves.
        part = whole[min(found) : max(found) + 6].replace('\\"', " ").replace('"', " ") + '"'
        from json.decoder import scanstring  # type: ignore[attr-defined]

        try:
            scanstring(part, 0, False)[0].encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            words = f"it has the lone surrogate \\u{half:04x}, which is no character"
            raise ValueError(words) from None
        except ValueError:
            pass  # another escape is none: it is no JSON at all


def _decode_event(data: Data) -> Any:  # noqa: ANN401 - any JSON value
    return decode(str(data, "utf-8"))


def _decode_answer(data: Data) -> Any:  # noqa: ANN401 - any JSON value
    text = str(data, "utf-8")
    check_characters(text)
    return decode(text)


def _decode_large(data: Data, library: Decode | None, plainly: Decode) -> Any:  # noqa: ANN401
    """Decode while no garbage is looked for: of a value that is being made there is none.

    Decoding lets no other thread run, so that others notice a moment of it at most.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if library is not None:
            try:
                return library(data)
            except Exception:  # noqa: BLE001, S110 - what is wrong json tells, if it is for json
                pass
        return plainly(data)
    finally:
        if was_enabled:
            gc.enable()


def _encoder_of(*, ensure_ascii: bool) -> Callable[[object], str]:
    """Return what json.dumps does without NaN: that makes an encoder anew for each value."""

    def encode(value: object) -> str:
        import json

        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)

    try:
        # Not documented. Without its record of what it is in, many threads may share it.
        from _json import encode_basestring, encode_basestring_ascii, make_encoder

        escape = encode_basestring_ascii if ensure_ascii else encode_basestring
        quick = make_encoder(None, _refuse_kind, escape, None, ": ", ", ", False, False, False)
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


def _scanner() -> Callable[[str, int], tuple[Any, int]]:
    """Return what reads a value of a text from an index on, and where it ends."""
    try:
        from _json import make_scanner

        scan: Callable[[str, int], tuple[Any, int]] = make_scanner(_Rules)  # type: ignore[arg-type]
        if scan('{"a": [-1, 1.5]}', 0) == ({"a": [-1, 1.5]}, 16):
            return scan
    except (ImportError, AttributeError, TypeError, ValueError, StopIteration):
        pass
    import json

    reader = json.JSONDecoder(parse_constant=_refuse)
    return reader.scan_once  # type: ignore[attr-defined,no-any-return]


def _has_many(data: bytes) -> bool:
    """Whether there may be brackets enough, in strings or not. Looking for a few is quick."""
    begin = data[:_BEGIN]
    if begin.count(b"[") + begin.count(b"{") > _BEGIN // 64:
        return True  # likely: the exact look takes less than 512 times this
    left = DEPTH_MAX
    for bracket in b"[{":
        at = data.find(bracket)
        while at >= 0:
            left -= 1
            if left < 0:
                return True
            at = data.find(bracket, at + 1)
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


def _refuse_kind(value: object) -> NoReturn:
    raise TypeError


class _Rules:
    """How the C half is to read, as `json.JSONDecoder` tells it."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, _refuse
    memo: ClassVar[dict[str, str]] = {}


_encode_ascii = _encoder_of(ensure_ascii=True)
_encode = _encoder_of(ensure_ascii=False)
_scan = _scanner()
