/* SPDX-License-Identifier: Apache-2.0
 *
 * The C floor: the least a process has to do on this kernel to run one command in a sandbox
 * of the same shape as nsbox's, with no library, no configuration and no reporting.
 * README.md says what that is; build_root() and child() say in which order.
 *
 *   floor -- CMD...                            one sandbox; exits with the command's status
 *   floor --bench N [--starters K] -- CMD...   N sandboxes from K starter processes, as JSON lines
 *   floor --server -- CMD...                   requests on stdin, answers on stdout:
 *        one                                     ->  MICROSECONDS STATUS
 *        batch N K                               ->  TOTAL_MICROSECONDS FAILED
 *        answer                                  ->  MICROSECONDS STATUS       (needs --event)
 *        steps                                   ->  NAME MICROSECONDS ...     (of the last "answer")
 *   --event TEXT   the line that "answer" writes to CMD's stdin; it reads a line of its stdout
 *   --spawn        no sandbox of its own: posix_spawn CMD (so that bubblewrap gets C starters, too)
 *
 * A time is CLOCK_MONOTONIC from just before clone3 to just after waitpid; for "answer" from just before
 * the pipes are made to the newline of the answer.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/mount.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* <sys/mount.h> and <linux/mount.h> clash on older C libraries: take the numbers, declare the calls. */
enum { BIND = 4096, REC = 16384, PRIVATE = 1 << 18, REMOUNT = 32, RDONLY = 1, NOSUID = 2, NODEV = 4, NOEXEC = 8, DETACH = 2 };
int mount(const char *, const char *, const char *, unsigned long, const void *);
int umount2(const char *, int);

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif
#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "the floor knows x86-64 and aarch64 only"
#endif
#define X32_BIT 0x40000000u
#define INNER_ID 1000
#define FIRST_HOST_ID 0x70000000u
#define HOST_IDS 65536u
#define LAST_CAPABILITY 40
#define SETUP_FAILED 125
#define MAX_STARTERS 64
#define MAX_SANDBOXES 100000

static char *const ENVIRONMENT[] = {"PATH=/usr/bin:/bin", "HOME=/tmp", "LC_ALL=C.UTF-8", NULL};
static const char *event;
static int child_input = -1, child_output = -1; /* pipes of "answer"; else the child has ours */
static unsigned spawn_only, is_root, has_time_namespaces, own_uid, own_gid;

/* What a shell, coreutils and CPython need; 51 numbers on x86-64 make 58 instructions. */
static const int ALLOWED[] = {
    __NR_read, __NR_write, __NR_close, __NR_fstat, __NR_newfstatat, __NR_lseek, __NR_mmap, __NR_mprotect,
    __NR_munmap, __NR_brk, __NR_rt_sigaction, __NR_rt_sigprocmask, __NR_rt_sigreturn, __NR_ioctl, __NR_pread64,
    __NR_openat, __NR_execve, __NR_exit, __NR_exit_group, __NR_wait4, __NR_fcntl, __NR_getcwd, __NR_chdir,
    __NR_getpid, __NR_getppid, __NR_gettid, __NR_getuid, __NR_getgid, __NR_geteuid, __NR_getegid, __NR_getgroups,
    __NR_clone, __NR_futex, __NR_set_tid_address, __NR_set_robust_list, __NR_rseq, __NR_prlimit64, __NR_getrandom,
    __NR_getdents64, __NR_uname, __NR_sigaltstack, __NR_pipe2, __NR_statx, __NR_kill,
    __NR_readlinkat,
#ifdef __x86_64__
    __NR_arch_prctl, __NR_access, __NR_dup2, __NR_readlink, __NR_vfork, __NR_poll,
#else
    __NR_faccessat, __NR_dup, __NR_dup3, __NR_ppoll,
#endif
};
#define ALLOWED_COUNT (sizeof ALLOWED / sizeof ALLOWED[0])
#define FILTER_LENGTH (ALLOWED_COUNT + 7)
static struct sock_filter filter[FILTER_LENGTH];

