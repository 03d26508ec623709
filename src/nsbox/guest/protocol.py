# SPDX-License-Identifier: Apache-2.0
"""Frames between the host and PID 1 of an environment.

The first word on the control socket (SOCK_SEQPACKET) is the environment's own, while no guest code
has run: that it is locked in (`launcher.template`), or which step of its birth failed.

After that the host asks on it: a byte that names the operation, a byte that says where the request
is, and descriptors: a *channel* (SOCK_STREAM) that this operation alone uses, then stdio. A short
request follows in the same message, a longer one on the channel after its length. So many
operations may be under way at once, from many threads, and none can read another's answer.

Answers come from inside and are not trusted: fixed-size structs, checked lengths, never pickle.
"""

from __future__ import annotations

import struct

RUN = b"R"
"""Start a command: `run_request`. Descriptors: channel, then those `stdio` names."""
WRITE = b"W"
"""Write a file: `write_request`, then its bytes on the channel."""
READ = b"F"
"""Read a file: `read_request`; answers OK with the size of a part and whether more come, each
followed by its bytes."""
PLACE = b"L"
"""Write a file of one invocation: as WRITE, with a path relative to /tmp. Missing parent
directories are made, and an existing file is replaced."""
REMOVE = b"D"
"""Remove files written by PLACE: `names_request`. A missing file is no error."""

WORK = b"P"
"""The worker's descriptors: socket, stdout, stderr. The first message to an environment of a
function, sent with its birth; not answered."""
WORK_STREAMS = 3
"""Descriptors that come with WORK."""
END = b"N"
"""Wait for the worker's end: answered by EXITED, as a run is, without STARTED."""
RESET = b"Z"
"""Kill everything but PID 1 and the worker, and empty all writable places (`reset_request`); answer
OK."""
LEFT = b"K"
"""Tell what runs besides PID 1, the worker, and what other commands have started
(`left_request`); answer OK with how many processes, and threads besides the first of each that goes
on."""
TERMINATE = b"T"
"""SIGTERM to every process but PID 1; answer OK when all commands, and the worker, have ended."""

HERE = b"h"
"""The request is in this message."""
ON_CHANNEL = b"c"
"""The request is on the channel, after its length."""
LARGEST_MESSAGE = 4096
"""Bytes of a message on the control socket."""

LARGEST_PART = 1 << 18
"""Bytes of a part of a file."""

LENGTH = struct.Struct("!I")
LARGEST_REQUEST = 8 << 20
"""Bytes of one request; the kernel's own limit on argv + environment is 2 to 6 MiB (execve(2))."""

_RUN = struct.Struct("!BHHII")
TTY = 1
"""Flag of a run: open a terminal; the answer STARTED carries its master end."""
ANNOUNCE = 2
"""Flag of a run: answer STARTED as soon as it runs."""
_STDIO = 4
WORKER = 3
"""Descriptor number of a worker's socket. A run that is given one becomes the worker; its only
answer is STARTED."""
STREAMS = WORKER + 1
"""Descriptors a run may be given."""
_STDIO_OF = [
    [bool(bits >> number & 1) for number in range(STREAMS)] for bits in range(1 << STREAMS)
]
_WRITE = struct.Struct("!IQ")
_READ = struct.Struct("!Q")
_RESET = struct.Struct("!q?")
_LEFT = struct.Struct("!q?")

ANSWER = struct.Struct("!cqqq")
"""Kind and three numbers, 25 bytes."""
STARTED = b"S"
"""The command runs; numbers: its pid inside, 0, 0. With a terminal, its master descriptor."""
SWEPT = b"V"
"""As EXITED, of a command that ran when a reset was asked for, and was killed for that."""
EXITED = b"X"
"""The command has ended and so has every process it started; numbers: wait status, user and system
CPU time in microseconds of the reaped processes."""
SHOWN = b"Y"
"""SIGSYS has ended the command; with a pidfd of it, by which the host can tell its number outside
until it is reaped: after the host's `SEEN`, or `SEEN_DEADLINE`."""
FAILED = b"E"
"""The operation failed; numbers: errno, stage (`STAGES`), 0."""
OK = b"O"
"""A file operation succeeded; numbers: size, 0, 0."""

STAGES = (
    "exec", "cwd", "tty", "open", "kind", "size", "io", "request", "worker", "reset",
    "room", "place", "left",
)  # fmt: skip

