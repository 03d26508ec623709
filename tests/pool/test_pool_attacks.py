# SPDX-License-Identifier: Apache-2.0
"""A hostile function of a shared pool: what it does to the calls of others after its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.pool.conftest import managed_of
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox.environment.environment import EnvironmentFace
from nsbox.functions.function import ReuseChoice
from nsbox.pool.manager import PoolSlot

pytestmark = pytest.mark.needs("userns")

Publish = Callable[[str, ReuseChoice], nsbox.FunctionVersion]

FORGER = """
import json, os, struct, threading

def frame(number):
    data = b'"forged"'
    return struct.pack("!cIQ", b"A", len(data), number) + data

def forge(numbers):
    for number in numbers:
        os.write(3, frame(number))

def handler(event, context):
    if event["attack"] == "after":
        # Its own answer by hand, then what is to be taken for those of the calls to come.
        os.write(3, frame(event["number"]))
        forge(range(event["number"] + 1, event["number"] + 9))
        threading.Event().wait()
    if event["attack"] == "later":
        threading.Thread(target=forge, args=(range(1, 64),), daemon=True).start()
    return event["echo"]
"""


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    def make(code: str, reuse: ReuseChoice) -> nsbox.FunctionVersion:
        (tmp_path / "app.py").write_text(code)
        limit = 30 * PATIENCE
        return nsbox.Function(
            "app.handler", code=tmp_path, reuse=reuse, timeout=limit, init_timeout=limit
        ).publish()

    return make


@pytest.mark.parametrize(("reuse", "tenants"), [("keep", ("a", "b")), ("reset", (None, None))])
def test_forged_and_late_answers_reach_no_other_call(
    publish: Publish, reuse: ReuseChoice, tenants: tuple[str | None, str | None]
) -> None:
    """With "keep" a function answers for the later calls of its own tenant, being the same."""
    with nsbox.WarmPool(publish(FORGER, reuse), max_environments=2) as pool:
        died = 0
        for attack in ["after", "later"] * 4:
            for tenant, of_whom in zip(tenants, ("attacker", "victim"), strict=True):
                kind = attack if of_whom == "attacker" else ""
                try:
                    answer = pool.invoke(
                        {"attack": kind, "number": 2, "echo": of_whom}, tenant=tenant
                    )
                except nsbox.EnvironmentDied as error:
                    assert "broke the rules" in str(error)  # noqa: PT017 - either is right
                    died += 1
                else:
                    # What the attacker says in its own calls is its own matter.
                    assert of_whom == "attacker" or answer == "victim"
        assert died
        stats = pool.stats()
        assert stats["Errors"] == died
        assert stats["Births"] >= died  # each was its environment's last


BREEDER = """
import json, os, time
def handler(event, context):
    if event:
        with open("/tmp/planted", "w") as file:
            file.write("x")
        if os.fork() == 0:
            time.sleep(1000)
        if event == "hang":
            time.sleep(1000)
        os._exit(0)
    return os.path.exists("/tmp/planted")
"""


def test_what_a_failed_call_leaves_is_in_no_later_one(publish: Publish) -> None:
    with nsbox.WarmPool(publish(BREEDER, "keep"), max_environments=1) as pool:
        for event in ("hang", "exit"):
            assert pool.invoke("") is False
            with pytest.raises(nsbox.InvokeError):
                pool.invoke(event, timeout=0.5 * PATIENCE)
            assert pool.invoke("") is False
        assert pool.stats()["Births"] == 3


PLANTER = """
import os
planted = []
def handler(event, context):
    found = [*planted, os.environ.get("PLANTED"), os.path.exists(f"/tmp/{event}") and event]
    planted.append(event)
    open(f"/tmp/{event}", "w").close()
    os.environ["PLANTED"] = event
    return [os.environ["SECRET"], list(filter(None, found))]
"""


def test_nothing_stays_for_another_tenant_or_version(tmp_path: Path) -> None:
    """One environment at a time, which has to make room: files, memory, variables, secrets."""
    (tmp_path / "app.py").write_text(PLANTER)
    limit = 30 * PATIENCE
    versions = [
        nsbox.Function(
            "app.handler", code=tmp_path, env={"SECRET": secret}, timeout=limit, init_timeout=limit
        ).publish()
        for secret in ("old", "new")
    ]
    with nsbox.WarmPool(versions[0], max_environments=1) as pool:
        for tenant in ("a", "b", None, "a"):
            assert pool.invoke("x", tenant=tenant) == ["old", []]
        assert pool.invoke("x", tenant="a") == ["old", ["x", "x", "x"]]
        pool.publish(versions[1])
        assert pool.invoke("x", tenant="a") == ["new", []]


FLOOD = """
import time
def handler(event, context):
    if event:
        open("/tmp/inside", "w").close()
    time.sleep(event)
    return event
"""


def test_a_flood_of_calls_is_refused_at_once_and_the_others_are_served(
    publish: Publish, slots: list[PoolSlot]
) -> None:
    """More calls of one tenant than may wait: the next is told so, who waits is served."""
    most = 4
    version = publish(FLOOD, "keep")
    with nsbox.WarmPool(
        version, max_environments=1, max_waiting=most, acquire_timeout=None
    ) as pool:
        pool.invoke(0, tenant="flood")
        env = EnvironmentFace(managed_of(slots[0]))

        def is_inside() -> bool:
            try:
                return env.read_file("/tmp/inside") == b""
            except nsbox.SyscallError:
                return False

        first = pool.submit(1000, timeout=900, tenant="flood")
        wait_until(is_inside, "the handler runs")
        with ThreadPoolExecutor(most) as threads:
            waiting = [threads.submit(pool.invoke, 0, tenant="flood") for _ in range(most)]
            wait_until(lambda: pool.stats()["Waiting"] == most, "they wait")
            for tenant in ("flood", "other"):
                with pytest.raises(nsbox.Throttled) as caught:
                    pool.invoke(0, tenant=tenant)
                assert caught.value.reason == "full"
            os.kill(env.pid, signal.SIGKILL)
            with pytest.raises(nsbox.EnvironmentDied):
                first.result()
            assert [call.result() for call in waiting] == [0] * most
        assert pool.invoke(0, tenant="other") == 0
        stats = pool.stats()
        assert (stats["Calls"], stats["Throttles"], stats["Errors"]) == (most + 5, 2, 1)
