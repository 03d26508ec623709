# SPDX-License-Identifier: Apache-2.0
"""``nsbox gc``: remove what only a SIGKILL of host and launcher together can leave."""

from __future__ import annotations

import click


@click.command("gc")
@click.option("--quiet", is_flag=True, help="Say nothing when there is nothing to remove.")
def gc_command(quiet: bool) -> int:
    """Remove the cgroup directories of dead owners below this process's own cgroup."""
    from nsbox.isolation.cgroups import Hierarchies, collect_garbage

    hierarchies = Hierarchies.detect()
    removed = collect_garbage(hierarchies)
    for path in removed:
        click.echo(f"removed {path}")
    if not removed and not quiet:
        where = ", ".join(hierarchies.bases) or "no usable cgroup"
        click.echo(f"nothing to remove in {where}")
    return 0
