# SPDX-License-Identifier: Apache-2.0
"""Standby environments: born ahead of need, used by one taker, never in anybody's way."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support import attack, host_program, wait_until

import nsbox
from nsbox.functions.deployment import kind_of
from nsbox.launcher.messages import Keep
from nsbox.launcher.protocol import STANDBY_LIFE
from nsbox.supervisor import standby
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.launcher import get_launcher


@pytest.fixture(autouse=True)
def _one_standby() -> Iterator[None]:
    nsbox.set_standby(1)
    yield
    nsbox.set_standby(0)
    get_launcher().companions.close()


def ready() -> list[EnvironmentConnection]:
    return [link for kind in get_launcher().companions.values() for link in kind]


def use_one(**fields: Any) -> str:
    with nsbox.ExecutionEnvironment(**fields) as env:
        env.run(["true"]).check()
        return env.id


def test_the_next_of_a_kind_is_there_already() -> None:
    use_one()
    (link,) = ready()
    with nsbox.ExecutionEnvironment() as env:
        assert env.id == link.env_id
        assert env.run(["cat", "/proc/sys/kernel/hostname"]).text() == "sandbox\n"
        (following,) = ready()
        assert following.env_id != env.id


def test_it_is_asked_for_after_the_first_answer_and_at_the_latest_at_the_end() -> None:
    with nsbox.ExecutionEnvironment() as env:
        assert ready() == []
        env.run(["true"])
        assert len(ready()) == 1
        env.run(["true"])
        assert len(ready()) == 1
    get_launcher().companions.close()
    with nsbox.ExecutionEnvironment():
        assert ready() == []
    assert len(ready()) == 1


def test_kinds_are_kept_apart_and_only_the_latest_are_kept() -> None:
    for pids in range(10, 10 + standby.KINDS_KEPT + 2):
        use_one(limits=nsbox.Limits(pids_max=pids), allow_missing={"cgroup.pids"})
    assert len(ready()) == standby.KINDS_KEPT
    known = {link.env_id for link in ready()}
    assert use_one(limits=nsbox.Limits(pids_max=10), allow_missing={"cgroup.pids"}) not in known


def test_what_belongs_to_the_caller_is_not_held_on_to(tmp_path: os.PathLike[str]) -> None:
    use_one(mounts=[nsbox.Mount.bind(tmp_path, "/data")])
    use_one(network="host")
    assert ready() == []


def test_none_are_kept_where_none_are_wanted() -> None:
    nsbox.set_standby(0)
    use_one()
    assert ready() == []


def test_as_many_as_wanted_each_given_once() -> None:
    nsbox.set_standby(3)
    use_one()
    known = {link.env_id for link in ready()}
    assert len(known) == 3
    envs = [nsbox.ExecutionEnvironment() for _ in range(4)]
    try:
        taken = [env.id for env in envs]
        assert len(set(taken)) == 4
        assert known <= set(taken)
        found = [env.run(["sh", "-c", "ls /tmp/mine; echo > /tmp/mine"]).stdout for env in envs]
        assert found == [b""] * 4
    finally:
        for env in envs:
            env.close()


def test_a_smaller_number_ends_those_that_are_kept() -> None:
    nsbox.set_standby(3)
    use_one()
    known = [link.env_id for link in ready()]
    nsbox.set_standby(1)
    assert [link.env_id for link in ready()] == known[2:]
    nsbox.set_standby(0)
    assert ready() == []
    for env_id in known:
        wait_until(lambda env_id=env_id: not pid_of(env_id), "it is ended")  # type: ignore[misc]


def test_what_is_wished_for_counts_as_long_as_it_is() -> None:
    launcher, spec = kind_of(nsbox.Config())
    assert spec is not None
    one, other = object(), object()
    standby.wish(one, launcher, [spec], 3)
    standby.wish(other, launcher, [spec], 2)
    known = [link.env_id for link in ready()]
    assert len(known) == 3
    use_one(limits=nsbox.Limits(pids_max=99), allow_missing={"cgroup.pids"})
    assert len(ready()) == 4, "one of the other kind"
    standby.forget(one)
    assert [link.env_id for link in ready()][:2] == known[1:]
    standby.forget(other)
    assert len(ready()) == 2
    standby.forget(other)


def test_wished_for_ones_are_kept_alive_and_replaced() -> None:
    launcher, spec = kind_of(nsbox.Config())
    assert spec is not None
    owner = object()
    try:
        standby.wish(owner, launcher, [spec], 2)
        first, second = ready()
        wait_until(lambda: pid_of(first.env_id), "it is born")
        for link in (first, second):
            link.asked_at -= STANDBY_LIFE
        os.kill(pid_of(first.env_id), signal.SIGKILL)
        wait_until(lambda: not first.tell_of_taker(Keep()), "its end is known")
        standby.wish(owner, launcher, [spec], 2)
        assert ready()[0] is second
        assert len(ready()) == 2
        assert use_one() == second.env_id, "it is as new"
    finally:
        standby.forget(owner)


def test_many_threads_never_share_one() -> None:
    nsbox.set_standby(4)
    use_one()
    seen: list[str] = []

    def work() -> None:
        for _ in range(5):
            seen.append(use_one())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == len(set(seen)) == 40


def test_a_dead_one_is_passed_over() -> None:
    use_one()
    (link,) = ready()
    launcher = get_launcher()
    wait_until(lambda: pid_of(link.env_id), "it is born")
    os.kill(pid_of(link.env_id), signal.SIGKILL)
    wait_until(lambda: not pid_of(link.env_id), "it is gone")
    assert use_one() != link.env_id
    assert get_launcher() is launcher


def test_one_that_is_too_old_is_passed_over() -> None:
    use_one()
    (link,) = ready()
    link.asked_at -= STANDBY_LIFE
    assert use_one() != link.env_id
    wait_until(lambda: not pid_of(link.env_id), "it is ended")


def test_they_end_with_their_launcher() -> None:
    use_one()
    (link,) = ready()
    old = get_launcher()
    os.kill(old.pid, signal.SIGKILL)
    wait_until(lambda: not old.alive, "its end is seen")
    assert use_one() != link.env_id
    assert get_launcher() is not old
    wait_until(lambda: not pid_of(link.env_id), "it is ended")


def test_a_forked_child_takes_none_of_its_parent() -> None:
    code = """
        import os, nsbox
        nsbox.set_standby(2)
        nsbox.run(["true"])
        read, write = os.pipe()
        pid = os.fork()
        with nsbox.ExecutionEnvironment() as env:
            assert env.run(["true"]).ok
            if pid == 0:
                os.write(write, env.id.encode())
                os._exit(0)
            other = os.read(read, 8).decode()
            assert other and other != env.id, other
        assert os.waitpid(pid, 0)[1] == 0
    """
    host = host_program(code)
    assert host.wait(60) == 0


def test_a_standby_environment_is_as_isolated_as_any() -> None:
    use_one()
    (link,) = ready()
    with nsbox.ExecutionEnvironment() as env:
        assert env.id == link.env_id
        status = attack(env, "answer = read('/proc/1/status')")
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert "CapBnd:\t0000000000000000" in status
        assert env.protections.missing == nsbox.run(["true"]).protections.missing


@pytest.mark.slow
def test_one_that_nobody_takes_is_ended() -> None:
    use_one()
    (link,) = ready()
    wait_until(lambda: pid_of(link.env_id), "it is born")
    begin = time.monotonic()
    wait_until(lambda: not pid_of(link.env_id), "its time is over", STANDBY_LIFE + 10)
    assert time.monotonic() - begin > STANDBY_LIFE - 10
    assert use_one() != link.env_id


@pytest.mark.parametrize("count", [-1, 65, 1.5, "2", None, True])
def test_a_wrong_number_is_refused(count: object) -> None:
    with pytest.raises(nsbox.ConfigError, match="standby: must be a number from 0 to 64, got"):
        nsbox.set_standby(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["-1", "many", "65", ""])
def test_a_wrong_variable_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NSBOX_STANDBY", text)
    with pytest.raises(nsbox.ConfigError, match=f"NSBOX_STANDBY: '{text}' is not a number"):
        standby._initial_count()


def pid_of(env_id: str) -> int:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm") as file:
                    if file.read().strip() == f"nsbox-{env_id}":
                        return int(entry)
            except OSError:
                continue
    return 0


def test_what_is_too_old_and_taken_in_that_moment_is_no_error() -> None:
    """A run that succeeded sees to what is on standby while another thread ends them."""
    others: list[threading.Thread] = []

    class Old(EnvironmentConnection):
        @property
        def asked_at(self) -> float:  # type: ignore[override]
            other = threading.Thread(target=nsbox.set_standby, args=(0,))
            other.start()
            other.join(0.02)
            others.append(other)
            return -math.inf

    with nsbox.ExecutionEnvironment() as env:
        env.run(["true"]).check()
        (link,) = ready()
        del link.asked_at
        link.__class__ = Old
        launcher, kind = kind_of(env.config)
        assert kind is not None
        standby.refill(launcher, kind)
        for other in others:
            other.join()
    assert others


def test_the_old_names_are_kept_for_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(DeprecationWarning, match="set_blanks is nsbox.set_standby now"):
        assert nsbox.set_blanks is nsbox.set_standby
    monkeypatch.delenv("NSBOX_STANDBY", raising=False)
    monkeypatch.setenv("NSBOX_BLANKS", "7")
    with pytest.warns(DeprecationWarning, match="NSBOX_BLANKS is NSBOX_STANDBY now"):
        assert standby._initial_count() == 7
    with pytest.warns(DeprecationWarning, match="blank= is standby= now"):
        nsbox.WarmPool(blank=0).close()
