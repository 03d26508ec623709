# SPDX-License-Identifier: Apache-2.0
"""Frames between the host and PID 1 of an environment.

The host asks on the environment's control socket (SOCK_SEQPACKET): one byte that names the
operation, with descriptors: a *channel* (SOCK_STREAM) that this operation alone uses, then stdio.
The request itself follows on the channel: a 4-byte length and JSON. So many operations may be
under way at once, from many threads, and none can read another's answer.

Answers come from inside and are not trusted: fixed-size structs, checked lengths, never pickle.
"""

from __future__ import annotations

import struct

RUN = b"R"
"""Start a command. Descriptors: channel, then those `stdio` names."""
WRITE = b"W"
"""Write a file: request ``{path, mode, size}``, then `size` bytes."""
READ = b"F"
"""Read a file: request ``{path, most}``; answer OK with the size, then the bytes."""

LENGTH = struct.Struct("!I")
LARGEST_REQUEST = 8 << 20
"""Bytes of one request; the kernel's own limit on argv + environment is 2 to 6 MiB (execve(2))."""

ANSWER = struct.Struct("!cqqq")
"""Kind and three numbers, 25 bytes."""
STARTED = b"S"
"""The command runs; numbers: its pid inside, 0, 0. With a terminal, its master descriptor."""
EXITED = b"X"
"""The command is over and nothing of it is left; numbers: wait status, user, system microseconds
of what was reaped with it."""
FAILED = b"E"
"""The operation failed; numbers: errno, stage (`STAGES`), 0."""
OK = b"O"
"""A file operation succeeded; numbers: size, 0, 0."""

STAGES = ("exec", "cwd", "tty", "open", "kind", "size", "io", "request")

SIGNAL = struct.Struct("!cq")
"""Host to init, on the channel of a running command."""
SIGNAL_MAIN = b"s"
"""Send the signal to the command's own process."""
SIGNAL_ALL = b"k"
"""SIGKILL the command and everything it started."""
