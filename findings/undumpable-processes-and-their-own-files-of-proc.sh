#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Linux: a process that is not dumpable (prctl PR_SET_DUMPABLE 0, or after a set-id program) and /proc/self.
#
# One would guess: not being dumpable keeps others of the same user id out, while a process can always look at
# itself; or, if the files are root's from then on (proc(5)), that none of them can be read by an ordinary user.
#
# What happens: neither. Whether memory may be looked at is asked with an exception for the process itself, but
# the owner of the files, root from then on, comes first, and their modes differ. So of its own the process still
# opens maps, smaps and stat (0444), and lists task and fd (0500, which has an exception of its own); it is refused
# pagemap, mem, environ, auxv, io and personality (0400): EACCES. What smaps sums up it may read, page by page in
# pagemap it may not. A descriptor that was opened before is of use as ever.
#
# Why it matters: hardened daemons make themselves undumpable, and libraries in them read /proc/self: what looks
# at pagemap loses its numbers, a crash handler or loader its auxv, a debugger of itself its mem, with EACCES "on
# itself" where the neighbouring file opens. The remedy is an order: open first, then become undumpable.
#
# Seen with Linux 6.18, Python 3.11 (the standard library alone). Exit status 0: as described; 1: it has changed.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"
cat >"$place/self.py" <<'PYTHON'
import ctypes, errno, os, platform, sys

PR_SET_DUMPABLE = 4  # linux/prctl.h
READ = ("maps", "smaps", "stat")
REFUSED = ("pagemap", "mem", "environ", "auxv", "io", "personality")


def try_open(name):
    """Return the name of the error, or ''."""
    try:
        os.close(os.open(f"/proc/self/{name}", os.O_RDONLY))
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


def try_list(name):
    try:
        os.listdir(f"/proc/self/{name}")
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


def look():
    found = {name: try_open(name) for name in (*READ, *REFUSED)}
    return found | {f"{name}/": try_list(name) for name in ("task", "fd")}


def main():
    print(f"Linux {platform.release()}, Python {platform.python_version()}, uid {os.getuid()}")
    before = look()
    early = os.open("/proc/self/pagemap", os.O_RDONLY)
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    after = look()
    entry = os.pread(early, 8, 0)
    owner = os.stat("/proc/self/maps").st_uid
    print(f"files are of uid {owner} afterwards")
    for name in after:
        print(f"{name:12} before: {before[name] or 'opened':8} after: {after[name] or 'opened'}")
    print(f"pagemap, opened before: {len(entry)} bytes read")
    wanted = dict.fromkeys((*READ, "task/", "fd/"), "") | dict.fromkeys(REFUSED, "EACCES")
    return any(before.values()) or after != wanted or owner != 0 or len(entry) != 8


sys.exit(main())
PYTHON
# Root may open everything whoever owns it.
if [ "$(id -u)" -eq 0 ]; then
    exec_as="setpriv --reuid=54321 --regid=54321 --clear-groups"
else
    exec_as=
fi
# shellcheck disable=SC2086 # a command with options, or nothing
$exec_as /usr/bin/python3 "$place/self.py"
