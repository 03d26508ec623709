# SPDX-License-Identifier: Apache-2.0
"""``nsbox plan``: the steps of a birth and the protections, for given options."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from nsbox.cli.options import environment_options, make_config


@click.command("plan")
@environment_options
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def plan_command(as_json: bool, **options: object) -> int:
    """Print what `nsbox run` would do with these options, in order; nothing is run.

    A launcher is started for it, which finds out what this host can enforce.
    """
    from nsbox.launcher.birth import STEPS
    from nsbox.supervisor.launcher import get_launcher
    from nsbox.supervisor.plan import Plan

    options.pop("timeout")
    config = make_config(options)
    plan = Plan(config, get_launcher().hello)
    spec = plan.spec
    steps = [
        {"number": number, "side": step.side, "name": step.name, "text": step.describe(spec)}
        for number, step in enumerate(STEPS, 1)
    ]
    if as_json:
        layers = [asdict(layer) for layer in plan.layers]
        click.echo(json.dumps({"steps": steps, "protections": layers}, indent=2))
        return 0
    side = ""
    for step in steps:
        if step["side"] != side:
            side = str(step["side"])
            click.echo(f"In the {side}:")
        click.echo(f"{step['number']:>4}  {step['name']:<14} {step['text']}")
    click.echo("Protections decided before the birth (it verifies the others at its end):")
    for layer in plan.layers:
        click.echo(f"  {'yes' if layer.in_force else 'no ':<4} {layer.name:<18} {layer.detail}")
    return 0
