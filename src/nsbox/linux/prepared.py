# SPDX-License-Identifier: Apache-2.0
"""Calls prepared before a clone and made after it.

A child of a large process pays for every page it writes to, and Python writes to every object it
looks at (reference counts). So whatever can be is done before: names encoded, flags combined,
functions looked up, structures filled in. What is left for the child is one loop over a list.
Measured on kernel 6.18: the same 60 calls through the functions of `calls` touched 430 pages, this
way 170.
"""

from __future__ import annotations

from ctypes import addressof, c_char, create_string_buffer
from itertools import repeat

from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.binding import SYSCALL, encode, encode_optional, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    Entry = tuple[str, Callable[..., Any], tuple[Any, ...], str, str | None]
    """Step, function, its arguments, and for errors: system call and path."""

_NAME_MAX = 256


class Name:
    """A placeholder for an environment's name in calls that are prepared once for many.

    Attributes:
        whole: Address of the name with what all begin with.
        end: Address of the rest.
    """

    __slots__ = ("_end", "end", "whole")

    def __init__(self, beginning: str) -> None:
        raw = encode(beginning)
        buffer = create_string_buffer(raw, _NAME_MAX)
        self._end = (c_char * (_NAME_MAX - len(raw))).from_buffer(buffer, len(raw))
        self.whole, self.end = addressof(buffer), addressof(self._end)

    def fill_in(self, end: str) -> None:
        """Have calls that are made from now on, here or in a clone, be about this one."""
        self._end.value = encode(end)


class Program:
    """A list of calls, each belonging to a named step."""

    __slots__ = ("entries", "step")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.step = ""

    def call(self, function: Callable[..., Any], *arguments: object) -> None:
        """Add a Python function that raises on failure."""
        self.entries.append((self.step, function, arguments, "", None))

    def _foreign(self, name: str, path: str | None, *arguments: object) -> None:
        function = calls.FOREIGN[name]
        self.entries.append((self.step, function, arguments, name, path))

    def mount(
        self, source: str | None, target: str, fstype: str | None, flags: int, data: str = ""
    ) -> None:
        """mount(2)."""
        words = (encode_optional(source), encode(target), encode_optional(fstype))
        self._foreign("mount", target, *words, flags, encode(data) if data else None)

    def bind_named(self, name: Name, target: str) -> None:
        """mount(2), MS_BIND of what has the end of `name` in the working directory."""
        self._foreign("mount_from", target, name.end, encode(target), None, c.MS_BIND, None)

    def umount2(self, target: str, flags: int) -> None:
        """umount2(2)."""
        self._foreign("umount2", target, encode(target), flags)

    def pivot_root(self, new_root: str, put_old: str) -> None:
        """pivot_root(2)."""
        number = SYSCALL["pivot_root"]
        self._foreign("pivot_root", new_root, number, encode(new_root), encode(put_old))

    def expect_root(self) -> None:
        """getcwd(2) with room for ``/`` alone: ERANGE when the working directory is another.

        One outside the root reads as "(unreachable)" (CVE-2024-21626).
        """
        self._foreign("getcwd", "/", SYSCALL["getcwd"], *calls.ROOT_ONLY)

    def close_range(self, first: int, last: int) -> None:
        """close_range(2)."""
        self._foreign("close_range", None, SYSCALL["close_range"], first, last, 0)

    def unshare(self, flags: int) -> None:
        """unshare(2)."""
        self._foreign("unshare", None, flags)

    def sethostname(self, name: str) -> None:
        """sethostname(2)."""
        raw = encode(name)
        self._foreign("sethostname", None, raw, len(raw))

    def prctl(self, option: int, argument: int, argument2: int = 0) -> None:
        """prctl(2), for options that give nothing back."""
        self._foreign("prctl", None, option, argument, argument2, 0, 0)

    def set_name(self, name: Name) -> None:
        """prctl(2) PR_SET_NAME: up to 15 bytes."""
        self._foreign("prctl_pointer", None, c.PR_SET_NAME, name.whole, 0, 0, 0)

    def drop_bounding_set(self, capabilities: Sequence[int]) -> None:
        """prctl(2) PR_CAPBSET_DROP, for each of them."""
        words = [repeat(c.PR_CAPBSET_DROP), capabilities, *[repeat(0)] * 3]
        # A loop in C, which each clone goes through in its own copy; below 0: one failed.
        calls_of_all = map(calls.FOREIGN["prctl"], *words)
        self.entries.append((self.step, sum, (calls_of_all,), "prctl", None))

    def capset_empty(self) -> None:
        """capset(2) with three empty sets, after PR_CAP_AMBIENT_CLEAR_ALL."""
        self.prctl(c.PR_CAP_AMBIENT, c.PR_CAP_AMBIENT_CLEAR_ALL)
        self._foreign("capset", None, *calls.NO_CAPABILITIES)

    def join_session_keyring(self) -> None:
        """keyctl(2) KEYCTL_JOIN_SESSION_KEYRING: a new one without a name."""
        number = SYSCALL["keyctl"]
        self._foreign("keyctl", None, number, c.KEYCTL_JOIN_SESSION_KEYRING, None)

    def landlock_restrict_self(self, ruleset: int) -> None:
        """landlock_restrict_self(2): holds for the process and its children."""
        number = SYSCALL["landlock_restrict_self"]
        self._foreign("landlock_restrict_self", None, number, ruleset, 0)

    def set_filter(self, program: bytes) -> None:
        """seccomp(2) SECCOMP_SET_MODE_FILTER; ValueError as `calls.filter_argument`."""
        argument = calls.filter_argument(program)
        number = SYSCALL["seccomp"]
        self._foreign("seccomp", None, number, c.SECCOMP_SET_MODE_FILTER, 0, argument)


def run(entries: list[Entry], at: list[str]) -> None:
    """Make the calls in order; `at[0]` is the step of the one being made.

    Raises:
        SyscallError: One failed; those after it were not made.
    """
    for step, function, arguments, name, path in entries:
        at[0] = step
        result = function(*arguments)
        if name and result < 0:
            raise failure(name, path)
