# SPDX-License-Identifier: Apache-2.0
"""The command ``nsbox``: parse, call, print, exit code.

Exit statuses are the command's own; 124 for a timeout, 137 for out of memory or a kill, 128 + N
for signal N, 126 and 127 as a shell has them, and 125 for whatever nsbox itself could not do,
wrong options included.

Each subcommand is a module that is imported when it is asked for: an interpreter starts in 15 ms,
and the imports of all of them would take five times as long.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_FAILURE = 125
"""Exit status of what nsbox could not do, as distinct from what the command did."""
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status; never raises for a user's mistake.

    Args:
        arguments: Without the program's name; None takes `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _fill_standard_streams()
    if words == ["--version"]:
        import nsbox

        print(f"nsbox {nsbox.__version__}")
        return 0
    try:
        from nsbox.cli.app import run_app

        return run_app(words)
    except KeyboardInterrupt:  # while it was imported, too
        return INTERRUPTED


def _fill_standard_streams() -> None:
    """Open /dev/null for each of 0, 1, 2 that the caller closed.

    The next file we open would get its number otherwise, and be taken for the user's stream.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return
        os.set_inheritable(fd, True)
