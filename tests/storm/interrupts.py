# SPDX-License-Identifier: Apache-2.0
"""Interrupts of a thread within its calls: at no particular place, and never outside of them."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_async_exc.argtypes = [ctypes.c_ulong, ctypes.py_object]


class Interrupted(KeyboardInterrupt):
    """What a thread other than the main one is interrupted with."""


class Window:
    """One thread's calls: open while one runs, and then interrupted once at most."""

    def __init__(self) -> None:
        """Made by the thread whose calls it is about; the main one is interrupted by SIGINT."""
        self._lock = threading.Lock()
        self._thread = threading.get_ident()
        self._is_main = threading.current_thread() is threading.main_thread()
        self._is_open = False

    def handle(self, _number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt as Python's own handler of SIGINT does, if it is open."""
        if self._is_open:
            self._is_open = False
            raise KeyboardInterrupt

    def interrupt(self) -> bool:
        """Interrupt the thread, if a call runs that has not been; to be called by another."""
        with self._lock:
            if not self._is_open:
                return False
            if self._is_main:
                signal.pthread_kill(self._thread, signal.SIGINT)
                return True
            self._is_open = False
            _set_async_exc(self._thread, Interrupted)
            return True

    def _close(self) -> None:
        with self._lock:
            self._is_open = False
        # One that was sent comes now. To take it back by NULL leaves CPython 3.11 looking for it
        # for ever, and in a trace function it does nothing else.
        for _ in range(100):
            pass

    def call(self, function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        """Return what `function` returns, or raises; an interrupt after its end is none."""
        answers: list[Any] = []
        errors: list[BaseException] = []
        try:
            self._is_open = True
            try:
                answers.append(function())
            except BaseException as error:  # noqa: BLE001 - judged
                errors.append(error)
            self._close()
        except KeyboardInterrupt as error:
            errors.append(error)  # it came in one of the lines above; there is no second
            self._close()
        if answers:
            return answers[0], None
        return None, errors[0]
