# SPDX-License-Identifier: Apache-2.0
"""Kernel constants, by the header that defines them, with the first kernel version.

Only what the standard library does not have: `os.O_PATH`, `signal.SIGKILL` and the like come from
there. Every value is the same on x86_64 and aarch64 (`calls` has the numbers that are not).
"""

from __future__ import annotations

# asm/signal.h. Here because `import signal` loads enum, which costs the launcher milliseconds.
SIGKILL = 9
SIGTERM = 15
SIGPIPE = 13
SIGCHLD = 17
SIGCONT = 18
SIGXFSZ = 25
SIGSYS = 31

# linux/sched.h: clone3(2), unshare(2), setns(2)
CLONE_NEWTIME = 0x00000080  # 5.6; inside clone(2)'s signal mask, so only unshare and clone3 take it
CLONE_VM = 0x00000100
CLONE_PIDFD = 0x00001000  # 5.2
CLONE_VFORK = 0x00004000
CLONE_PARENT = 0x00008000  # 2.3.13
CLONE_NEWNS = 0x00020000  # 2.4.19
CLONE_CHILD_CLEARTID = 0x00200000  # 2.5.49
CLONE_CHILD_SETTID = 0x01000000  # 2.5.49
CLONE_NEWCGROUP = 0x02000000  # 4.6
CLONE_NEWUTS = 0x04000000  # 2.6.19
CLONE_NEWIPC = 0x08000000  # 2.6.19
CLONE_NEWUSER = 0x10000000  # 2.6.23; without privilege since 3.8
CLONE_NEWPID = 0x20000000  # 2.6.24
CLONE_NEWNET = 0x40000000  # 2.6.24
CLONE_INTO_CGROUP = 0x2_0000_0000  # 5.7, clone3 only

# linux/mount.h: mount(2)
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000  # 2.4
MS_REC = 0x4000  # 2.4.11
MS_PRIVATE = 0x40000  # 2.6.15
MS_SLAVE = 0x80000  # 2.6.15
MS_SHARED = 0x100000  # 2.6.15

# linux/fs.h, sys/mount.h: umount2(2)
MNT_DETACH = 0x2  # 2.4.11

# linux/fcntl.h: the *at() family and the file descriptor mount calls
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000  # 2.6.39
AT_RECURSIVE = 0x8000  # 5.2

# linux/mount.h: open_tree(2), move_mount(2)
OPEN_TREE_CLONE = 0x1  # 5.2
OPEN_TREE_CLOEXEC = 0o2000000  # 5.2; O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4  # 5.2

# linux/mount.h: mount_setattr(2) 5.12, and the attributes of fsmount(2) 5.2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_IDMAP = 0x100000  # 5.12; tmpfs since 6.3

# linux/mount.h: fsopen(2), fsconfig(2), fsmount(2)
FSOPEN_CLOEXEC = 0x1  # 5.2
FSMOUNT_CLOEXEC = 0x1  # 5.2
FSCONFIG_SET_STRING = 1  # 5.2
FSCONFIG_CMD_CREATE = 6  # 5.2

# linux/openat2.h: openat2(2), 5.6
RESOLVE_NO_XDEV = 0x1
RESOLVE_NO_MAGICLINKS = 0x2
RESOLVE_NO_SYMLINKS = 0x4
RESOLVE_BENEATH = 0x8
RESOLVE_IN_ROOT = 0x10

# linux/close_range.h: close_range(2), 5.9
CLOSE_RANGE_CLOEXEC = 0x4  # 5.11
CLOSE_RANGE_MAX = 0xFFFF_FFFF
"""The `last` that means "every descriptor from `first` on"."""

IOPRIO_WHO_PROCESS = 1  # linux/ioprio.h: ioprio_get(2)
# linux/keyctl.h: keyctl(2)
KEYCTL_JOIN_SESSION_KEYRING = 1  # 2.6.10
KEYCTL_CLEAR = 7  # 2.6.10
KEYCTL_GET_PERSISTENT = 22  # 3.13; EOPNOTSUPP without CONFIG_PERSISTENT_KEYRINGS
KEY_SPEC_SESSION_KEYRING = -3  # 2.6.10
KEY_SPEC_USER_KEYRING = -4  # 2.6.10
KEY_SPEC_USER_SESSION_KEYRING = -5  # 2.6.10

# linux/fs.h: inode flags, ioctl_iflags(2); the numbers are those of x86-64 and arm64
FS_IOC_GETFLAGS = 0x80086601  # 2.6.20; of a tmpfs since 6.0
FS_IOC_SETFLAGS = 0x40086602

# linux/prctl.h: prctl(2); what a clone does itself, and what the prctl module has no function for
PR_SET_PDEATHSIG = 1  # 2.1.57; the prctl module is not loaded in the launcher
PR_SET_DUMPABLE = 4  # 2.3.20
PR_SET_NAME = 15  # 2.6.9
PR_CAPBSET_DROP = 24  # 2.6.25
PR_SET_NO_NEW_PRIVS = 38  # 3.5
PR_GET_TID_ADDRESS = 40  # 3.5; EINVAL without CONFIG_CHECKPOINT_RESTORE
PR_CAP_AMBIENT = 47  # 4.3
PR_CAP_AMBIENT_IS_SET = 1  # 4.3
PR_CAP_AMBIENT_CLEAR_ALL = 4  # 4.3

# linux/seccomp.h: seccomp(2), 3.17
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_MODE_DISABLED = 0  # the values of `Seccomp:` in /proc/PID/status
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO = 0x0005_0000  # 3.5
SECCOMP_RET_ALLOW = 0x7FFF_0000  # 3.5
# linux/bpf_common.h
BPF_MAXINSNS = 4096

# linux/capability.h: capset(2)
LINUX_CAPABILITY_VERSION_3 = 0x2008_0522  # 2.6.26
LINUX_CAPABILITY_U32S_3 = 2

# asm-generic/ioctls.h: ioctl_tty(2)
TIOCSWINSZ = 0x5414

# linux/sockios.h, linux/if.h: netdevice(7)
SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1
IFNAMSIZ = 16
