# SPDX-License-Identifier: Apache-2.0
"""The system calls of Linux in groups, each with the reason why it is allowed or refused.

Pure data. Every call of x86-64 up to 469 (Linux 6.18) stands in exactly one group. The tiers are
nested: what `strict` allows `default` allows too, and so on. `docker` is Docker's default profile
(moby/profiles 02e898b) for a container without capabilities, but for uretprobe, which the kernel
lets past any filter. Names of other architectures are a subset.
"""

from __future__ import annotations

STRICT = "strict"
DEFAULT = "default"
DOCKER = "docker"
DENIED = "denied"
DANGEROUS = "dangerous"

TIERS = (STRICT, DEFAULT, DOCKER)
"""From the narrowest to the widest."""

# (tier, group, reason, names). A call in DENIED is in no profile, but allow() takes it; one in
# DANGEROUS opens a way out of the environment and wants allow_dangerous().
GROUPS: tuple[tuple[str, str, str, str], ...] = (
    (
        STRICT,
        "file access",
        "opening, reading and writing; what can be reached is decided by the mount namespace",
        """access chdir close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
        fadvise64 fallocate fchdir fcntl fdatasync flock fsync ftruncate getcwd getdents getdents64
        lseek open openat openat2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readv
        sendfile truncate write writev cachestat""",
    ),
    (
        STRICT,
        "file names and attributes",
        "names, modes, owners and times of files; no_new_privs and nosuid kill set-id bits",
        """chmod chown fchmod fchmodat fchmodat2 fchown fchownat lchown link linkat mkdir mkdirat
        readlink readlinkat rename renameat renameat2 rmdir symlink symlinkat umask unlink unlinkat
        futimesat utime utimensat utimes""",
    ),
    (
        STRICT,
        "file status",
        "read-only questions about files and file systems; C libraries and coreutils ask them",
        """fstat fstatfs lstat newfstatat stat statfs statx fgetxattr flistxattr getxattr lgetxattr
        listxattr llistxattr""",
    ),
    (
        STRICT,
        "descriptors and events",
        "pipes, polling, eventfd, timerfd, signalfd, inotify: event loops are built of them",
        """epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
        inotify_add_watch inotify_init inotify_init1 inotify_rm_watch pipe pipe2 poll ppoll pselect6
        select signalfd signalfd4 timerfd_create timerfd_gettime timerfd_settime ioctl""",
    ),
    (
        STRICT,
        "memory",
        "the process's own address space, charged to the memory limit",
        """brk madvise membarrier memfd_create mincore mmap mprotect mremap mseal msync munmap""",
    ),
    (
        STRICT,
        "processes and threads",
        "making, running and awaiting processes; clone may not make namespaces",
        """clone execve execveat exit exit_group fork vfork wait4 waitid arch_prctl prctl rseq
        set_robust_list get_robust_list set_tid_address get_thread_area set_thread_area futex
        futex_requeue futex_wait futex_waitv futex_wake getpgid getpgrp getpid getppid getsid gettid
        setpgid setsid kill tgkill tkill pidfd_open pidfd_send_signal restart_syscall""",
    ),
    (
        STRICT,
        "signals",
        "handlers, masks and waiting; a pid namespace bounds who can be signalled",
        """pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend
        rt_sigtimedwait sigaltstack""",
    ),
    (
        STRICT,
        "clocks and timers",
        "reading clocks, sleeping, own timers; no clock can be set",
        """alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep
        setitimer time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
        times""",
    ),
    (
        STRICT,
        "identity, read only",
        "asking for the ids, limits, usage and name of the system",
        """getegid geteuid getgid getgroups getresgid getresuid getuid getpriority getrlimit
        getrusage setrlimit prlimit64 sysinfo uname getcpu getrandom""",
    ),
    (
        STRICT,
        "scheduling of itself",
        "reading the scheduler's view, yielding, and the process's own affinity",
        """sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_setaffinity sched_yield""",
    ),
    (
        STRICT,
        "sockets",
        "Unix and Internet sockets in an own network namespace; families by argument",
        """accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg
        recvmsg sendmmsg sendmsg sendto setsockopt shutdown socket socketpair""",
    ),
    (
        STRICT,
        "self-sandboxing",
        "only ever take rights away: programs such as browsers and file(1) use them",
        """landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp""",
    ),
    (
        DEFAULT,
        "ids of itself",
        "without capabilities they only swap ids the process already has; su-exec, PostgreSQL and "
        "tar call them",
        """setfsgid setfsuid setgid setregid setresgid setresuid setreuid setuid""",
    ),
    (
        DEFAULT,
        "moving data in the kernel",
        "splice had kernel bugs (CVE-2022-0847), so strict goes without; cp, pv and proxies use it",
        """splice tee sync sync_file_range syncfs""",
    ),
    (
        DEFAULT,
        "pinned memory",
        "bounded by RLIMIT_MEMLOCK and the memory limit; password tools and databases use it",
        """mlock mlock2 mlockall munlock munlockall""",
    ),
    (
        DEFAULT,
        "memory protection keys",
        "V8 guards its code pages with them",
        """pkey_alloc pkey_free pkey_mprotect""",
    ),
    (
        DEFAULT,
        "System V and POSIX ipc",
        "in an ipc namespace of its own; Python's multiprocessing, PostgreSQL and BLAS libraries",
        """mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink semctl semget
        semop semtimedop shmat shmctl shmdt shmget""",
    ),
    (
        DEFAULT,
        "named pipes",
        "mkfifo(1), tar, and the job server of make 4.4; by argument, no device node",
        """mknod mknodat""",
    ),
    (
        DEFAULT,
        "priorities",
        "only downwards without CAP_SYS_NICE; numpy's BLAS and V8 set them",
        """setpriority sched_setattr sched_setparam sched_setscheduler""",
    ),
    (
        DOCKER,
        "tracing",
        "debuggers; may reach every process of the same uid that is dumpable, nsbox's own are not",
        """process_mrelease process_vm_readv process_vm_writev ptrace""",
    ),
    (
        DOCKER,
        "extended attributes",
        "can write user.* attributes; a past source of overlay bugs",
        """fremovexattr fsetxattr lremovexattr lsetxattr removexattr removexattrat setxattr
        setxattrat getxattrat listxattrat""",
    ),
    (
        DOCKER,
        "old asynchronous io",
        "superseded; databases fall back to threads",
        """io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit""",
    ),
    (
        DOCKER,
        "capabilities and groups",
        "change nothing where there is no capability",
        """capget capset setgroups""",
    ),
    (
        DOCKER,
        "odd memory",
        "rarely needed and with a record of kernel bugs; memfd_secret hides pages from the host",
        """map_shadow_stack memfd_secret modify_ldt remap_file_pages vmsplice""",
    ),
    (
        DOCKER,
        "rest of Docker's list",
        "harmless without capabilities, and unused by the 16 workloads that were measured",
        """adjtimex clock_adjtime epoll_ctl_old epoll_wait_old fanotify_mark ioprio_get ioprio_set
        listmount msgctl msgget msgrcv msgsnd name_to_handle_at personality readahead
        rt_sigqueueinfo rt_tgsigqueueinfo sched_rr_get_interval statmount""",
    ),
    (
        DENIED,
        "never implemented or removed",
        "the kernel has no such call any more",
        """_sysctl afs_syscall create_module get_kernel_syms getpmsg nfsservctl putpmsg query_module
        security tuxcall uselib vserver sysfs ustat""",
    ),
    (
        DENIED,
        "memory policy of NUMA nodes",
        "host-wide placement; refused by Docker too",
        """get_mempolicy mbind migrate_pages move_pages process_madvise set_mempolicy
        set_mempolicy_home_node""",
    ),
    (
        DENIED,
        "young and unused",
        "not yet used by common programs; clone3 passes its flags behind a pointer, so it is "
        "ENOSYS and C libraries fall back to clone",
        """file_getattr file_setattr lsm_get_self_attr lsm_list_modules lsm_set_self_attr uprobe
        uretprobe lookup_dcookie""",
    ),
    (
        DANGEROUS,
        "mounts",
        "rebuild the file tree; the walls of the file system are made of them",
        """chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree
        open_tree_attr pivot_root umount2 quotactl quotactl_fd""",
    ),
    (
        DANGEROUS,
        "namespaces",
        "a user namespace gives all capabilities inside it, and with them most kernel bugs; "
        "clone3 hides its flags behind a pointer",
        """clone3 setns unshare""",
    ),
    (
        DANGEROUS,
        "keyrings",
        "keys are kept per uid, not per environment, and the code has had holes (CVE-2016-0728)",
        """add_key keyctl request_key""",
    ),
    (
        DANGEROUS,
        "kernel programs and monitors",
        "run or watch code in the kernel; io_uring acts without passing seccomp",
        """bpf fanotify_init io_uring_enter io_uring_register io_uring_setup perf_event_open
        userfaultfd""",
    ),
    (
        DANGEROUS,
        "reaching into processes and files",
        "take descriptors from another process or open files past the mount namespace",
        """kcmp open_by_handle_at pidfd_getfd""",
    ),
    (
        DANGEROUS,
        "the machine",
        "modules, kexec, power, swap, ports, host name, clock and log belong to the host",
        """acct clock_settime delete_module finit_module init_module ioperm iopl kexec_file_load
        kexec_load reboot setdomainname sethostname settimeofday swapoff swapon syslog vhangup""",
    ),
)

