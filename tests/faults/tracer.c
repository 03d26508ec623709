/* SPDX-License-Identifier: Apache-2.0 */
/* Run a program that uses nsbox, follow all it starts, count their system calls and make one fail.
 *
 *     tracer COUNTS PROGRAM [ARGUMENT...]
 *
 * Every process has a class, by whose child it is (below). The program asks by a prctl(2) that no
 * kernel knows, so that what is counted begins and ends at a place of its own:
 *
 *     prctl(ASK, COUNT)                       count from here
 *     prctl(ASK, WRITE)                       write "CLASS CALL TIMES" lines to the file COUNTS
 *     prctl(ASK, FAIL, CLASS << 16 | CALL, ERRNO, N)   have the Nth CALL of CLASS fail, from here
 *     prctl(ASK, STOP)                        no more; answers the pid that met it, or 0
 *
 * A call that fails is not made. strace(1) would count each process by itself, take 30 ms to attach
 * and cannot attach to PID 1 of an environment as an ordinary user. x86-64 only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum { ASK = 0x4e534258, COUNT = 1, WRITE, FAIL, STOP };
enum { NONE, HOST, LAUNCHER, JANITOR, TEMPLATE, INIT, WORKER, CLASSES };
enum { PIDS = 1 << 22, CALLS = 512, STOPPED_NEW = 64, IN_CALL = 1, MEETS = 2, ANSWERED = 4 };

static unsigned char class_of[PIDS], state_of[PIDS];
static int result_of[PIDS];
static int waiting[STOPPED_NEW]; /* seen before the parent has told of them */
static long times[CLASSES][CALLS];
static int fail_class, fail_call, fail_errno, fail_left, met;
static const char *counts;

static int is_thread(int tid) {
    char text[4096], path[64];
    snprintf(path, sizeof path, "/proc/%d/status", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, text, sizeof text - 1);
    close(fd);
    text[size < 0 ? 0 : size] = 0;
    char *line = strstr(text, "\nTgid:");
    return line && atoi(line + 6) != tid;
}

/* Whether a process has `word` in its command line. */
static int has_word(int pid, const char *word) {
    char text[4096], path[64];
    snprintf(path, sizeof path, "/proc/%d/cmdline", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, text, sizeof text);
    close(fd);
    return size > 0 && memmem(text, size, word, strlen(word)) != NULL;
}

static void go_on(int tid, int signal) { ptrace(PTRACE_SYSCALL, tid, 0, signal); }

static void adopt(int parent, int child) {
    static const unsigned char child_of[CLASSES] = {NONE, LAUNCHER, JANITOR, NONE, INIT, WORKER, WORKER};
    int class = class_of[parent];
    class_of[child] = is_thread(child) ? class : child_of[class];
    state_of[child] = 0;
    for (int i = 0; i < STOPPED_NEW; i++)
        if (waiting[i] == child) {
            waiting[i] = 0;
            go_on(child, 0);
        }
}

/* What has executed another program: a launcher, a template, an executed worker; else nobody's. */
static int executed(int pid) {
    switch (class_of[pid]) {
    case HOST:
        return 1;
    case LAUNCHER:
        return has_word(pid, "nsbox/launcher/main.py");
    case JANITOR:
        class_of[pid] = TEMPLATE;
        return 1;
    case INIT:
    case WORKER:
        return has_word(pid, "nsbox.guest") || has_word(pid, "nsbox/guest");
    }
    return 0;
}

static int answer(struct user_regs_struct *regs) {
    switch (regs->rsi) {
    case COUNT:
        memset(times, 0, sizeof times);
        return 0;
    case WRITE: {
        FILE *file = fopen(counts, "we");
        for (int class = 0; class < CLASSES; class++)
            for (int call = 0; call < CALLS; call++)
                if (times[class][call])
                    fprintf(file, "%d %d %ld\n", class, call, times[class][call]);
        return fclose(file);
    }
    case FAIL:
        fail_class = regs->rdx >> 16, fail_call = regs->rdx & 0xffff;
        fail_errno = regs->r10, fail_left = regs->r8, met = 0;
        return 0;
    case STOP:
        fail_left = 0;
        return met;
    }
    return -EINVAL;
}

