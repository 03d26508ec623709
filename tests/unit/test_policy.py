# SPDX-License-Identifier: Apache-2.0
"""SeccompPolicy as a value: profiles, algebra, lint, OCI JSON."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsbox.errors import ConfigError
from nsbox.seccomp import profiles
from nsbox.seccomp.policy import SeccompPolicy
from nsbox.seccomp.profiles import (
    ALLOW,
    DANGEROUS_NAMES,
    EINVAL,
    ENOSYS,
    EOPNOTSUPP,
    EPERM,
    EPROTONOSUPPORT,
    ERRNO,
    INT,
    KILL_PROCESS,
    LOG,
    TIER_OF,
)

pytestmark = pytest.mark.static

HARMLESS = sorted(set(TIER_OF) - DANGEROUS_NAMES)
PROFILES = ("strict", "default", "docker")


def oci(*syscalls: dict[str, Any], default: str = "SCMP_ACT_ERRNO", **more: object) -> str:
    return json.dumps({"defaultAction": default, "syscalls": syscalls, **more})


def entry(name: str, action: str = "SCMP_ACT_ALLOW", **more: object) -> dict[str, Any]:
    return {"names": [name], "action": action, **more}


def arg(index: int, op: str, value: int, two: int = 0) -> dict[str, Any]:
    return {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": two}


def load(text: object, **more: object) -> SeccompPolicy:
    return SeccompPolicy.from_oci(text, machine="x86_64", kernel=(6, 1), **more)  # type: ignore[arg-type]


def test_profiles_have_the_documented_sizes_and_are_nested() -> None:
    strict, default, docker = (SeccompPolicy.named(name).allowed for name in PROFILES)
    assert (len(strict), len(default), len(docker)) == (229, 274, 307)
    assert strict < default < docker


def test_every_group_has_a_reason_and_no_call_is_listed_twice() -> None:
    names = [name for _, _, _, text in profiles.GROUPS for name in text.split()]
    assert len(names) == len(set(names)) == 383
    assert all(reason for _, _, reason, _ in profiles.GROUPS)
    assert set(profiles.NEW_NUMBERS) <= set(names)
    assert profiles.NEW_NUMBERS["cachestat"] == 451
    assert profiles.NEW_NUMBERS["file_setattr"] == 469
    assert not profiles.FOREIGN_NAMES & set(names)


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_open_no_way_out(name: str) -> None:
    policy = SeccompPolicy.named(name)
    assert not policy.dangerous
    assert not policy.allowed & DANGEROUS_NAMES
    assert policy.decide("clone3") == ENOSYS
    assert policy.decide("clone", (0x10000000,)) == EPERM
    assert policy.decide("clone", (1 << 32 | 0x10000000,)) == EPERM
    assert policy.decide("clone", (0x3D0F00,)) == ALLOW
    for family in (38, 40, 1 << 32 | 40):
        assert policy.decide("socket", (family, 0, 0)) == EPERM
    assert policy.decide("ioctl", (0, 0x5412 | 7 << 32)) == EPERM
    assert policy.decide("ioctl", (0, 0x5401)) == ALLOW


def test_argument_rules_of_strict() -> None:
    policy = SeccompPolicy.strict()
    assert policy.decide("socket", (16, 3, 0)) == ALLOW
    assert policy.decide("socket", (16, 3, 12)) == EPROTONOSUPPORT
    assert policy.decide("socket", (17, 3, 0)) == EPERM
    assert policy.decide("prlimit64", (0, 7)) == ALLOW
    assert policy.decide("prlimit64", (1, 7, 8)) == EPERM
    assert policy.decide("seccomp", (1, 1)) == ALLOW
    assert policy.decide("seccomp", (1, 9)) == EPERM
    assert policy.decide("prlimit64", (7, 7, 0)) == ALLOW  # asks
    assert policy.decide("prlimit64", (7, 7, 1 << 32)) == EPERM  # a pointer has all 64 bits
    assert policy.decide("prctl", (35,)) == EPERM
    assert policy.decide("prctl", (15,)) == ALLOW
    assert policy.decide("personality", (INT,)) == ALLOW
    assert policy.decide("personality", (0x40000,)) == ALLOW  # ADDR_NO_RANDOMIZE
    assert policy.decide("personality", (0x100000,)) == EPERM  # MMAP_PAGE_ZERO


@pytest.mark.parametrize("name", PROFILES)
def test_leases_and_notifications_are_refused_and_other_commands_of_fcntl_are_not(
    name: str,
) -> None:
    policy = SeccompPolicy.named(name)
    for high in (0, 1 << 32, INT << 32):
        for command in (1024, 1026, 1040):  # F_SETLEASE, F_NOTIFY, F_SETDELEG
            assert policy.decide("fcntl", (3, high | command)) == EPERM
        # F_DUPFD to F_GETOWNER_UIDS, OFD locks, F_GETLEASE, F_DUPFD_QUERY to F_GETDELEG
        for command in (*range(18), 36, 37, 38, 1025, *range(1027, 1040)):
            assert policy.decide("fcntl", (3, high | command)) == ALLOW
        for command in (1041, 2048, 1 << 30):
            assert policy.decide("fcntl", (3, high | command)) == EINVAL


@pytest.mark.parametrize("name", PROFILES)
def test_pid_1_is_not_the_guests(name: str) -> None:
    policy = SeccompPolicy.named(name)
    for call in ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
        for high in (0, 1 << 32):
            assert policy.decide(call, (high | 1, 1)) not in (ALLOW, LOG)
    for call, process in (("setpriority", 0), ("ioprio_set", 1)):
        for which in range(4):
            assert policy.decide(call, (which, 1 << 32 | 1)) != ALLOW
            assert name == "strict" or (policy.decide(call, (which, 0)) == ALLOW) == (
                which == process
            )
    assert policy.decide("sched_setaffinity", (7, 8)) == ALLOW
    assert policy.decide("prlimit64", (1, 7, 1)) == EPERM
    assert policy.decide("prlimit64", (7, 7, 1)) == EPERM
    assert policy.decide("prlimit64", (1, 7, 0)) == ALLOW


@pytest.mark.parametrize("name", PROFILES)
def test_a_refused_call_answers_what_programs_are_prepared_for(name: str) -> None:
    policy = SeccompPolicy.named(name)
    for action, reason, names in profiles.REFUSALS:
        assert reason
        for call in names.split():
            if call not in policy.allowed:
                assert policy.decide(call) == action
    listed = [call for _, _, names in profiles.REFUSALS for call in names.split()]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(TIER_OF)
    assert policy.allow("setxattr").decide("setxattr") == ALLOW
    assert policy.allow("setxattr").deny("setxattr").decide("setxattr") == EOPNOTSUPP


def test_ptrace_of_default_reads_and_that_of_allow_writes() -> None:
    policy = SeccompPolicy.default()
    for request in (7, 8, 12, 16, 17, 0x4204):
        assert policy.decide("ptrace", (1 << 32 | request,)) == ALLOW
    # TRACEME, POKE*, SETREGS, SYSCALL, SETOPTIONS, SETREGSET, SEIZE
    for request in (0, 4, 5, 6, 13, 24, 0x4200, 0x4205, 0x4206):
        assert policy.decide("ptrace", (request,)) == EPERM
        assert policy.allow("ptrace").decide("ptrace", (request,)) == ALLOW
    assert SeccompPolicy.strict().decide("ptrace", (16,)) == EPERM
    assert "unshare" in policy.allow_dangerous("unshare").allowed


def test_without_set_id_bits() -> None:
    oci = SeccompPolicy.from_oci(
        {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [
                {"names": sorted(DANGEROUS_NAMES | {"clone"}), "action": "SCMP_ACT_ERRNO"},
                {
                    "names": ["open"],
                    "action": "SCMP_ACT_LOG",
                    "args": [{"index": 1, "value": 65, "op": "SCMP_CMP_EQ"}],
                },
            ],
        }
    )
    for base in (*map(SeccompPolicy.named, profiles.TIERS), oci):
        policy = base.without_set_id_bits()
        for mode in (0o4755, 0o2755, 0o6000, 0o755, 0o1777):
            decided = {policy.decide(call, (0, mode, 0, 0)) for call in ("chmod", "fchmod")}
            decided |= {policy.decide("fchmodat", (0, 0, mode, 0))}
            decided |= {policy.decide("openat", (0, 0, flags, mode)) for flags in (64, 0x410000)}
            assert decided == {EPERM if mode & 0o6000 else ALLOW}, oct(mode)
            assert policy.decide("open", (0, 65, mode)) != (LOG if mode & 0o6000 else EPERM)
        # Without O_CREAT and O_TMPFILE the argument is whatever was in the register.
        assert policy.decide("openat", (0, 0, 0x10000, INT)) == ALLOW
        assert policy.decide("openat2") == ENOSYS
        assert policy.decide("io_uring_setup") == EPERM
        changed = {call for call in TIER_OF if policy.decide(call) != base.decide(call)}
        assert changed <= {"openat2", "io_uring_setup"}


def test_unknown_names_are_refused_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"'sokcet'.*socket"):
        SeccompPolicy.strict().allow("sokcet")
    with pytest.raises(ConfigError, match="'nothing_like_it'"):
        SeccompPolicy.strict().deny("nothing_like_it")
    with pytest.raises(ConfigError, match=r"'lax'.*strict, default, docker"):
        SeccompPolicy.named("lax")


@pytest.mark.parametrize("call", sorted(DANGEROUS_NAMES))
def test_dangerous_calls_must_be_meant(call: str) -> None:
    with pytest.raises(ConfigError, match=rf"allow_dangerous\('{call}'\)"):
        SeccompPolicy.default().allow(call)
    meant = SeccompPolicy.default().allow_dangerous(call)
    assert meant.decide(call) == ALLOW
    assert meant.dangerous == {call}
    assert not meant.deny(call).dangerous


def test_design_example_and_ptrace_with_namespaces() -> None:
    policy = SeccompPolicy.default().allow("ptrace").deny("socket")
    assert policy.decide("ptrace") == ALLOW
    assert policy.decide("socket", (1, 1, 0)) == EPERM
    with pytest.raises(ConfigError, match="ptrace"):
        policy.allow_dangerous("unshare")
    assert "unshare" in policy.allow_dangerous("unshare", "ptrace").allowed


def test_allow_dangerous_lifts_an_argument_rule_and_allow_keeps_it() -> None:
    assert SeccompPolicy.strict().allow("clone") == SeccompPolicy.strict()
    lifted = SeccompPolicy.strict().allow_dangerous("clone")
    assert lifted.decide("clone", (0x10000000,)) == ALLOW
    assert lifted.dangerous == {"clone"}


def test_the_dangerous_calls_are_those_of_the_threat_model() -> None:
    expected = """mount bpf kexec_load init_module open_by_handle_at io_uring_setup io_uring_enter
        io_uring_register keyctl add_key perf_event_open userfaultfd setns unshare clone3 reboot
        pivot_root move_mount pidfd_getfd"""
    assert set(expected.split()) <= DANGEROUS_NAMES


def test_describe_tells_reasons_and_rules() -> None:
    text = SeccompPolicy.strict().describe()
    assert "229 calls" in text
    assert "errno 95" in text
    assert "keyrings (refused)" in text
    assert "socket: allow if arg0 == 0x1" in text


@given(st.sampled_from(PROFILES), st.lists(st.sampled_from(HARMLESS), max_size=5))
@settings(max_examples=60, deadline=None)
def test_allow_and_deny_algebra(base: str, names: list[str]) -> None:
    policy = SeccompPolicy.named(base)
    allowed, denied = policy.allow(*names), policy.deny(*names)
    assert allowed.allowed == policy.allowed | set(names)
    assert denied.allowed == policy.allowed - set(names)
    assert allowed.allow(*names) == allowed
    assert denied.deny(*names) == denied
    assert policy.allow(*reversed(names)) == allowed
    assert allowed.deny(*names) == denied
    assert denied.allow(*names).allowed == allowed.allowed
    assert hash(policy.allow(*names)) == hash(allowed)
    assert policy == SeccompPolicy.named(base)
    again = SeccompPolicy.from_json(allowed.to_json())
    assert again == allowed
    assert again.digest() == allowed.digest()
    assert (allowed.digest() == policy.digest()) == (allowed == policy)


def test_oci_docker_like_profile() -> None:
    policy = load(
        oci(
            entry("read"),
            {"names": ["write", "_llseek", "not_born_yet"], "action": "SCMP_ACT_ALLOW"},
            entry("ptrace", includes={"minKernel": "4.8"}),
            entry("kcmp", includes={"caps": ["CAP_SYS_PTRACE"]}),
            entry("arch_prctl", includes={"arches": ["amd64", "x32"]}),
            entry("sync_file_range", includes={"arches": ["ppc64le"]}),
            entry("clone", args=[arg(0, "MASKED_EQ", 2114060288)], excludes={"arches": ["s390"]}),
            entry("clone3", "SCMP_ACT_ERRNO", errnoRet=38, excludes={"caps": ["CAP_SYS_ADMIN"]}),
            entry("socket", args=[arg(0, "NE", 40)]),
            entry("reboot", "SCMP_ACT_KILL_PROCESS"),
            defaultErrnoRet=13,
            archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
        )
    )
    assert policy.allowed == {"read", "write", "ptrace", "arch_prctl", "clone", "socket"}
    assert policy.decide("openat") == ERRNO | errno.EACCES
    assert policy.decide("clone3") == ENOSYS
    assert policy.decide("reboot") == KILL_PROCESS
    assert policy.decide("socket", (39,)) == ALLOW
    assert policy.decide("socket", (1 << 32 | 40,)) == ERRNO | errno.EACCES


@pytest.mark.parametrize("op", ["EQ", "NE", "LT", "LE", "GT", "GE"])
@given(value=st.integers(1, INT - 1), probe=st.integers(0, INT), high=st.integers(0, INT))
@settings(max_examples=40, deadline=None)
def test_oci_comparisons_hold_on_the_low_half(op: str, value: int, probe: int, high: int) -> None:
    policy = load(oci(entry("socket", args=[arg(0, op, value)])))
    for low in (probe, value, value - 1, value + 1):
        holds = {
            "EQ": low == value,
            "NE": low != value,
            "LT": low < value,
            "LE": low <= value,
            "GT": low > value,
            "GE": low >= value,
        }[op]
        assert policy.decide("socket", (high << 32 | low,)) == (ALLOW if holds else EPERM)


def test_oci_two_arguments_and_the_stricter_of_two_rules() -> None:
    policy = load(
        oci(
            entry("socket", args=[arg(0, "EQ", 2), arg(1, "LT", 3)]),
            entry("socket", "SCMP_ACT_KILL_PROCESS", args=[arg(0, "EQ", 2), arg(1, "EQ", 2)]),
        )
    )
    assert policy.decide("socket", (2, 1)) == ALLOW
    assert policy.decide("socket", (2, 2)) == KILL_PROCESS
    assert policy.decide("socket", (2, 3)) == EPERM


def test_oci_deny_list_allows_no_dangerous_call_unless_named() -> None:
    refused = entry("socket", "SCMP_ACT_ERRNO")
    with pytest.raises(ConfigError, match="allow_dangerous"):
        load(oci(refused, default="SCMP_ACT_ALLOW"))
    rest = {"names": sorted(DANGEROUS_NAMES), "action": "SCMP_ACT_ERRNO"}
    with pytest.raises(ConfigError, match=r"'clone'"):
        load(oci(refused, rest, default="SCMP_ACT_ALLOW"))
    clone = entry("clone", "SCMP_ACT_ERRNO")
    policy = load(oci(refused, rest, clone, default="SCMP_ACT_ALLOW"))
    assert policy.decide("read") == ALLOW
    assert policy.decide("socket", (1,)) == EPERM
    assert load(oci(entry("mount")), allow_dangerous=["mount"]).decide("mount") == ALLOW


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "defaultAction is missing"),
        (oci(default="SCMP_ACT_MAYBE"), "SCMP_ACT_MAYBE"),
        (oci(listenerPath="/x"), "listenerPath"),
        (oci(flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]), "SPEC_ALLOW"),
        (oci(architectures=["SCMP_ARCH_S390X"]), "SCMP_ARCH_S390X"),
        (oci(entry("read", "SCMP_ACT_NOTIFY")), "listener"),
        (oci(entry("read", "SCMP_ACT_TRACE", errnoRet=1)), "listener"),
        (oci(entry("read", errnoRet=1)), "errnoRet"),
        (oci(entry("read", "SCMP_ACT_ERRNO", errnoRet=0)), "errno must be"),
        (oci(entry("read", "SCMP_ACT_ERRNO", errnoRet=True)), "errno must be"),
        (oci(entry("read", arg=[])), "unknown keys arg"),
        (oci({"names": ["read"]}), "action is missing"),
        (oci({"names": [], "action": "SCMP_ACT_ALLOW"}), "names"),
        (oci({"names": "read", "action": "SCMP_ACT_ALLOW"}), "must be a list"),
        (oci(entry("raed", "SCMP_ACT_KILL")), "'raed'"),
        (oci(entry("read"), entry("read", "SCMP_ACT_KILL")), "two actions"),
        (oci(entry("read", args=[arg(6, "EQ", 1)])), "index"),
        (oci(entry("read", args=[arg(0, "SAME", 1)])), "operator"),
        (oci(entry("read", args=[arg(0, "EQ", -1)])), "must be 0 to"),
        (oci(entry("read", args=[arg(0, "EQ", 1 << 32)])), "does not fit 32 bits"),
        (oci(entry("read", args=[arg(0, "LT", 0)])), "never or always"),
        (oci(entry("read", args=[arg(0, "GE", 0)])), "never or always"),
        (oci(entry("read", args=[arg(0, "MASKED_EQ", 0)])), "never or always"),
        (oci(entry("read", args=[arg(0, "MASKED_EQ", 1, 2)])), "never or always"),
        (oci(entry("read", args=[arg(0, "NE", 1), arg(0, "NE", 2)])), "compared twice"),
        (oci(entry("read", args=[arg(i, "NE", 5) for i in range(3)])), "too many"),
        (oci(entry("read", includes={"user": 1})), "unknown keys user"),
        (oci(entry("read", includes={"minKernel": "new"})), "kernel version"),
        (oci(entry("clone")), "clone"),
    ],
)
def test_oci_what_is_not_understood_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load(text)