TIER_OF: dict[str, str] = {name: tier for tier, _, _, names in GROUPS for name in names.split()}
"""The narrowest tier each known call is in."""


def names_in(tier: str) -> frozenset[str]:
    """Return the calls that the profile `tier` allows, its narrower tiers included."""
    wanted = TIERS[: TIERS.index(tier) + 1]
    return frozenset(name for name, found in TIER_OF.items() if found in wanted)


DANGEROUS_NAMES = frozenset(name for name, tier in TIER_OF.items() if tier == DANGEROUS)

# What the kernel does with a call (linux/seccomp.h, SECCOMP_RET_*), strictest first.
KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, LOG, ALLOW = (
    0x80000000,
    0x00000000,
    0x00030000,
    0x00050000,
    0x7FFC0000,
    0x7FFF0000,
)
EPERM, ENOSYS = ERRNO | 1, ERRNO | 38

# A test is (argument index, mask, value): it holds when `argument & mask == value`. No mask is
# wider than 32 bits: the kernel reads an int from these registers, so the high half must not
# count (CVE-2019-10063 went round a 64-bit comparison).
Test = tuple[int, int, int]
Rule = tuple[int, tuple[Test, ...]]
"""(action, tests): the action is taken when all tests hold. No test always holds."""
INT = 0xFFFFFFFF


