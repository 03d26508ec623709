# SPDX-License-Identifier: Apache-2.0
"""Drop all privileges irrevocably. The only module that imports python-prctl.

python-prctl is GPL-3.0-or-later (see README, Licence); it has the names of the securebits, and sets
that of a process. A clone makes calls that were prepared: one function of the module touches eight
more pages of it, and dropping the bounding set by one eighteen.
"""

from __future__ import annotations

import os
import resource

import prctl

from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from nsbox.linux.prepared import Program

# capabilities(7), securebits: with these locked no set-user-ID program, no uid change and no
# ambient set can ever bring a capability back.
_SECUREBITS = (
    prctl.SECBIT_NOROOT
    | prctl.SECBIT_NOROOT_LOCKED
    | prctl.SECBIT_NO_SETUID_FIXUP
    | prctl.SECBIT_NO_SETUID_FIXUP_LOCKED
    | prctl.SECBIT_KEEP_CAPS_LOCKED
    | 1 << 6  # SECBIT_NO_CAP_AMBIENT_RAISE and its lock (linux/securebits.h, Linux 4.3)
    | 1 << 7
)


def _last_capability() -> int:
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


_PR_SET_SECUREBITS = 28  # linux/prctl.h, Linux 2.6.26

# Read where the host's /proc is still there: python-prctl may know fewer than the kernel has.
_CAPABILITIES = tuple(range(_last_capability() + 1))


def become(program: Program, user_id: int, *, drop_groups: bool) -> None:
    """Prepare: take `user_id` as user and group id, and no supplementary group.

    `drop_groups` is False where the kernel forbids setgroups(2): in a user namespace made by an
    ordinary user (user_namespaces(7)), whose groups then remain.
    """
    if drop_groups:
        program.call(os.setgroups, ())
    program.call(os.setresgid, user_id, user_id, user_id)
    program.call(os.setresuid, user_id, user_id, user_id)


def set_rlimits(program: Program, limits: Mapping[str, int]) -> None:
    """Prepare: set hard and soft limits; `limits` maps names such as ``"nofile"`` to values."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}")
        program.call(resource.setrlimit, kind, (value, value))


def drop_all(program: Program) -> None:
    """Prepare: lock the securebits, empty all five capability sets and set no_new_privs."""
    # Not through python-prctl, which refuses the ambient bits: it does not know them.
    program.prctl(_PR_SET_SECUREBITS, _SECUREBITS)
    program.drop_bounding_set(_CAPABILITIES)
    program.capset_empty()
    program.prctl(c.PR_SET_NO_NEW_PRIVS, 1)


def shield(program: Program) -> None:
    """Prepare: clear the dumpable flag, set the parent-death signal, make a session keyring."""
    # Not dumpable: no ptrace, no /proc/PID/mem, fd or environ for the commands, which share its
    # uid (prctl(2), PR_SET_DUMPABLE). The signal is a second belt to the lifeline.
    program.prctl(c.PR_SET_DUMPABLE, 0)
    program.prctl(c.PR_SET_PDEATHSIG, c.SIGKILL)
    # Without a session keyring of its own it would share the caller's (keyrings(7)).
    program.join_session_keyring()


def set_name(name: str) -> None:
    """Set the name that ps and /proc/PID/comm show, up to 15 bytes."""
    prctl.set_name(name)