static void make_filter(void) {
    const unsigned refuse = FILTER_LENGTH - 3, allow = FILTER_LENGTH - 2, kill = FILTER_LENGTH - 1;
    unsigned at = 0;
#define PUT(code, k, yes, no) (filter[at] = (struct sock_filter)BPF_JUMP(code, k, yes, no), at++)
    PUT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch), 0, 0);
    PUT(BPF_JMP | BPF_JEQ | BPF_K, NATIVE_ARCH, 0, kill - at - 1);
    PUT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr), 0, 0);
    PUT(BPF_JMP | BPF_JGE | BPF_K, X32_BIT, kill - at - 1, 0);
    for (size_t i = 0; i < ALLOWED_COUNT; i++)
        PUT(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)ALLOWED[i], allow - at - 1, 0);
    if (at != refuse)
        abort();
    PUT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM, 0, 0);
    PUT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW, 0, 0);
    PUT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS, 0, 0);
#undef PUT
}

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* When each step of the last sandbox ended; shared with the child, which does most of them. */
enum { BEGIN, CLONE3, ID_MAPS, MOUNTS, PIVOT_ROOT, PRIVILEGES, ANSWER, EXIT, STEPS };
static const char *const STEP_NAMES[] = {"begin", "clone3", "id_maps", "mounts", "pivot_root", "privileges", "program", "exit"};
static double *ended;

static void fail(const char *step) {
    dprintf(2, "floor: %s: %s\n", step, strerror(errno));
    _exit(SETUP_FAILED);
}

#define DO(call)                                                                                                       \
    do {                                                                                                               \
        if ((call) < 0)                                                                                                \
            fail(#call);                                                                                               \
    } while (0)

static void *shared_memory(size_t size) {
    void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail("mmap");
    return memory;
}

static void bind_read_only(const char *source, const char *target) {
    struct mount_attr attributes = {.attr_set = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV};
    /* Recursive: a mount copied into a less privileged namespace is locked to what lies below it. */
    DO(mount(source, target, NULL, BIND | REC, NULL));
    DO(syscall(SYS_mount_setattr, AT_FDCWD, target, AT_RECURSIVE, &attributes, sizeof attributes));
}

/* /lib64 and its like: a link into /usr as the host has it, or (unmerged /usr) a bind of the directory. */
static void copy_link_or_directory(const char *path) {
    char target[256];
    struct stat status;
    ssize_t length = readlink(path, target, sizeof target - 1);
    if (length > 0) {
        target[length] = 0;
        DO(symlink(target, path + 1));
    } else if (stat(path, &status) == 0) {
        DO(mkdir(path + 1, 0755));
        bind_read_only(path, path + 1);
    }
}

static void build_root(void) {
    static const char *const links[] = {"/bin", "/sbin", "/lib", "/lib64"};
    static const char *const devices[] = {"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"};
    DO(mount(NULL, "/", NULL, REC | PRIVATE, NULL));
    DO(mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=0755,size=1m"));
    DO(chdir("/tmp"));
    DO(mkdir("usr", 0755));
    bind_read_only("/usr", "usr");
    for (size_t i = 0; i < sizeof links / sizeof links[0]; i++)
        copy_link_or_directory(links[i]);
    DO(mkdir("dev", 0755));
    for (size_t i = 0; i < sizeof devices / sizeof devices[0]; i++) {
        int file = open(devices[i] + 1, O_CREAT | O_WRONLY | O_CLOEXEC, 0644);
        DO(file);
        close(file);
        DO(mount(devices[i], devices[i] + 1, NULL, BIND, NULL));
    }
    /* Before the detach: the kernel allows a new /proc only where a whole one is still in sight. */
    DO(mkdir("proc", 0755));
    DO(mount("proc", "proc", "proc", NOSUID | NODEV | NOEXEC, NULL));
    DO(mkdir("tmp", 0755));
    DO(mount("tmpfs", "tmp", "tmpfs", NOSUID | NODEV, "mode=1777,size=64m"));
    ended[MOUNTS] = now_us();
    DO(syscall(SYS_pivot_root, ".", "."));
    DO(umount2(".", DETACH));
    DO(mount(NULL, "/", NULL, REMOUNT | BIND | RDONLY | NOSUID | NODEV, NULL));
    DO(chdir("/tmp"));
}

static void drop_privileges(void) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct none[2] = {{0, 0, 0}, {0, 0, 0}};
    struct sock_fprog program = {FILTER_LENGTH, filter};
    for (int capability = 0; capability <= LAST_CAPABILITY; capability++)
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 && errno != EINVAL) /* EINVAL: an older kernel's last */
            fail("PR_CAPBSET_DROP");
    DO(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
    DO(syscall(SYS_capset, &header, none));
    DO(syscall(SYS_close_range, 3, ~0u, 4 /* CLOSE_RANGE_CLOEXEC */));
    DO(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program));
}

