# SPDX-License-Identifier: Apache-2.0
"""Whether processes of this uid can read and write this one by /proc (prctl(2), PR_SET_DUMPABLE).

The source of this module goes along to a worker that is executed, where nothing else of nsbox is.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4  # linux/prctl.h
_found: list[Callable[[int, int], int]] = []


def show() -> None:
    """Set the dumpable flag: this process and its uid have access to its /proc/PID."""
    _prctl()(PR_SET_DUMPABLE, 1)


def hide() -> None:
    """Clear the dumpable flag.

    Raises:
        ImportError: This Python has no ctypes.
        PermissionError: A filter refuses it.
    """
    prctl = _prctl()
    if prctl(PR_SET_DUMPABLE, 0) or prctl(PR_GET_DUMPABLE, 0):
        raise PermissionError("PR_SET_DUMPABLE was refused")


def _prctl() -> Callable[[int, int], int]:
    if not _found:
        calls = sys.modules.get("nsbox.linux.calls")
        if calls is None:
            from ctypes import CDLL

            calls = CDLL(None)  # type: ignore[assignment]
        _found.append(calls.prctl)  # type: ignore[union-attr]
    return _found[0]
