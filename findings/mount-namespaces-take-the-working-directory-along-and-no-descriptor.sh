#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Linux: what a process has of a directory when it enters a mount namespace of its own (unshare(2), CLONE_NEWNS).
#
# One would guess: an open descriptor names a directory for good, better than a path, which another can replace. So
# a helper in a mount namespace of its own is handed O_PATH descriptors of what it is to bind, and binds those: by
# open_tree(2) with AT_EMPTY_PATH, by /proc/self/fd/N as the source of mount(2), or by fchdir(2) and ".".
#
# What happens: each of the three is refused with EINVAL. The descriptor is still of the mount of the namespace that
# it was opened in, even one that the process itself opened a line before unshare(2); reading, listing and fstat(2)
# go on working, which hides it. The working directory (and the root) of the same process is moved to the copy of
# that mount: "." can be bound, though it is the very directory that the descriptor cannot be bound by. A descriptor
# of "." opened afterwards works, too, and so does the name.
#
# Why it matters: servers that set up mounts for others (container runtimes, mount brokers, sandboxes) cannot have
# sources passed as descriptors to get rid of races on names, or of names on file systems that do not answer. EINVAL
# names no reason. What remains: clone the tree where the descriptor is from (open_tree, OPEN_TREE_CLONE) and pass
# that, which takes CAP_SYS_ADMIN there; or fchdir(2) to it before the namespace is entered; or names.
#
# Seen with Linux 6.18, Python 3.11 (the standard library alone). Exit status 0: as described; 1: it has changed.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"
mkdir "$place/source" "$place/target"
: >"$place/source/file"
cat >"$place/look.py" <<'PYTHON'
import ctypes, errno, os, platform, sys

CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x00020000  # linux/sched.h
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18  # linux/mount.h
OPEN_TREE, OPEN_TREE_CLONE, AT_EMPTY_PATH = 428, 1, 0x1000
libc = ctypes.CDLL(None, use_errno=True)


def outcome(value):
    """Return "works", or the name of the error."""
    return "works" if value >= 0 else errno.errorcode[ctypes.get_errno()]


def clone(fd):
    return outcome(libc.syscall(OPEN_TREE, fd, b"", AT_EMPTY_PATH | OPEN_TREE_CLONE))


def main():
    print(f"Linux {platform.release()}, Python {platform.python_version()}, uid {os.getuid()}")
    source, target = os.path.realpath("source"), os.path.realpath("target")
    before = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    os.chdir("source")
    if libc.unshare(CLONE_NEWNS | (0 if os.getuid() == 0 else CLONE_NEWUSER)):
        raise SystemExit(f"unshare: {os.strerror(ctypes.get_errno())}")
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise SystemExit(f"mount: {os.strerror(ctypes.get_errno())}")
    found = {}

    def bind(path):
        return outcome(libc.mount(path.encode(), target.encode(), None, MS_BIND, None))

    found["list the old descriptor"] = "works" if os.listdir(before) == ["file"] else "differs"
    found["clone the old descriptor"] = clone(before)
    found["bind /proc/self/fd/OLD"] = bind(f"/proc/self/fd/{before}")
    found["bind the working directory"] = bind(".")
    after = os.open(".", os.O_PATH | os.O_DIRECTORY)
    found["clone a new descriptor of it"] = clone(after)
    found["bind the name"] = bind(source)
    os.fchdir(before)
    found["fchdir to the old one, bind ."] = bind(".")
    same = os.path.samestat(os.fstat(before), os.fstat(after))
    print(f"old and new are one directory: {same}")
    for what, how in found.items():
        print(f"{what:32}{how}")
    wanted = dict.fromkeys(found, "works")
    for what in ("clone the old descriptor", "bind /proc/self/fd/OLD", "fchdir to the old one, bind ."):
        wanted[what] = "EINVAL"
    return found != wanted or not same


sys.exit(main())
PYTHON
cd "$place"
/usr/bin/python3 look.py
