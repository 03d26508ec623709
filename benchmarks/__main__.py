# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks`: the whole suite of functions, as JSON, a Markdown table and plots."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from benchmarks import growth, plots, pooled, results
from benchmarks.functions import CASE_NAMES, FunctionSuite
from benchmarks.harness import Report, describe, measure_interleaved
from benchmarks.peers import UnavailableError

FEWEST_ROUNDS = 30
QUICK_ROUNDS = 2
QUICK_LIVE = 10
GROWTH = "growth"
POOL_GROWTH = "pooled-at"
_WAYS = (*CASE_NAMES, *pooled.CASE_NAMES, GROWTH, POOL_GROWTH)


def _check_names(
    _context: click.Context, _parameter: click.Parameter, text: str
) -> tuple[str, ...]:
    prefixes = tuple(filter(None, text.split(",")))
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in _WAYS):
            raise click.BadParameter(f"no case begins with {prefix!r}")
    return prefixes


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=f"Cases: {', '.join(_WAYS)}.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("benchmark-results"),
    show_default=True,
    help="Directory for results.json, results.md and the plots.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True)
@click.option(
    "--warmup",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Rounds before that are not counted.",
)
@click.option(
    "--pause",
    type=click.FloatRange(min=0),
    default=0.003,
    show_default=True,
    help="Seconds between measurements.",
)
@click.option(
    "--live",
    type=click.IntRange(min=0),
    default=results.MOST_LIVE,
    show_default=True,
    help="Grow to so many live environments, in steps; also in a pool; 0: not at all.",
)
@click.option(
    "--quick", is_flag=True, help=f"{QUICK_ROUNDS} rounds, {QUICK_LIVE} live: does it run?"
)
@click.option(
    "--only",
    metavar="NAME[,NAME]",
    default="",
    callback=_check_names,
    help="Only the cases that begin so.",
)
@click.option("--plots/--no-plots", "wants_plots", default=True, help="Draw PNG and SVG files.")
def main(
    output: Path,
    rounds: int,
    warmup: int,
    pause: float,
    live: int,
    quick: bool,
    only: tuple[str, ...],
    wants_plots: bool,
) -> int:
    """Measure nsbox's functions beside their peers, in one interleaved run.

    Nothing is asserted: a target that is not met is a line of the table. See benchmarks/README.md.
    """
    if quick:
        rounds, warmup, live = QUICK_ROUNDS, 1, min(live, QUICK_LIVE)
    idle = live if _wants(POOL_GROWTH, only) else 0
    live = live if _wants(GROWTH, only) else 0
    growth.raise_descriptor_limit(max(live, idle))
    output.mkdir(parents=True, exist_ok=True)
    report = Report()
    with FunctionSuite(only, report) as suite, pooled.PoolSuite(only, report) as pools:
        for label, cases in (
            ("one at a time", [*suite.single, *pools.single]),
            ("several starters", [*suite.rates, *pools.rates]),
        ):
            with _bar(label, len(cases) * (warmup + rounds)) as advance:
                measure_interleaved(
                    cases, report, rounds=rounds, warmup=warmup, pause=pause, advance=advance
                )
        if steps := growth.steps_up_to(live):
            with _bar(f"up to {steps[-1]} live", steps[-1]) as advance:
                _grow(suite, report, steps, advance)
        if steps := pooled.idle_up_to(idle):
            with _bar(f"up to {steps[-1]} idle in a pool", sum(steps)) as advance:
                pools.measure_idle(steps, advance)
    _write(report, output, wants_plots)
    if rounds < FEWEST_ROUNDS:
        _say(f"Only {rounds} rounds: publish nothing below {FEWEST_ROUNDS}.")
    return 0


def _wants(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(name.startswith(prefix) for prefix in only)


@contextlib.contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; nothing but its label where that is no terminal."""
    with click.progressbar(length=length, label=label, file=sys.stderr) as shown:
        yield shown.update


def _grow(
    suite: FunctionSuite, report: Report, steps: list[int], advance: Callable[[int], None]
) -> None:
    try:
        suite.growth().measure(steps, advance)
    except Exception as error:  # noqa: BLE001 - named; what was measured before is written
        report.missing[GROWTH] = describe(error)


def _write(report: Report, output: Path, wants_plots: bool) -> None:
    results.write_json(report, output / "results.json")
    if wants_plots:
        try:
            plots.draw(report, output)
        except UnavailableError as error:
            report.missing["plots"] = str(error)
    page = io.StringIO()
    results.write_page(report, page)
    (output / "results.md").write_text(page.getvalue(), encoding="utf-8")
    click.echo(page.getvalue(), nl=False)
    _say(f"written: {output}/results.json, results.md" + (", plots" if wants_plots else ""))


def _say(text: str) -> None:
    click.echo(text, err=True)


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m benchmarks"))