SIGNAL = struct.Struct("!cq")
"""Host to init, on the channel of a running command."""
SIGNAL_MAIN = b"s"
"""Send the signal to the command's own process."""
SIGNAL_GROUP = b"g"
"""Send the signal to the process group that the command leads."""
SIGNAL_ALL = b"k"
"""SIGKILL the command and everything it started."""
SEEN = b"y"
"""The command that was shown need not be kept any longer; no signal."""
SEEN_DEADLINE = 0.1
"""Seconds for which a command that SIGSYS has ended is kept; meanwhile PID 1 does nothing else."""

_FAILURE = b"!"


def failure_word(step: str, errno: int, message: str) -> bytes:
    """Return the first message of an environment whose birth failed, at most `LARGEST_MESSAGE`."""
    return (_FAILURE + f"{step}\0{errno}\0{message}".encode(errors="replace"))[:LARGEST_MESSAGE]


def parse_failure(word: bytes) -> tuple[str, int, str] | None:
    """Return step, error number and message of a failed birth; None for any other first message."""
    if not word.startswith(_FAILURE):
        return None
    step, errno, message = word[1:].decode(errors="replace").split("\0", 2)
    return step, int(errno), message


def run_request(
    argv: list[bytes],
    environment: list[bytes],
    cwd: bytes,
    stdio: list[bool],
    flags: int,
    tty: tuple[int, int] | None,
) -> bytes:
    """Return the request to run `argv`; `environment` has ``NAME=value``, nothing holds a NUL."""
    flags |= TTY if tty else 0
    for number, given in enumerate(stdio):
        flags |= _STDIO << number if given else 0
    header = _RUN.pack(flags, *(tty or (0, 0)), len(argv), len(environment))
    variables = [variable.replace(b"=", b"\0", 1) for variable in environment]
    return header + b"\0".join([cwd, *argv, *variables])


def parse_run(
    data: bytes,
) -> tuple[int, tuple[int, int], list[bool], bytes, list[bytes], dict[bytes, bytes]]:
    """Return flags, terminal size, stdio, working directory, argv and environment of a request."""
    flags, rows, columns, count, _ = _RUN.unpack_from(data)
    words = data[_RUN.size :].split(b"\0")
    environment = dict(zip(words[count + 1 :: 2], words[count + 2 :: 2], strict=True))
    stdio = _STDIO_OF[flags // _STDIO % (1 << STREAMS)]
    return flags, (rows, columns), stdio, words[0], words[1 : count + 1], environment


def write_request(path: bytes, mode: int, size: int) -> bytes:
    """Return the request to write `size` bytes, which follow on the channel, to `path`."""
    return _WRITE.pack(mode, size) + path


def parse_write(data: bytes) -> tuple[bytes, int, int]:
    """Return path, mode and size of a write request."""
    mode, size = _WRITE.unpack_from(data)
    return data[_WRITE.size :], mode, size


def names_request(names: list[bytes]) -> bytes:
    """Return the request to remove files; no name holds a NUL."""
    return b"\0".join(names)


def parse_names(data: bytes) -> list[bytes]:
    """Return the names of a remove request."""
    return data.split(b"\0")


def reset_request(kept: int, places: list[bytes], *, has_commands: bool) -> bytes:
    """Return the request to reset.

    Args:
        kept: Pid inside of a process to keep besides the worker, or 0.
        places: Paths of tmpfs mounts to empty besides those of every environment.
        has_commands: Whether commands are run next, which are children of PID 1: then its own
            priority and affinity are checked, too.
    """
    return _RESET.pack(kept, has_commands) + b"\0".join(places)


def parse_reset(data: bytes) -> tuple[int, bool, list[bytes]]:
    """Return `kept`, `has_commands` and `places` of a reset request."""
    kept, has_commands = _RESET.unpack_from(data)
    places = data[_RESET.size :]
    return kept, has_commands, places.split(b"\0") if places else []


def left_request(worker: int, *, kill: bool) -> bytes:
    """Return the request to count the processes left running beside `worker`.

    Args:
        worker: Its pid inside; 0 is the worker that PID 1 has forked.
        kill: Kill them; the answer counts those killed, and the worker's further threads.
    """
    return _LEFT.pack(worker, kill)


def parse_left(data: bytes) -> tuple[int, bool]:
    """Return `worker` and `kill` of a left request."""
    worker, kill = _LEFT.unpack(data)
    return worker, kill


def read_request(path: bytes, most: int) -> bytes:
    """Return the request to read `path`, unless it has more than `most` bytes."""
    return _READ.pack(most) + path


def parse_read(data: bytes) -> tuple[bytes, int]:
    """Return path and most bytes of a read request."""
    return data[_READ.size :], _READ.unpack_from(data)[0]
