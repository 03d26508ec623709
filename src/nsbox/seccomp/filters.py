# SPDX-License-Identifier: Apache-2.0
"""Seccomp filters: made on the host side, loaded in the environment.

`load` is all the launcher and the environment ever use, so this module imports nothing heavy and
never libseccomp. The host gets its bytes from `filter_for` and hands them down.
"""

from __future__ import annotations

from nsbox.linux import calls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.seccomp.policy import SeccompPolicy


def load(program: bytes) -> None:
    """Filter the calling process from now on with `program`, a BPF program (sock_filter array).

    Needs no_new_privs. It is the last step before execve: the filter refuses what set-up needs.

    Raises:
        SyscallError: seccomp(2) refused it.
    """
    calls.seccomp_set_filter(program)


def filter_for(policy: SeccompPolicy) -> bytes:
    """Return the program of `policy`: from memory, from the disk cache, or compiled in a child.

    Host side only.

    Raises:
        UnsupportedHostError: libseccomp is missing, or the machine is not supported.
    """
    # Imported late: subprocess and hashlib cost the launcher 30 ms, and it never comes here.
    from nsbox.seccomp import cache

    return cache.filter_for(policy)


def compile_policy(policy: SeccompPolicy) -> bytes:
    """Return the program of `policy`, compiled in this very process, which loads libseccomp.

    Raises:
        UnsupportedHostError: libseccomp is missing, or the machine is not supported.
    """
    from nsbox.seccomp import compiler

    return compiler.compile_policy(policy)
