# SPDX-License-Identifier: Apache-2.0
"""A `SeccompPolicy` compiled to a BPF program.

libseccomp (pyseccomp) knows the system call numbers. The program is laid out here, because loading
a filter costs by the instruction (the kernel runs it once for every call number to fill its bitmap
of calls that are always allowed), and because the first rule that holds decides, with an errno of
its own: libseccomp knows no order of rules, and one "else" for all calls.

1. wrong architecture, or the x32 bit: KILL_PROCESS. Always first: numbers mean nothing before it.
2. a binary search over *ranges* of numbers that are decided alike (about 100 for 470 numbers).
3. a return, or the comparisons of that call's arguments; what is alike is there once.

The result is not trusted: `verify` runs it, in a small interpreter, against the policy's own
`decide` for every number and for arguments around every value that is compared.

Importing pyseccomp starts subprocesses (ctypes' quick_decoder), so it happens in a child process
that does nothing else: see `cache`.
"""

from __future__ import annotations

import itertools
import struct
import sys
from collections import defaultdict
from types import ModuleType
from typing import TYPE_CHECKING

from nsbox.errors import UnsupportedHostError
from nsbox.seccomp import profiles
from nsbox.seccomp.policy import SeccompPolicy, action_name
from nsbox.seccomp.profiles import ENOSYS, INT, KILL_PROCESS, Rule, Test

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

AUDIT_ARCH_X86_64 = 0xC000003E  # linux/audit.h
AUDIT_ARCH_AARCH64 = 0xC00000B7
X32_BIT = 0x40000000  # asm/unistd.h: __X32_SYSCALL_BIT
EXIT_UNSUPPORTED = 3
HINT = "Install it with `apt install libseccomp2`, and pyseccomp with `pip install pyseccomp`"

# linux/bpf_common.h, classic BPF: (code, jump if true, jump if false, constant).
Instruction = tuple[int, int, int, int]
_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_NUMBER, _ARCH, _ARGS = 0, 4, 16  # offsets in struct seccomp_data, linux/seccomp.h
_INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS
_REACH = 256  # conditional jumps skip up to 255 instructions
_REUSE_WITHIN = 190  # so that those who reach it late need no jump in between

Leaf = tuple[Rule, ...]
"""The rules of a number, the last of which always holds."""
Word = tuple[int, int]
"""(offset in struct seccomp_data, mask): what a comparison wants to be loaded."""


