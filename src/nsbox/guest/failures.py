# SPDX-License-Identifier: Apache-2.0
"""How a worker tells that its function has failed, as AWS Lambda's runtime does.

A part of `runtime`, and so imports no other part of nsbox.
"""

from __future__ import annotations

import sys

from nsbox.values.json_text import encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_NAME_MAX, _MESSAGE_MAX, _TRACE_MAX, _LINE_MAX = 1 << 10, 1 << 18, 1 << 17, 1 << 13
"""Characters of an error's type, message, stack trace, and of a line of that; escaped, each may
have 12 bytes, and so all of them are less than an answer may have."""


def tell_failure(kind: str, message: str, request_id: str, trace: Sequence[str] = ()) -> bytes:
    """Write an error to the log, and return the answer that tells it.

    What is too long is cut: that is no broken rule.
    """
    kind, message = _cut(kind, _NAME_MAX), _cut(message, _MESSAGE_MAX)
    lines = [_cut(line, _LINE_MAX) for line in trace]
    while sum(map(len, lines)) > _TRACE_MAX:
        lines = [*lines[: len(lines) // 4], "  [...]\n", *lines[-(len(lines) // 4) :]]
    is_plain = bool(lines) and lines[0].startswith("  File")
    head = f"[ERROR] {kind}: {message}\n" + "Traceback (most recent call last):\n" * is_plain
    flush()
    try:
        with open(2, "wb", 0, closefd=False) as log:  # sys.stderr may be another by now
            log.write((head + "".join(lines)).encode())
    except OSError:
        pass  # the function has closed it
    told = {"errorType": kind, "errorMessage": message, "requestId": request_id}
    return encode({**told, "stackTrace": lines})


def tell_raised(error: BaseException, own_file: str, request_id: str) -> bytes:
    """Tell of what user code has raised, without the first frames, which are of `own_file`.

    The stack trace of one with causes, notes or others in it is what Python prints.
    """
    import traceback  # large, and needed only here

    frames: TracebackType | None = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == own_file:
        frames = frames.tb_next
    kind = type(error)
    try:
        message = str(error)
    except Exception as failure:  # noqa: BLE001 - its own words may raise anything
        message = f"<no words: {type(failure).__name__}>"
    context = None if error.__suppress_context__ else error.__context__
    has_more = isinstance(error, BaseExceptionGroup) or hasattr(error, "__notes__")
    try:
        if error.__cause__ is not None or context is not None or has_more:
            trace = [*traceback.TracebackException(kind, error, frames, compact=True).format()]
        else:
            trace = traceback.format_list(traceback.extract_tb(frames))
    except Exception:  # noqa: BLE001 - so may what it refers to
        trace = []
    # A metaclass may have another idea of __name__.
    return tell_failure(type.__dict__["__name__"].__get__(kind), message, request_id, trace)


def flush() -> None:
    """Have what was written to stdout and stderr on its way."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # the function has closed or replaced it


def _cut(text: str, most: int) -> str:
    """Return text of at most that many characters, without surrogates, which UTF-8 has not."""
    if len(text) > most:
        text = text[: most - 4] + "..." + "\n" * text.endswith("\n")
    return text.encode("utf-8", "backslashreplace").decode()
