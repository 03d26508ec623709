# SPDX-License-Identifier: Apache-2.0
"""What is enforced, by what, and what is refused: decided from values, with made-up hosts."""

from __future__ import annotations

import copy
import functools
import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from nsbox import Config, ConfigError, IoMax, Limits, Mount, Protections, UnsupportedHostError
from nsbox.errors import LauncherError
from nsbox.isolation import namespaces
from nsbox.isolation.layout import LayoutMount
from nsbox.launcher.messages import Hello, Spec
from nsbox.linux import constants as c
from nsbox.seccomp import filters
from nsbox.supervisor import plan as b

if TYPE_CHECKING:
    from nsbox.supervisor.connection import EnvironmentConnection

pytestmark = pytest.mark.static

FEATURES = (
    "memory",
    "memory.swap",
    "pids",
    "cpu",
    "cpuset",
    "io",
    "cpu_accounting",
    "freeze",
    "kill",
)
MISSING = {
    "missing": "the directory belongs to root",
    "hint": "Delegate it: see docs/host-setup.md",
}
FULL_HOST = Hello(
    pid=1,
    privileged=True,
    ids="range",
    drops_groups=True,
    namespaces=list(namespaces.FLAGS),
    networks_ready=True,
    landlock=True,
    cgroups={f"cgroup.{name}": {"version": 2} for name in FEATURES},
    trees={},
)


def host(*missing: str, **changes: object) -> Hello:
    """Return a hello of a host that has everything but the cgroup features named."""
    hello = Hello.from_wire(copy.deepcopy(FULL_HOST.to_wire()) | changes)
    for name in missing:
        hello.cgroups[name] = MISSING
    return hello


POOR_HOST = host(
    *FULL_HOST.cgroups, privileged=False, ids="own", drops_groups=False, networks_ready=False
)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "filter_for", lambda policy: policy.name.encode())


