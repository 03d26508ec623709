/* SPDX-License-Identifier: Apache-2.0
 *
 * An image of this process's memory, and how its clones give back what they have copied of it for nothing.
 * What it is for is told by nsbox/linux/image.py.
 *
 * It is C since CPython writes to its own objects between any two of its instructions: here nothing
 * but the stack is written to. Both functions want a process of one thread, and block all signals.
 * They allocate nothing, and touch no mapping that has the stack or thread-local storage in it, where
 * the kernel writes by itself (rseq(2)) and errno is. The library is linked with -z now, for the
 * linker's tables would be written to at the first call of a function.
 */
#define _GNU_SOURCE
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef __GLIBC__
#error "known of glibc alone: its malloc does not take memory for zeroed after MADV_DONTNEED"
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22 /* Linux 5.14; older ones answer EINVAL, and pages come one by one */
#endif

enum {
    MOST = 64,              /* mappings */
    SMALLEST = 64 << 10,    /* bytes of a mapping that is worth it */
    BUFFER = 2048,          /* bytes */
    CHUNK = 256,            /* pages */
};
/* Of an entry of /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst). */
static const uint64_t IS_PRESENT = 1ULL << 63, IS_OF_FILE = 1ULL << 61;

struct mapping {
    unsigned long begin, end, offset, inode;
    char mode[5];
    const char *name; /* in the reader's line */
};

struct reader {
    int fd;
    size_t filled, taken;
    char buffer[BUFFER];
    char line[512]; /* what is longer is cut: no name that matters is */
};

/* 1 with the next line, 0 at the end, -1 with errno. */
static int next_line(struct reader *r)
{
    size_t length = 0;
    for (;;) {
        if (r->taken == r->filled) {
            ssize_t count = read(r->fd, r->buffer, BUFFER);
            if (count < 0)
                return -1;
            if (count == 0)
                return 0;
            r->filled = count;
            r->taken = 0;
        }
        char c = r->buffer[r->taken++];
        if (c == '\n') {
            r->line[length] = 0;
            return 1;
        }
        if (length < sizeof r->line - 1)
            r->line[length++] = c;
    }
}

/* "begin-end mode offset major:minor inode name", of proc_pid_maps(5); 0, and `m` as it was, for any other. */
static int parse(const char *line, struct mapping *m)
{
    struct mapping new;
    char *at;
    new.begin = strtoul(line, &at, 16);
    if (at == line || *at != '-')
        return 0;
    new.end = strtoul(at + 1, &at, 16);
    if (*at != ' ' || strlen(at) < 6)
        return 0;
    memcpy(new.mode, at + 1, 4);
    new.mode[4] = 0;
    new.offset = strtoul(at + 5, &at, 16);
    strtoul(at, &at, 16);
    if (*at != ':')
        return 0;
    strtoul(at + 1, &at, 16);
    new.inode = strtoul(at, &at, 10);
    new.name = at + strspn(at, " ");
    *m = new;
    return 1;
}

static int holds(const struct mapping *m, const void *address)
{
    return m->begin <= (unsigned long)address && (unsigned long)address < m->end;
}

/* Whether the kernel writes there by itself, or this code does. */
static int is_in_use(const struct mapping *m)
{
    char local;
    return holds(m, &local) || holds(m, &errno) || holds(m, __builtin_thread_pointer());
}

/* Whether all flags of a "VmFlags:" line are those of plain memory that is forked as it is, and not
 * locked, wiped, left out or watched by somebody (proc_pid_smaps(5)). */
static int is_plain(const char *flags)
{
    static const char known[] = " rd wr mr mw me ac sd nh hg ";
    for (;;) {
        flags += strspn(flags, " ");
        if (!*flags)
            return 1;
        char word[5] = {' ', flags[0], flags[1], ' ', 0};
        if (!flags[1] || !strstr(known, word))
            return 0;
        flags += 2;
    }
}

/* Find what a process has of its own that is worth an image: a number of mappings, or -1. */
static int find(struct mapping *found)
{
    struct reader r = {.fd = open("/proc/self/smaps", O_RDONLY | O_CLOEXEC)};
    struct mapping m = {0};
    int count = 0, is_wanted = 0, state;
    if (r.fd < 0)
        return -1;
    while ((state = next_line(&r)) > 0) {
        if (parse(r.line, &m)) {
            is_wanted = !strcmp(m.mode, "rw-p") && m.end - m.begin >= SMALLEST && !is_in_use(&m);
            m.name = NULL;
        } else if (is_wanted && !strncmp(r.line, "VmFlags:", 8)) {
            if (is_plain(r.line + 8) && count < MOST)
                found[count++] = m;
            is_wanted = 0;
        }
    }
    int error = errno;
    close(r.fd);
    errno = error;
    return state < 0 ? -1 : count;
}

/* Write all but pages of zeros: a quarter. Most are of no use yet. */
static int write_used(int fd, const struct mapping *m, unsigned long offset, unsigned long page)
{
    for (const char *at = (const char *)m->begin; at < (const char *)m->end; at += page, offset += page) {
        if (!*at && !memcmp(at, at + 1, page - 1))
            continue;
        ssize_t count = pwrite(fd, at, page, offset);
        if (count != (ssize_t)page) {
            errno = count < 0 ? errno : EIO;
            return -1;
        }
    }
    return 0;
}

/* Have in the page tables what was written, or each clone would have to ask for it page by page. A page more is
 * work at each birth and each end of a clone. */
static void populate(int fd, char *place, off_t begin, off_t end)
{
    off_t from = begin;
    while ((from = lseek(fd, from, SEEK_DATA)) >= 0 && from < end) {
        off_t to = lseek(fd, from, SEEK_HOLE);
        madvise(place + (from - begin), (to < end ? to : end) - from, MADV_POPULATE_READ);
        from = to;
    }
}

