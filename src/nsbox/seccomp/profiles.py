# SPDX-License-Identifier: Apache-2.0
"""The system calls of Linux in groups, each with the reason why it is allowed or refused.

Pure data. Every call of x86-64 up to 469 (Linux 6.18) stands in exactly one group. The tiers are
nested: what `strict` allows `default` allows too, and so on. `docker` is Docker's default profile
(moby/profiles 02e898b) for a container without capabilities, but for uretprobe, which the kernel
lets past any filter. Names of other architectures are a subset.
"""

from __future__ import annotations

import errno

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
        "pipes, polling, eventfd, timerfd, signalfd: event loops are built of them",
        """epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
        pipe pipe2 poll ppoll pselect6 select signalfd signalfd4 timerfd_create timerfd_gettime
        timerfd_settime ioctl""",
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
        "making, running and awaiting processes; clone may not make namespaces, and personality "
        "may only ask, or switch the randomisation of addresses off, as sanitizers do",
        """clone execve execveat exit exit_group fork vfork wait4 waitid arch_prctl prctl rseq
        set_robust_list get_robust_list set_tid_address get_thread_area set_thread_area futex
        futex_requeue futex_wait futex_waitv futex_wake getpgid getpgrp getpid getppid getsid gettid
        setpgid setsid kill tgkill tkill pidfd_open pidfd_send_signal restart_syscall
        personality""",
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
        "identity",
        "asking for the ids, limits, usage and name of the system, and setting limits of itself by "
        "pid 0; there are no capabilities, so that capset has none to give",
        """capget capset getegid geteuid getgid getgroups getresgid getresuid getuid getpriority
        getrlimit getrusage setrlimit prlimit64 sysinfo uname getcpu getrandom""",
    ),
    (
        STRICT,
        "scheduling of itself",
        "reading the scheduler's view, yielding, and affinity: OpenMP binds its threads; PID 1 is "
        "nobody's but nsbox's",
        """sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
        sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_yield""",
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
        "named pipes",
        "mkfifo(1), tar, and the job server of make 4.4; by argument, no device node",
        """mknod mknodat""",
    ),
    (
        STRICT,
        "self-sandboxing",
        "only ever take rights away: programs such as browsers and file(1) use them",
        """landlock_add_rule landlock_create_ruleset landlock_restrict_self seccomp""",
    ),
    (
        STRICT,
        "ids of itself",
        "without capabilities they only swap ids the process already has; make (posix_spawn with "
        "RESETIDS), su-exec, PostgreSQL and tar call them",
        """setfsgid setfsuid setgid setregid setresgid setresuid setreuid setuid""",
    ),
    (
        DEFAULT,
        "moving data in the kernel",
        "splice had kernel bugs (CVE-2022-0847), so strict goes without; cp, pv and proxies use it",
        """splice tee sync sync_file_range syncfs readahead""",
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
        """mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget
        msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget""",
    ),
    (
        DEFAULT,
        "watching files",
        "file watchers and tail -f; on files that others have, too (/usr, code, binds), it tells "
        "when they are opened, so strict goes without",
        """inotify_add_watch inotify_init inotify_init1 inotify_rm_watch""",
    ),
    (
        DEFAULT,
        "priorities",
        "only downwards without CAP_SYS_NICE; numpy's BLAS, V8, nice and ionice set them",
        """setpriority sched_setattr sched_setparam sched_setscheduler ioprio_get ioprio_set""",
    ),
    (
        DEFAULT,
        "signals with a value",
        "sigqueue(3): kill with a word more",
        """rt_sigqueueinfo rt_tgsigqueueinfo""",
    ),
    (
        DEFAULT,
        "looking at threads",
        "LeakSanitizer stops its own process's threads and reads their registers; no more by "
        "argument. What it reaches are dumpable processes of the same uid, nsbox's own are not",
        """ptrace""",
    ),
    (
        DOCKER,
        "tracing",
        "debuggers, with all of ptrace; what they reach is as above",
        """process_mrelease process_vm_readv process_vm_writev""",
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
        "groups",
        "changes nothing where there is no capability",
        """setgroups""",
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
        """adjtimex clock_adjtime epoll_ctl_old epoll_wait_old fanotify_mark listmount
        name_to_handle_at statmount""",
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
EPERM, ENOSYS = ERRNO | errno.EPERM, ERRNO | errno.ENOSYS
EINVAL, EOPNOTSUPP = ERRNO | errno.EINVAL, ERRNO | errno.EOPNOTSUPP
EPROTONOSUPPORT = ERRNO | errno.EPROTONOSUPPORT

# (action, reason, names). Whether a program goes on without a call is decided by the errno: what
# it is prepared for is a kernel or a file system that has no such thing. So each of these answers
# as one without it does, wherever a policy does not allow it. All others are EPERM: what a process
# without privileges is told by the kernel itself (mount, chroot, setgroups, ptrace, bpf, syslog,
# io_uring and userfaultfd where their sysctls refuse them, mlock with RLIMIT_MEMLOCK 0).
REFUSALS: tuple[tuple[int, str, str], ...] = (
    (
        EOPNOTSUPP,
        "a file system without extended attributes and ACLs: cp -p, mv, install and sed -i say "
        "nothing then, tar and rsync go on, tar warns where ACLs were asked for; with EPERM they "
        "complain or fail",
        """setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr""",
    ),
    (
        EOPNOTSUPP,
        "a file system without file handles: systemd's libraries look at mount points instead",
        """name_to_handle_at""",
    ),
    (
        EINVAL,
        "a file that cannot be spliced: Go's io.Copy, pv and busybox read and write then; Go "
        "reports every other errno to its caller",
        """splice tee vmsplice""",
    ),
    (
        ENOSYS,
        "glibc and musl start threads and processes with clone then",
        """clone3""",
    ),
    (
        ENOSYS,
        "an older kernel: libattr, libacl, chattr, libmount and systemd take the older call, the "
        "ioctl, or /proc",
        """setxattrat getxattrat listxattrat removexattrat file_getattr file_setattr listmount
        statmount lsm_get_self_attr lsm_list_modules lsm_set_self_attr""",
    ),
    (
        ENOSYS,
        "a kernel without CONFIG_AIO: InnoDB and nginx take threads",
        """io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit""",
    ),
    (
        ENOSYS,
        "a kernel without CONFIG_NUMA: numa_available(3) says no, and OpenBLAS, hwloc, MySQL and "
        "JVMs ask no further; old versions of libnuma know this errno only",
        """get_mempolicy mbind migrate_pages move_pages process_madvise set_mempolicy
        set_mempolicy_home_node""",
    ),
    (
        ENOSYS,
        "a kernel without inotify: glib, watchdog and tail -f poll",
        """inotify_add_watch inotify_init inotify_init1 inotify_rm_watch""",
    ),
    (
        ENOSYS,
        "a kernel without System V ipc, POSIX message queues, or protection keys",
        """mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget
        msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget pkey_alloc pkey_free
        pkey_mprotect""",
    ),
    (
        ENOSYS,
        "PostgreSQL and RocksDB leave it to fdatasync then, and warn of any other errno",
        """sync_file_range""",
    ),
    (
        ENOSYS,
        "a kernel built without secretmem, user shadow stacks, or LDT",
        """memfd_secret map_shadow_stack modify_ldt""",
    ),
)
REFUSAL_OF: dict[str, int] = {
    name: action for action, _, names in REFUSALS for name in names.split()
}
"""What a refused call answers, where that is not EPERM."""

# A test is (argument index, mask, value): it holds when `argument & mask == value`. No mask of an
# int is wider than 32 bits: the kernel reads an int from these registers, so the high half must
# not count (CVE-2019-10063 went round a 64-bit comparison). Pointers have all 64.
Test = tuple[int, int, int]
Rule = tuple[int, tuple[Test, ...]]
"""(action, tests): the action is taken when all tests hold. No test always holds."""
Rules = tuple[Rule, ...]
"""The first whose tests hold decides; where none does, the policy's default action."""
INT = 0xFFFFFFFF
POINTER = 0xFFFFFFFFFFFFFFFF

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
