# SPDX-License-Identifier: Apache-2.0
"""isolation/cgroups: the parsers on texts of many hosts, everything else on this host's cgroups.

The same tests run on v1, hybrid and v2 hosts, as root and as a user with a delegated cgroup: what
the host does not have is skipped, or fails when NSBOX_MUST_RUN names it.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import PATIENCE, SLOW_MACHINE, wait_until

import nsbox
from nsbox.errors import EnvironmentStateError, SyscallError, UnsupportedHostError
from nsbox.isolation.cgroups import (
    EnvironmentCgroup,
    Hierarchies,
    Owner,
    Tree,
    UsageReader,
    collect_garbage,
    locate,
    remove_tree_after,
    sweep,
    v2,
)
from nsbox.isolation.cgroups.locate import NAMES, Place
from nsbox.linux import calls

MIB = 1 << 20

# -- where the own cgroup is ----------------------------------------------------------------------

V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def v1_mount(names: str, root: str = "/", prefix: str = "/sys/fs/cgroup") -> str:
    return f"32 31 0:29 {root} {prefix}/{names} rw,relatime - cgroup cgroup rw,{names}"


def test_pure_v2() -> None:
    found = locate("0::/user.slice/run-1.scope\n", V2)
    for name in NAMES:
        assert found[name].version == 2
        assert found[name].directory == "/sys/fs/cgroup/user.slice/run-1.scope"
    assert found.bases == ["/sys/fs/cgroup/user.slice/run-1.scope"]


def test_hybrid_takes_v1_controllers_and_the_core_of_v2() -> None:
    cgroup = "8:pids:/\n7:blkio:/\n6:freezer:/\n4:memory:/a b\n1:cpu,cpuacct:/x\n0::/\n"
    mounts = [v1_mount(name) for name in ("pids", "blkio", "freezer", "memory", "cpu,cpuacct")]
    mounts.append("41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
    found = locate(cgroup, "\n".join(mounts))
    assert (found["memory"].version, found["memory"].directory) == (1, "/sys/fs/cgroup/memory/a b")
    assert found["io"].directory == "/sys/fs/cgroup/blkio"
    assert found["cpu"].directory == found["cpuacct"].directory == "/sys/fs/cgroup/cpu,cpuacct/x"
    assert found["unified"].directory == "/sys/fs/cgroup/unified"
    # In no v1 hierarchy: the v2 one may have it, which its cgroup.controllers tells.
    assert (found["cpuset"].version, found["cpuset"].directory) == (2, "/sys/fs/cgroup/unified")


def test_pure_v1_names_what_is_missing() -> None:
    found = locate("4:memory:/m\n3:pids:/p\n", v1_mount("memory"))
    assert found["memory"].directory == "/sys/fs/cgroup/memory/m"
    assert found["pids"].version == 0
    assert "not mounted" in found["pids"].reason
    assert "mount -t cgroup -o pids" in found["pids"].hint
    assert found["cpu"].reason == "no cgroup hierarchy has the controller cpu"
    assert found["unified"].version == 0


def test_nothing_at_all() -> None:
    found = locate("", "")
    assert all(
        not found[name].version and found[name].reason and found[name].hint for name in NAMES
    )
    assert locate("0::/x\n", "").places["unified"].reason == "no cgroup2 file system is mounted"
    assert found.bases == []


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/docker/abc", "/docker/abc", "/sys/fs/cgroup"),  # a container's bind of its own cgroup
        ("/docker/abc/job", "/docker/abc", "/sys/fs/cgroup/job"),
        ("/docker/abcd", "/docker/abc", None),  # a name that only begins alike
        ("/", "/", "/sys/fs/cgroup"),
        ("/../x", "/", None),  # moved out of its cgroup namespace
        ("/../x", "/..", "/sys/fs/cgroup/x"),
        ("/foo", "/..", None),  # the namespace's root has a name that nobody tells
        ("/../../x", "/..", None),
        ("/a/nsbox.host", "/", "/sys/fs/cgroup/a"),  # moved there by an nsbox
        ("/nsbox.host", "/", "/sys/fs/cgroup"),
        ("/nsbox.host", "/nsbox.host", "/sys/fs/cgroup"),  # its parent is not to be seen
        ("/a (deleted)", "/", "/sys/fs/cgroup/a"),
    ],
)
def test_paths_count_from_the_mounts_root(path: str, root: str, expected: str | None) -> None:
    place = locate(f"0::{path}\n", V2.replace(" / ", f" {root} ", 1))["unified"]
    assert (place.directory or None) == expected
    if expected is None:
        assert "no cgroup2 mount shows" in place.reason


def test_escapes_and_later_mounts() -> None:
    other = V2.replace("/sys/fs/cgroup", "/mnt/a\\040b\\134c")
    assert locate("0::/x\n", f"{V2}\n{other}")["unified"].directory == "/mnt/a b\\c/x"
    assert locate("4:memory:/y:z\n", v1_mount("memory"))["memory"].directory.endswith("/y:z")


@settings(database=None, deadline=None)
@given(st.text(st.characters(exclude_characters="\n\0 \\", exclude_categories=["Cs"]), max_size=20))
def test_any_path_stays_below_the_mount(name: str) -> None:
    place = locate(f"0::/{name}\n", V2)["unified"]
    assert not place.version or os.path.normpath(place.directory).startswith("/sys/fs/cgroup")


def fake(
    directory: Path, version: int = 2, processes: str = "", controllers: str = ""
) -> Hierarchies:
    (directory / "cgroup.procs").write_text(processes)
    (directory / "cgroup.controllers").write_text(controllers)
    return Hierarchies({name: Place(name, version, str(directory)) for name in NAMES})


def test_a_directory_that_does_not_list_us_is_not_taken(tmp_path: Path) -> None:
    found = fake(tmp_path)
    found.check()
    assert all("does not list this process" in found[name].reason for name in NAMES)


def test_without_delegation_the_hint_names_systemd_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fake(tmp_path, processes=f"{os.getpid()}\n")
    monkeypatch.setattr(sys.modules[Place.__module__], "may", lambda *_args: False)
    found.check()
    assert "no delegation" in found["memory"].reason
    assert "systemd-run --user --scope -p Delegate=yes" in found["memory"].hint


def test_controllers_that_are_not_handed_down(tmp_path: Path) -> None:
    found = fake(tmp_path, processes=f"{os.getpid()}\n", controllers="pids memory\n")
    found.check()
    assert found["memory"].version == found["pids"].version == 2
    assert found["cpuacct"].version == found["freezer"].version == found["unified"].version == 2
    assert "controller cpu is not in" in found["cpu"].reason
    assert "kernel" in found["cpu"].hint, "without cgroup.events it is the root: nothing is above"
    (tmp_path / "cgroup.events").write_text("")
    found = fake(tmp_path, processes=f"{os.getpid()}\n", controllers="pids memory\n")
    found.check()
    assert "Delegate=cpu" in found["cpu"].hint


# -- owners ---------------------------------------------------------------------------------------


def test_owner_names_come_back() -> None:
    owner = Owner.current()
    again = Owner.parse(owner.name)
    assert again is not None
    assert again.name == owner.name
    assert not again.is_dead()
    assert owner.pid == os.getpid()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nsbox",
        "nsbox.host",
        "nsbox.1.2.3",
        "nsbox.1.2.3.abcdef01.x",
        "nsbox.01.2.3.abcdef01",
        "nsbox.+1.2.3.abcdef01",
        "nsbox.1.2.3.ABCDEF01",
        "nsbox.1.2.3.abcdef0",
        "nsbox.1.2.3.abcdef01\n",
        "nsbox.\u0661.2.3.abcdef01",
        "xnsbox.1.2.3.abcdef01",
        "nsbox.1..3.abcdef01",
    ],
)
def test_other_names_are_nobodys(name: str) -> None:
    assert Owner.parse(name) is None


@settings(database=None, deadline=None)
@given(st.text(max_size=40))
def test_a_parsed_name_is_exactly_the_name(name: str) -> None:
    owner = Owner.parse(name)
    assert owner is None or owner.name == name


def test_owner_judgement() -> None:
    own = Owner.current()
    with subprocess.Popen(["sleep", "60"]) as process:
        alive = Owner.of(process.pid)
        assert not alive.is_dead()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert alive.is_dead(), "a zombie owns nothing"
        process.wait()
    assert alive.is_dead()
    assert Owner(own.pid, own.start_time + 1, own.namespace, own.boot).is_dead(), "pid reuse"
    assert Owner(own.pid, own.start_time, own.namespace, "00000000").is_dead(), "another boot"
    other = Owner(alive.pid, alive.start_time, alive.namespace + 1, alive.boot)
    assert not other.is_dead(), "another pid namespace's pids cannot be judged from here"


# -- small pieces ---------------------------------------------------------------------------------


def test_cpu_quota() -> None:
    assert v2.cpu_quota(0.5) == (50_000, 100_000)
    assert v2.cpu_quota(2) == (200_000, 100_000)
    assert v2.cpu_quota(0.005) == (5_000, 1_000_000)  # the kernel takes no quota below 1 ms
    assert v2.parse_cpus("0-2,5") == {0, 1, 2, 5}
    assert v2.parse_cpus("") == set()
    with pytest.raises(SyscallError, match="cpuset"):
        v2.parse_cpus("0-4000000000")


def test_readers_of_files_that_are_not_there(tmp_path: Path) -> None:
    reader = UsageReader({"unified": str(tmp_path), "memory": str(tmp_path / "gone")})
    assert set(reader.read().values()) == {None}
    assert reader.cpu_usec() is None
    assert reader.oom_kills() is None


def test_files_that_a_hierarchy_lacks_are_asked_for_once(tmp_path: Path) -> None:
    absent: set[object] = set()
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "pids.current").write_text("2\n")
    assert UsageReader({"unified": str(tmp_path / "first")}, absent).read()["pids_current"] == 2
    (tmp_path / "second").mkdir()
    for name in ("pids.current", "pids.peak"):
        (tmp_path / "second" / name).write_text("3\n")
    read = UsageReader({"unified": str(tmp_path / "second")}, absent).read()
    assert (read["pids_current"], read["pids_peak"]) == (3, None)


def test_a_removed_cgroup_says_nothing_about_others(tmp_path: Path) -> None:
    absent: set[object] = set()
    assert UsageReader({"unified": str(tmp_path / "gone")}, absent).read()["pids_peak"] is None
    assert not absent


def test_v2_files_are_read_by_their_names(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nthrottled_usec 7\n",
        "memory.current": "4096\n",
        "memory.peak": "8192\n",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 2\noom_kill 1\noom_group_kill 1\n",
        "pids.current": "2\n",
        "pids.peak": "5\n",
        "io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n8:0 \n8:16 rbytes=5\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    read = UsageReader({"unified": str(tmp_path)}).read()
    assert list(read.values()) == [30, 20, 10, 7, 4096, 8192, 2, 5, 15, 20, 1, 2, 1, 2]


@pytest.mark.parametrize(
    "path", ["", "/", ".", "tree", "/tmp", "/sys/fs/cgroup", "/a/../b", "/a//b"]
)
def test_sweeps_refuse_foreign_paths(path: str) -> None:
    with pytest.raises(ValueError, match="not removed"):
        remove_tree_after([path])


def test_sweeps_refuse_what_is_no_cgroup(tmp_path: Path) -> None:
    name = Owner(1, 2, 3, "00000000").name
    tree = tmp_path / name
    (tree / "environment").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no cgroup"):
        remove_tree_after([str(tree)])
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="symbolic link"):
        remove_tree_after([str(link / name)])
    assert (tree / "environment").is_dir()


def test_garbage_collection_follows_no_link(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    canary.mkdir()
    base = tmp_path / "base"
    base.mkdir()
    (base / Owner(1, 2, 3, "00000000").name).symlink_to(canary)
    tree = base / Owner(1, 2, 4, "00000000").name
    tree.mkdir()
    (tree / "cgroup.procs").write_text("")
    (tree / "link").symlink_to(canary)
    assert collect_garbage(fake(base)) == []
    assert canary.is_dir()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "x" * 65, "a.b", "\u00e9", "a\0"])
def test_bad_environment_names(name: str) -> None:
    assert not sweep.is_environment_name(name)
    with pytest.raises(ValueError, match="cannot name a cgroup"):
        Tree(Owner.current(), Hierarchies({})).make(name, {})


# -- on this host's cgroups -----------------------------------------------------------------------


def require(tree: Tree, *features: str) -> None:
    capabilities = tree.capabilities()
    for feature in features:
        if "missing" in capabilities[feature]:
            reason = f"{feature}: {capabilities[feature]['missing']}"
            if feature in os.environ.get("NSBOX_MUST_RUN", "").split(","):
                pytest.fail(reason)
            pytest.skip(reason)


def is_hybrid() -> bool:
    """Whether this host has cgroups of both versions that this user can use."""
    hierarchies = Hierarchies.detect()
    return {hierarchies[name].version for name in NAMES} == {1, 2}


@pytest.fixture(params=["as found", *["v1 alone"] * is_hybrid()])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    """The cgroups of this host and, on hybrid hosts, the same without its v2 hierarchy."""
    hierarchies = Hierarchies.detect()
    if request.param == "v1 alone":
        for name in NAMES:
            if hierarchies[name].version == 2:
                hierarchies.miss(name, "hidden by the test", "none")
    tree = Tree(hierarchies=hierarchies)
    tree.create()
    if not tree.paths:
        reason = tree.hierarchies["unified"].reason
        if "cgroup.memory" in os.environ.get("NSBOX_MUST_RUN", ""):
            pytest.fail(reason)
        pytest.skip(reason)
    paths = list(tree.paths.values())
    yield tree
    assert tree.remove(timeout=5) == []
    assert not [path for path in paths if os.path.exists(path)]


class Guest:
    """A Python child that waits, is put into a cgroup, and then runs `code`."""

    def __init__(self, code: str) -> None:
        program = f"import sys; sys.stdin.readline()\n{code}"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.pid = self.process.pid

    def start_in(self, cgroup: EnvironmentCgroup) -> None:
        cgroup.attach(self.pid, unified=True)
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def guest() -> Iterator[Callable[[str], Guest]]:
    guests: list[Guest] = []

    def start(code: str) -> Guest:
        guests.append(Guest(code))
        return guests[-1]

    yield start
    for item in guests:
        item.close()


def remove(cgroup: EnvironmentCgroup) -> None:
    deadline = time.monotonic() + 5
    while left := cgroup.try_remove():
        assert time.monotonic() < deadline, left
        time.sleep(0.005)


def test_make_and_remove(tree: Tree) -> None:
    cgroup = tree.make("e1", {})
    assert cgroup.paths == json.loads(json.dumps(cgroup.paths))
    for path in cgroup.paths.values():
        assert os.path.isdir(path)
        assert os.path.basename(os.path.dirname(path)) == tree.name
    assert (cgroup.clone_fd >= 0) == ("unified" in cgroup.paths)
    assert cgroup.try_remove() == []
    assert cgroup.try_remove() == []
    assert not any(os.path.exists(path) for path in cgroup.paths.values())
    assert cgroup.clone_fd == -1


def test_capabilities_say_a_version_or_why_not(tree: Tree) -> None:
    for feature, found in tree.capabilities().items():
        assert feature.startswith("cgroup.")
        if "missing" in found:
            assert found["missing"]
            assert found["hint"]
        else:
            assert found["version"] in (1, 2)


def test_processes_move_to_a_leaf_and_back() -> None:
    """No internal processes: v2 hands controllers down only from a cgroup without any."""
    nsbox.shutdown()  # the launcher of the tests before has moved this process already
    hierarchies = Hierarchies.detect()
    base = hierarchies["unified"].directory
    wanted = [name for name in v2.CONTROLLERS if hierarchies[name].version == 2]
    if not wanted or not os.path.exists(f"{base}/cgroup.events"):
        pytest.skip("v2 has no controller here, or the own cgroup is the root")
    before = Path("/proc/self/cgroup").read_text()
    assert not before.rstrip().endswith("/nsbox.host")
    first, second = Tree(hierarchies=hierarchies), Tree(Owner.of(os.getppid() or os.getpid()))
    first.create()
    assert Path("/proc/self/cgroup").read_text().rstrip().endswith("/nsbox.host")
    assert Hierarchies.detect()["unified"].directory == base, "the leaf's parent is the own cgroup"
    second.create()
    assert first.remove() == []
    assert Path("/proc/self/cgroup").read_text() != before, "another launcher needs the leaf"
    remove(second.make("e", {"pids_max": 5}))
    assert second.remove() == []
    assert Path("/proc/self/cgroup").read_text() == before
    assert not os.path.exists(f"{base}/nsbox.host")


def test_only_the_needed_hierarchies(tree: Tree) -> None:
    plain = tree.make("plain", {"memory_max": None})
    assert set(plain.paths) <= {"unified", "memory", "pids", "freezer", "cpuacct"}
    remove(plain)
    require(tree, "cgroup.cpu")
    limited = tree.make("limited", {"cpu_max": 1.5})
    reader = UsageReader(limited.paths).read()
    assert reader["throttled_usec"] == 0
    remove(limited)


def test_memory_limit_bites(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.memory")
    cgroup = tree.make("oom", {"memory_max": 32 * MIB, "pids_max": 16})
    reader = UsageReader(cgroup.paths)
    event = cgroup.oom_eventfd()
    assert (event is not None) == (tree.capabilities()["cgroup.memory"] == {"version": 1})
    if event is not None:
        assert not select.select([event], [], [], 0)[0]
    assert reader.oom_kills() == 0
    hog = guest("x = bytearray(96 << 20); print(len(x))")
    hog.start_in(cgroup)
    assert hog.process.wait(10) == -signal.SIGKILL
    assert reader.oom_kills() == 1, "v2's counter says 2, the victim of a group kill twice"
    usage = reader.read()
    assert usage["oom_kills"] == 1
    assert usage["memory_peak"] is None or 30 * MIB < usage["memory_peak"] <= 32 * MIB
    if event is not None:
        assert select.select([event], [], [], 5)[0], "the eventfd tells of the OOM"
        os.close(event)
    remove(cgroup)


def test_v2_oom_kills_the_whole_environment(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.memory")
    if tree.capabilities()["cgroup.memory"] != {"version": 2}:
        pytest.skip("v1 kills one process; the launcher kills the rest on the eventfd")
    cgroup = tree.make("group", {"memory_max": 32 * MIB})
    bystander = guest("print('in', flush=True); sys.stdin.readline()")
    bystander.start_in(cgroup)
    assert bystander.line() == "in"
    hog = guest("x = bytearray(96 << 20)")
    hog.start_in(cgroup)
    assert hog.process.wait(10) == bystander.process.wait(10) == -signal.SIGKILL
    usage = UsageReader(cgroup.paths).read()
    assert (usage["oom_events"] or 0) >= 1
    assert usage["oom_kills"] == 2
    remove(cgroup)


def test_swap_is_off(tree: Tree) -> None:
    require(tree, "cgroup.memory", "cgroup.memory.swap")
    cgroup = tree.make("swap", {"memory_max": 32 * MIB})
    directory = cgroup.paths.get("memory", cgroup.paths.get("unified", ""))
    expected = {
        "memory.swap.max": "0",
        "memory.memsw.limit_in_bytes": str(32 * MIB),
    }
    seen = {
        name: Path(directory, name).read_text().strip()
        for name in expected
        if Path(directory, name).exists()
    }
    assert seen == {name: expected[name] for name in seen}
    assert seen or Path(directory, "memory.swappiness").exists() or not Path("/proc/swaps").exists()
    remove(cgroup)


def test_pids_limit_bites(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.pids")
    cgroup = tree.make("pids", {"pids_max": 3})
    forker = guest(
        "import os, time\n"
        "made = 0\n"
        "try:\n"
        "    while made < 10:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        made += 1\n"
        "except BlockingIOError: print('EAGAIN', made, flush=True)\n"
        "time.sleep(60)\n"
    )
    forker.start_in(cgroup)
    assert forker.line() == "EAGAIN 2"
    usage = UsageReader(cgroup.paths).read()
    assert usage["pids_current"] == 3
    assert usage["pids_peak"] in (3, None)
    while cgroup.kill():  # again only where the kernel has no cgroup.kill
        if forker.process.poll() is not None:
            break
    forker.process.wait(10)
    remove(cgroup)


def test_cpu_limit_throttles(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.cpu", "cgroup.cpu_accounting")
    cgroup = tree.make("cpu", {"cpu_max": 0.2})
    spinner = guest("while True: pass")
    reader = UsageReader(cgroup.paths)
    began = time.monotonic()
    spinner.start_in(cgroup)
    # Longer where the machine is itself a process: what it is not given to run counts as used, and
    # the kernel takes that off the next periods.
    wait_until(lambda: time.monotonic() - began > 0.5 * PATIENCE, "there is a number of periods")
    wait_until(lambda: (reader.read()["throttled_usec"] or 0) > 50_000, "it is throttled", 30)
    while cgroup.kill():
        if spinner.process.poll() is not None:
            break
    spinner.process.wait(20 * PATIENCE)
    elapsed = time.monotonic() - began
    usage = reader.read()
    used, throttled = usage["cpu_usec"], usage["throttled_usec"]
    assert used is not None
    assert 20_000 < used < 700_000 * elapsed
    assert throttled is not None
    assert throttled > 50_000
    assert (usage["cpu_user_usec"] or 0) + (usage["cpu_system_usec"] or 0) <= used + 20_000
    assert reader.cpu_usec() == used
    remove(cgroup)


def test_cpuset(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.cpuset")
    cgroup = tree.make("cpuset", {"cpuset_cpus": "0"})
    pinned = guest("import os; print(sorted(os.sched_getaffinity(0)), flush=True)")
    pinned.start_in(cgroup)
    assert pinned.line() == "[0]"
    pinned.process.wait(10)
    remove(cgroup)
    with pytest.raises(SyscallError) as caught:
        tree.make("toomany", {"cpuset_cpus": "0-4000"})
    assert caught.value.filename is not None
    assert caught.value.filename.endswith("/toomany/cpuset.cpus")
    assert not [p for p in tree.paths.values() if os.path.exists(f"{p}/toomany")]


def block_device() -> str:
    """Return MAJ:MIN of the disk under the root directory, or of any."""
    number = os.stat("/").st_dev
    disk = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not disk.exists():
        disks = [d for d in Path("/sys/block").iterdir() if not d.name.startswith(("loop", "ram"))]
        disk = next((d for d in disks if (d / "size").read_text() != "0\n"), disk)
    if not disk.exists():
        pytest.skip("no block device here")
    if (disk / "partition").exists():  # limits are of whole disks
        disk = disk.resolve().parent
    return (disk / "dev").read_text().strip()


def file_on(device: str, *directories: Path) -> Path | None:
    """Return the name for a new file in the first of `directories` that is on `device`."""
    for directory in directories:
        number = os.stat(directory).st_dev
        if f"{os.major(number)}:{os.minor(number)}" == device:
            return directory / f"nsbox-test-io-{os.getpid()}"
    # A disk below another file system, as with LVM: then the limit is set and read back only.
    assert not SLOW_MACHINE, "User-Mode Linux has its disk on /var/tmp"
    return None


def test_io_limit_is_accepted_and_bites(
    tree: Tree, guest: Callable[[str], Guest], tmp_path: Path
) -> None:
    require(tree, "cgroup.io")
    device = block_device()
    limits = {"device": device, "rbps": 2 * MIB, "wbps": 3 * MIB, "riops": 1000, "wiops": None}
    cgroup = tree.make("io", {"io_max": [limits]})
    directory = Path(cgroup.paths.get("io", cgroup.paths.get("unified", "")))
    if "io" in cgroup.paths:
        assert f"{device} {2 * MIB}" in (directory / "blkio.throttle.read_bps_device").read_text()
        assert f"{device} {3 * MIB}" in (directory / "blkio.throttle.write_bps_device").read_text()
        assert f"{device} 1000" in (directory / "blkio.throttle.read_iops_device").read_text()
    else:
        line = f"{device} rbps={2 * MIB} wbps={3 * MIB} riops=1000 wiops=max"
        assert line in (directory / "io.max").read_text()
    file = file_on(device, tmp_path, Path("/var/tmp"))
    if file is not None:
        with file.open("wb") as stream:
            stream.write(b"x" * MIB)
            stream.flush()
            os.fsync(stream.fileno())
        reading = guest(
            "import mmap, os, time\n"
            f"fd = os.open({str(file)!r}, os.O_RDONLY | os.O_DIRECT)\n"
            f"buffer = mmap.mmap(-1, {MIB})\n"
            "start = time.monotonic()\n"
            "print(os.readv(fd, [buffer]), time.monotonic() - start, flush=True)\n"
        )
        reading.start_in(cgroup)
        size, seconds = reading.line().split()
        assert int(size) == MIB
        assert float(seconds) > 0.25, "1 MiB at 2 MiB/s"
        usage = UsageReader(cgroup.paths).read()
        assert usage["io_rbytes"] is not None
        assert usage["io_rbytes"] >= MIB
        assert usage["io_rios"]
        reading.process.wait(10)
        file.unlink()
    remove(cgroup)
    with pytest.raises(SyscallError) as caught:
        tree.make("nodevice", {"io_max": [{"device": "4095:77", "rbps": MIB}]})
    assert caught.value.errno
    assert not [p for p in tree.paths.values() if os.path.exists(f"{p}/nodevice")]


def counting(count: mmap.mmap) -> int:
    return int.from_bytes(count[:8], "little")


def test_freeze_and_thaw(tree: Tree, guest: Callable[[str], Guest], tmp_path: Path) -> None:
    require(tree, "cgroup.freeze")
    cgroup = tree.make("freeze", {})
    assert cgroup.can_freeze
    file = tmp_path / "count"
    file.write_bytes(bytes(8))
    counter = guest(
        "import mmap\n"
        f"with open({str(file)!r}, 'r+b') as f: count = mmap.mmap(f.fileno(), 8)\n"
        "number = 0\n"
        "while True:\n"
        "    number += 1\n"
        "    count[:] = number.to_bytes(8, 'little')\n"
        "    if number == 1000: print('going', flush=True)\n"
    )
    counter.start_in(cgroup)
    assert counter.line() == "going"
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 8, prot=mmap.PROT_READ) as count:
        cgroup.freeze()
        before = counting(count)
        time.sleep(0.05)
        assert counting(count) == before, "it stands still"
        cgroup.freeze()  # again is fine
        cgroup.thaw()
        deadline = time.monotonic() + 5
        while counting(count) == before:
            assert time.monotonic() < deadline, "it goes on"
            time.sleep(0.001)
    cgroup.freeze()
    assert cgroup.kill(), "a frozen process dies too"
    assert counter.process.wait(10) == -signal.SIGKILL
    remove(cgroup)


def test_freeze_that_takes_too_long_lets_go(tree: Tree, guest: Callable[[str], Guest]) -> None:
    require(tree, "cgroup.freeze")
    cgroup = tree.make("slow", {})
    busy = guest("print('in', flush=True)\nwhile True: pass")
    busy.start_in(cgroup)
    assert busy.line() == "in"
    # On the same processor as this test it can freeze only once this test lets go of that.
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(busy.pid, {min(own)})
    os.sched_setaffinity(0, {min(own)})
    late = 0
    try:
        for _ in range(20):  # now and then it is its turn just then
            try:
                cgroup._set_frozen(True, -1)
            except TimeoutError:
                late += 1
            cgroup.thaw()
    finally:
        os.sched_setaffinity(0, own)
    assert late
    cgroup.kill()
    busy.process.wait(10)
    remove(cgroup)


def test_busy_until_killed_and_reaped(tree: Tree, guest: Callable[[str], Guest]) -> None:
    cgroup = tree.make("busy", {})
    sleeper = guest("import time; print('in', flush=True); time.sleep(60)")
    sleeper.start_in(cgroup)
    assert sleeper.line() == "in"
    assert cgroup.is_populated()
    assert set(cgroup.try_remove()) == set(cgroup.paths.values())
    remaining = tree.remove()
    assert set(remaining) >= {os.path.dirname(path) for path in cgroup.paths.values()}
    assert cgroup.kill()
    assert sleeper.process.wait(10) == -signal.SIGKILL
    remove(cgroup)


def test_a_killed_cgroup_is_not_used_again(tree: Tree) -> None:
    cgroup = tree.make("killed", {})
    cgroup.kill()
    with pytest.raises(EnvironmentStateError, match="killed"):
        _ = cgroup.clone_fd
    with pytest.raises(EnvironmentStateError, match="killed"):
        cgroup.attach(os.getpid())
    remove(cgroup)


def test_clone_into_cgroup_and_joining_v1(tree: Tree) -> None:
    cgroup = tree.make("clone", {"memory_max": 64 * MIB})
    if cgroup.clone_fd < 0:
        remove(cgroup)
        pytest.skip("no cgroup v2")
    tasks = cgroup.open_tasks()
    assert len(tasks) == len({p for name, p in cgroup.paths.items() if name != "unified"})
    read_end, write_end = os.pipe()
    pid, pidfd = calls.clone3(0, cgroup=cgroup.clone_fd)
    if pid == 0:  # pragma: no cover - runs in the child
        code = 1
        try:
            for descriptor in tasks:
                os.write(descriptor, b"0")
            os.write(write_end, b"1")
            signal.pause()
            code = 0
        finally:
            os._exit(code)
    try:
        os.close(write_end)
        assert os.read(read_end, 1) == b"1"
        for path in cgroup.paths.values():
            assert Path(path, "cgroup.procs").read_text().split() == [str(pid)]
    finally:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in (*tasks, read_end, pidfd):
            os.close(descriptor)
    remove(cgroup)


def test_a_failed_write_removes_what_was_made(tree: Tree) -> None:
    require(tree, "cgroup.pids")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SyscallError) as caught:
        tree.make("bad", {"pids_max": -5})
    assert caught.value.filename is not None
    assert caught.value.filename.endswith("/bad/pids.max")
    assert not [p for p in tree.paths.values() if os.path.exists(f"{p}/bad")]
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_same_name_twice_is_refused_and_leaves_the_first_alone(tree: Tree) -> None:
    cgroup = tree.make("twice", {})
    with pytest.raises(SyscallError, match="EEXIST"):
        tree.make("twice", {})
    assert all(os.path.isdir(path) for path in cgroup.paths.values())
    remove(cgroup)


def test_a_limit_nothing_can_enforce_is_refused() -> None:
    places = {name: Place(name, 0, "", "for the test", "do this") for name in NAMES}
    empty = Tree(Owner.current(), Hierarchies(places))
    capabilities = empty.capabilities()
    assert {str(item["missing"]) for item in capabilities.values()} == {"for the test"}
    with pytest.raises(UnsupportedHostError) as caught:
        empty.make("x", {"memory_max": MIB})
    assert caught.value.feature == "cgroup.memory"
    assert (caught.value.reason, caught.value.hint) == ("for the test", "do this")
    cgroup = empty.make("x", {})
    assert cgroup.paths == {}
    assert cgroup.clone_fd == -1
    assert not cgroup.can_freeze
    with pytest.raises(SyscallError):
        cgroup.freeze()
    assert cgroup.try_remove() == []


def test_a_removed_launcher_directory_is_made_again(tree: Tree) -> None:
    for path in set(tree.paths.values()):
        os.rmdir(path)
    cgroup = tree.make("again", {})
    remove(cgroup)


def test_remove_refuses_foreign_paths(tree: Tree, tmp_path: Path) -> None:
    for path in ("", "/", str(tmp_path), os.path.dirname(next(iter(tree.paths.values())))):
        cgroup = tree.make("mine", {})
        paths = dict(cgroup.paths)
        cgroup.paths["memory"] = path
        with pytest.raises(ValueError, match="not removed"):
            cgroup.try_remove()
        assert all(os.path.isdir(mine) for mine in paths.values()), "nothing at all was removed"
        cgroup.paths = paths
        remove(cgroup)
    assert tmp_path.is_dir()
    tree.paths["extra"] = str(tmp_path)
    with pytest.raises(ValueError, match="not removed"):
        tree.remove()
    del tree.paths["extra"]


def test_garbage_of_dead_owners_only(tree: Tree, guest: Callable[[str], Guest]) -> None:
    own = tree.owner
    with subprocess.Popen(["true"]) as process:
        dead_process = Owner.of(process.pid)
        process.wait()
    dead = [
        dead_process,
        Owner(own.pid, own.start_time + 1, own.namespace, own.boot),
        Owner(1, 1, own.namespace + 1, "00000000"),
    ]
    kept = [
        Owner(own.pid, own.start_time, own.namespace, own.boot).name,
        Owner(dead_process.pid, 1, own.namespace + 1, own.boot).name,
        "nsbox.evil",
        "nsbox.1.2.3.zzzzzzzz",
        "other",
    ]
    made: list[str] = []
    try:
        for base in {os.path.dirname(path) for path in tree.paths.values()}:
            for name in [owner.name for owner in dead] + [n for n in kept if n != own.name]:
                os.mkdir(f"{base}/{name}")
                made.append(f"{base}/{name}")
            os.mkdir(f"{base}/{dead[0].name}/environment")
            made.append(f"{base}/{dead[0].name}/environment")
        first = tree.paths.get("unified") or next(iter(tree.paths.values()))
        populated = f"{os.path.dirname(first)}/{dead[1].name}"
        # Its parent has the owner's pid: so it is with every live environment, and from another
        # time namespace the owner of one looks dead.
        sleeper = guest("import time; time.sleep(60)")
        Path(populated, "cgroup.procs").write_text(str(sleeper.pid))
        left = guest("import time; time.sleep(60)")
        Path(os.path.dirname(first), dead[0].name, "environment", "cgroup.procs").write_text(
            str(left.pid)
        )

        removed = collect_garbage(Hierarchies.detect())

        names = {owner.name for owner in dead}
        expected = {path for path in made if os.path.basename(path) in names} - {populated}
        assert set(removed) == expected
        assert left.process.wait(10) == -signal.SIGKILL
        assert sleeper.process.poll() is None
        assert not [path for path in removed if os.path.exists(path)]
        assert os.path.isdir(populated)
        for base in {os.path.dirname(path) for path in tree.paths.values()}:
            assert all(os.path.isdir(f"{base}/{name}") for name in kept)
        sleeper.close()
        assert collect_garbage(Hierarchies.detect()) == [populated]
    finally:
        for path in reversed(made):
            if os.path.isdir(path):
                os.rmdir(path)


def test_the_janitor_kills_what_is_left(tree: Tree, guest: Callable[[str], Guest]) -> None:
    with subprocess.Popen(["sleep", "60"]) as launcher:
        owner = Owner.of(launcher.pid)
        launcher.kill()
    orphan = Tree(owner)
    orphan.create()
    cgroup = orphan.make("left", {})
    sleeper = guest("import time; print('in', flush=True); time.sleep(60)")
    sleeper.start_in(cgroup)
    assert sleeper.line() == "in"
    cgroup.close()
    reaper = os.pidfd_open(sleeper.pid)
    assert remove_tree_after(list(orphan.paths.values()), timeout=5) == []
    assert select.select([reaper], [], [], 5)[0]
    os.close(reaper)
    assert not [path for path in orphan.paths.values() if os.path.exists(path)]
    assert os.path.isdir(next(iter(tree.paths.values()))), "another launcher's is left alone"