def compile_policy(policy: SeccompPolicy) -> bytes:
    """Return the program as an array of struct sock_filter, 8 bytes each.

    Raises:
        UnsupportedHostError: no libseccomp here, a machine that is not supported, or a program
            that does not do what the policy says.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError) as err:  # RuntimeError: no libseccomp.so
        raise UnsupportedHostError("seccomp", f"libseccomp cannot be loaded: {err}", HINT) from err
    arch = pyseccomp.system_arch()
    if arch not in (AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64):
        raise UnsupportedHostError(
            "seccomp", f"no filter for architecture {arch:#x}", "Use x86-64 or aarch64"
        )
    numbers = known_numbers(pyseccomp, arch)
    program = _layout(_leaves(policy, numbers), arch)
    if len(program) > _INSTRUCTIONS_MAX:
        raise UnsupportedHostError(
            "seccomp", f"the filter has {len(program)} instructions", "Use a smaller policy"
        )
    verify(program, policy, numbers, arch)
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def known_numbers(library: ModuleType, arch: int) -> dict[str, int]:
    """Return the number of every call that nsbox knows and `arch` has."""
    numbers: dict[str, int] = {}
    for name in profiles.TIER_OF:
        number = library.resolve_syscall(library.Arch.NATIVE, name)
        if number >= 0:  # negative: libseccomp's way to say "not on this architecture"
            numbers[name] = number
    numbers.update(profiles.NEW_NUMBERS)
    if arch == AUDIT_ARCH_X86_64:
        numbers.update(profiles.X86_64_NUMBERS)
    return numbers


def _leaves(policy: SeccompPolicy, numbers: Mapping[str, int]) -> list[Leaf]:
    """Return the rules for each number, from 0 to the first one that is too new."""
    entries = dict(policy.rules)
    otherwise = ((policy.default_action, ()),)
    leaves: list[Leaf] = [((ENOSYS, ()),)] * (max(numbers.values()) + 2)
    for name, number in numbers.items():
        rules = entries.get(name, ())
        leaves[number] = rules if rules and not rules[-1][1] else (*rules, *otherwise)
    return leaves


class _Emitter:
    """Lays out a program from its end, where every instruction already knows its successors.

    Loading a filter costs by the instruction (each is translated to eBPF and then to machine
    code), so what is there already and can be reached from the new place is not written again.
    """

    def __init__(self) -> None:
        self._reversed: list[Instruction] = []
        self._found: dict[tuple[int, int, tuple[int, ...]], int] = {}

    def add(self, code: int, constant: int, *targets: int) -> int:
        """Return the place, counted from the end, of an instruction that goes on at `targets`."""
        key = code, constant, targets
        place = self._found.get(key, -1)
        if place < 0 or len(self._reversed) - place > _REUSE_WITHIN:
            near = self._bring_near(targets, _REACH if len(targets) > 1 else 1)
            offsets = [len(self._reversed) - target - 1 for target in near]
            if_true, if_false = offsets if len(offsets) > 1 else (0, 0)
            place = self._found[key] = self._append((code, if_true, if_false, constant))
        return place

    def program(self) -> list[Instruction]:
        """Return what was laid out; it begins with what was added last."""
        return self._reversed[::-1]

    def _bring_near(self, targets: Sequence[int], reach: int) -> list[int]:
        """Return places that lead to `targets`, none further away than `reach` instructions."""
        near = list(targets)
        while far := [target for target in near if len(self._reversed) - target > reach]:
            jump = self._append((_JUMP, 0, 0, len(self._reversed) - far[0] - 1))
            near = [jump if target == far[0] else target for target in near]
        return near

    def _append(self, instruction: Instruction) -> int:
        self._reversed.append(instruction)
        return len(self._reversed) - 1


def _layout(leaves: Sequence[Leaf], arch: int) -> list[Instruction]:
    """Return the whole program. The last leaf stands for every number above, too."""
    emitter = _Emitter()
    starts = [n for n in range(len(leaves)) if n == 0 or leaves[n] != leaves[n - 1]]
    place = _search(emitter, [(start, leaves[start]) for start in starts])
    kill = (_RETURN, KILL_PROCESS)
    if arch == AUDIT_ARCH_X86_64:
        place = emitter.add(_ANY_BIT, X32_BIT, emitter.add(*kill), place)
    place = emitter.add(_LOAD, _NUMBER, place)
    place = emitter.add(_EQUAL, arch, place, emitter.add(*kill))
    emitter.add(_LOAD, _ARCH, place)
    return emitter.program()


def _search(emitter: _Emitter, ranges: Sequence[tuple[int, Leaf]]) -> int:
    """Return the place of a binary search over `ranges`, each with its first number."""
    if len(ranges) == 1:
        return _place_leaf(emitter, ranges[0][1])
    middle = len(ranges) // 2
    above, below = _search(emitter, ranges[middle:]), _search(emitter, ranges[:middle])
    return emitter.add(_AT_LEAST, ranges[middle][0], above, below)


def _place_leaf(emitter: _Emitter, leaf: Leaf) -> int:
    """Return the place of the comparisons of `leaf`, the first of which that holds decides."""

    def enter(held: Word | None) -> int:
        """Return the place to go on at where `held` is what was loaded last."""
        if wanted is None or held == wanted:
            return place
        word, mask = wanted
        masked = place if mask == INT else emitter.add(_AND, mask, place)
        return masked if held == (word, INT) else emitter.add(_LOAD, word, masked)

    place, wanted = emitter.add(_RETURN, leaf[-1][0]), None
    for action, tests in reversed(leaf[:-1]):
        others, others_want = place, wanted
        place, wanted = emitter.add(_RETURN, action), None
        for word, value in reversed(_words(tests)):
            holds = enter(word)
            place, wanted = others, others_want
            fails = enter(word)
            place, wanted = emitter.add(_EQUAL, value, holds, fails), word
    return enter(None)


def _words(tests: Sequence[Test]) -> list[tuple[Word, int]]:
    """Return what to load and what it must equal, for each half of each argument to compare."""
    return [
        ((_ARGS + 8 * index + 4 * half, mask >> 32 * half & INT), value >> 32 * half & INT)
        for index, mask, value in tests
        for half in (0, 1)  # both machines are little-endian
        if mask >> 32 * half & INT
    ]


def _next(instruction: Instruction, here: int, loaded: int) -> int:
    code, if_true, if_false, constant = instruction
    if code == _JUMP:
        return here + 1 + constant
    holds = {
        _EQUAL: loaded == constant,
        _AT_LEAST: loaded >= constant,
        _ANY_BIT: bool(loaded & constant),
    }
    return here + 1 + (if_true if holds.get(code, True) else if_false)


def run_program(
    program: Sequence[Instruction], arch: int, number: int, args: Sequence[int] = (0,) * 6
) -> int:
    """Return the action `program` takes: an interpreter for what this module makes."""
    place, loaded = 0, 0
    while True:
        code, _, _, constant = program[place]
        if code == _RETURN:
            return constant
        if code == _AND:
            loaded &= constant
        elif code == _LOAD and constant >= _ARGS:
            index, high = divmod(constant - _ARGS, 8)
            loaded = args[index] >> (32 if high else 0) & INT
        elif code == _LOAD:
            loaded = number if constant == _NUMBER else arch
        place = _next(program[place], place, loaded)


def verify(
    program: Sequence[Instruction], policy: SeccompPolicy, numbers: Mapping[str, int], arch: int
) -> None:
    """Compare `program` with what `policy` says.

    Raises:
        UnsupportedHostError: they differ: a mistake of this module.
    """

    def expect(arch: int, number: int, args: Sequence[int], action: int) -> None:
        found = run_program(program, arch, number, args)
        if found != action:
            raise UnsupportedHostError(
                "seccomp",
                f"the filter made for {policy.name!r} would answer {action_name(found)} instead of "
                f"{action_name(action)} to call {number} with {[hex(a) for a in args]}",
                "Simplify the policy's argument rules",
            )

    zeros = (0,) * 6
    names = {number: name for name, number in numbers.items()}
    for number in (*range(max(names) + 64), 0x3FFFFFFF, 0x80000000):
        expect(arch ^ 0x80000000, number, zeros, KILL_PROCESS)
        if arch == AUDIT_ARCH_X86_64:
            expect(arch, number | X32_BIT, zeros, KILL_PROCESS)
        name = names.get(number)
        expect(arch, number, zeros, policy.decide(name, zeros) if name else ENOSYS)
    for call, rules in policy.rules:
        if call in numbers:
            for args in _probes(rules):
                expect(arch, numbers[call], args, policy.decide(call, args))


def _probes(rules: Sequence[Rule]) -> Iterator[tuple[int, ...]]:
    """Return arguments on and around every compared value, with and without high halves."""
    values: dict[int, set[int]] = defaultdict(lambda: {0, INT})
    for _, tests in rules:
        for index, mask, value in tests:
            lowest = mask & -mask
            values[index] |= {value, value ^ lowest, value | ~mask & INT, value ^ mask}
    columns = [
        {value | high for value in values[index] for high in (0, 1 << 32, INT << 32)}
        if index in values
        else {0}
        for index in range(6)
    ]
    # A policy with very many alternatives is probed only so far; each value still comes up.
    return itertools.islice(itertools.product(*columns), 20_000)


def main() -> None:
    """Compile the policy on stdin to stdout; the entry point of the child process."""
    try:
        program = compile_policy(SeccompPolicy.from_json(sys.stdin.buffer.read()))
    except UnsupportedHostError as err:
        sys.stderr.write(f"{err.reason}\n{err.hint}\n")
        raise SystemExit(EXIT_UNSUPPORTED) from None
    sys.stdout.buffer.write(program)