@pytest.fixture(autouse=True)
def _block_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A host with two disks, 8:0 and 8:16, and a partition, 8:17."""
    for name in ("8:0", "8:16", "8:17/partition"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(b, "_BLOCK_DEVICES", str(tmp_path))


def decide(hello: Hello = FULL_HOST, **fields: object) -> b.Plan:
    return b.Plan(Config(**fields), hello)  # type: ignore[arg-type]


def layers(plan: b.Plan) -> Protections:
    return Protections(tuple(plan.layers))


# -- limits ------------------------------------------------------------------------------------

LIMITS: list[tuple[str, Any, str]] = [
    ("memory_max", "1G", "cgroup.memory"),
    ("cpu_max", 0.5, "cgroup.cpu"),
    ("cpuset_cpus", "0", "cgroup.cpuset"),
    ("io_max", (IoMax(device="8:0", rbps="1M"),), "cgroup.io"),
]


@pytest.mark.parametrize(("name", "value", "feature"), LIMITS)
def test_limit_goes_to_its_controller(name: str, value: object, feature: str) -> None:
    made = decide(limits=Limits(**{name: value}))  # type: ignore[arg-type]
    assert name in made.spec.cgroup_limits
    assert layers(made)[feature].in_force
    assert "cgroup v2" in layers(made)[feature].detail


@pytest.mark.parametrize(("name", "value", "feature"), LIMITS)
def test_named_limit_that_cannot_be_had_is_refused(name: str, value: object, feature: str) -> None:
    with pytest.raises(UnsupportedHostError) as caught:
        decide(host(feature), limits=Limits(**{name: value}))  # type: ignore[arg-type]
    error = caught.value
    assert error.feature == feature
    assert name in error.reason
    assert "belongs to root" in error.reason
    assert error.hint == MISSING["hint"]
    assert str(error).startswith(f"{feature} cannot be enforced on this host: ")


@pytest.mark.parametrize(("name", "value", "feature"), LIMITS)
def test_named_limit_may_be_done_without_by_name(name: str, value: object, feature: str) -> None:
    made = decide(
        host(feature),
        limits=Limits(**{name: value}),  # type: ignore[arg-type]
        allow_missing={feature},
    )
    assert name not in made.spec.cgroup_limits
    layer = layers(made)[feature]
    assert not layer.in_force
    assert "belongs to root" in layer.detail


def test_allowing_one_to_be_missing_allows_no_other() -> None:
    limits = Limits(memory_max="1G", cpu_max=1)
    with pytest.raises(UnsupportedHostError, match=r"^cgroup\.cpu "):
        decide(host("cgroup.memory", "cgroup.cpu"), limits=limits, allow_missing={"cgroup.memory"})


def test_default_limit_that_cannot_be_had_is_said_not_to_be_in_force() -> None:
    made = decide(host("cgroup.memory"))
    assert "memory_max" not in made.spec.cgroup_limits
    assert not layers(made)["cgroup.memory"].in_force
    assert layers(made)["cgroup.memory"].detail == "memory_max: the directory belongs to root"


def test_a_poor_host_gets_an_environment_with_all_defaults_and_the_truth() -> None:
    made = decide(POOR_HOST)
    assert made.spec.cgroup_limits == {}
    assert not made.accounts_cpu
    assert [layer.name for layer in layers(made).missing] == ["cgroup.memory"]
    unwanted = {layer.name for layer in made.layers if not layer.wanted}
    assert unwanted == {"cgroup.cpu", "cgroup.cpuset", "cgroup.io"}
    assert not any(layer.in_force for layer in made.layers if not layer.wanted)


def test_limit_switched_off_by_name_is_not_in_force_and_never_refused() -> None:
    made = decide(host("cgroup.memory"), limits=Limits(memory_max=None, pids_max=None))
    assert made.spec.cgroup_limits == {}
    assert layers(made)["cgroup.memory"].detail == "no limit was asked for"
    assert "nproc" not in made.spec.rlimits


def release(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    fake = os.uname_result(("Linux", "host", text, "#1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: fake)


def test_pids_fall_back_to_rlimits(monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, "5.14.0-1-amd64")
    made = decide(host("cgroup.pids"), limits=Limits(pids_max=40))
    assert made.spec.rlimits["nproc"] == 40
    assert layers(made)["cgroup.pids"].in_force
    assert "RLIMIT_NPROC" in layers(made)["cgroup.pids"].detail
    assert "nproc" not in decide().spec.rlimits


def test_pids_do_not_fall_back_where_rlimits_count_all_of_the_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release(monkeypatch, "5.10.0")
    with pytest.raises(UnsupportedHostError, match=r"^cgroup\.pids "):
        decide(host("cgroup.pids"), limits=Limits(pids_max=40))
    made = decide(host("cgroup.pids"))
    assert not layers(made)["cgroup.pids"].in_force
    assert "nproc" not in made.spec.rlimits


def test_rlimits_are_those_asked_for() -> None:
    assert decide().spec.rlimits == {"nofile": 1024, "core": 0}
    made = decide(limits=Limits(open_files=None, file_size="1M", core_size=None))
    assert made.spec.rlimits == {"fsize": 1 << 20}
    assert layers(made)["rlimit.fsize"].in_force


def hard_limits(monkeypatch: pytest.MonkeyPatch, **hard: int) -> None:
    numbers = {getattr(resource, f"RLIMIT_{name.upper()}"): value for name, value in hard.items()}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (0, numbers.get(kind, resource.RLIM_INFINITY))
    )


def test_a_default_is_no_higher_than_the_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, "5.14.0")
    hard_limits(monkeypatch, nofile=256, nproc=100)
    made = decide(host("cgroup.pids"))
    assert made.spec.rlimits == {"nproc": 100, "nofile": 256, "core": 0}
    files, processes = layers(made)["rlimit.nofile"], layers(made)["cgroup.pids"]
    assert files.in_force
    assert files.detail == "open_files=256, this process's hard limit; by default 1024"
    assert processes.in_force
    assert processes.detail.startswith("pids_max=100, this process's hard limit; by default 256")
    assert "nproc" not in decide().spec.rlimits  # its cgroup is not bounded by that


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("open_files", 1024, "nofile"),
        ("file_size", 257, "fsize"),
        ("core_size", 257, "core"),
        ("pids_max", 257, "nproc"),
    ],
)
def test_a_named_limit_over_the_hard_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int, kind: str
) -> None:
    release(monkeypatch, "5.14.0")
    hard_limits(monkeypatch, **{kind: 256})
    given: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=f"^{name}: {value} is over .* hard limit of 256; raise"):
        decide(host("cgroup.pids"), limits=Limits(**given))
    given[name] = 256
    made = decide(host("cgroup.pids"), limits=Limits(**given))
    assert made.spec.rlimits[kind] == 256


def test_fewer_descriptors_than_pid_1_needs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hard_limits(monkeypatch, nofile=15)
    with pytest.raises(ConfigError, match=r"^open_files: 1024 is over .* hard limit of 15; raise"):
        decide()


def test_cpu_time_needs_accounting() -> None:
    limits = Limits(cpu_time=2)
    assert layers(decide(limits=limits))["cpu_time"].in_force
    without = host("cgroup.cpu_accounting")
    with pytest.raises(UnsupportedHostError) as caught:
        decide(without, limits=limits)
    assert caught.value.feature == "cpu_time"
    made = decide(without, limits=limits, allow_missing={"cpu_time"})
    assert not layers(made)["cpu_time"].in_force


@pytest.mark.parametrize("device", ["/dev/no-such-disk", "/etc/passwd", "/dev/null", "8:x", ":"])
def test_io_device_must_be_a_block_device(device: str) -> None:
    with pytest.raises(ConfigError, match="io_max device"):
        decide(limits=Limits(io_max=(IoMax(device=device, rbps=1),)))


@pytest.mark.parametrize(
    ("device", "words"), [("9:9", "no such device; see lsblk"), ("8:17", "name the whole disk")]
)
def test_io_device_must_be_a_whole_device_of_this_host(device: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"io_max device '{device}': .*{words}"):
        decide(limits=Limits(io_max=(IoMax(device=device, rbps=1),)))


@pytest.mark.parametrize("cpus", ["99999", "0,99999", "0-99999", "1-0"])
def test_cpus_must_be_of_this_host(cpus: str) -> None:
    with pytest.raises(ConfigError, match=f"of '{cpus}': this host has the CPUs 0-"):
        decide(limits=Limits(cpuset_cpus=cpus))


def test_io_device_is_told_by_number() -> None:
    made = decide(limits=Limits(io_max=(IoMax(device="8:16", rbps="1M", wiops=5),)))
    assert made.spec.cgroup_limits["io_max"] == [
        {"device": "8:16", "rbps": 1 << 20, "wbps": None, "riops": None, "wiops": 5}
    ]


# -- namespaces and the filter -----------------------------------------------------------------


def test_all_namespaces_are_made() -> None:
    made = decide(host(networks_ready=False))
    assert made.spec.namespace_names == list(namespaces.FLAGS)
    assert made.spec.namespaces == sum(namespaces.FLAGS.values())


def test_a_network_namespace_held_ready_is_not_made_anew() -> None:
    made = decide()
    assert "network" in made.spec.namespace_names
    assert not made.spec.namespaces & c.CLONE_NEWNET
    assert layers(made)["namespace.network"].in_force


def test_the_hosts_network_is_said_to_be_in_reach() -> None:
    made = decide(network="host")
    assert "network" not in made.spec.namespace_names
    assert not made.spec.namespaces & c.CLONE_NEWNET
    assert not layers(made)["namespace.network"].in_force


def test_time_namespaces_are_done_without_and_all_others_are_not() -> None:
    for name in set(namespaces.FLAGS) - {"time"}:
        having = [other for other in namespaces.FLAGS if other != name]
        with pytest.raises(UnsupportedHostError) as caught:
            decide(host(namespaces=having))
        assert caught.value.feature == f"namespace.{name}"
    made = decide(host(namespaces=[other for other in namespaces.FLAGS if other != "time"]))
    assert [layer.name for layer in layers(made).missing] == ["namespace.time"]
    assert layers(made)["namespace.time"].detail == "this kernel has no time namespaces"
    assert not made.spec.namespaces & c.CLONE_NEWTIME


def test_landlock_is_missed_where_nothing_else_does_the_same() -> None:
    assert layers(decide())["landlock"].in_force
    assert decide().spec.landlock is True
    without = decide(host(landlock=False))
    assert without.spec.landlock is False
    assert layers(without).missing == ()
    open_network = decide(host(landlock=False), network="host")
    missing = [layer for layer in layers(open_network).missing if layer.wanted]
    assert [layer.name for layer in missing] == ["landlock"]
    assert "abstract Unix sockets" in missing[0].detail


def test_filter_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_policy: object) -> bytes:
        raise UnsupportedHostError("seccomp", "libseccomp is missing", "apt install libseccomp2")

    monkeypatch.setattr(filters, "filter_for", refuse)
    with pytest.raises(UnsupportedHostError, match="libseccomp is missing"):
        decide()
    made = decide(allow_missing={"seccomp"})
    assert made.program == b""
    assert not layers(made)["seccomp"].in_force


def test_filter_is_that_of_the_policy() -> None:
    made = decide(seccomp="strict")
    assert bytes.fromhex(made.spec.seccomp) == made.program == b"strict"
    assert "strict" in layers(made)["seccomp"].detail


# -- the layout --------------------------------------------------------------------------------


def layout_mount(mount: Mount, *, idmap: bool = True) -> LayoutMount:
    mounts = b.make_layout(Config(mounts=(mount,)), idmap=idmap).mounts
    return next(entry for entry in mounts if entry.destination == mount.destination)


@pytest.mark.parametrize(
    ("mount", "idmap", "shared", "idmapped"),
    [
        (Mount.bind("/usr", "/data"), True, True, False),
        # Without idmapped mounts a writable bind is the same for all environments.
        (Mount.bind("/usr", "/data", rw=True), False, True, False),
        # Each environment has a /tmp of its own, and so what is in it.
        (Mount.bind("/usr", "/tmp/data"), True, False, False),
        (Mount.bind("/usr", "/tmpdata"), True, True, False),
        (Mount.tmpfs("/data"), True, False, False),
        (Mount.tmpfs("/tmp/data"), False, False, False),
    ],
)
def test_only_what_no_environment_can_change_is_shared(
    mount: Mount, idmap: bool, shared: bool, idmapped: bool
) -> None:
    entry = layout_mount(mount, idmap=idmap)
    assert (entry.shared, entry.idmapped) == (shared, idmapped)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A directory that does not belong to root."""
    if os.geteuid() == 0:
        os.chown(tmp_path, 12345, 12345)
    return tmp_path


