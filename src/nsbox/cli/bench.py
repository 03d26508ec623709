# SPDX-License-Identifier: Apache-2.0
"""``nsbox bench``: the benchmarks of a checkout. They are no part of the installed package."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

_SOURCE_TREE: Final = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))


@click.command(
    "bench",
    # Whatever stands here, --help included, is for the suite to understand.
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench_command(arguments: tuple[str, ...]) -> int:
    """Run the benchmarks of a checkout of nsbox: the current directory, or that of this source."""
    directory = find_checkout()
    if directory is None:
        raise click.ClickException(
            "the benchmarks come with the repository, not with the installed package: "
            "clone it, and run 'nsbox bench' in the clone's top directory"
        )
    sys.path.insert(0, directory)
    suite: click.Command = importlib.import_module("benchmarks.__main__").main
    status = suite.main(args=list(arguments), prog_name="nsbox bench", standalone_mode=False)
    return status if isinstance(status, int) else 0


def find_checkout() -> str | None:
    """Return the directory whose `benchmarks` are nsbox's own; None if there is none."""
    for directory in (os.getcwd(), _SOURCE_TREE):
        # Any project may have benchmarks: those beside nsbox's own source are meant.
        if all(
            os.path.isfile(os.path.join(directory, *path))
            for path in (("benchmarks", "__main__.py"), ("src", "nsbox", "__init__.py"))
        ):
            return directory
    return None