def _equal(index: int, *values: int) -> tuple[tuple[Test, ...], ...]:
    return tuple(((index, INT, value),) for value in values)


_CLONE_NAMESPACES = 0x7E020000  # linux/sched.h: NEW NS CGROUP UTS IPC USER PID NET
# CLONE_NEWTIME (0x80) lies in clone's exit signal (CSIGNAL): only unshare and clone3 read it.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_ALG, _AF_VSOCK = 1, 2, 10, 16, 38, 40
_FAMILIES = (
    *_equal(0, _AF_UNIX, _AF_INET, _AF_INET6),
    # Interfaces and addresses are read through NETLINK_ROUTE, protocol 0; netfilter, audit and
    # crypto netlink are kernel surface and nothing else.
    ((0, INT, _AF_NETLINK), (2, INT, 0)),
)
_NO_TERMINAL_INJECTION = _equal(
    1,
    0x5412,  # asm-generic/ioctls.h: TIOCSTI, types into the terminal
    0x541C,  # TIOCLINUX, pastes the console's selection
    0x541D,  # TIOCCONS, redirects the console
    0x5423,  # TIOCSETD, loads line disciplines
)

_IFMT, _IFIFO, _IFREG = 0o170000, 0o010000, 0o100000  # linux/stat.h


def _no_device(index: int) -> tuple[tuple[Test, ...], ...]:
    # A type of 0 is a regular file as well (mknod(2)).
    return tuple(((index, _IFMT, kind),) for kind in (_IFIFO, _IFREG, 0))


ONLY = "only"
EXCEPT = "except"
ArgumentRule = tuple[str, tuple[tuple[Test, ...], ...]]

ARGUMENT_RULES: dict[str, ArgumentRule] = {
    "clone": (ONLY, (((0, _CLONE_NAMESPACES, 0),),)),
    "socket": (ONLY, _FAMILIES),
    "socketpair": (ONLY, _FAMILIES),
    "ioctl": (EXCEPT, _NO_TERMINAL_INJECTION),
    # Another process's limits and CPUs are not its business. A pid of its own cannot be known
    # when the filter is made, so only 0 (itself) passes: C libraries and CPython pass 0.
    # pthread_setaffinity_np passes a thread id and gets EPERM.
    "prlimit64": (ONLY, _equal(0, 0)),
    "sched_setaffinity": (ONLY, _equal(0, 0)),
    # linux/seccomp.h: SECCOMP_FILTER_FLAG_NEW_LISTENER (8) lets one process answer the calls of
    # others; stacked listeners are kernel surface that no program here needs.
    "seccomp": (ONLY, (((1, 8, 0),),)),
    "prctl": (EXCEPT, _equal(0, 35, 0x59616D61)),  # linux/prctl.h: PR_SET_MM, PR_SET_PTRACER
    "mknod": (ONLY, _no_device(1)),
    "mknodat": (ONLY, _no_device(2)),
    "personality": (ONLY, _equal(0, 0, INT)),  # PER_LINUX, and "only ask"
}
"""`only`: one of the alternatives must hold, else EPERM. `except`: none may hold."""

