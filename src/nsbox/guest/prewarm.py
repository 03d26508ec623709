# SPDX-License-Identifier: Apache-2.0
"""Warm-up: start a worker and serve an event with a trivial handler, and leave no trace.

The interpreter sets much up when it is first needed: importer, compiler, codecs. The template does
it before there are clones, and the worker of a standby environment while it waits, so that it has
its own copies of the pages that a start and an invocation write to.
"""

from __future__ import annotations

import json
import os
import sys
from _socket import AF_UNIX, SOCK_STREAM, socketpair
from importlib.machinery import FileFinder, PathFinder, SourceFileLoader

from nsbox.guest import runtime, standard
from nsbox.linux import calls
from nsbox.linux.visibility import PR_GET_DUMPABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_DIRECTORY = os.path.dirname(__file__)
_PLACE = "/tmp/nsbox-warm"  # noqa: S108 - the environment's own; no guest code has run yet
_CODE = "/var/task"  # nsbox.functions.function.TASK_ROOT
_LIBRARY = os.path.dirname(os.__file__)
_SOURCE = b"""
class A:
    def f(self, *a, **k):
        return [x for x in {**k} if x] + [a, f"{a}"]
"""


_TOLD = ("name", "version", "arn", "memory", "log_group", "tenant")
_EVENT = runtime.INVOCATION.pack(1.0, 2) + b'w\0{"warm": [1.5]}'


_HANDLER = b"""
def handler(event, context):
    context.get_remaining_time_in_millis()
    return event
"""


def handler(event: Any, context: runtime.Context) -> Any:  # noqa: ANN401 - any JSON value
    """Answer an event with itself."""
    context.get_remaining_time_in_millis()
    return event


def warm_up_inside() -> None:
    """Do as `warm_up` in an environment, where no file of nsbox is visible: /tmp gets a module."""
    module = f"{_PLACE}/prewarm.py"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        os.mkdir(_PLACE, 0o700)
        try:
            fd = os.open(module, flags, 0o600)
            try:
                is_whole = os.write(fd, _HANDLER) == len(_HANDLER)
                os.close(fd)
                if is_whole:
                    warm_up(_PLACE)
            finally:
                os.unlink(module)
        finally:
            os.rmdir(_PLACE)
    except OSError:
        pass  # its /tmp has no room, or its limits allow no file
    PathFinder.find_spec("prewarm", [_CODE])
    finder = sys.path_importer_cache.get(_CODE)
    if isinstance(finder, FileFinder):
        finder.invalidate_caches()  # the code is attached later


def warm_up(place: str = _DIRECTORY) -> None:
    """Start a worker with the handler of `prewarm` in `place`, and have it answer an event.

    Leaves nothing of it.
    """
    SourceFileLoader("prewarm", __file__).source_to_code(_SOURCE, "<warm>")
    environment, path, directory = dict(os.environ), list(sys.path), os.getcwd()
    ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
    request = {
        "handler": "prewarm.handler",
        "path": [place],
        "cwd": place,
        "own": {"AWS_LAMBDA_LOG_STREAM_NAME": "warm"},
        "env": {f"WARM_{number}": f"{number}" * (number + 3) for number in range(20)},
        "function": {name: f"{name} of a warm function" for name in _TOLD},
        "forks": False,
        "visible": False,
        "keeps_path": False,
    }
    try:
        standard.open_stream(1).write("")
        standard.places_of((standard.identity(0),), 4)
        calls.prctl(PR_GET_DUMPABLE)
        worker = runtime.Worker(theirs)
        for kind, data in (
            (runtime.START, json.dumps(request).encode()),
            (runtime.LOAD, runtime.MOMENT.pack(0.0)),
            (runtime.INVOKE, _EVENT),
        ):
            ours.sendall(runtime.HEADER.pack(kind, len(data), 1) + data)
            worker.serve_one()
    finally:
        ours.close()
        theirs.close()
        sys.modules.pop("prewarm", None)
        sys.path[:] = path
        _forget_places()
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(environment)


def _forget_places() -> None:
    """Drop the importer's caches of all directories but the standard library's."""
    finders = sys.path_importer_cache
    for place in list(finders):
        if finders[place] is None or not f"{place}/".startswith(f"{_LIBRARY}/"):
            del finders[place]
