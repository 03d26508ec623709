# SPDX-License-Identifier: Apache-2.0
"""Give `logging` in a worker the root handler that AWS Lambda's runtime gives it.

Only when something imports `logging`: that takes 5 ms and a megabyte. A part of `runtime`,
and so imports nothing of nsbox.
"""

from __future__ import annotations

import sys
import time
from importlib.machinery import PathFinder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class LogSetup:
    """Sets `logging` up: the first finder of sys.meta_path, until somebody imports that.

    The root has its handler before any other code uses the module, as on AWS Lambda, where
    `logging.basicConfig` does nothing for that reason.
    """

    def __init__(self, request_id: Callable[[], str]) -> None:
        """Set it up now when it has been imported (`preload`), else when it will be."""
        self._request_id = request_id
        if "logging" in sys.modules:
            self._set_up(sys.modules["logging"])
        else:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of `logging` whose loader sets it up, too; None for all other modules."""
        if name != "logging":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader, load = spec.loader, spec.loader.exec_module

            def load_and_set_up(module: ModuleType) -> None:
                load(module)
                del loader.exec_module
                self._set_up(module)

            loader.exec_module = load_and_set_up  # type: ignore[method-assign]
        return spec

    def _set_up(self, logging: Any) -> None:  # noqa: ANN401 - a module that is not imported here
        """Add the handler: lines as AWS Lambda's, on stdout."""
        if not hasattr(logging, "LogRecord"):
            return  # a module of the function's own that has this name

        request_id = self._request_id

        class Handler(logging.Handler):  # type: ignore[misc]
            def emit(self, record: Any) -> None:  # noqa: ANN401 - a LogRecord
                record.aws_request_id = request_id()
                sys.stdout.write(self.format(record))

        logging.Formatter.converter = time.gmtime
        handler = Handler()
        handler.setFormatter(
            logging.Formatter(
                "[%(levelname)s]\t%(asctime)s.%(msecs)03dZ\t%(aws_request_id)s\t%(message)s\n",
                "%Y-%m-%dT%H:%M:%S",
            )
        )
        logging.getLogger().addHandler(handler)
