#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Linux: the last message of a process on a SOCK_SEQPACKET Unix socket, when the process has left a message unread.
#
# One would guess: an error of the connection is in its place in the order of what comes. What the peer has sent
# before its end is received first and then, once, "connection reset", as a stream socket does it.
#
# What happens: SOCK_SEQPACKET raises ECONNRESET first and hands out the queued messages afterwards, whole, and then
# the end of file. SOCK_STREAM, with the same calls, gives the message, ECONNRESET, the end of file. unix(7) names
# neither order.
#
# Why it matters: supervisors take SOCK_SEQPACKET for its whole messages, and the message before a death is the one
# that says why. A worker that tells its result and ends while a request for it is on its way is taken for one that
# was killed without a word by everybody who stops reading at the first error. The remedy is to read once more.
#
# Seen with Linux 6.18, Python 3.11 (the standard library alone). Exit status 0: as described; 1: it has changed.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat >"$place/last_word.py" <<'PYTHON'
import errno, os, platform, socket, sys

MESSAGE = b"the result"


def received(kind):
    """Return what three reads give when a child has told its result and left a request unread."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.send(b"a request that nobody reads")
    pid = os.fork()
    if pid == 0:
        theirs.send(MESSAGE)
        os._exit(0)
    theirs.close()
    os.waitpid(pid, 0)
    seen = []
    for _ in range(3):
        try:
            seen.append(ours.recv(99, socket.MSG_DONTWAIT).decode() or "end of file")
        except OSError as error:
            seen.append(errno.errorcode[error.errno])
    ours.close()
    return seen


print(f"Linux {platform.release()}, Python {platform.python_version()}")
stream, packets = received(socket.SOCK_STREAM), received(socket.SOCK_SEQPACKET)
print(f"SOCK_STREAM:    {', '.join(stream)}")
print(f"SOCK_SEQPACKET: {', '.join(packets)}")
message = MESSAGE.decode()
sys.exit(
    stream != [message, "ECONNRESET", "end of file"]
    or packets != ["ECONNRESET", message, "end of file"]
)
PYTHON
/usr/bin/python3 "$place/last_word.py"
