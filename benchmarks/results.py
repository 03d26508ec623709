# SPDX-License-Identifier: Apache-2.0
"""What is written of a run of `python -m benchmarks`: the targets, JSON and a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from benchmarks import pooled
from benchmarks.functions import COLD_STEP, FLOOR_STEP, HEAVY, LIBRARY
from benchmarks.harness import (
    COUNT,
    MEGABYTES,
    MICROSECONDS,
    PER_SECOND,
    Report,
    Series,
    Target,
    write_markdown,
)

FLOOR = "floor-answer"
RATE_FLOOR = "floor-rate-8"
ECHO = "echo-"
MOST_LIVE = 1000

TARGETS = (
    Target("cold", FLOOR, 0.20),
    Target("cold", "bwrap-answer", 0.20),
    Target("cold-standby", FLOOR, 0.04),
    Target("warm-100B", "echo-100B", 2.0),
    Target("async-100B", "echo-100B", 3.0),
    Target("warm-100B", "pool-100B", 0.10),
    Target("reset", FLOOR, 0.12),
    Target("warm-1MiB", "echo-1MiB", 1.3),
    Target("warm-6MiB", "echo-6MiB", 1.3),
    Target("nsbox-rate-8", RATE_FLOOR, 0.5, PER_SECOND),
    Target("pss-at-10", None, 1.3, MEGABYTES),
    Target(f"answering-at-{MOST_LIVE}", None, MOST_LIVE, COUNT),
    Target(f"cold-at-{MOST_LIVE}", "cold-at-1", 2.0),
    *pooled.TARGETS,
)
# Told without a bound.
RATIOS = (
    Target("cold-exec", FLOOR),
    Target("never", FLOOR),
    Target("subprocess-answer", FLOOR),
    Target("bwrap-answer", FLOOR),
    Target("crun-answer", FLOOR),
    Target("warm-64KiB", "echo-64KiB"),
    Target("warm-rows", "echo-rows"),
    Target(f"warm-rows-{LIBRARY}", "echo-rows"),
    *(Target(f"async-{size}", f"echo-{size}") for size in ("64KiB", "1MiB", "6MiB", "rows")),
    Target(f"{HEAVY}-preload", f"{HEAVY}-cold"),
    Target("nsbox-rate-2", "floor-rate-2", unit=PER_SECOND),
    Target(f"floor-at-{MOST_LIVE}", "floor-at-1"),
    Target(f"warm-at-{MOST_LIVE}", "warm-at-1"),
    Target(f"pss-at-{MOST_LIVE}", "pss-at-10", unit=MEGABYTES),
    *pooled.RATIOS,
)


def document(report: Report) -> dict[str, Any]:
    """The whole run as one JSON object; times in microseconds, memory in 1e6 bytes."""
    verdicts = [report.judge(target) for target in (*TARGETS, *RATIOS)]
    return {
        "host": report.host,
        "series": {
            series.name: {
                "unit": series.unit,
                "count": len(series.samples),
                **{name: _round(series.quantile(q)) for name, q in _QUANTILES},
                "to_floor": _to_floor(series, report),
                "samples": [_round(sample) for sample in series.samples],
            }
            for series in report.series.values()
        },
        "verdicts": [
            {
                "name": verdict.target.name,
                "reference": verdict.target.reference,
                "ratio": verdict.ratio and _round(verdict.ratio),
                "undisturbed": verdict.undisturbed and _round(verdict.undisturbed),
                "bound": verdict.target.bound,
                "met": verdict.met,
            }
            for verdict in verdicts
        ],
        "missing": report.missing,
    }


def write_json(report: Report, path: Path) -> None:
    """Writes `document`."""
    path.write_text(json.dumps(document(report), indent=1) + "\n", encoding="utf-8")


def write_page(report: Report, stream: TextIO) -> None:
    """The Markdown page: host, targets and verdicts, then every series."""
    stream.write("# nsbox: functions, measured\n\n")
    for key, value in report.host.items():
        stream.write(f"- {key}: {value}\n")
    stream.write("\n## Targets and ratios\n\n")
    report.write_verdicts([*TARGETS, *(t for t in RATIOS if t.name in report.series)], stream)
    stream.write("\n## Series\n\n")
    steps: list[Series] = []
    plain: list[Series] = []
    for series in report.series.values():
        is_step = series.name.startswith((FLOOR_STEP, COLD_STEP))
        (steps if is_step else plain).append(series)
    header = ["series", "unit", "median", "p10", "p99", "n", "to floor"]
    write_markdown(header, [_row(series, report) for series in plain], stream)
    if steps:
        stream.write("\n## Steps\n\n")
        write_markdown(header, [_row(series, report) for series in steps], stream)


_QUANTILES = (("median", 0.5), ("p10", 0.1), ("p90", 0.9), ("p99", 0.99))


def _row(series: Series, report: Report) -> list[str]:
    ratio = _to_floor(series, report)
    return [
        series.name,
        series.unit,
        *(_figure(series.quantile(q)) for q in (0.5, 0.1, 0.99)),
        str(len(series.samples)),
        "" if ratio is None else f"{ratio:.3g}",
    ]


def _to_floor(series: Series, report: Report) -> float | None:
    """The ratio of medians to the floor of the same kind: a sandboxed answer, sandboxes a second,
    and for warm calls the bare echo of the same size."""
    name, _, size = series.name.partition("-")
    if name in pooled.PREFIXES and "rate" not in size:
        floor = ECHO + "100B"
    elif name in pooled.PREFIXES:
        return None
    elif series.unit == PER_SECOND:
        floor = f"floor-rate-{series.name.rpartition('-')[2]}"
    elif series.unit != MICROSECONDS:
        return None
    elif name in ("echo", "pool", "warm", "async") and not size.startswith("at-"):
        floor = ECHO + size
    elif name in ("cold", "floor") and size.startswith("at-"):
        floor = f"floor-{size}"
    elif series.name.startswith("warm-at-"):
        floor = ECHO + "100B"
    else:
        floor = FLOOR
    reference = report.series.get(floor)
    return None if reference is None else _round(series.median / reference.median)


def _figure(value: float) -> str:
    """At least three significant digits, and no more than are worth reading."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _round(value: float) -> float:
    return float(f"{value:.5g}")