static void child(int go[2], char **command) {
    char byte;
    close(go[1]);
    if (read(go[0], &byte, 1) != 1) /* end of file: the parent died or could not write the maps */
        _exit(SETUP_FAILED);
    ended[ID_MAPS] = now_us();
    if (is_root) {
        DO(setgroups(0, NULL));
        DO(syscall(SYS_setresgid, INNER_ID, INNER_ID, INNER_ID));
        DO(syscall(SYS_setresuid, INNER_ID, INNER_ID, INNER_ID));
    }
    DO(prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)); /* after the ids: a change of them clears it */
    DO(sethostname("sandbox", 7));
    build_root();
    ended[PIVOT_ROOT] = now_us();
    if (child_input >= 0) {
        DO(dup2(child_input, 0));
        DO(dup2(child_output, 1));
    }
    drop_privileges();
    ended[PRIVILEGES] = now_us();
    execve(command[0], command, ENVIRONMENT);
    int missing = errno == ENOENT;
    dprintf(2, "floor: %s: %s\n", command[0], strerror(errno));
    _exit(missing ? 127 : 126);
}

static int write_proc(pid_t pid, const char *name, const char *text) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    ssize_t written = write(file, text, strlen(text));
    close(file);
    return written < 0 ? -1 : 0;
}

static int write_maps(pid_t pid, unsigned number) {
    char uids[64], gids[64];
    unsigned host = FIRST_HOST_ID + number % HOST_IDS;
    snprintf(uids, sizeof uids, "%d %u 1\n", INNER_ID, is_root ? host : own_uid);
    snprintf(gids, sizeof gids, "%d %u 1\n", INNER_ID, is_root ? host : own_gid);
    if (!is_root && write_proc(pid, "setgroups", "deny") < 0)
        return -1;
    return write_proc(pid, "uid_map", uids) < 0 || write_proc(pid, "gid_map", gids) < 0 ? -1 : 0;
}

