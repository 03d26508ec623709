# SPDX-License-Identifier: Apache-2.0
"""JSON echoes without a sandbox: two Python processes and a socket, a program, a process pool."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Self

from benchmarks.peers import ENVIRONMENT, UnavailableError

ANSWER_ONE_LINE = (
    "import json, sys\n"
    "sys.stdout.write(json.dumps(json.loads(sys.stdin.readline())) + '\\n')\n"
    "sys.stdout.flush()\n"
)
_LENGTH = struct.Struct("=I")
_FIRST = 1 << 16
# What the peer executes: an interpreter without site, as nsbox's own processes are.
_PEER = """
import json, socket, struct, sys
LENGTH, FIRST = struct.Struct("=I"), 1 << 16

def receive(sock):
    data = sock.recv(FIRST)
    if not data:
        sys.exit()
    size, = LENGTH.unpack_from(data)
    body = memoryview(bytearray(size))
    at = len(data) - LENGTH.size
    body[:at] = data[LENGTH.size:]
    while at < size:
        at += sock.recv_into(body[at:])
    return body.obj

sock = socket.socket(fileno=int(sys.argv[1]))
while True:
    answer = json.dumps(json.loads(receive(sock))).encode()
    sock.sendall(LENGTH.pack(len(answer)) + answer)
"""


def interpreter() -> str:
    """The Python that every peer executes: this one, if a sandbox with only /usr has it."""
    own = os.path.realpath(sys.executable)
    for program in (own, os.path.realpath("/usr/bin/python3")):
        if program.startswith("/usr/") and os.access(program, os.X_OK):
            return program
    raise UnavailableError("there is no Python below /usr that a sandbox could execute")


def answer_argv() -> list[str]:
    """A fresh interpreter that answers one line of JSON with the same value."""
    return [interpreter(), "-I", "-S", "-c", ANSWER_ONE_LINE]


def subprocess_answer(argv: Sequence[str], event: str) -> float:
    """`subprocess.Popen`, start to the answer; microseconds. The end is waited for afterwards."""
    pipe = subprocess.PIPE
    begin = time.perf_counter_ns()
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=ENVIRONMENT) as process:
        if process.stdin is None or process.stdout is None:
            raise UnavailableError("the process has no pipes")
        process.stdin.write(event.encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        duration = time.perf_counter_ns() - begin
    if json.loads(answer) != json.loads(event):
        raise UnavailableError(f"the answer was {answer[:100]!r}")
    return duration / 1e3


class SocketEcho:
    """A bare JSON echo: a Unix stream socket, four bytes of length, json at both ends."""

    def __init__(self) -> None:
        """Starts the peer."""
        self._socket, theirs = socket.socketpair()
        with theirs:
            argv = [interpreter(), "-I", "-S", "-c", _PEER, str(theirs.fileno())]
            self._process = subprocess.Popen(argv, pass_fds=[theirs.fileno()])

    def call(self, event: Any) -> Any:  # noqa: ANN401 - a JSON value
        """One round trip, JSON value to JSON value."""
        request = json.dumps(event).encode()
        self._socket.sendall(_LENGTH.pack(len(request)) + request)
        data = self._socket.recv(_FIRST)
        if not data:
            raise UnavailableError("the echo process has ended")
        (size,) = _LENGTH.unpack_from(data)
        answer = bytearray(size)
        body = memoryview(answer)
        at = len(data) - _LENGTH.size
        body[:at] = data[_LENGTH.size :]
        while at < size:
            at += self._socket.recv_into(body[at:])
        return json.loads(answer)

    def __enter__(self) -> Self:
        """The echo itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the peer: it sees end of file."""
        self._socket.close()
        self._process.wait()


def identity(event: Any) -> Any:  # noqa: ANN401 - a JSON value
    """What the worker of a pool does."""
    return event


class PoolEcho:
    """`ProcessPoolExecutor` with warm workers."""

    def __init__(self, workers: int = 1) -> None:
        """Starts the workers. Not by fork: this process may have threads by now."""
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=context)
        # One is started for each call that finds none idle.
        for future in [self._pool.submit(identity, None) for _ in range(64 * workers)]:
            future.result()

    def call(self, event: Any) -> Any:  # noqa: ANN401 - a JSON value
        """One round trip through the pool."""
        return self._pool.submit(identity, event).result()

    def __enter__(self) -> Self:
        """The echo itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the worker."""
        self._pool.shutdown()