@pytest.mark.parametrize("rw", [True, False])
def test_idmaps_are_for_root_and_can_be_done_without(source: Path, rw: bool) -> None:
    mounts = (Mount.bind(source, "/data", rw=rw),)

    def is_idmapped(made: b.Plan) -> bool:
        return any(entry.idmapped for entry in made.spec.layout.mounts)

    assert is_idmapped(decide(mounts=mounts))
    assert not is_idmapped(decide(mounts=mounts, allow_missing={"idmapped_mounts"}))
    assert not is_idmapped(decide(host(privileged=False), mounts=mounts))


def test_idmaps_of_what_belongs_to_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is made there, and what is public stays shared and is seen as by others."""
    with pytest.raises(ConfigError, match=r"'/usr': belongs to root.*chown -R nobody /usr"):
        decide(mounts=(Mount.bind("/usr", "/data", rw=True),))
    allowed = {"idmapped_mounts"}
    assert decide(mounts=(Mount.bind("/usr", "/data", rw=True),), allow_missing=allowed)
    assert not layout_mount(Mount.bind("/usr", "/data")).idmapped
    tmp_path.chmod(0o700)
    assert layout_mount(Mount.bind(tmp_path, "/data")).idmapped
    # An interpreter's own directory is shared, unless only its owner may use it.
    set_prefixes(monkeypatch, tmp_path, "/usr")
    assert b.make_layout(Config(), idmap=True).mounts[0].idmapped
    tmp_path.chmod(0o755)
    assert not b.make_layout(Config(), idmap=True).mounts[0].idmapped


def test_set_id_bits_are_told_of_where_something_is_writable(source: Path) -> None:
    made = decide(mounts=(Mount.bind(source, "/data", rw=True),))
    assert layers(made)["set_id_bits"].in_force
    assert made.spec.seccomp_name == "policy 'default without set-id bits'"
    for mount in (Mount.bind(source, "/data"), Mount.tmpfs("/data")):
        assert "set_id_bits" not in layers(decide(mounts=(mount,)))


def test_files_and_directories_are_told_apart() -> None:
    assert layout_mount(Mount.bind("/usr", "/data")).is_directory
    assert not layout_mount(Mount.bind("/etc/passwd", "/users")).is_directory
    assert layout_mount(Mount.tmpfs("/data", size=4096)).size == 4096


def test_parents_are_mounted_before_what_is_in_them() -> None:
    mounts = tuple(Mount.tmpfs(path) for path in ("/a/b/c", "/a", "/d/e", "/a/b"))
    made = b.make_layout(Config(mounts=mounts), idmap=False).mounts
    order = [entry.destination for entry in made]
    assert order.index("/a") < order.index("/a/b") < order.index("/a/b/c")


@pytest.mark.parametrize("path", [(), ("layout",), ("layout", "mounts", 0)], ids=str)
def test_a_spec_with_other_fields_is_refused(path: tuple[str | int, ...]) -> None:
    """Wherever in it they are: the launcher may be of another version."""
    wire = json.loads(json.dumps(decide(mounts=(Mount.tmpfs("/data"),)).spec.to_wire()))
    assert Spec.from_wire(wire).layout.mounts
    inner = functools.reduce(lambda value, step: value[step], path, wire)
    kind = {0: "Spec", 1: "Layout", 3: "LayoutMount"}[len(path)]
    (name, value), *_ = inner.items()
    for change in ({name: None, "new": 1}, {"new": 1}):
        inner |= change
        if change.get(name, 1) is None:
            del inner[name]
        with pytest.raises(LauncherError, match=f"a {kind} without .* with \\['new'\\]"):
            Spec.from_wire(wire)
        inner[name] = value
    del inner["new"], inner[name]
    with pytest.raises(LauncherError, match=f"a {kind} without \\['{name}'\\] and with"):
        Spec.from_wire(wire)


def test_spec_is_json_and_says_nothing_of_the_command() -> None:
    made = decide(env={"TOKEN": "hunter2"}, limits=Limits(memory_max="1G"))
    text = json.dumps(made.spec.to_wire())
    assert Spec.from_wire(json.loads(text)).to_wire() == made.spec.to_wire()
    # Later environments are clones of the launcher: it must never see the tenant's data.
    assert "hunter2" not in text
    assert made.environment["TOKEN"] == "hunter2"


def test_environment_has_nothing_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert set(b.base_environment(Config())) == {"PATH", "HOME", "USER", "LOGNAME", "LANG"}
    changed = b.base_environment(Config(env={"HOME": "/data", "A": "1"}))
    assert (changed["HOME"], changed["A"]) == ("/data", "1")


# -- interpreters outside /usr -------------------------------------------------------------------


def set_prefixes(monkeypatch: pytest.MonkeyPatch, prefix: Path | str, base: Path | str) -> None:
    for name in ("prefix", "exec_prefix"):
        monkeypatch.setattr(sys, name, str(prefix))
        monkeypatch.setattr(sys, f"base_{name}", str(base))


def test_interpreter_in_usr_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_prefixes(monkeypatch, "/usr", "/usr")
    assert b.interpreter_prefixes() == {}
    set_prefixes(monkeypatch, "/usr/local", "/usr/local")
    assert b.interpreter_prefixes() == {}
    assert b.base_environment(Config())["PATH"].startswith("/usr/local/bin:/usr/bin")


def test_interpreter_elsewhere_is_bound_and_in_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv, base = tmp_path / "venv", tmp_path / "python"
    set_prefixes(monkeypatch, venv, base)
    assert b.interpreter_prefixes() == {str(venv): str(venv), str(base): str(base)}
    assert b.base_environment(Config())["PATH"].startswith(f"{venv}/bin:{base}/bin:/usr")
    made = b.make_layout(Config(), idmap=True).mounts
    assert {entry.destination for entry in made} == {str(venv), str(base)}
    assert not any(entry.writable for entry in made)


def test_interpreter_within_another_is_bound_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_prefixes(monkeypatch, tmp_path, tmp_path / "base")
    assert list(b.interpreter_prefixes()) == [str(tmp_path)]


def test_interpreter_that_was_started_by_a_way_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What ".." leads to is said by the host's links, and what programs inside see by the text."""
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/venv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    set_prefixes(monkeypatch, f"{tmp_path}/link/../venv", "/usr")
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/link/../venv/bin/python")
    assert b.interpreter_prefixes() == {f"{tmp_path}/venv": f"{tmp_path}/far/venv"}
    assert b.interpreter() == f"{tmp_path}/venv/bin/python"