/* Put this process's memory into the file `fd`, seal that, and map it in the memory's place. Until all
 * of the file is written and sealed nothing has changed. Gives its bytes, or -1. */
static long take(int fd)
{
    struct mapping found[MOST];
    unsigned long size = 0, at = 0, page = sysconf(_SC_PAGESIZE);
    int count = find(found);
    if (count <= 0) {
        errno = count ? errno : ENOENT;
        return -1;
    }
    for (int i = 0; i < count; i++)
        size += found[i].end - found[i].begin;
    if (ftruncate(fd, size) < 0)
        return -1;
    for (int i = 0; i < count; at += found[i].end - found[i].begin, i++)
        if (write_used(fd, &found[i], at, page) < 0)
            return -1;
    if (fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0)
        return -1;
    /* What clones compare with. */
    void *view = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (view == MAP_FAILED)
        return -1;
    at = 0;
    for (int i = 0; i < count; at += found[i].end - found[i].begin, i++) {
        void *place = (void *)found[i].begin;
        size_t length = found[i].end - found[i].begin;
        if (mmap(place, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, at) == MAP_FAILED)
            return -1;
        populate(fd, place, at, at + length);
    }
    /* The file's other pages count as this process's, and not as those of the first clone that needs one. */
    madvise(view, size, MADV_POPULATE_READ);
    madvise(view, size, MADV_DONTNEED);
    return size;
}

/* Tell which pages from an address on are copies of this process's own, or may be: all of them where the
 * process is hidden even from itself (PR_SET_DUMPABLE), as far as files of mode 0400 go. */
static void look(int pagemap, unsigned long address, unsigned long page, uint64_t *entries)
{
    off_t at = address / page * sizeof *entries;
    if (pagemap < 0 || pread(pagemap, entries, CHUNK * sizeof *entries, at) < 0)
        for (int i = 0; i < CHUNK; i++)
            entries[i] = IS_PRESENT;
}

/* Give back the pages of a mapping of the image that are as they are in the image. */
static long give_back(const struct mapping *m, const char *view, int pagemap, unsigned long page)
{
    uint64_t entries[CHUNK];
    unsigned long at = m->begin, from = 0, i = CHUNK;
    long given = 0;
    for (; at <= m->end; at += page, i++) {
        int is_same = 0;
        if (at < m->end) {
            if (i == CHUNK) {
                look(pagemap, at, page, entries);
                i = 0;
            }
            is_same = (entries[i] & (IS_PRESENT | IS_OF_FILE)) == IS_PRESENT &&
                      !memcmp((void *)at, view + m->offset + (at - m->begin), page);
        }
        if (is_same) {
            from = from ? from : at;
        } else if (from) {
            if (!madvise((void *)from, at - from, MADV_DONTNEED)) {
                given += at - from;
                madvise((void *)from, at - from, MADV_POPULATE_READ);
            }
            from = 0;
        }
    }
    return given;
}

/* In a clone: give back what has come to be as it was. Mappings are the image's if they say so now. */
static long drop(unsigned long inode, int given_pagemap)
{
    struct mapping found[MOST], m, view = {0};
    int count = 0, state;
    struct reader r = {.fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC)};
    if (r.fd < 0)
        return -1;
    while ((state = next_line(&r)) > 0) {
        if (!parse(r.line, &m))
            continue;
        /* Calls under way for which the kernel may write to any page. */
        if (strstr(m.name, "[aio]") || strstr(m.name, "[io_uring]")) {
            count = 0;
            break;
        }
        if (m.inode != inode || strncmp(m.name, "/memfd:nsbox-image", 18))
            continue;
        if (!strcmp(m.mode, "r--p") && m.offset == 0 && m.end - m.begin > view.end - view.begin)
            view = m;
        else if (!strcmp(m.mode, "rw-p") && count < MOST && !is_in_use(&m))
            found[count++] = m;
    }
    int error = errno;
    close(r.fd);
    errno = error;
    if (state < 0)
        return -1;
    long given = 0;
    unsigned long size = view.end - view.begin, page = sysconf(_SC_PAGESIZE);
    int pagemap = given_pagemap;
    if (pagemap < 0)
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    for (int i = 0; i < count; i++)
        if (found[i].offset + (found[i].end - found[i].begin) <= size)
            given += give_back(&found[i], (const char *)view.begin, pagemap, page);
    if (pagemap >= 0 && pagemap != given_pagemap)
        close(pagemap);
    madvise((void *)view.begin, size, MADV_DONTNEED); /* its page tables, too, from Linux 6.14 on */
    return given;
}

static PyObject *answer(long result)
{
    return result < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(result);
}

static PyObject *py_take(PyObject *module, PyObject *args)
{
    int fd;
    sigset_t all, before;
    if (!PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    long size = take(fd);
    int error = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return answer(size);
}

static PyObject *py_drop(PyObject *module, PyObject *args)
{
    unsigned long inode;
    int pagemap;
    sigset_t all, before;
    if (!PyArg_ParseTuple(args, "ki", &inode, &pagemap))
        return NULL;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before);
    long given = drop(inode, pagemap);
    int error = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = error;
    return answer(given);
}

static PyMethodDef methods[] = {
    {"take", py_take, METH_VARARGS, "take(fd): bytes put into the memfd, and mapped from it now"},
    {"drop", py_drop, METH_VARARGS, "drop(inode, pagemap or -1): bytes of the memfd's mappings that were as in it"},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_image", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__image(void)
{
    return PyModuleDef_Init(&module);
}