static void system_call(int tid) {
    struct user_regs_struct regs;
    if (ptrace(PTRACE_GETREGS, tid, 0, &regs) < 0)
        return;
    int class = class_of[tid];
    if (!(state_of[tid] & IN_CALL)) {
        long call = (int)regs.orig_rax;
        state_of[tid] = IN_CALL;
        if (call == SYS_prctl && regs.rdi == ASK && class == HOST) {
            state_of[tid] |= ANSWERED;
            result_of[tid] = answer(&regs);
        } else if (call >= 0 && call < CALLS) {
            times[class][call]++;
            if (fail_left && class == fail_class && call == fail_call && --fail_left == 0) {
                state_of[tid] |= MEETS;
                result_of[tid] = -fail_errno;
                met = tid;
            }
        }
        if (state_of[tid] != IN_CALL) {
            regs.orig_rax = SYS_getpid; /* none at all would be for the filter of an environment to kill */
            ptrace(PTRACE_SETREGS, tid, 0, &regs);
        }
    } else {
        if (state_of[tid] != IN_CALL) {
            regs.rax = result_of[tid];
            ptrace(PTRACE_SETREGS, tid, 0, &regs);
        }
        state_of[tid] = 0;
    }
}

static void stopped(int tid, int status) {
    int signal = WSTOPSIG(status), event = status >> 16;
    unsigned long child = 0;
    switch (event) {
    case PTRACE_EVENT_FORK:
    case PTRACE_EVENT_VFORK:
    case PTRACE_EVENT_CLONE:
        ptrace(PTRACE_GETEVENTMSG, tid, 0, &child);
        adopt(tid, child);
        go_on(tid, 0);
        return;
    case PTRACE_EVENT_EXEC:
        if (executed(tid))
            go_on(tid, 0);
        else
            ptrace(PTRACE_DETACH, tid, 0, 0);
        return;
    case PTRACE_EVENT_STOP:
        if (class_of[tid] == NONE) {
            for (int i = 0; i < STOPPED_NEW; i++)
                if (!waiting[i]) {
                    waiting[i] = tid;
                    return;
                }
            abort();
        }
        if (signal == SIGTRAP)
            go_on(tid, 0);
        else
            ptrace(PTRACE_LISTEN, tid, 0, 0);
        return;
    }
    if (signal == (SIGTRAP | 0x80)) {
        system_call(tid);
        signal = 0;
    }
    go_on(tid, signal);
}

int main(int count, char **words) {
    int gate[2], status, last = 1;
    char byte;
    if (count < 3 || pipe(gate) < 0)
        return 2;
    counts = words[1];
    int program = fork();
    if (program == 0) {
        close(gate[1]);
        if (read(gate[0], &byte, 1) == 1) {
            close(gate[0]);
            execv(words[2], words + 2);
        }
        _exit(127);
    }
    close(0), close(1); /* they are the program's */
    class_of[program] = HOST;
    long follow = PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL | PTRACE_O_TRACEEXEC | PTRACE_O_TRACEFORK |
                  PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE;
    if (ptrace(PTRACE_SEIZE, program, 0, follow) < 0 || ptrace(PTRACE_INTERRUPT, program, 0, 0) < 0) {
        fprintf(stderr, "tracer: ptrace: %s\n", strerror(errno));
        return 3;
    }
    if (write(gate[1], "", 1) != 1)
        return 2;
    close(gate[0]), close(gate[1]);
    for (int tid; (tid = waitpid(-1, &status, __WALL)) > 0;) {
        if (WIFSTOPPED(status)) {
            stopped(tid, status);
        } else {
            if (tid == program)
                last = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
            class_of[tid] = state_of[tid] = 0;
        }
    }
    return last;
}
