# SPDX-License-Identifier: Apache-2.0
"""Plots of a run as PNG and SVG; needs matplotlib (`pip install nsbox[bench]`)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.functions import COLD_STEP, FLOOR_STEP, HEAVY, SIZES
from benchmarks.growth import STEPS
from benchmarks.harness import Report
from benchmarks.peers import UnavailableError

_OURS, _PEERS, _FLOOR = "#2a6fbb", "#9aa5b1", "#d98032"
_STARTS = (
    ("crun-answer", "crun"),
    ("bwrap-answer", "bubblewrap"),
    ("floor-answer", "C floor + python3"),
    ("subprocess-answer", "subprocess, no sandbox"),
    (f"{HEAVY}-cold", f"nsbox, imports {HEAVY}"),
    (f"{HEAVY}-preload", f"nsbox, {HEAVY} preloaded"),
    ("cold-exec", 'nsbox, start="exec"'),
    ("cold", "nsbox, cold"),
    ("never", 'nsbox, reuse="never", back to back'),
    ("cold-standby", "nsbox, cold from standby"),
    ("reset", 'nsbox, reuse="reset"'),
    ("warm-100B", "nsbox, warm"),
)
_WARM = (
    ("pool", "ProcessPoolExecutor", _PEERS),
    ("echo", "bare socket echo", _FLOOR),
    ("async", "nsbox, asyncio", "#7fb0e0"),
    ("warm", "nsbox", _OURS),
)


def draw(report: Report, directory: Path) -> list[Path]:
    """Draws what there is data for; returns the files."""
    pyplot = _pyplot()
    files = []
    for name, plot in (
        ("starts", _draw_starts),
        ("warm", _draw_warm),
        ("growth", _draw_growth),
        ("steps", _draw_steps),
    ):
        figure = plot(pyplot, report)
        if figure is None:
            continue
        files += _save(pyplot, figure, report.host, directory, name)
    return files


def _pyplot() -> Any:  # noqa: ANN401 - matplotlib, not typed
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        raise UnavailableError("matplotlib is not installed (pip install 'nsbox[bench]')") from None
    matplotlib.use("Agg")  # files only: no display is needed
    matplotlib.rcParams["svg.hashsalt"] = "nsbox"  # the same data make the same file
    return importlib.import_module("matplotlib.pyplot")


def _save(
    pyplot: Any,  # noqa: ANN401 - matplotlib, not typed
    figure: Any,  # noqa: ANN401
    host: Mapping[str, str],
    directory: Path,
    name: str,
) -> list[Path]:
    # A fixed way below the axes, whatever the height of the figure.
    figure.axes[-1].annotate(
        f"Linux {host['kernel']}, {host['cpu']}, {host['user']}, commit {host['commit']}",
        (1, 0), (0, -42), xycoords="axes fraction",
        textcoords="offset points", ha="right", va="top", fontsize=6, color="0.4",
    )  # fmt: skip
    files = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in files:
        figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(figure)
    return files


def draw_soak(
    samples: Mapping[str, Sequence[tuple[int, Mapping[str, float]]]],
    host: Mapping[str, str],
    directory: Path,
) -> list[Path]:
    """Draws a soak's looks (soak.py), memory above and numbers below; returns the files."""
    pyplot = _pyplot()
    figure, grid = pyplot.subplots(2, len(samples), figsize=(11, 6), squeeze=False)
    for column, (kind, looks) in enumerate(samples.items()):
        for name in looks[0][1]:
            axes = grid[0 if name.startswith(("RSS", "PSS")) else 1][column]
            calls = [number for number, sample in looks if name in sample]
            values = [sample[name] for _, sample in looks if name in sample]
            axes.plot(calls, values, label=name, linewidth=1)
        grid[0][column].set_title(f"{kind} invocations, one after another", fontsize=10)
        grid[1][column].set_xlabel("invocations")
        for axes in (grid[0][column], grid[1][column]):
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=5)
    grid[0][0].set_ylabel("MB")
    grid[1][0].set_ylabel("number")
    return _save(pyplot, figure, host, directory, "soak")


def _short(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.0f} us"
    return f"{microseconds / 1e3:.3g} ms"