@pytest.mark.parametrize("path", ["/usr/bin/python3", "/bin/python3"])
def test_interpreter_of_the_host(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    set_prefixes(monkeypatch, "/usr", "/usr")
    monkeypatch.setattr(sys, "executable", path)
    assert b.interpreter() == path


def test_interpreter_by_a_link_from_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_prefixes(monkeypatch, "/usr", "/usr")
    (tmp_path / "python").symlink_to("/usr/bin/env")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert b.interpreter() == os.path.realpath("/usr/bin/env")


@pytest.mark.parametrize("prefix", ["/", "/home", "/root", "~"])
def test_home_directories_are_never_bound(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    path = os.path.expanduser(prefix)
    set_prefixes(monkeypatch, path, path)
    assert b.interpreter_prefixes() == {}


def test_own_root_and_own_mount_replace_the_interpreter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    set_prefixes(monkeypatch, tmp_path, tmp_path)
    config = Config(rootfs="/usr")
    assert b.make_layout(config, idmap=True).mounts == []
    assert str(tmp_path) not in b.base_environment(config)["PATH"]
    mine = Config(mounts=(Mount.bind("/usr/bin", str(tmp_path)),))
    (entry,) = b.make_layout(mine, idmap=True).mounts
    assert entry.source == "/usr/bin"


# -- the plan and the end of a birth -------------------------------------------------------------


def test_plan_is_made_once_for_a_config_and_a_host() -> None:
    config = Config()
    one = b.make_plan(config, FULL_HOST)
    assert b.make_plan(config, FULL_HOST) is one
    assert b.make_plan(Config(), FULL_HOST) is not one
    assert b.make_plan(config, host()) is not one, "another launcher may have found another host"


def test_plans_kept_are_few() -> None:
    for _ in range(100):
        b.make_plan(Config(), FULL_HOST)
    assert len(b._plans) <= 40


@pytest.mark.parametrize(
    ("ids", "drops_groups", "words"),
    [
        ("range", True, "uid 1000 inside; host id 77, of no other environment; no supplementary"),
        ("subordinate", False, "subordinate id 77, of no other environment; the caller's groups"),
        ("own", False, "the caller's own id: environments share it; the caller's groups remain"),
    ],
)
def test_identity_is_said_as_it_is(ids: str, drops_groups: bool, words: str) -> None:
    hello = host(ids=ids, drops_groups=drops_groups)
    link = cast(
        "EnvironmentConnection",
        SimpleNamespace(host_id=77, proc="subset=pid", has_callers_id=hello.ids == "own"),
    )
    made = Protections(tuple(b.born_layers(Config(), hello, link, [])))
    assert words in made["identity"].detail
    assert "processes only" in made["proc"].detail
    assert made["capabilities"].in_force
