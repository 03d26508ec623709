# SPDX-License-Identifier: Apache-2.0
"""What the arguments of allowed system calls may be: for every profile, and by profile.

Pure data, as `nsbox.seccomp.profiles`, which says what calls there are.
"""

from __future__ import annotations

from nsbox.seccomp.profiles import (
    ALLOW,
    DEFAULT,
    DOCKER,
    EINVAL,
    EPERM,
    EPROTONOSUPPORT,
    INT,
    POINTER,
    STRICT,
    Rules,
)


def _when(action: int, index: int, *values: int, mask: int = INT) -> Rules:
    return tuple((action, ((index, mask, value),)) for value in values)


_OTHERWISE: Rules = ((ALLOW, ()),)

_CLONE_NAMESPACES = 0x7E020000  # linux/sched.h: NEW NS CGROUP UTS IPC USER PID NET
# CLONE_NEWTIME (0x80) lies in clone's exit signal (CSIGNAL): only unshare and clone3 read it.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_ALG, _AF_VSOCK = 1, 2, 10, 16, 38, 40
_FAMILIES: Rules = (
    *_when(ALLOW, 0, _AF_UNIX, _AF_INET, _AF_INET6),
    # Interfaces and addresses are read through NETLINK_ROUTE, protocol 0; netfilter, audit and
    # crypto netlink are kernel surface and nothing else. libaudit (su, sshd, cron, useradd) goes
    # on where the kernel has no such protocol, and aborts with any other errno.
    (ALLOW, ((0, INT, _AF_NETLINK), (2, INT, 0))),
    *_when(EPROTONOSUPPORT, 0, _AF_NETLINK),
)
_NO_TERMINAL_INJECTION: Rules = (
    *_when(
        EPERM,
        1,
        0x5412,  # asm-generic/ioctls.h: TIOCSTI, types into the terminal
        0x541C,  # TIOCLINUX, pastes the console's selection
        0x541D,  # TIOCCONS, redirects the console
        0x5423,  # TIOCSETD, loads line disciplines
    ),
    *_OTHERWISE,
)

# linux/fcntl.h. A lease or a delegation on a file of one's own uid makes every other open of it
# wait for /proc/sys/fs/lease-break-time, 45 s, by the host too; dnotify tells what others do in a
# directory. Commands that are not known yet are answered as by a kernel that has none of them.
_F_SETLEASE, _F_NOTIFY, _F_SETDELEG = 1024, 1026, 1040
_NO_LEASES: Rules = (
    *_when(EPERM, 1, _F_SETLEASE, _F_NOTIFY, _F_SETDELEG),
    *_when(ALLOW, 1, 0, mask=INT & ~1023),  # POSIX's, OFD locks, owners and signals
    *_when(ALLOW, 1, 1024, mask=INT & ~15),  # pipe sizes, seals, F_DUPFD_CLOEXEC, hints
    (EINVAL, ()),
)

# PID 1 has the uid of the commands, and so they could slow it down; commands to come inherit that
# of it, for longer than the one that did it lives. Their own pids and thread ids are not known
# when a filter is made: every other pid passes, and is one of the environment's pid namespace.
_NOT_PID_1: Rules = (*_when(EPERM, 0, 1), *_OTHERWISE)
# Not by group or user, which would be PID 1's, too: PRIO_PROCESS 0, IOPRIO_WHO_PROCESS 1.
_PRIORITY: Rules = (*_when(EPERM, 1, 1), *_when(ALLOW, 0, 0))
_IO_PRIORITY: Rules = (*_when(EPERM, 1, 1), *_when(ALLOW, 0, 1))

_PR_SET_MM, _PR_SET_PTRACER = 35, 0x59616D61  # linux/prctl.h
_ADDR_NO_RANDOMIZE, _UNAME26, _PER_LINUX32 = 0x40000, 0x20000, 8  # linux/personality.h

