# SPDX-License-Identifier: Apache-2.0
"""A step of a birth, as a value: who makes it, its name, what it does."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from nsbox.launcher.messages import Spec


_LONGEST = 16 << 10  # characters of a message, which may have paths in it


class Step:
    """One step of a birth.

    Attributes:
        side: ``"launcher"``, ``"template"`` or ``"environment"``: the process that makes it.
        name: For `SetupError.step` and for people.
        run: What makes it, or prepares its calls.
    """

    __slots__ = ("_text", "name", "run", "side")

    def __init__(
        self,
        side: str,
        name: str,
        text: str | Callable[[Spec], str],
        run: Callable[..., None],
    ) -> None:
        self.side = side
        self.name = name
        self._text = text
        self.run = run

    def describe(self, spec: Spec) -> str:
        """Say what the step does for the environment `spec` describes."""
        return self._text if isinstance(self._text, str) else self._text(spec)


def failure(step: str, error: BaseException) -> dict[str, Any]:
    """Return an error of a birth as the fields of a `SetupError`."""
    text = repr(error)
    if isinstance(error, OSError):
        text = str(error).removeprefix(f"[Errno {error.errno}] ")
    return {
        "step": step,
        "errno": getattr(error, "errno", None) or 0,
        "message": text[:_LONGEST],
    }
