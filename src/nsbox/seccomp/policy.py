# SPDX-License-Identifier: Apache-2.0
"""`SeccompPolicy`: which system calls a guest may make, as a value.

A policy is an allow-list. What it does not name is refused: with EPERM, or with the errno that
programs are prepared for (`profiles.REFUSALS`), and with ENOSYS for numbers nsbox does not know (so
that a C library tries the older call). A foreign ABI (i386, x32) kills the process whatever the
policy says. Arguments that are ints are compared under 32-bit masks only.

Pure: no kernel, no libseccomp. `nsbox.seccomp.filters` turns a policy into a program.
"""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nsbox.errors import ConfigError
from nsbox.seccomp import arguments, oci, profiles
from nsbox.seccomp.profiles import ALLOW, DANGEROUS_NAMES, EPERM, INT, LOG, TIER_OF, Rule, Test

Entries = dict[str, tuple[Rule, ...]]

_CLONE_NAMESPACES = arguments.ARGUMENT_RULES["clone"][0][1][0][1]
_ALLOWING = (ALLOW, LOG)


@dataclass(frozen=True, slots=True)
class SeccompPolicy:
    """An immutable seccomp policy. Make one with `strict`, `default`, `docker` or `from_oci`.

    Two policies are equal when they decide every call alike; the name does not count.
    """

    name: str = field(compare=False)
    """For people: the base and what was changed."""
    rules: tuple[tuple[str, tuple[Rule, ...]], ...]
    """(call, rules), sorted by call. The first rule whose tests all hold decides."""
    default_action: int = EPERM
    """SECCOMP_RET_* for known calls that no rule decides."""
    dangerous: frozenset[str] = frozenset()
    """Calls that open a way out and were allowed by name."""

    def __post_init__(self) -> None:
        opened = _dangerous_calls(dict(self.rules))
        for call in sorted(opened - self.dangerous):
            raise ConfigError(
                f"seccomp policy {self.name!r} allows {call!r}, which {_danger(call)}. "
                f"Say allow_dangerous({call!r}) if that is meant"
            )
        object.__setattr__(self, "dangerous", self.dangerous & opened)

    # -- making one ---------------------------------------------------------------------------

    @classmethod
    def strict(cls) -> SeccompPolicy:
        """Return the narrowest profile: 229 calls, enough for CPython, node, gcc and a shell."""
        return cls._profile(profiles.STRICT)

    @classmethod
    def default(cls) -> SeccompPolicy:
        """Return `strict` and what numpy, V8 and database clients want besides: 274 calls."""
        return cls._profile(profiles.DEFAULT)

    @classmethod
    def docker(cls) -> SeccompPolicy:
        """Return Docker's default list without capabilities, 307 calls, compared under masks.

        Some things are stricter than Docker's: i386 and x32 are killed; the ioctls that type into
        a terminal, leases and directory notifications (fcntl) are refused, and so is to change
        priorities of PID 1, which is not the guest's here, and limits but by pid 0 (itself).
        """
        return cls._profile(profiles.DOCKER)

    @classmethod
    def named(cls, name: str) -> SeccompPolicy:
        """Return the profile called `name`.

        Raises:
            ConfigError: there is none of that name.
        """
        if name not in profiles.TIERS:
            raise ConfigError(
                f"seccomp: no profile {name!r}; there are {', '.join(profiles.TIERS)}"
            )
        return cls._profile(name)

    @classmethod
    @functools.cache
    def _profile(cls, tier: str) -> SeccompPolicy:
        allowed = profiles.names_in(tier)
        entries = {call: arguments.rules_in(tier, call) for call in allowed}
        entries |= {call: _refusal(call) for call in profiles.REFUSAL_OF if call not in allowed}
        return cls(name=tier, rules=_sorted(entries))

    @classmethod
    def from_oci(
        cls,
        source: str | bytes | Mapping[str, object],
        *,
        allow_dangerous: Iterable[str] = (),
        machine: str | None = None,
        kernel: tuple[int, int] | None = None,
    ) -> SeccompPolicy:
        """Return the policy of an OCI runtime-spec `linux.seccomp` object or a Docker profile.

        Conditions are judged for a process without capabilities on `machine` and `kernel` (this
        host's by default). Foreign architectures in it are ignored: nsbox kills them always.
        Every comparison is made on the low 32 bits.

        Args:
            source: JSON text, or the parsed object.
            allow_dangerous: Dangerous calls that the profile may allow.
            machine: As `uname -m` says it.
            kernel: (major, minor), for `minKernel`.

        Raises:
            ConfigError: a key, action, operator or value is not understood, or the profile allows
                a dangerous call that `allow_dangerous` does not name.
        """
        dangerous = known_names(allow_dangerous)
        try:
            entries, default_action = oci.parse(source, machine=machine, kernel=kernel)
        except RecursionError as error:
            raise ConfigError("seccomp profile: it is nested too deep") from error
        entries.setdefault("clone3", _refusal("clone3"))
        return cls(
            name="oci",
            rules=_sorted(entries),
            default_action=default_action,
            dangerous=frozenset(dangerous),
        )

    # -- changing one -------------------------------------------------------------------------

    def allow(self, *names: str) -> SeccompPolicy:
        """Return a policy that allows `names` too, under nsbox's rules for their arguments.

        Calls that are allowed already keep their rules, but for those that a profile allows
        less of than these: ptrace in `default`, which is for LeakSanitizer there, is all of it
        then.

        Raises:
            ConfigError: a name is unknown, or the call is dangerous.
        """
        entries = dict(self.rules)
        for call in known_names(names):
            if not _is_allowed(entries, call) or arguments.is_narrowed(call, entries[call]):
                entries[call] = arguments.rules_of(call)
        return self._changed("+", names, entries, self.dangerous)

    def allow_dangerous(self, *names: str) -> SeccompPolicy:
        """Return a policy that allows `names` whatever their arguments.

        This is how a call that opens a way out is allowed, and how an argument rule is lifted.

        Raises:
            ConfigError: a name is unknown.
        """
        entries = dict(self.rules)
        for call in known_names(names):
            entries[call] = ((ALLOW, ()),)
        return self._changed("+!", names, entries, self.dangerous | frozenset(names))

    def deny(self, *names: str) -> SeccompPolicy:
        """Return a policy that refuses `names`.

        Raises:
            ConfigError: a name is unknown.
        """
        entries = dict(self.rules)
        for call in known_names(names):
            entries.pop(call, None)
            if call in profiles.REFUSAL_OF:
                entries[call] = _refusal(call)
        return self._changed("-", names, entries, self.dangerous)

    def without_set_id_bits(self) -> SeccompPolicy:
        """Return a policy under which no file gets the set-user-ID or set-group-ID bit.

        A mode with one of them is EPERM, whatever else is allowed. openat2(2) is ENOSYS and
        io_uring is refused, since no filter sees their modes. Used where there are writable binds.
        """
        entries = dict(self.rules)
        for call, harmless in profiles.SET_ID_RULES.items():
            rules: list[Rule] = []
            for action, tests in entries.get(call, ((self.default_action, ()),)):
                if action in _ALLOWING:
                    rules += [(action, both) for more in harmless for both in _both(tests, more)]
                else:
                    rules.append((action, tests))
            is_whole = rules and not rules[-1][1]
            entries[call] = tuple(rules) if is_whole else (*rules, (EPERM, ()))
        for call, action in profiles.UNSEEN_MODES.items():
            entries[call] = ((action, ()),)
        return self._changed("without ", ["set-id bits"], entries, self.dangerous)

    def _changed(
        self, sign: str, names: Sequence[str], entries: Entries, dangerous: frozenset[str]
    ) -> SeccompPolicy:
        return SeccompPolicy(
            name=self.name + "".join(f" {sign}{name}" for name in names),
            rules=_sorted(entries),
            default_action=self.default_action,
            dangerous=dangerous,
        )

    # -- asking one ---------------------------------------------------------------------------

    @property
    def allowed(self) -> frozenset[str]:
        """The calls that are allowed, always or for some arguments."""
        entries = dict(self.rules)
        return frozenset(call for call in entries if _is_allowed(entries, call))

    def decide(self, call: str, args: Sequence[int] = (0, 0, 0, 0, 0, 0)) -> int:
        """Return the SECCOMP_RET_* action for a known `call` made with the six `args`."""
        for action, tests in dict(self.rules).get(call, ()):
            if all(args[index] & mask == value for index, mask, value in tests):
                return action
        return self.default_action

    def to_json(self) -> str:
        """Return the policy as canonical JSON, which `from_json` reads."""
        return json.dumps(
            {
                "name": self.name,
                "default_action": self.default_action,
                "rules": self.rules,
                "dangerous": sorted(self.dangerous),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> SeccompPolicy:
        """Return the policy that `to_json` wrote. For nsbox's own processes, not for profiles."""
        data = json.loads(text)
        return cls(
            name=data["name"],
            default_action=data["default_action"],
            dangerous=frozenset(data["dangerous"]),
            rules=tuple(
                (
                    call,
                    tuple(
                        (action, tuple((i, m, v) for i, m, v in tests)) for action, tests in rules
                    ),
                )
                for call, rules in data["rules"]
            ),
        )

    def digest(self) -> str:
        """Return 64 hex digits that are the same for policies that decide alike."""
        canonical = json.dumps([self.default_action, self.rules], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def describe(self) -> str:
        """Return an explanation for people: every group of calls, what is allowed, and why."""
        allowed = self.allowed
        lines = [
            f"seccomp policy {self.name!r}: {len(allowed)} calls allowed; other known calls: "
            f"{action_name(self.default_action)}; unknown numbers: errno 38 (ENOSYS); "
            "i386 and x32: the process is killed",
        ]
        for _, group, reason, text in profiles.GROUPS:
            names = text.split()
            inside = [name for name in names if name in allowed]
            outside = [name for name in names if name not in allowed]
            word = "allowed" if not outside else "partly allowed" if inside else "refused"
            lines.append(f"  {group} ({word}): {reason}")
            lines += [f"    + {' '.join(inside)}"] if inside else []
            lines += [f"    - {' '.join(outside)}"] if outside else []
        entries = dict(self.rules)
        for action, reason, text in profiles.REFUSALS:
            names = [name for name in text.split() if entries.get(name) == ((action, ()),)]
            if names:
                lines.append(f"  {action_name(action)}: {reason}")
                lines.append(f"    - {' '.join(names)}")
        lines.append("  by argument (low 32 bits; pointers: all 64):")
        for call, rules in self.rules:
            is_told = call in profiles.REFUSAL_OF and rules == _refusal(call)
            if any(tests for _, tests in rules) or not (rules[-1][0] in _ALLOWING or is_told):
                otherwise = "" if not rules[-1][1] else f", else {action_name(self.default_action)}"
                told = "; ".join(_rule_text(rule) for rule in rules[:8])
                more = f"; and {len(rules) - 8} more" if len(rules) > 8 else ""
                lines.append(f"    {call}: {told}{more}{otherwise}")
        return "\n".join(lines)


def known_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return `names`, all of which are system calls nsbox knows.

    Raises:
        ConfigError: one is not; the message names it and what is spelt nearly so.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError(f"seccomp: must be a list of names of system calls, got {names!r}")
    result = tuple(names)
    for name in result:
        if not isinstance(name, str) or name not in TIER_OF:
            near = difflib.get_close_matches(str(name), TIER_OF, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(f"seccomp: unknown system call {name!r}{hint}")
    return result


def action_name(action: int) -> str:
    """Return a SECCOMP_RET_* action in words."""
    if action & INT & ~0xFFFF == profiles.ERRNO:
        number = action & 0xFFFF
        return f"errno {number} ({errno.errorcode.get(number, 'unknown')})"
    words = {
        profiles.KILL_PROCESS: "kill the process",
        profiles.KILL_THREAD: "kill the thread",
        profiles.TRAP: "SIGSYS",
        LOG: "allow and log",
        ALLOW: "allow",
    }
    return words.get(action, hex(action))


def _rule_text(rule: Rule) -> str:
    action, tests = rule
    told = " and ".join(
        f"arg{index} == {value:#x}" if mask == INT else f"arg{index} & {mask:#x} == {value:#x}"
        for index, mask, value in tests
    )
    return f"{action_name(action)} if {told}" if told else action_name(action)


def _refusal(call: str) -> tuple[Rule, ...]:
    return ((profiles.REFUSAL_OF[call], ()),)


def _sorted(entries: Entries) -> tuple[tuple[str, tuple[Rule, ...]], ...]:
    return tuple(sorted(entries.items()))


def _both(one: tuple[Test, ...], other: tuple[Test, ...]) -> list[tuple[Test, ...]]:
    """Return tests that hold when both do, one for each argument (libseccomp), or none if never."""
    merged = {index: (mask, value) for index, mask, value in one}
    for index, mask, value in other:
        old_mask, old_value = merged.get(index, (0, 0))
        if (value ^ old_value) & mask & old_mask:
            return []
        merged[index] = (old_mask | mask, old_value | value)
    return [tuple((index, mask, value) for index, (mask, value) in sorted(merged.items()))]


def _is_allowed(entries: Entries, call: str) -> bool:
    return any(action in _ALLOWING for action, _ in entries.get(call, ()))


def _dangerous_calls(entries: Entries) -> frozenset[str]:
    opened = {call for call in DANGEROUS_NAMES if _is_allowed(entries, call)}
    for action, tests in entries.get("clone", ()):
        shut = any(
            index == 0 and mask & _CLONE_NAMESPACES == _CLONE_NAMESPACES and not value & mask
            for index, mask, value in tests
        )
        if action in _ALLOWING and not shut:
            opened.add("clone")
    # ptrace alone reaches only the guest's own processes; with a user namespace it also brings
    # CAP_SYS_PTRACE and a filter that can be rewritten from outside the traced process.
    # What LeakSanitizer needs of it cannot write.
    can_trace = _is_allowed(entries, "ptrace") and not arguments.is_narrowed(
        "ptrace", entries["ptrace"]
    )
    if can_trace and opened & {"clone", "clone3", "unshare", "setns"}:
        opened.add("ptrace")
    return frozenset(opened)


def _danger(call: str) -> str:
    if call == "clone":
        return "can then make namespaces: its flags are not restricted"
    if call == "ptrace":
        return "together with new namespaces gives power over processes the filter should hold"
    for _, group, reason, names in profiles.GROUPS:
        if call in names.split():
            return f"is in the group {group!r}: {reason}"
    return "is dangerous"
