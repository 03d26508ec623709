# SPDX-License-Identifier: Apache-2.0
"""Landlock scopes: abstract Unix sockets and signals do not leave the environment.

Abstract sockets belong to a network namespace and signals to a pid namespace, so this repeats what
those do, and is all there is between an environment in the host's network and the abstract
sockets of the host's services (CVE-2020-15257 was one of those).
"""

from __future__ import annotations

from nsbox.linux import landlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.linux.prepared import Program

_SCOPES = landlock.SCOPE_ABSTRACT_UNIX_SOCKET | landlock.SCOPE_SIGNAL
_ABI_WITH_SCOPES = 6  # Linux 6.12
MISSING = "this kernel has no Landlock scopes (Linux 6.12)"


def is_available() -> bool:
    """Whether the kernel has Landlock's scopes (Linux 6.12)."""
    return landlock.abi() >= _ABI_WITH_SCOPES


def make_ruleset() -> int:
    """Return the descriptor of a ruleset for `restrict`; all environments can share it.

    Raises:
        OSError: The kernel refuses it.
    """
    return landlock.create_ruleset(_SCOPES)


def restrict(program: Program, ruleset: int) -> None:
    """Prepare: confine the process and all that it will start; needs no_new_privs."""
    program.landlock_restrict_self(ruleset)
    program.close_range(ruleset, ruleset)
