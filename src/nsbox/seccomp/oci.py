# SPDX-License-Identifier: Apache-2.0
"""OCI runtime-spec `linux.seccomp` and Docker's profile JSON, read into rules.

Strict on purpose: a key or value that is not understood is an error, because a rule that is read
wrongly is a hole. See config-linux.md of the runtime-spec, and profiles/seccomp of moby.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from typing import cast

from nsbox.errors import ConfigError
from nsbox.seccomp.profiles import ALLOW, EPERM, ERRNO, FOREIGN_NAMES, INT, LOG, TIER_OF, Rule, Test
from nsbox.seccomp.profiles import KILL_PROCESS as _KILL_PROCESS
from nsbox.seccomp.profiles import KILL_THREAD as _KILL_THREAD
from nsbox.seccomp.profiles import TRAP as _TRAP

_ACTIONS = {
    "SCMP_ACT_ALLOW": ALLOW,
    "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_ERRNO": ERRNO,
    "SCMP_ACT_TRAP": _TRAP,
    "SCMP_ACT_KILL": _KILL_THREAD,
    "SCMP_ACT_KILL_THREAD": _KILL_THREAD,
    "SCMP_ACT_KILL_PROCESS": _KILL_PROCESS,
}
_FLAGS = ("SECCOMP_FILTER_FLAG_TSYNC",)
_NO_LISTENER = ("SCMP_ACT_TRACE", "SCMP_ACT_NOTIFY")
_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
}
_PROFILE_KEYS = frozenset(
    ("defaultAction", "defaultErrnoRet", "architectures", "archMap", "flags", "syscalls", "comment")
)
_SYSCALL_KEYS = frozenset(
    ("names", "name", "action", "errnoRet", "args", "includes", "excludes", "comment")
)
_ALTERNATIVES_MAX = 256  # of one entry; the kernel takes 4096 instructions in all

Object = Mapping[str, object]


def parse(
    source: str | bytes | Object, *, machine: str | None, kernel: tuple[int, int] | None
) -> tuple[dict[str, tuple[Rule, ...]], int]:
    """Return (rules by call, default action) of a profile. Raises ConfigError."""
    if isinstance(source, (str, bytes)):
        try:
            source = cast("Object", json.loads(source))
        except ValueError as err:
            raise ConfigError(f"seccomp profile: not JSON: {err}") from err
    profile = _object(source, "profile", _PROFILE_KEYS)
    machine = machine or os.uname().machine
    kernel = kernel or _version(os.uname().release, "kernel release")
    _check_architectures(profile, machine)
    flags = [name for name in _list(profile, "flags", "profile") if name not in _FLAGS]
    if flags:
        raise ConfigError(f"seccomp profile: flags not supported: {_show(flags)}")
    if "defaultAction" not in profile:
        raise ConfigError("seccomp profile: defaultAction is missing")
    default = _action(profile["defaultAction"], profile.get("defaultErrnoRet"), "defaultAction")

    conditional: dict[str, list[Rule]] = {}
    always: dict[str, int] = {}
    for number, item in enumerate(_list(profile, "syscalls", "profile")):
        where = f"syscalls[{number}]"
        entry = _object(item, where, _SYSCALL_KEYS)
        if not _applies(entry, machine, kernel, where):
            continue
        if "action" not in entry:
            raise ConfigError(f"seccomp profile: {where}: action is missing")
        action = _action(entry["action"], entry.get("errnoRet"), where)
        alternatives = _alternatives(_list(entry, "args", where), where)
        for name in _names(entry, where):
            if name not in TIER_OF:
                if name not in FOREIGN_NAMES and action not in (ALLOW, LOG):
                    # Unknown and allowed is harmless, it stays refused; unknown and refused
                    # would be a refusal that never happens.
                    raise ConfigError(
                        f"seccomp profile: {where}: unknown system call {_show(name)}"
                    )
            elif alternatives == [()]:
                if always.setdefault(name, action) != action:
                    raise ConfigError(f"seccomp profile: {where}: {_show(name)} has two actions")
            else:
                conditional.setdefault(name, []).extend((action, tests) for tests in alternatives)
    return _merge(conditional, always, default), EPERM if default in (ALLOW, LOG) else default


def _merge(
    conditional: dict[str, list[Rule]], always: dict[str, int], default: int
) -> dict[str, tuple[Rule, ...]]:
    open_by_default = default in (ALLOW, LOG)
    entries: dict[str, tuple[Rule, ...]] = {}
    for name in TIER_OF if open_by_default else {*conditional, *always}:
        otherwise = always.get(name, default)
        # Where two rules hold the stricter one wins: SECCOMP_RET_* are ordered as signed numbers.
        rules = sorted(set(conditional.get(name, [])), key=lambda rule: (rule[0] ^ 1 << 31, rule))
        while rules and rules[-1][0] == otherwise:
            rules.pop()
        if name in always or open_by_default:
            rules.append((otherwise, ()))
        if rules:
            entries[name] = tuple(rules)
    return entries


def _check_architectures(profile: Object, machine: str) -> None:
    if not isinstance(machine, str) or machine not in _ARCHITECTURES:
        raise ConfigError(f"seccomp profile: machine {machine!r} is not supported")
    native = _ARCHITECTURES[machine][0]
    listed = [str(name) for name in _list(profile, "architectures", "profile")]
    for number, item in enumerate(_list(profile, "archMap", "profile")):
        keys = frozenset(("architecture", "subArchitectures"))
        listed.append(str(_object(item, f"archMap[{number}]", keys).get("architecture")))
    if listed and native not in listed:
        raise ConfigError(f"seccomp profile: it is not for {native}, only for {', '.join(listed)}")


def _applies(entry: Object, machine: str, kernel: tuple[int, int], where: str) -> bool:
    keys = frozenset(("caps", "arches", "minKernel"))
    includes = _object(entry.get("includes") or {}, f"{where}.includes", keys)
    excludes = _object(entry.get("excludes") or {}, f"{where}.excludes", keys)
    if _list(includes, "caps", where):
        return False  # the guest has no capability
    arches = _list(includes, "arches", where)
    own = _ARCHITECTURES[machine]
    if arches and not any(name in own for name in arches):
        return False
    if any(name in own for name in _list(excludes, "arches", where)):
        return False
    if "minKernel" in includes and kernel < _version(includes["minKernel"], where):
        return False
    return not ("minKernel" in excludes and kernel >= _version(excludes["minKernel"], where))


def _action(value: object, number: object, where: str) -> int:
    if value in _NO_LISTENER:
        raise ConfigError(
            f"seccomp profile: {where}: {_show(value)} needs a listener, nsbox has none"
        )
    if not isinstance(value, str) or value not in _ACTIONS:
        raise ConfigError(f"seccomp profile: {where}: unknown action {_show(value)}")
    action = _ACTIONS[value]
    if action != ERRNO:
        if number is not None:
            raise ConfigError(f"seccomp profile: {where}: errnoRet does not go with {value}")
        return action
    if number is None:
        return EPERM
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number < 4096:
        raise ConfigError(f"seccomp profile: {where}: errno must be 1 to 4095, got {_show(number)}")
    return ERRNO | number


def _names(entry: Object, where: str) -> list[str]:
    names = list(_list(entry, "names", where))
    if "name" in entry:
        names.append(entry["name"])
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"seccomp profile: {where}: names must be a list of strings")
    return cast("list[str]", names)


def _alternatives(args: list[object], where: str) -> list[tuple[Test, ...]]:
    """Return the ways in which all of `args` can hold, each a tuple of masked tests."""
    columns: dict[int, list[Test]] = {}
    for number, item in enumerate(args):
        place = f"{where}.args[{number}]"
        arg = _object(item, place, frozenset(("index", "value", "valueTwo", "op")))
        index = _number(arg.get("index"), f"{place}.index", 5)
        if index in columns:
            # runc would join them with "or", libseccomp refuses: too easy to get wrong.
            raise ConfigError(
                f"seccomp profile: {place}: argument {index} is compared twice; use two entries"
            )
        columns[index] = [(index, mask, value) for mask, value in _masked(arg, place)]
    rows = 1
    for column in columns.values():
        rows *= len(column)
    if rows > _ALTERNATIVES_MAX:
        raise ConfigError(f"seccomp profile: {where}: needs {rows} comparisons, too many")
    return [tuple(sorted(row)) for row in itertools.product(*columns.values())]


def _masked(arg: Object, where: str) -> list[tuple[int, int]]:
    """Return (mask, value) pairs of which one holds exactly when the comparison does."""
    value = _low_half(arg.get("value"), f"{where}.value")
    if arg.get("op") == "SCMP_CMP_MASKED_EQ":
        wanted = _low_half(arg.get("valueTwo", 0), f"{where}.valueTwo")
        if wanted & ~value or not value:
            raise ConfigError(f"seccomp profile: {where}: the mask makes it hold never or always")
        return [(value, wanted)]
    spans = {
        "SCMP_CMP_EQ": [(value, value)],
        "SCMP_CMP_NE": [(0, value - 1), (value + 1, INT)],
        "SCMP_CMP_LT": [(0, value - 1)],
        "SCMP_CMP_LE": [(0, value)],
        "SCMP_CMP_GE": [(value, INT)],
        "SCMP_CMP_GT": [(value + 1, INT)],
    }
    op = arg.get("op")
    if not isinstance(op, str) or op not in spans:
        raise ConfigError(f"seccomp profile: {where}: unknown operator {_show(op)}")
    blocks = [block for low, high in spans[op] for block in _blocks(low, high)]
    if not blocks or blocks == [(0, 0)]:
        raise ConfigError(f"seccomp profile: {where}: {op} {value} holds never or always")
    return blocks


def _blocks(low: int, high: int) -> list[tuple[int, int]]:
    """Return the aligned powers of two that make up low..high, as (mask, value)."""
    blocks = []
    while low <= high:
        size = low & -low or 1 << 32
        while low + size - 1 > high:
            size >>= 1
        blocks.append((INT & ~(size - 1), low))
        low += size
    return blocks


def _low_half(value: object, where: str) -> int:
    """Return a 64-bit value's low half; its high half must be the sign extension or zero."""
    number = _number(value, where, (1 << 64) - 1)
    if number >> 32 not in (0, INT):
        raise ConfigError(f"seccomp profile: {where}: {number:#x} does not fit 32 bits")
    return number & INT


def _number(value: object, where: str, maximum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
        raise ConfigError(f"seccomp profile: {where}: must be 0 to {maximum}, got {_show(value)}")
    return value


def _version(value: object, where: str) -> tuple[int, int]:
    try:
        major, minor = str(value).split("-")[0].split(".")[:2]
        return int(major), int(minor)
    except ValueError as err:
        raise ConfigError(f"seccomp profile: {where}: {_show(value)} is no kernel version") from err


def _show(value: object) -> str:
    """Return what a message says of a value, which may be of any size and depth."""
    try:
        text = repr(value)
    except ValueError:  # an int of too many digits (sys.set_int_max_str_digits)
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _object(value: object, where: str, keys: frozenset[str]) -> Object:
    if not isinstance(value, Mapping):
        raise ConfigError(f"seccomp profile: {where} must be an object, got {_show(value)}")
    if unknown := sorted(str(key) for key in value if key not in keys):
        raise ConfigError(f"seccomp profile: {where}: unknown keys {', '.join(unknown)}")
    return cast("Object", value)


def _list(parent: Object, key: str, where: str) -> list[object]:
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"seccomp profile: {where}.{key} must be a list, got {_show(value)}")
    return list(value)
