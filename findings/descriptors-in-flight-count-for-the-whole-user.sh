#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Linux: descriptors sent over Unix sockets (SCM_RIGHTS) and not yet received.
#
# One would guess: a process may have as many of its descriptors in flight as its own limit of open
# files says, and what another process has sent is that one's affair.
#
# What happens: all processes of a user id have one count. It is compared with the soft RLIMIT_NOFILE of
# whoever sends next. So a process that has sent nothing at all gets ETOOMANYREFS ("Too many references:
# cannot splice") because another process of its user has unread messages somewhere, and the same call
# succeeds as soon as the sender raises its own soft limit, though nothing in flight has changed.
# unix(7) has the error, but says neither whose descriptors count nor whose limit is taken.
#
# Why it matters: a supervisor and the workers it feeds by SCM_RIGHTS mostly run as one user. A supervisor
# with the usual 1,024 is the first to fail when one worker leaves messages unread; the remedy is in its
# own hands (setrlimit), and the text of the error leads elsewhere.
#
# Seen with Linux 6.18, Python 3.11 (the standard library alone). Exit status 0: as described; 1: it has changed.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
chmod 755 "$place"
cat >"$place/flight.py" <<'PYTHON'
import array, errno, os, platform, resource, socket, sys

HOARD, SMALL = 100, 64


def send_one(sender):
    """Send one descriptor; return the name of the error, or ''."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
    try:
        sender.sendmsg([b"x"], rights)
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""


def main():
    print(f"Linux {platform.release()}, Python {platform.python_version()}, uid {os.getuid()}")
    told, tell = os.pipe()
    release, released = os.pipe()
    if os.fork() == 0:  # the other process: HOARD descriptors in flight, unread
        os.close(released)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        failures = [name for _ in range(HOARD) if (name := send_one(ours))]
        os.write(tell, str(len(failures)).encode() + b"\n")
        os.read(release, 1)
        os._exit(0)
    os.close(release)
    hoard_failures = int(os.read(told, 16))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SMALL, hard))
    first = send_one(sender)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    second = send_one(sender)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SMALL, hard))
    os.close(released)
    os.wait()
    third = send_one(sender)
    print(f"another process has {HOARD} in flight ({hoard_failures} refused)")
    print(f"this one's first, soft limit {SMALL}: {first or 'sent'}")
    print(f"the same, soft limit 1024: {second or 'sent'}")
    print(f"soft limit {SMALL}, the other process gone: {third or 'sent'}")
    return [hoard_failures, first, second, third] != [0, "ETOOMANYREFS", "", ""]


sys.exit(main())
PYTHON
# CAP_SYS_RESOURCE and CAP_SYS_ADMIN are exempt: as root it runs under a user id that nobody else has.
if [ "$(id -u)" -eq 0 ]; then
    exec_as="setpriv --reuid=54321 --regid=54321 --clear-groups"
else
    exec_as=
fi
# shellcheck disable=SC2086 # a command with options, or nothing
$exec_as /usr/bin/python3 "$place/flight.py"
