# SPDX-License-Identifier: Apache-2.0
"""``nsbox doctor``: try everything a sandbox needs, and name the remedy for what does not work."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Final

import click

from nsbox.host import features

_WIDTH: Final = 100


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects.")
def doctor_command(as_json: bool) -> int:
    """Try each operation for real, and each limit until it bites; takes a few seconds.

    The exit status is 0 when a default environment can be made.
    """
    findings = features.find(list(features.PROBED))
    fit = next(finding.works for finding in findings if finding.name == "environment")
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
        return 0 if fit else 1
    facts = features.host_facts()
    who = "root" if not facts["user"] else f"user {facts['user']}"
    where = f", in a container ({facts['container']})" if facts["container"] else ""
    click.echo(f"nsbox doctor: {who}, Linux {os.uname().release}{where}")
    for finding in findings:
        state = "works" if finding.works else "MISSING" if _is_needed(finding) else "missing"
        click.echo(f"{state:<8} {finding.name:<22} {' '.join(finding.detail.split())}")
        if not finding.works:
            click.echo(f"{'':<8} {'':<22} tried: {features.PROBED[finding.name]}")
        if finding.remedy:
            click.echo(f"{'':<8} {'':<22} remedy: {finding.remedy}")
    count = sum(finding.works for finding in findings)
    told = "A default environment can be made." if fit else "No default environment can be made."
    click.echo(f"{told} {count} of {len(findings)} work here.")
    return 0 if fit else 1


def _is_needed(finding: features.Finding) -> bool:
    return finding.name in features.NEEDED
