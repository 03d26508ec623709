# SPDX-License-Identifier: Apache-2.0
"""A further belt: no abstract Unix socket and no process outside the environment is reached.

Abstract sockets belong to a network namespace and signals to a pid namespace, so this repeats what
those do, and is all there is between an environment in the host's network and the abstract
sockets of the host's services (CVE-2020-15257 was one of those).
"""

from __future__ import annotations

import os

from nsbox.linux import landlock

_SCOPES = landlock.SCOPE_ABSTRACT_UNIX_SOCKET | landlock.SCOPE_SIGNAL
_ABI_WITH_SCOPES = 6  # Linux 6.12
MISSING = "this kernel has no Landlock scopes (Linux 6.12)"


def is_available() -> bool:
    """Whether the kernel has scopes."""
    return landlock.abi() >= _ABI_WITH_SCOPES


def restrict() -> None:
    """Confine this process and all that it will start; needs no_new_privs."""
    ruleset = landlock.create_ruleset(_SCOPES)
    try:
        landlock.restrict_self(ruleset)
    finally:
        os.close(ruleset)
