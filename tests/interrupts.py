# SPDX-License-Identifier: Apache-2.0
"""Interrupts at each place of an operation where one can come, one after another."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import opcode
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.support import SLOW_MACHINE

import nsbox

# What nsbox uses of the standard library between two of its own lines. Not `threading`: a Condition
# that is interrupted in Python's own code (Event.wait, Thread.start, Future.result) may keep its
# lock, whoever uses it.
_LIBRARY = [str(Path(contextlib.__file__))]
_kept: list[bytes] = []  # what the tracer points to


@functools.cache
def _tracer() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        library = f"{directory}/interrupts.so"
        source = Path(__file__).with_suffix(".c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
        tracer = ctypes.PyDLL(library)
    stops = bytearray(256)
    for name, number in opcode.opmap.items():
        if ("CALL" in name and "PRECALL" not in name) or "JUMP_BACKWARD" in name:
            stops[number] = 1
    (ctypes.c_char * 256).in_dll(tracer, "stops").raw = bytes(stops)
    names = [str(Path(nsbox.__file__).parent), *_LIBRARY]
    below = (ctypes.c_char_p * 64).in_dll(tracer, "below")
    for number, name in enumerate(names):
        _kept.append(name.encode())
        below[number] = _kept[-1]
    return tracer


def interrupt(
    operation: Callable[[], object], place: int, raised: type[BaseException] | None = None
) -> bool:
    """Interrupt `operation` at its `place`-th place, from 1; False: it has not so many.

    By SIGINT, or with `raised` as another thread interrupts this one (PyThreadState_SetAsyncExc).
    """
    tracer = _tracer()
    ctypes.c_void_p.in_dll(tracer, "raised").value = None if raised is None else id(raised)
    seen = ctypes.c_long.in_dll(tracer, "seen")
    ctypes.c_long.in_dll(tracer, "target").value = place
    set_trace = ctypes.pythonapi.PyEval_SetTrace
    set_trace.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    set_trace.restype = None
    function = ctypes.cast(tracer.trace, ctypes.c_void_p)
    seen.value = 0
    try:
        set_trace(function, None)
        try:
            operation()
        finally:
            set_trace(None, None)
    except BaseException as error:
        if not isinstance(error, raised or KeyboardInterrupt):
            raise
    return seen.value >= place


def count_places(operation: Callable[[], object]) -> int:
    """Return how many places there are in `operation`, which is not interrupted."""
    interrupt(operation, 1 << 60)
    return ctypes.c_long.in_dll(_tracer(), "seen").value


def interrupt_at_each_place(
    prepare: Callable[[], Callable[[], object]], check: Callable[[], object], stride: int = 1
) -> int:
    """Interrupt what `prepare` returns at each `stride`-th place; `check` after each of them.

    Returns how many places there are, to within one stride. On a slow machine fewer are tried.
    """
    for place in itertools.count(1, stride * 8 if SLOW_MACHINE else stride):
        is_interrupted = interrupt(prepare(), place)
        check()
        if not is_interrupted:
            return place
    raise AssertionError
