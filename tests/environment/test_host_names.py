# SPDX-License-Identifier: Apache-2.0
"""With the host's network names resolve inside as outside."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import nsbox

pytestmark = pytest.mark.needs("userns")


@pytest.mark.parametrize("userland", ["full", "minimal"])
def test_files_that_names_resolve_by(
    make_env: Callable[..., nsbox.ExecutionEnvironment], userland: str
) -> None:
    env = make_env(network="host", userland=userland)
    hosts = env.read_file("/etc/hosts").decode()
    assert hosts == Path("/etc/hosts").read_text() + f"\n127.0.0.1 {env.config.hostname}\n"
    for name in ("resolv.conf",):
        assert env.read_file(f"/etc/{name}") == Path(f"/etc/{name}").read_bytes()
    outside = Path("/etc/nsswitch.conf").read_text().splitlines()
    inside = env.read_file("/etc/nsswitch.conf").decode().splitlines()
    of_hosts = [line for line in outside if line.startswith("hosts:")]
    assert [line for line in inside if line.startswith("hosts:")] == of_hosts
    assert [line for line in inside if line.startswith("passwd:")] == ["passwd: files"]


def test_a_name_of_the_host_resolves(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    names = [
        line.split("#")[0].split()[1]
        for line in Path("/etc/hosts").read_text().splitlines()
        if len(line.split("#")[0].split()) > 1
    ]
    env = make_env(network="host")
    for name in [*names, env.config.hostname]:
        assert env.run(["getent", "hosts", name], timeout=10).ok, name
    outside = subprocess.run(["getent", "ahosts", names[0]], capture_output=True, text=True)
    assert env.run(["getent", "ahosts", names[0]], timeout=10).text() == outside.stdout


def test_without_the_hosts_network_nothing_of_its_names_is_seen(
    env: nsbox.ExecutionEnvironment,
) -> None:
    hosts = env.read_file("/etc/hosts").decode()
    assert hosts.splitlines() == [f"{a} localhost sandbox" for a in ("127.0.0.1", "::1")]
    assert env.read_file("/etc/resolv.conf") == b""