DOCKER_ARGUMENT_RULES: dict[str, ArgumentRule] = {
    "clone": ARGUMENT_RULES["clone"],
    # Docker lists the families it allows; beyond these two that leaves out only dead ones.
    "socket": (EXCEPT, _equal(0, _AF_ALG, _AF_VSOCK)),
    # UNAME26 (0x20000) and PER_LINUX32 (8), as Docker has it.
    "personality": (ONLY, _equal(0, 0, 8, 0x20000, 0x20008, INT)),
    # Not in Docker's list, which trusts each container to have a terminal of its own.
    "ioctl": ARGUMENT_RULES["ioctl"],
}

_SET_IDS = 0o6000  # linux/stat.h: S_ISUID, S_ISGID
_CREATING = 0o20000100  # asm-generic/fcntl.h: O_TMPFILE, O_CREAT; open(2) reads no mode without

SET_ID_RULES: dict[str, tuple[tuple[Test, ...], ...]] = {
    **{name: (((1, _SET_IDS, 0),),) for name in ("chmod", "fchmod", "creat", "mknod")},
    **{name: (((2, _SET_IDS, 0),),) for name in ("fchmodat", "fchmodat2", "mknodat")},
    "open": (((1, _CREATING, 0),), ((2, _SET_IDS, 0),)),
    "openat": (((2, _CREATING, 0),), ((3, _SET_IDS, 0),)),
}
"""When a call can give no file a set-id bit: one of the alternatives holds. mkdir(2) ignores the
bits, and bind(2) takes those of the socket, which only fchmod changes."""
UNSEEN_MODES = {"openat2": ENOSYS, "io_uring_setup": EPERM}
"""Calls whose mode no filter sees: in memory. C libraries and programs fall back from ENOSYS."""

_FOREIGN = """
    _llseek _newselect arm_fadvise64_64 arm_sync_file_range breakpoint cacheflush chown32
    clock_adjtime64 clock_getres_time64 clock_gettime64 clock_nanosleep_time64 clock_settime64
    fadvise64_64 fchown32 fcntl64 fstat64 fstatat64 fstatfs64 ftruncate64 futex_time64 getegid32
    geteuid32 getgid32 getgroups32 getresgid32 getresuid32 getuid32 io_pgetevents_time64 ipc
    lchown32 lstat64 mmap2 mq_timedreceive_time64 mq_timedsend_time64 ppoll_time64 pselect6_time64
    recv recvmmsg_time64 riscv_flush_icache riscv_hwprobe rt_sigtimedwait_time64 s390_pci_mmio_read
    s390_pci_mmio_write s390_runtime_instr sched_rr_get_interval_time64 semtimedop_time64 send
    sendfile64 set_tls setfsgid32 setfsuid32 setgid32 setgroups32 setregid32 setresgid32
    setresuid32 setreuid32 setuid32 sigprocmask sigreturn socketcall stat64 statfs64 stime
    swapcontext sync_file_range2 timer_gettime64 timer_settime64 timerfd_gettime64
    timerfd_settime64 truncate64 ugetrlimit umount utimensat_time64 waitpid"""
FOREIGN_NAMES = frozenset(_FOREIGN.split())
"""Calls of 32-bit or other machines that OCI profiles name; they are not where nsbox runs."""

_FROM_424 = """
    pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount
    fsopen fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2
    process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset
    landlock_add_rule landlock_restrict_self memfd_secret process_mrelease futex_waitv
    set_mempolicy_home_node cachestat fchmodat2 map_shadow_stack futex_wake futex_wait
    futex_requeue statmount listmount lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal
    setxattrat getxattrat listxattrat removexattrat open_tree_attr file_getattr
    file_setattr"""
NEW_NUMBERS = {name: number for number, name in enumerate(_FROM_424.split(), start=424)}
"""Numbers 424 to 469, the same on every architecture; libseccomp 2.5 knows only some."""

X86_64_NUMBERS = {"uretprobe": 335, "uprobe": 336}
"""Added below 424 on x86-64 (Linux 6.11, 6.18). The kernel lets both pass any filter."""
