# SPDX-License-Identifier: Apache-2.0
"""The helper process of `nsbox.host.features`: ``python -m nsbox.host.probes NAME...``.

Prints a JSON object per line: name, works, detail, errno, hint. Probes of the kernel change the
process they run in, so each gets one of its own; those that run environments share this one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from nsbox.linux.binding import is_unknown

NOT_KNOWN = "not known"
"""What the detail of a probe begins with that could not tell; it is asked again."""
_PLAIN = (OSError, PermissionError)


def _report(name: str, action: Callable[[], str]) -> None:
    answer: dict[str, Any] = {"name": name, "works": False, "errno": 0, "hint": ""}
    try:
        answer["detail"] = action()
        answer["works"] = True
    except Exception as error:  # noqa: BLE001 - whatever it was, it is the finding
        plain = getattr(error, "strerror", None) if type(error) in _PLAIN else None
        answer["detail"] = plain or getattr(error, "reason", "") or str(error) or repr(error)
        if isinstance(error, OSError) and is_unknown(error):
            answer["detail"] = f"{NOT_KNOWN}: {answer['detail']}"
        answer["errno"] = getattr(error, "errno", 0) or 0
        answer["hint"] = getattr(error, "hint", "")
    print(json.dumps(answer), flush=True)


def main(names: list[str]) -> None:
    """Run probes and print what they find."""
    from nsbox.host import probes_kernel

    if len(names) == 1 and names[0] in probes_kernel.PROBES:
        _report(names[0], probes_kernel.PROBES[names[0]])
        return
    for name in names:
        if name in probes_kernel.PROBES:
            subprocess.run([sys.executable, "-m", "nsbox.host.probes", name], check=False)
        else:
            from nsbox.host import probes_limits

            _report(name, probes_limits.PROBES[name])


if __name__ == "__main__":
    main(sys.argv[1:])