# linux/stat.h: of the types S_IFIFO (0o10000), S_IFREG (0o100000) and 0, which is a regular file as
# well (mknod(2)), none has one of these bits; devices, directories, links and sockets do.
_OTHER_TYPES = 0o060000

ARGUMENT_RULES: dict[str, Rules] = {
    "clone": _when(ALLOW, 0, 0, mask=_CLONE_NAMESPACES),
    "socket": _FAMILIES,
    "socketpair": _FAMILIES,
    "ioctl": _NO_TERMINAL_INJECTION,
    "fcntl": _NO_LEASES,
    # Limits are asked for freely, and set by 0 (itself) alone: those of the process that the
    # invocations of reuse="reset" are forks of could not be raised again.
    "prlimit64": (*_when(ALLOW, 0, 0), *_when(ALLOW, 2, 0, mask=POINTER)),
    "sched_setaffinity": _NOT_PID_1,
    "sched_setattr": _NOT_PID_1,
    "sched_setparam": _NOT_PID_1,
    "sched_setscheduler": _NOT_PID_1,
    "setpriority": _PRIORITY,
    "ioprio_set": _IO_PRIORITY,
    # linux/seccomp.h: SECCOMP_FILTER_FLAG_NEW_LISTENER (8) lets one process answer the calls of
    # others; stacked listeners are kernel surface that no program here needs.
    "seccomp": _when(ALLOW, 1, 0, mask=8),
    "prctl": (*_when(EPERM, 0, _PR_SET_MM), *_OTHERWISE),
    "mknod": _when(ALLOW, 1, 0, mask=_OTHER_TYPES),
    "mknodat": _when(ALLOW, 2, 0, mask=_OTHER_TYPES),
    # PER_LINUX, and "only ask" (0xffffffff). Without randomisation, as ThreadSanitizer starts
    # itself anew, a process is the easier to attack for whoever has it.
    "personality": _when(ALLOW, 0, 0, _ADDR_NO_RANDOMIZE, INT),
}
"""Rules for the arguments of calls that are allowed."""

_PROFILE_RULES: dict[str, dict[str, Rules]] = {
    STRICT: {
        # Who may trace it under Yama: of use where there is ptrace.
        "prctl": (*_when(EPERM, 0, _PR_SET_MM, _PR_SET_PTRACER), *_OTHERWISE),
    },
    DEFAULT: {
        # linux/ptrace.h: CONT, KILL, GETREGS, ATTACH, DETACH, GETREGSET. Not SEIZE and
        # SETOPTIONS, which could switch filters off (CVE-2022-30594), nor any that writes.
        "ptrace": _when(ALLOW, 0, 7, 8, 12, 16, 17, 0x4204),
    },
    DOCKER: {
        # Docker lists the families it allows; beyond these two that leaves out only dead ones.
        "socket": (*_when(EPERM, 0, _AF_ALG, _AF_VSOCK), *_OTHERWISE),
        "socketpair": _OTHERWISE,
        "seccomp": _OTHERWISE,
        "prctl": _OTHERWISE,
        "mknod": _OTHERWISE,
        "mknodat": _OTHERWISE,
        # UNAME26 and PER_LINUX32, as Docker has it.
        "personality": _when(
            ALLOW, 0, 0, _PER_LINUX32, _UNAME26, _UNAME26 | _PER_LINUX32, _ADDR_NO_RANDOMIZE, INT
        ),
    },
}


def rules_in(tier: str, call: str) -> Rules:
    """Return the rules of the profile `tier` for a call that it allows."""
    return _PROFILE_RULES[tier].get(call) or rules_of(call)


def rules_of(call: str) -> Rules:
    """Return nsbox's rules for a call that is allowed by name."""
    return ARGUMENT_RULES.get(call, _OTHERWISE)


def is_narrowed(call: str, rules: Rules) -> bool:
    """Whether these are a profile's rules, and those of the call allowed by name are wider."""
    return any(rules == _PROFILE_RULES[tier].get(call) for tier in (STRICT, DEFAULT))
