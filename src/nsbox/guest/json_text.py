# SPDX-License-Identifier: Apache-2.0
"""JSON of events and answers, on both sides; a part of `python_runtime`: imports none of nsbox."""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


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
    """Return what json.loads does."""
    try:
        value, end = _scan(text)
    except ValueError:
        end = -1
    return value if end == len(text) else json.loads(text)


_scan = json.JSONDecoder().raw_decode
