# SPDX-License-Identifier: Apache-2.0
"""Many environments, one after another and at once, leave every count where it was."""

from __future__ import annotations

import gc
import os
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tests.support import SLOW_MACHINE, wait_until

import nsbox
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

ONE_AFTER_ANOTHER = 60 if SLOW_MACHINE else 200
AT_ONCE = 40 if SLOW_MACHINE else 100
WARM_UP = 20
MIB = 1 << 20


def count_of_launcher(name: str) -> int:
    """Return how many entries a directory of the launcher in /proc has; -1 where it is hidden."""
    try:
        return len(os.listdir(f"/proc/{get_launcher().pid}/{name}"))
    except PermissionError:
        return -1


def counts() -> dict[str, int]:
    launcher = get_launcher()
    children = psutil.Process(launcher.pid).children(recursive=True)
    return {
        "descriptors of the host": len(os.listdir("/proc/self/fd")),
        "threads of the host": len(os.listdir("/proc/self/task")),
        "children of the host": len(psutil.Process().children()),
        "descriptors of the launcher": count_of_launcher("fd"),
        "threads of the launcher": count_of_launcher("task"),
        "descendants of the launcher": len(children),
        "mounts of the host": len(Path("/proc/self/mountinfo").read_text().splitlines()),
        "mounts of the launcher": len(
            Path(f"/proc/{launcher.pid}/mountinfo").read_text().splitlines()
        ),
        "cgroups": sum(
            os.path.isdir(f"{tree}/{name}")
            for tree in set(launcher.hello.trees.values())
            for name in os.listdir(tree)
        ),
        "named sockets": Path("/proc/net/unix").read_text().count(f"nsbox-{os.getpid()}"),
        "temporary files": len(os.listdir(os.environ["TMPDIR"])),
    }


def assert_counts_return_to(before: dict[str, int]) -> None:
    seen: dict[str, int] = {}

    def back() -> bool:
        seen.clear()
        now = counts()
        seen.update({name: now[name] for name in now if now[name] > before[name]})
        return not seen

    try:
        wait_until(back, "every count is where it was")
    except AssertionError:
        pytest.fail(f"more than before: {seen}, before: {before}")


def resident_bytes_of_launcher() -> int:
    return int(psutil.Process(get_launcher().pid).memory_info().rss)


def warm_up() -> None:
    """Let caches fill: layouts, prepared calls, network namespaces kept ready."""
    for _ in range(WARM_UP):
        nsbox.run(["true"]).check()
    if get_launcher().hello.networks_ready:
        ready = [-1, -1]

        def steady() -> bool:
            ready[:] = [ready[1], count_of_launcher("fd")]
            return ready[0] == ready[1]

        wait_until(steady, "namespaces are made ahead of need")
    gc.collect()


def test_one_after_another() -> None:
    warm_up()
    before, resident = counts(), resident_bytes_of_launcher()
    pids = set()
    for number in range(ONE_AFTER_ANOTHER):
        with nsbox.ExecutionEnvironment() as env:
            pids.add(env.pid)
            if number % 10 == 0:
                assert env.run(["sh", "-c", "sleep 60 & exit 3"]).exit_code == 3
    assert len(pids) > 1
    assert_counts_return_to(before)
    assert not [pid for pid in pids if Path(f"/proc/{pid}/comm").exists() and _is_ours(pid)]
    assert resident_bytes_of_launcher() - resident < 4 * MIB


def _is_ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().startswith("nsbox-")
    except OSError:
        return False


def test_all_at_once() -> None:
    warm_up()
    before, resident = counts(), resident_bytes_of_launcher()
    with ThreadPoolExecutor(8) as pool:
        envs = list(pool.map(lambda _: nsbox.ExecutionEnvironment(), range(AT_ONCE)))
        try:
            assert len({env.pid for env in envs}) == len({env.id for env in envs}) == AT_ONCE
            assert all(env.state is nsbox.State.READY for env in envs)
            texts = list(pool.map(lambda env: env.run(["hostname"]).check().stdout, envs))
            assert len(texts) == AT_ONCE
            alive = counts()
            launcher = get_launcher()
            assert alive["descendants of the launcher"] >= AT_ONCE
            if launcher.hello.trees:
                assert alive["cgroups"] - before["cgroups"] >= AT_ONCE
            if launcher.hello.ids == "range":
                uids = {psutil.Process(env.pid).uids().real for env in envs}
                assert len(uids) == AT_ONCE, "no two share a host uid"
        finally:
            for env in envs:
                env.close(wait=False)
    del envs
    assert_counts_return_to(before)
    assert resident_bytes_of_launcher() - resident < 8 * MIB
    assert nsbox.run(["true"]).ok


def test_more_environments_than_the_soft_limit_of_descriptors_suggests() -> None:
    """The launcher inherits the host's limit, but is not bound by the soft one."""
    nsbox.shutdown()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = len(os.listdir("/proc/self/fd")) + 64
    if hard != resource.RLIM_INFINITY and hard < 4 * lowest:
        pytest.skip(f"the hard limit is {hard} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        get_launcher()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    envs = [nsbox.ExecutionEnvironment() for _ in range(40)]
    assert all(env.run(["true"]).ok for env in envs)
    # What an environment itself may open is its own limit, not the launcher's.
    assert int(envs[0].run(["sh", "-c", "ulimit -Hn"]).text()) == envs[0].config.limits.open_files
    for env in envs:
        env.close()