static pid_t start_sandbox(unsigned number, char **command) {
    struct clone_args arguments = {
        .flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS |
                 CLONE_NEWCGROUP | (has_time_namespaces ? CLONE_NEWTIME : 0),
        .exit_signal = SIGCHLD,
    };
    int go[2];
    DO(pipe2(go, O_CLOEXEC));
    pid_t pid = (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
    if (pid == 0)
        child(go, command);
    DO(pid);
    ended[CLONE3] = now_us();
    close(go[0]);
    if (write_maps(pid, number) < 0)
        dprintf(2, "floor: id maps: %s\n", strerror(errno)); /* the child sees end of file and exits 125 */
    else if (write(go[1], "g", 1) != 1)
        dprintf(2, "floor: go: %s\n", strerror(errno));
    close(go[1]);
    return pid;
}

static pid_t start(unsigned number, char **command) {
    pid_t pid;
    posix_spawn_file_actions_t actions;
    if (!spawn_only)
        return start_sandbox(number, command);
    posix_spawn_file_actions_init(&actions);
    if (child_input >= 0) {
        posix_spawn_file_actions_adddup2(&actions, child_input, 0);
        posix_spawn_file_actions_adddup2(&actions, child_output, 1);
    }
    if ((errno = posix_spawn(&pid, command[0], &actions, NULL, command, ENVIRONMENT)) != 0)
        fail(command[0]);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

/* Waits for the end; returns the exit status as a shell would give it. */
static int reap(pid_t pid) {
    int status;
    DO(waitpid(pid, &status, 0)); /* no handlers are set: it is not interrupted */
    ended[EXIT] = now_us();
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* One sandbox from start to exit. */
static int run_one(unsigned number, char **command, double *microseconds) {
    double begin = ended[BEGIN] = now_us();
    int status = reap(start(number, command));
    *microseconds = now_us() - begin;
    return status;
}

/* One sandbox from start to its answer to one event, over pipes; its end is waited for after the clock. */
static int run_answer(unsigned number, char **command, double *microseconds) {
    int input[2], output[2];
    char line[65536];
    ssize_t length, answered = 0;
    ended[BEGIN] = now_us();
    DO(pipe2(input, O_CLOEXEC));
    DO(pipe2(output, O_CLOEXEC));
    child_input = input[0], child_output = output[1];
    pid_t pid = start(number, command);
    close(output[1]);
    DO(dprintf(input[1], "%s\n", event)); /* our end to read is still open: there is no SIGPIPE */
    close(input[0]);
    while (!answered && (length = read(output[0], line, sizeof line)) > 0)
        answered = memchr(line, '\n', (size_t)length) != NULL;
    ended[ANSWER] = now_us();
    *microseconds = ended[ANSWER] - ended[BEGIN];
    close(input[1]);
    close(output[0]);
    child_input = child_output = -1;
    int status = reap(pid);
    return answered ? status : SETUP_FAILED;
}

static void print_steps(int file) {
    for (int step = CLONE3; step < STEPS; step++)
        dprintf(file, "%s %.1f%c", STEP_NAMES[step], ended[step] - ended[step - 1], step + 1 < STEPS ? ' ' : '\n');
}

struct batch {
    atomic_uint next, failed;
    double end[MAX_STARTERS];
    double microseconds[];
};

static void starter(struct batch *batch, unsigned index, unsigned count, char **command, int ready, int barrier) {
    char byte = 0;
    prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (write(ready, &byte, 1) != 1 || read(barrier, &byte, 1) != 0)
        fail("starter");
    for (unsigned number; (number = atomic_fetch_add(&batch->next, 1)) < count;)
        if (run_one(number, command, &batch->microseconds[number]) != 0)
            atomic_fetch_add(&batch->failed, 1);
    batch->end[index] = now_us();
    _exit(0);
}

/* count sandboxes from `starters` processes that begin together; the time is to the end of the last one. */
static double run_batch(struct batch *batch, unsigned count, unsigned starters, char **command) {
    int ready[2], barrier[2];
    char byte;
    atomic_store(&batch->next, 0);
    atomic_store(&batch->failed, 0);
    DO(pipe2(ready, O_CLOEXEC));
    DO(pipe2(barrier, O_CLOEXEC));
    pid_t pids[MAX_STARTERS];
    for (unsigned index = 0; index < starters; index++) {
        pid_t pid = pids[index] = fork();
        DO(pid);
        if (pid == 0) {
            close(barrier[1]);
            starter(batch, index, count, command, ready[1], barrier[0]);
        }
    }
    close(ready[1]);
    for (unsigned index = 0; index < starters; index++)
        if (read(ready[0], &byte, 1) != 1)
            fail("a starter died");
    double begin = now_us(), end = begin;
    close(barrier[1]);
    for (unsigned index = 0; index < starters; index++) {
        int status;
        DO(waitpid(pids[index], &status, 0)); /* by pid: orphans of a spawned sandbox may be ours, too */
        if (status != 0)
            atomic_fetch_add(&batch->failed, 1);
    }
    for (unsigned index = 0; index < starters; index++)
        end = batch->end[index] > end ? batch->end[index] : end;
    close(ready[0]);
    close(barrier[0]);
    return end - begin;
}

static struct batch *new_batch(unsigned count) {
    return shared_memory(sizeof(struct batch) + count * sizeof(double));
}

static void free_batch(struct batch *batch, unsigned count) {
    munmap(batch, sizeof(struct batch) + count * sizeof(double));
}

static int bench(unsigned count, unsigned starters, char **command) {
    struct batch *batch = new_batch(count);
    double total = run_batch(batch, count, starters, command);
    for (unsigned number = 0; number < count; number++)
        printf("{\"sandbox\": %u, \"us\": %.1f}\n", number, batch->microseconds[number]);
    printf("{\"total_us\": %.1f, \"count\": %u, \"starters\": %u, \"failed\": %u, \"per_second\": %.1f}\n", total, count,
           starters, atomic_load(&batch->failed), count * 1e6 / total);
    return atomic_load(&batch->failed) != 0;
}

static int serve(char **command) {
    char line[64];
    unsigned count, starters, number = 0;
    double microseconds;
    /* The command must not get the request channel: it sees /dev/null instead. */
    int answers = fcntl(1, F_DUPFD_CLOEXEC, 3), requests = fcntl(0, F_DUPFD_CLOEXEC, 3);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    DO(null);
    DO(answers);
    DO(requests);
    DO(dup2(null, 0));
    DO(dup2(null, 1));
    close(null);
    /* bubblewrap ends before its own PID 1 does: reap that here, after the answer, not in the host's init. */
    DO(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0));
    FILE *input = fdopen(requests, "r");
    if (input == NULL)
        fail("fdopen");
    while (fgets(line, sizeof line, input)) {
        if (strcmp(line, "one\n") == 0) {
            int status = run_one(number++, command, &microseconds);
            dprintf(answers, "%.1f %d\n", microseconds, status);
        } else if (strcmp(line, "answer\n") == 0 && event) {
            int status = run_answer(number++, command, &microseconds);
            dprintf(answers, "%.1f %d\n", microseconds, status);
        } else if (strcmp(line, "steps\n") == 0) {
            print_steps(answers);
        } else if (sscanf(line, "batch %u %u", &count, &starters) == 2 && count > 0 && count <= MAX_SANDBOXES &&
                   starters > 0 && starters <= MAX_STARTERS) {
            struct batch *batch = new_batch(count);
            microseconds = run_batch(batch, count, starters, command);
            dprintf(answers, "%.1f %u\n", microseconds, atomic_load(&batch->failed));
            free_batch(batch, count);
        } else {
            dprintf(2, "floor: unknown request: %s", line);
            return 2;
        }
        while (waitpid(-1, NULL, WNOHANG) > 0) {
        }
    }
    while (waitpid(-1, NULL, 0) > 0) {
    }
    return 0;
}

static unsigned number_argument(const char *text, unsigned most) {
    char *end;
    unsigned long value = text ? strtoul(text, &end, 10) : 0;
    if (text == NULL || *end != 0 || value < 1 || value > most) {
        fprintf(stderr, "floor: expected a number from 1 to %u, not %s\n", most, text ? text : "nothing");
        exit(2);
    }
    return (unsigned)value;
}

int main(int argc, char **argv) {
    unsigned count = 0, starters = 1;
    int server = 0, at = 1;
    double microseconds;
    (void)argc;
    for (; argv[at] && strcmp(argv[at], "--") != 0; at++) {
        if (strcmp(argv[at], "--spawn") == 0)
            spawn_only = 1;
        else if (strcmp(argv[at], "--server") == 0)
            server = 1;
        else if (strcmp(argv[at], "--event") == 0)
            event = argv[++at];
        else if (strcmp(argv[at], "--bench") == 0)
            count = number_argument(argv[++at], MAX_SANDBOXES);
        else if (strcmp(argv[at], "--starters") == 0)
            starters = number_argument(argv[++at], MAX_STARTERS);
        else
            break;
        if (argv[at] == NULL)
            break;
    }
    if (argv[at] == NULL || strcmp(argv[at], "--") != 0 || argv[at + 1] == NULL) {
        fprintf(stderr, "usage: floor [--spawn] [--server [--event TEXT] | --bench N [--starters K]] -- "
                        "/PATH/TO/COMMAND [ARG...]\n");
        return 2;
    }
    char **command = argv + at + 1;
    own_uid = geteuid(), own_gid = getegid();
    is_root = own_uid == 0;
    has_time_namespaces = access("/proc/self/ns/time", F_OK) == 0;
    make_filter();
    ended = shared_memory(STEPS * sizeof *ended);
    if (server)
        return serve(command);
    if (count)
        return bench(count, starters, command);
    return run_one(0, command, &microseconds);
}
