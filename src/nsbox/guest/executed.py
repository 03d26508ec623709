# SPDX-License-Identifier: Apache-2.0
"""The worker as a program of its own, for ``start="exec"``: no file of nsbox is inside."""

from __future__ import annotations

import functools
import marshal
from base64 import b64encode
from importlib.abc import InspectLoader
from importlib.util import MAGIC_NUMBER
from typing import Final

from nsbox.guest import failures, log_setup, runtime, standard
from nsbox.linux import visibility
from nsbox.values import json_text

# Each before those that import it.
_MODULES: Final = (log_setup, json_text, failures, visibility, standard, runtime)
# Compiling takes 10 ms, which is half of a start: only another version of Python does it inside.
_PROGRAM: Final = """import sys
from _frozen_importlib_external import MAGIC_NUMBER
if MAGIC_NUMBER == {magic!r}:
    from binascii import a2b_base64
    from marshal import loads
    modules = loads(a2b_base64(sys.argv[1]))
else:
    modules = [(name, compile(text, {file!r}, "exec")) for name, text in eval(sys.argv[2])]
for name, code in modules:
    module = sys.modules[name] = type(sys)(name)
    exec(code, vars(module))
module.main({channel})
"""


@functools.cache
def executed_worker(channel: int) -> tuple[str, str, str]:
    """Return what follows ``python3 -c``: a worker with its socket at the descriptor `channel`.

    These are the program, its modules as this version of Python compiles them, and their sources.
    None is longer than a word of a command line may be (execve(2), MAX_ARG_STRLEN).
    """
    file = runtime.EXECUTED_FILE
    sources = []
    for module in _MODULES:
        with open(str(module.__file__), encoding="utf-8") as source:
            sources.append((module.__name__, source.read()))
    codes = [(name, InspectLoader.source_to_code(text, file)) for name, text in sources]
    program = _PROGRAM.format(magic=MAGIC_NUMBER, file=file, channel=channel)
    return program, b64encode(marshal.dumps(codes)).decode(), repr(sources)
