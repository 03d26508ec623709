# SPDX-License-Identifier: Apache-2.0
"""Config, Limits, Mount, IoMax: what is refused, in which words, and what is kept."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsbox import Config, ConfigError, Function, IoMax, Limits, Mount, SeccompPolicy
from nsbox.functions.function import FunctionFields
from nsbox.seccomp import profiles
from nsbox.values.config import (
    ALLOWABLE,
    ConfigFields,
    LimitsFields,
    RunFields,
    check_argv,
    check_environment,
    check_text,
    make_config,
    parse_seconds,
    parse_size,
)

pytestmark = pytest.mark.static

NAN, INFINITY = float("nan"), float("inf")


def bind(destination: str) -> Mount:
    return Mount.bind("/usr", destination)


# Each row is one thing somebody will write: the call, and words its message must have: the name
# of the value, the value itself, and where there is one the remedy.
BAD: list[tuple[Callable[[], object], str]] = [
    # sizes
    (lambda: Limits(memory_max="lots"), "memory_max: 'lots' is no size.*'256M'"),
    (lambda: Limits(memory_max=""), "memory_max: '' is no size"),
    (lambda: Limits(memory_max="-1M"), "memory_max: '-1M' is no size"),
    (lambda: Limits(memory_max="1e9"), "memory_max: '1e9' is no size"),
    (lambda: Limits(memory_max="5X"), "memory_max: '5X' is no size"),
    (lambda: Limits(memory_max="1M 2M"), "memory_max: '1M 2M' is no size"),
    (lambda: Limits(memory_max="nan"), "memory_max: 'nan' is no size"),
    (lambda: Limits(memory_max="1\0M"), r"memory_max: '1\\x00M' is no size"),
    (lambda: Limits(memory_max=0), "memory_max: must be above zero, got 0"),
    (lambda: Limits(memory_max="0"), "memory_max: must be above zero, got 0"),
    (lambda: Limits(memory_max="0.1"), "memory_max: must be above zero, got 0"),
    (lambda: Limits(memory_max=-4096), "memory_max: must be above zero, got -4096"),
    (lambda: Limits(memory_max=True), "memory_max: True is no size"),
    (lambda: Limits(memory_max=1.5), "memory_max: 1.5 is no size"),  # type: ignore[arg-type]
    (lambda: Limits(memory_max=b"1M"), "memory_max: b'1M' is no size"),  # type: ignore[arg-type]
    (lambda: Limits(memory_max=1 << 63), "memory_max: .* larger than any kernel limit"),
    (lambda: Limits(memory_max="9999999T"), "memory_max: .* larger than any kernel limit"),
    (lambda: Limits(memory_max="9" * 400 + "T"), "memory_max: '9+T' is no size"),
    (lambda: Limits(memory_max="1" + "0" * 5000), "memory_max: '10+' is no size"),
    (lambda: Limits(file_size="x"), "file_size: 'x' is no size"),
    (lambda: Limits(output_max="x"), "output_max: 'x' is no size"),
    (lambda: Limits(output_max=None), "output_max: .*must have a limit"),  # type: ignore[arg-type]
    (lambda: Config(tmp_size=0), "tmp_size: must be above zero"),
    (lambda: Config(tmp_size="1Q"), "tmp_size: '1Q' is no size"),
    (lambda: Mount.tmpfs("/data", size=-1), "tmpfs size: must be above zero, got -1"),
    # counts
    (lambda: Limits(pids_max=0), "pids_max: must be from 2 to .*, got 0"),
    (lambda: Limits(pids_max=1), "pids_max: must be from 2"),  # PID 1 is one of them
    (lambda: Limits(pids_max=-5), "pids_max: .* got -5"),
    (lambda: Limits(pids_max="64"), "pids_max: must be a whole number, got '64'"),  # type: ignore[arg-type]
    (lambda: Limits(pids_max=6.4), "pids_max: must be a whole number"),  # type: ignore[arg-type]
    (lambda: Limits(pids_max=True), "pids_max: must be a whole number, got True"),
    (lambda: Limits(pids_max=1 << 40), "pids_max: must be from 2 to 4194304"),
    (lambda: Limits(open_files=15), "open_files: must be from 16"),
    (lambda: Limits(memory_max="1M"), "memory_max: must be at least 2097152, got 1048576"),
    (lambda: Limits(core_size=-1), "core_size: must be from 0"),
    (lambda: Config(user_id=0), "user_id: must be from 1 to 65533, got 0"),
    (lambda: Config(user_id=65534), "user_id: must be from 1 to 65533"),
    (lambda: Config(user_id=-1), "user_id: must be from 1"),
    # rates and times
    (lambda: Limits(cpu_max=0), "cpu_max: must be from 0.01 to 4096 CPUs, got 0"),
    (lambda: Limits(cpu_max=-0.5), "cpu_max: must be above zero"),
    (lambda: Limits(cpu_max=0.001), "cpu_max: must be from 0.01"),
    (lambda: Limits(cpu_max=5000), "cpu_max: must be from 0.01 to 4096"),
    (lambda: Limits(cpu_max=NAN), "cpu_max: must be above zero and finite, got nan"),
    (lambda: Limits(cpu_max=INFINITY), "cpu_max: must be above zero and finite, got inf"),
    (lambda: Limits(cpu_max="1"), "cpu_max: must be a number"),  # type: ignore[arg-type]
    (lambda: Limits(cpu_max=True), "cpu_max: must be a number"),
    (lambda: Limits(cpu_time=0), "cpu_time: must be above zero"),
    (lambda: Limits(cpu_time=NAN), "cpu_time: must be above zero and finite"),
    (lambda: parse_seconds("5", "timeout"), "timeout: must be a number of seconds, got '5'"),
    (lambda: parse_seconds(-1, "timeout"), "timeout: must be above zero and finite, got -1"),
    (lambda: parse_seconds(None, "timeout"), "timeout: must be a number of seconds, got None"),
    # CPU lists
    (lambda: Limits(cpuset_cpus=""), "cpuset_cpus: '' is no CPU list"),
    (lambda: Limits(cpuset_cpus="0-"), "cpuset_cpus: '0-' is no CPU list such as '0-1,3'"),
    (lambda: Limits(cpuset_cpus="0,,1"), "cpuset_cpus: '0,,1' is no CPU list"),
    (lambda: Limits(cpuset_cpus="0\n1"), "cpuset_cpus: .* is no CPU list"),
    (lambda: Limits(cpuset_cpus="0\0"), "cpuset_cpus: .*NUL"),
    (lambda: Limits(cpuset_cpus=0), "cpuset_cpus: must be text, got 0"),  # type: ignore[arg-type]
    # io
    (lambda: IoMax(device="/dev/sda"), "io_max '/dev/sda': name at least one of rbps"),
    (lambda: IoMax(device="/dev/sda", rbps=0), "io_max rbps: must be above zero"),
    (lambda: IoMax(device="/dev/sda", wiops=-1), "io_max wiops: must be from 1"),
    (lambda: IoMax(device="/dev/\0", rbps=1), "io_max device: .*NUL"),
    (lambda: Limits(io_max=("/dev/sda",)), "io_max: must hold IoMax values, got '/dev/sda'"),  # type: ignore[arg-type]
    # mounts
    (
        lambda: Mount.bind("/no/such", "/data"),
        "'/no/such': No such file.*bind something that exists",
    ),
    (lambda: Mount.bind("/us\0r", "/data"), "mount source: .*NUL"),
    (lambda: bind("data"), "mount destination 'data': must be absolute, e.g. '/data'"),
    (lambda: bind(""), "mount destination '': must be absolute"),
    (lambda: bind("/data/../etc"), r"mount destination '/data/../etc': must not contain '\.\.'"),
    (lambda: bind("/.."), r"must not contain '\.\.'"),
    (lambda: bind("/da\0ta"), "mount destination: .*NUL"),
    (lambda: bind("/"), "mount destination '/': choose a directory of its own"),
    (lambda: bind("//"), "mount destination '//': choose a directory of its own"),
    (lambda: bind("/tmp/"), "mount destination '/tmp/': choose a directory"),
    (lambda: bind("/./usr"), "mount destination '/./usr': choose a directory"),
    (lambda: bind("/etc"), "mount destination '/etc': choose a directory"),
    (lambda: bind("/proc"), "mount destination '/proc': /proc is nsbox's own"),
    (lambda: bind("//proc/self"), "/proc is nsbox's own"),
    (lambda: bind("/sys/fs/cgroup"), "/sys is nsbox's own"),
    (lambda: bind("/dev/./shm"), "/dev is nsbox's own"),
    (lambda: Mount(source="/", destination="/d", type="overlay"), "mount type 'overlay'"),
    (lambda: Config(mounts=(bind("/d"), bind("/d//"))), "'/d' is the destination of two mounts"),
    (lambda: Config(mounts=("/usr:/data",)), "mounts: must hold Mount values"),  # type: ignore[arg-type]
    (lambda: Config(rootfs="/no/such"), "rootfs '/no/such': not a directory; rootfs/README.md"),
    (lambda: Config(rootfs="/etc/passwd"), "rootfs '/etc/passwd': not a directory"),
    (lambda: Config(rootfs="/\0"), "rootfs: .*NUL"),
    (
        lambda: Mount(source="srv", destination="/d"),
        "mount source 'srv': must be absolute; see Mount.bind",
    ),
    (lambda: Mount(source="/srv", destination="/d", options=("suid",)), "mount option 'suid': "),
    (lambda: Mount(source="/srv", destination="/d", options=("ro", "rw")), "one of 'ro' and 'rw'"),
    (lambda: Mount(source="/srv", destination="/d", options="ro"), "mount options: .* got 'ro'"),  # type: ignore[arg-type]
    (
        lambda: Mount(source="", destination="/d", type="tmpfs", options=("rw", "size=x")),
        "tmpfs size: 'x' is no size",
    ),
    (
        lambda: Mount(source="", destination="/d", type="tmpfs", options=("rw",)),
        "a tmpfs needs 'size=BYTES'",
    ),
    (lambda: Config(mounts=None), "mounts: must be a sequence of Mount values, got None"),  # type: ignore[arg-type]
    (lambda: Config(mounts=bind("/d")), "mounts: must be a sequence of Mount values, got Mount"),  # type: ignore[arg-type]
    (lambda: Limits(io_max=5), "io_max: must be a sequence of IoMax values, got 5"),  # type: ignore[arg-type]
    # the rest of Config
    (lambda: Config(env=5), "env: must be a mapping of names to values, got int"),  # type: ignore[arg-type]
    (lambda: Config(env="A=1"), "env: must be a mapping of names to values, got str"),  # type: ignore[arg-type]
    (lambda: Config(env=["A=1"]), "env: must be a mapping of names to values, got list"),  # type: ignore[list-item]
    (lambda: Config(env={"A": "\ud800"}), r"env\['A'\]: '\\ud800' stands for no bytes"),
    (lambda: Config(allow_missing=5), "allow_missing: must be a sequence of str values, got 5"),  # type: ignore[arg-type]
    (lambda: Config(allow_missing=[5]), "allow_missing: must hold str values, got 5"),  # type: ignore[list-item]
    (lambda: Config().replace(memory_max=1), r"'memory_max' of Config; .*Limits\(memory_max=...\)"),  # type: ignore[call-arg]
    (lambda: Config(env={"": "x"}), "env: '' is no variable name"),
    (lambda: Config(env={"A=B": "x"}), "env: 'A=B' is no variable name"),
    (lambda: Config(env={"A": "x\0"}), r"env\['A'\]: .*NUL"),
    (lambda: Config(env={"A\0": "x"}), "env name: .*NUL"),
    (lambda: Config(env={"A": 1}), r"env\['A'\]: must be text, got 1"),  # type: ignore[arg-type]
    (lambda: Config(limits={"pids_max": 4}), "limits: must be a Limits value"),  # type: ignore[arg-type]
    (lambda: Config(network="bridge"), "network: must be 'none' or 'host', got 'bridge'"),  # type: ignore[arg-type]
    (lambda: Config(seccomp="lax"), "lax"),  # type: ignore[arg-type]
    (lambda: Config(seccomp=None), "seccomp: must be a SeccompPolicy or name"),  # type: ignore[arg-type]
    (lambda: Config(allow_missing="seccomp"), "allow_missing: give a set of names"),
    (lambda: Config(allow_missing={"cgroup.mem"}), "'cgroup.mem' is none of cgroup.cpu, cgroup.cp"),
    (lambda: Config(hostname="a b"), "hostname: 'a b' is no host name"),
    (lambda: Config(hostname=""), "hostname: '' is no host name"),
    (lambda: Config(hostname="x" * 65), "hostname: .*up to 64"),
    (lambda: Config(hostname="-x"), "hostname: '-x'"),
    (lambda: Config(hostname="x\n127.0.0.1 bank"), "hostname: "),
    (lambda: Config(cwd="work"), "cwd: must be absolute, got 'work'"),
    (lambda: Config(cwd="/\0"), "cwd: .*NUL"),
    (lambda: Config().replace(memory="1M"), "unknown option 'memory' of Config"),  # type: ignore[call-arg]
    (lambda: make_config(None, {"limit": 1, "zzz": 2}), "unknown option 'limit' of Config"),
    (lambda: make_config({"env": {}}, {}), "config: must be a Config"),  # type: ignore[arg-type]
    # command lines
    (lambda: check_argv([]), r"argv: a command is needed, got \[\]"),
    (lambda: check_argv([""]), r"argv: a command is needed, got \[''\]"),
    (lambda: check_argv(None), "argv: give a list of arguments, got None"),  # type: ignore[arg-type]
    (lambda: check_argv("ls -l"), r"not the string 'ls -l'.*\['sh', '-c', line\]"),
    (lambda: check_argv(b"ls"), "not the string b'ls'"),  # type: ignore[arg-type]
    (lambda: check_argv(["ls", "a\0b"]), r"argv\[1\]: .*NUL"),
    (lambda: check_argv(["ls", "\ud800"]), r"argv\[1\]: .*give the bytes themselves"),
    (lambda: check_argv(["ls", 5]), r"argv\[1\]: must be text, got 5"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("make", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_value_is_refused_by_name(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (1, 1), ("1", 1), ("4096", 4096), ("1K", 1024), ("1k", 1024), ("1KiB", 1024), ("1kB", 1024),
        ("256M", 256 << 20), ("0.5G", 512 << 20), (" 2 G ", 2 << 30), ("1T", 1 << 40), ("7B", 7),
        (1 << 62, 1 << 62),
    ],
)  # fmt: skip
def test_size_is_kept_as_bytes(text: int | str, number: int) -> None:
    assert parse_size(text) == number


@given(st.integers(1, (1 << 42) - 1), st.sampled_from(["", "K", "M", "k", "m"]))
def test_whole_sizes_are_exact(number: int, unit: str) -> None:
    factor = {"": 1, "K": 1 << 10, "M": 1 << 20}[unit.upper()]
    expected = number * factor  # also above 2**53, where a float is not exact
    assert parse_size(f"{number}{unit}") == expected


@given(st.one_of(st.text(), st.integers(), st.floats(), st.binary(), st.none(), st.booleans()))
def test_any_size_is_bytes_or_a_config_error(value: object) -> None:
    try:
        size = parse_size(value)  # type: ignore[arg-type]
    except ConfigError as error:
        message = str(error)
    else:
        assert isinstance(size, int)
        assert 0 < size <= 1 << 62
        return
    assert message.startswith("size: ")


@given(st.one_of(st.text(), st.integers(), st.floats(), st.none(), st.booleans()))
def test_any_time_is_finite_or_a_config_error(value: object) -> None:
    try:
        seconds = parse_seconds(value, "timeout")
    except ConfigError:
        return
    assert 0 < seconds < 1e9


@given(st.text(alphabet="/.abc \n\t~-prosydvt"))
def test_accepted_destinations_are_clean_and_never_nsbox_own(path: str) -> None:
    try:
        mount = Mount.tmpfs(path)
    except ConfigError:
        return
    parts = mount.destination.split("/")
    assert parts[0] == ""
    assert parts[1] not in ("proc", "sys", "dev", "")
    assert not {".", "..", ""} & set(parts[1:])


@given(st.dictionaries(st.text(), st.text()))
def test_environment_is_kept_or_refused_whole(env: dict[str, str]) -> None:
    bad = any(not name or "=" in name or "\0" in name + value for name, value in env.items())
    if bad:
        with pytest.raises(ConfigError):
            check_environment(env)
    else:
        assert check_environment(env) == env


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"))))
def test_command_line_is_kept_word_for_word(argv: list[str]) -> None:
    if argv and argv[0]:
        assert check_argv(argv) == tuple(argv)
    else:
        with pytest.raises(ConfigError):
            check_argv(argv)


def test_command_line_may_hold_paths_and_undecodable_bytes() -> None:
    argv: list[Any] = [Path("/bin/ls"), b"/tmp/\xff\xfe"]
    assert check_argv(argv) == ("/bin/ls", "/tmp/\udcff\udcfe")
    assert os.fsencode(check_text(b"\xff", "x")) == b"\xff"


def test_defaults_are_the_documented_ones() -> None:
    config = Config()
    limits = config.limits
    assert (limits.memory_max, limits.pids_max, limits.output_max) == (512 << 20, 256, 16 << 20)
    assert (limits.open_files, limits.core_size, limits.file_size) == (1024, 0, None)
    assert (limits.cpu_max, limits.cpuset_cpus, limits.io_max, limits.cpu_time) == (
        None, None, (), None,
    )  # fmt: skip
    assert (config.tmp_size, config.network, config.cwd) == (64 << 20, "none", "/tmp")
    assert (config.hostname, config.user_id, config.seccomp.name) == ("sandbox", 1000, "default")
    assert config.allow_missing == frozenset()


def test_named_limits_are_told_from_defaults() -> None:
    assert Limits().named == frozenset()
    assert Limits(pids_max=256).named == {"pids_max"}
    assert Limits(memory_max=None, cpu_max=1).named == {"memory_max", "cpu_max"}
    assert Limits(memory_max=None).memory_max is None
    assert Limits(memory_max="512M") != Limits(), "naming the default is asking for it"


def test_values_are_hashable_and_equal_by_content() -> None:
    def make() -> Config:
        return Config(
            mounts=[Mount.bind("/usr", "/data"), Mount.tmpfs("/scratch", size="1M")],
            env={"B": "2", "A": "1"},
            limits=Limits(memory_max="1G", io_max=[IoMax(device="8:0", rbps="1M")]),
            allow_missing={"seccomp"},
            seccomp="strict",
        )

    one, two = make(), make()
    assert one == two
    assert len({one, two}) == 1
    assert one.env == (("A", "1"), ("B", "2"))
    assert one.seccomp == SeccompPolicy.strict()
    assert one != one.replace(cwd="/")
    assert hash(Config()) == hash(Config())


def test_values_are_frozen() -> None:
    for value, name in ((Config(), "cwd"), (Limits(), "pids_max"), (bind("/d"), "source")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, "x")


def test_replace_checks_and_keeps_the_rest() -> None:
    config = Config(env={"A": "1"}, cwd="/")
    changed = config.replace(hostname="other")
    assert (changed.hostname, changed.cwd, changed.env) == ("other", "/", (("A", "1"),))
    with pytest.raises(ConfigError, match="hostname"):
        config.replace(hostname="")


def test_replace_keeps_which_limits_were_named() -> None:
    limits = Limits(pids_max=99)
    assert Config(limits=limits).replace(cwd="/").limits.named == {"pids_max"}
    again = dataclasses.replace(limits, memory_max="1G")  # type: ignore[arg-type]
    assert "pids_max" in again.named


def test_config_can_be_sent_to_a_worker_of_the_callers() -> None:
    # nsbox never unpickles anything, but its values may be in what a user's pool pickles.
    config = Config(limits=Limits(pids_max=9), mounts=(bind("/d"),), seccomp=SeccompPolicy.strict())
    assert pickle.loads(pickle.dumps(config)) == config  # noqa: S301 - made one line above


def test_bind_resolves_links_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    mount = Mount.bind(tmp_path / "link", "/data/")
    assert mount.source == str((tmp_path / "real").resolve())
    assert (mount.destination, mount.writable, mount.size) == ("/data", False, 0)
    assert Mount.bind(tmp_path, "/data", rw=True).writable
    with pytest.raises(ConfigError, match="bind something that exists"):
        Mount.bind(tmp_path / "gone", "/data")


def test_tmpfs_knows_its_size() -> None:
    mount = Mount.tmpfs("/scratch", size="3M")
    assert (mount.size, mount.writable, mount.type) == (3 << 20, True, "tmpfs")


def test_every_name_of_allow_missing_is_accepted() -> None:
    assert Config(allow_missing=ALLOWABLE).allow_missing == ALLOWABLE
    assert Config(allow_missing=["seccomp"] * 2).allow_missing == {"seccomp"}


def test_bad_value_is_refused_before_a_launcher_is_started() -> None:
    import nsbox
    from nsbox.supervisor import launcher

    before = launcher._holder._launcher
    with pytest.raises(ConfigError):
        nsbox.run(["true"], tmp_size="x")
    with pytest.raises(ConfigError):
        nsbox.run([], limits=Limits())
    with pytest.raises(ConfigError):
        nsbox.ExecutionEnvironment(colour="red")  # type: ignore[call-arg]
    assert launcher._holder._launcher is before


def test_type_checkers_are_told_of_every_field() -> None:
    assert set(ConfigFields.__annotations__) == {item.name for item in dataclasses.fields(Config)}
    limits = {item.name for item in dataclasses.fields(Limits) if item.init}
    assert set(LimitsFields.__annotations__) == limits
    taken = inspect.signature(Function).parameters
    assert list(FunctionFields.__annotations__) == list(taken)
    assert set(RunFields.__annotations__) == set(ConfigFields.__annotations__) - {"env", "cwd"}
    names = get_type_hints(RunFields)["seccomp"]
    assert sorted(get_args(get_args(names)[1])) == sorted(profiles.TIERS)
