# SPDX-License-Identifier: Apache-2.0
"""``nsbox gc``: remove what SIGKILL of host and launcher together leaves, and unused code."""

from __future__ import annotations

import os

import click

_DAY = 86400


@click.command("gc")
@click.option(
    "--store-days",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    help="Remove code from the store that was not used for so many days.",
)
@click.option("--store-size", metavar="SIZE", help="Then the longest unused, down to this size.")
@click.option("--quiet", is_flag=True, help="Say nothing when there is nothing to remove.")
def gc_command(store_days: float, store_size: str | None, quiet: bool) -> int:
    """Remove cgroup directories of dead owners below this process's own, and unused code.

    Code that a living process has published stays, whatever its age.
    """
    from nsbox.isolation.cgroups import Hierarchies, collect_garbage
    from nsbox.store.store import Store, default_path
    from nsbox.values.config import parse_size

    max_bytes = None if store_size is None else parse_size(store_size, "store-size")
    hierarchies = Hierarchies.detect()
    removed = collect_garbage(hierarchies)
    store = default_path()
    if os.path.isdir(store):
        removed += Store().collect(max_age=store_days * _DAY, max_bytes=max_bytes)
    for path in removed:
        click.echo(f"removed {path}")
    if not removed and not quiet:
        where = ", ".join([*hierarchies.bases, store]) if hierarchies.bases else store
        click.echo(f"nothing to remove in {where}")
    return 0
