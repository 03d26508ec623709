# SPDX-License-Identifier: Apache-2.0
"""What a pool thinks of its sources: whether one may serve again, and how much memory it takes."""

from __future__ import annotations

from typing import Final

from nsbox.errors import ConfigError, FunctionError
from nsbox.functions.function import FunctionVersion
from nsbox.pool.events import Retirement
from nsbox.values.config import Config

Source = FunctionVersion | Config
_HARMLESS: Final = ("", "Runtime.MarshalError", "Function.ResponseSizeTooLarge")


def doubt_of(what: Source, error: BaseException | None, reuse: str) -> Retirement | None:
    """Return why an environment may not be used again after a call that ended so, or None.

    Args:
        what: What it is of.
        error: What the call has raised.
        reuse: The policy of a `Config`; a function has its own.
    """
    function = what.function if isinstance(what, FunctionVersion) else None
    if function is not None:
        reuse = function.reuse
    if error is not None and not isinstance(error, ConfigError):
        if not isinstance(error, FunctionError) or error.invocation is None:
            return Retirement.FAILURE
        # The host's own word on how it failed; what the function says is `error.error_type`.
        kind = error.invocation.error_type
        is_command = function is not None and function.command
        if kind not in _HARMLESS and not (is_command and kind == "Runtime.ExitError"):
            return Retirement.FAILURE
    return Retirement.INVOCATIONS if reuse == "never" else None


def weightless(_source: Source) -> int:
    """Return the memory of an environment where no budget is kept."""
    return 0


def memory_of(source: Source) -> int:
    """Return the bytes an environment may use; ConfigError where there is no limit."""
    limits = source.function.limits if isinstance(source, FunctionVersion) else source.limits
    if limits.memory_max is None:
        raise ConfigError(
            "memory_budget: it sums up memory limits, and there is one without; give it "
            "limits=Limits(memory_max=...), or leave memory_budget out"
        )
    return limits.memory_max
