# SPDX-License-Identifier: Apache-2.0
"""Numbers of pools as Prometheus reads them, by its client's own parser."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support import SOURCE

import nsbox
from nsbox.observe.prometheus import PoolCollector

Make = Callable[..., nsbox.FunctionVersion]


class Known:
    """Numbers that are given."""

    def __init__(self, **numbers: float) -> None:
        self._numbers = numbers

    def stats(self) -> dict[str, float]:
        return self._numbers


def scrape(registry: CollectorRegistry) -> tuple[dict[str, str], dict[tuple[str, str], float]]:
    """Return the kinds of families, and the values of samples by name and pool."""
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    kinds = {family.name: family.type for family in families}
    assert all(family.documentation for family in families)
    values = {}
    for family in families:
        for sample in family.samples:
            assert set(sample.labels) == {"pool"}
            values[sample.name, sample.labels["pool"]] = sample.value
    return kinds, values


def registry_of(pools: dict[str, object]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(PoolCollector(pools))  # type: ignore[arg-type]
    return registry


@pytest.mark.needs("userns")
def test_numbers_of_pools_that_were_used(make: Make) -> None:
    with nsbox.WarmPool(make(), provisioned=1) as first, nsbox.WarmPool() as second:
        registry = registry_of({"handlers": first, 'odd "name"\n': second})
        for _ in range(3):
            first.invoke({})
        with pytest.raises(nsbox.FunctionError):
            first.invoke({"raise": True})
        with second.acquire():
            kinds, values = scrape(registry)
        stats = first.stats()
    assert values["nsbox_pool_calls_total", "handlers"] == 4
    assert values["nsbox_pool_invocations_total", "handlers"] == 4
    assert values["nsbox_pool_errors_total", "handlers"] == 1
    assert values["nsbox_pool_throttles_total", "handlers"] == 0
    assert values["nsbox_pool_births_total", "handlers"] == 1
    assert values["nsbox_pool_provisioned_invocations_total", "handlers"] == 4
    assert values["nsbox_pool_duration_seconds_count", "handlers"] == 4
    assert values["nsbox_pool_duration_seconds_sum", "handlers"] == stats["Duration"] / 1000
    assert (
        values["nsbox_pool_init_duration_seconds_total", "handlers"] == stats["InitDuration"] / 1000
    )
    assert values["nsbox_pool_environments", "handlers"] == 1
    assert values["nsbox_pool_idle_environments", "handlers"] == 1
    odd = 'odd "name"\n'
    assert values["nsbox_pool_concurrent_executions", odd] == 1
    assert values["nsbox_pool_waiting_calls", odd] == 0
    assert kinds["nsbox_pool_duration_seconds"] == "summary"
    assert kinds["nsbox_pool_calls"] == "counter"
    assert kinds["nsbox_pool_environments"] == "gauge"
    # Whatever the pool counts is told, under the names of its attributes.
    for name, _ in values:
        attribute = name.removeprefix("nsbox_pool_").removesuffix("_total")
        if not attribute.startswith("duration_seconds"):  # a count and a sum
            assert values[name, "handlers"] == getattr(stats, attribute)
    assert len(kinds) == len(stats)
    assert all(re.fullmatch("nsbox_pool_[a-z_]+", name) for name in kinds)


def test_numbers_that_are_new_are_told_too() -> None:
    kinds, values = scrape(registry_of({"a": Known(BrandNew=3.5), "b": Known(Calls=2)}))
    assert kinds == {"nsbox_pool_brand_new": "gauge", "nsbox_pool_calls": "counter"}
    assert values == {("nsbox_pool_brand_new", "a"): 3.5, ("nsbox_pool_calls_total", "b"): 2}


@pytest.mark.needs("userns")
def test_an_asynchronous_pool_before_and_after_it_is_entered(make: Make) -> None:
    async def main() -> None:
        pool = nsbox.AsyncWarmPool(make())
        registry = registry_of({"a": pool})
        assert scrape(registry) == ({}, {})
        async with pool:
            await pool.invoke({})
            assert scrape(registry)[1]["nsbox_pool_calls_total", "a"] == 1
        assert scrape(registry)[1]["nsbox_pool_environments", "a"] == 0

    asyncio.run(main())


@pytest.mark.parametrize("pools", [[], {"a": 7}, {7: Known()}, Known()])
def test_what_are_no_pools(pools: object) -> None:
    with pytest.raises(nsbox.ConfigError, match="pools: "):
        PoolCollector(pools)  # type: ignore[arg-type]


def test_without_the_client_the_remedy_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import nsbox.observe.prometheus"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": SOURCE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (
        "ImportError: nsbox.observe.prometheus needs prometheus-client: pip install " in done.stderr
    )
    assert "nsbox[prometheus]" in done.stderr


def test_the_document_names_what_is_told() -> None:
    from nsbox.observe import prometheus

    text = (Path(__file__).resolve().parents[2] / "docs/pool.md").read_text()
    section = text.split("\n## Prometheus\n")[1].split("\n## ")[0]
    names = {f"{name}_total" for name in prometheus._COUNTERS.values()}
    names |= {f"{name}_total" for name in prometheus._SECONDS.values()}
    names |= set(prometheus._GAUGES.values())
    names.add("duration_seconds")
    assert set(re.findall(r"`nsbox_pool_(\w+)`", section)) == names