def _draw_starts(pyplot: Any, report: Report) -> Any:  # noqa: ANN401 - matplotlib, not typed
    found = [(report.series[name], label) for name, label in _STARTS if name in report.series]
    if not found:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.42 * len(found)))
    colours = [_OURS if label.startswith("nsbox") else _PEERS for _, label in found]
    colours = [
        _FLOOR if s.name == "floor-answer" else c for (s, _), c in zip(found, colours, strict=True)
    ]
    medians = [series.median / 1e3 for series, _ in found]
    axes.barh([label for _, label in found], medians, color=colours)
    for at, (series, _) in enumerate(found):
        low, high = series.quantile(0.1) / 1e3, series.quantile(0.9) / 1e3
        axes.plot([low, high], [at, at], color="0.2", linewidth=1)
        axes.annotate(
            f"{medians[at]:.3g}", (max(high, medians[at]), at), (4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(10 ** math.floor(math.log10(min(medians) / 2)), max(medians) * 4)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("milliseconds to the JSON answer (median; line: p10 to p90)")
    axes.set_title("Time to the JSON answer of a Python function")
    return figure


def _draw_warm(pyplot: Any, report: Report) -> Any:  # noqa: ANN401 - matplotlib, not typed
    sizes = [
        size for size in SIZES if f"warm-{size}" in report.series or f"echo-{size}" in report.series
    ]
    if not sizes:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4))
    peers = [peer for peer in _WARM if any(f"{peer[0]}-{size}" in report.series for size in sizes)]
    width = 0.8 / len(peers)
    for number, (name, label, colour) in enumerate(peers):
        places, values = [], []
        for at, size in enumerate(sizes):
            if series := report.series.get(f"{name}-{size}"):
                places.append(at + (number - (len(peers) - 1) / 2) * width)
                values.append(series.median)
        bars = axes.bar(places, values, width, label=label, color=colour)
        axes.bar_label(bars, [_short(value) for value in values], fontsize=6, padding=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sizes)), sizes)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("microseconds (median)")
    axes.set_title("A warm call: JSON value in, the same value out")
    axes.legend(fontsize=8)
    return figure


def _draw_growth(pyplot: Any, report: Report) -> Any:  # noqa: ANN401 - matplotlib, not typed
    panels = (
        ("cold", "cold start, ms", 1e3),
        ("warm", "warm 100 B call, us", 1),
        ("pss", "PSS per environment, MB", 1),
    )
    figure, all_axes = pyplot.subplots(1, 3, figsize=(10, 3.2))
    drawn = False
    for axes, (name, label, scale) in zip(all_axes, panels, strict=True):
        found = [
            (step, series) for step in STEPS if (series := report.series.get(f"{name}-at-{step}"))
        ]
        if found:
            drawn = True
            steps = [step for step, _ in found]
            low = [series.quantile(0.1) / scale for _, series in found]
            high = [series.quantile(0.9) / scale for _, series in found]
            axes.fill_between(steps, low, high, color=_OURS, alpha=0.2, linewidth=0)
            axes.plot(steps, [series.median / scale for _, series in found], "o-", color=_OURS)
            axes.set_ylim(0, max(high) * 1.1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("live environments")
        axes.set_title(label, fontsize=10)
    figure.tight_layout()
    return figure if drawn else None


def _draw_steps(pyplot: Any, report: Report) -> Any:  # noqa: ANN401 - matplotlib, not typed
    bars = {"C floor + python3": FLOOR_STEP, "nsbox, cold": COLD_STEP}
    figure, axes = pyplot.subplots(figsize=(9, 2.6))
    colours = pyplot.get_cmap("tab20").colors
    number = 0
    for label, prefix in bars.items():
        left = 0.0
        for name, series in report.series.items():
            if name.startswith(prefix):
                value = series.median / 1e3
                axes.barh(
                    label, value, left=left, color=colours[number % len(colours)],
                    label=f"{name.removeprefix(prefix)}: {value:.2g}",
                )  # fmt: skip
                left += value
                number += 1
    if not number:
        return None
    axes.set_xlabel("milliseconds (sum of medians)")
    axes.set_title("Where the time goes")
    axes.legend(fontsize=6, ncols=2, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
