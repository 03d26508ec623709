# SPDX-License-Identifier: Apache-2.0
"""The worker as a program of its own, for ``start="exec"``: no file of nsbox is inside."""

from __future__ import annotations

import functools
from typing import Final

from nsbox.guest import failures, log_setup, runtime, standard
from nsbox.linux import visibility
from nsbox.values import json_text

# Each module is made of its source, and each before those that import it.
_MODULES: Final = (log_setup, failures, json_text, visibility, standard, runtime)
_PROGRAM: Final = """import sys
from types import ModuleType
for name, source in {!r}:
    module = sys.modules[name] = ModuleType(name)
    exec(compile(source, {!r}, "exec"), vars(module))
module.main({})
"""


@functools.cache
def executed_worker(channel: int) -> str:
    """Return the program that is a worker with its socket at the descriptor `channel`."""
    sources = []
    for module in _MODULES:
        with open(str(module.__file__), encoding="utf-8") as file:
            sources.append((module.__name__, file.read()))
    return _PROGRAM.format(sources, runtime.EXECUTED_FILE, channel)
