# SPDX-License-Identifier: Apache-2.0
"""Files of an environment: its PID 1 writes and removes them, and the host opens none; resets."""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Mapping

from nsbox.errors import ConfigError, EnvironmentStateError, NsboxError, SyscallError
from nsbox.guest import protocol as p
from nsbox.supervisor.channel import BrokenAnswer, Channel
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.values.config import Config, check_text
from nsbox.values.invocation import NOTHING, LeftRunning

_CALLS = {
    "open": ("openat2", ""),
    "kind": ("openat2", "it is no regular file"),
    "size": ("read", "it has more than max_bytes"),
    "place": ("openat", ""),
}
"""What failed at a stage, and why it did; at another one it was the transfer itself."""
_PROGRAM_MAX = 1 << 24  # bytes of a program that is looked at
_PT_INTERP, _PATH_MAX = 3, 4096  # elf.h; linux/limits.h
_INTERPRETER_MAX = 256  # BINPRM_BUF_SIZE, linux/binfmts.h
_OWN = 2  # processes that are nsbox's: PID 1 and the worker


def write_file(
    get_connection: Callable[[], EnvironmentConnection], path: str, data: bytes, mode: int
) -> None:
    """See `ExecutionEnvironment.write_file`."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ConfigError(f"data: must be bytes, got {type(data).__name__}; encode it")
    if isinstance(mode, bool) or not isinstance(mode, int) or mode & ~0o777:
        raise ConfigError(f"mode: must be permission bits such as 0o644, got {mode!r}")
    name = os.fsencode(_inside(path))
    send_file(get_connection(), p.WRITE, name, data, mode)


def read_file(
    get_connection: Callable[[], EnvironmentConnection], path: str, max_bytes: int
) -> bytes:
    """See `ExecutionEnvironment.read_file`."""
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ConfigError(f"max_bytes: must not be negative, got {max_bytes!r}")
    max_bytes = min(max_bytes, sys.maxsize)
    request = p.read_request(os.fsencode(_inside(path)), max_bytes)
    connection = get_connection()
    parts: list[bytearray] = []
    left, more = max_bytes, 1
    with connection.ask(p.READ, request, []) as channel:
        while more:
            size, more = expect_ok(connection, channel, "read", path)
            if not (0 <= size <= min(left, p.LARGEST_PART) and more in (0, size > 0)):
                raise connection.died(BrokenAnswer("PID 1 sent a malformed answer"))
            try:
                parts.append(channel.receive_data(size))
            except OSError as error:
                raise connection.failed(error, "recvfrom") from error
            left -= size
    return b"".join(parts)


def missing_interpreter(connection: EnvironmentConnection, path: str) -> str:
    """Say what is missing for a program that execve(2) did not find though it is there, or ""."""
    try:
        data = read_file(lambda: connection, path, _PROGRAM_MAX)
    except (NsboxError, OSError):
        return ""  # it is not there, or too large to look
    if data.startswith(b"#!"):
        # Of all white space only these two end the name (fs/binfmt_script.c).
        first = data[2:_INTERPRETER_MAX].partition(b"\n")[0].replace(b"\t", b" ").strip(b" ")
        name = first.partition(b" ")[0]
        where = "in its first line" + name.endswith(b"\r") * " (which ends in CR LF, as on Windows)"
        return f"its interpreter, {os.fsdecode(name)!r} {where}, does not exist"
    try:
        name = _loader_of(data)
    except (struct.error, OverflowError):
        return ""  # it is cut off
    return f"the loader it is linked for, {os.fsdecode(name)!r}, does not exist" if name else ""


def _loader_of(data: bytes) -> bytes:
    """Return PT_INTERP of an ELF file (elf(5)), b"" where there is none."""
    if data[:4] != b"\x7fELF" or data[5:6] != b"\1":  # ELFDATA2LSB
        return b""
    is_64 = data[4] == 2
    (table,) = struct.unpack_from("<Q" if is_64 else "<I", data, 32 if is_64 else 28)
    size, count = struct.unpack_from("<HH", data, 54 if is_64 else 42)
    for entry in range(table, table + size * count, size or 1):
        if struct.unpack_from("<I", data, entry) == (_PT_INTERP,):
            form, at = ("<Q16xQ", entry + 8) if is_64 else ("<I8xI", entry + 4)
            offset, length = struct.unpack_from(form, data, at)
            return data[offset : offset + min(length, _PATH_MAX)].rstrip(b"\0")
    return b""


def _inside(path: str) -> str:
    text = check_text(path, "path")
    if not text.startswith("/"):
        raise ConfigError(f"path: must be absolute inside the environment, got {path!r}")
    return text


def send_file(
    connection: EnvironmentConnection, operation: bytes, path: bytes, data: bytes, mode: int
) -> None:
    """Have PID 1 write a file: `operation` is WRITE or PLACE.

    Raises:
        SyscallError: It cannot; the file is named as `path`.
        EnvironmentDied: PID 1 is gone, or does not listen.
    """
    with connection.ask(operation, p.write_request(path, mode, len(data)), []) as channel:
        try:
            channel.send_all(data)
        except OSError as error:
            raise connection.failed(error, "sendto") from error
        expect_ok(connection, channel, "write", path.decode(errors="surrogateescape"))


def place_files(connection: EnvironmentConnection, files: Mapping[str, bytes]) -> None:
    """Have PID 1 write files below /tmp; see `send_file`."""
    for name, data in files.items():
        send_file(connection, p.PLACE, name.encode(), data, 0o644)


def reset_request(config: Config, kept: int | None = None) -> bytes:
    """Return what PID 1 is sent with RESET, so that it takes away everything that was left.

    Args:
        config: What the environment was made from: its tmpfs mounts are emptied too.
        kept: Of a handler's: the process that serves it, which stays; 0 for PID 1's own worker.
    """
    places = [os.fsencode(m.destination) for m in config.mounts if m.type == "tmpfs"]
    return p.reset_request(kept or 0, places, has_commands=kept is None)


def reset(connection: EnvironmentConnection, config: Config) -> None:
    """Have PID 1 take away everything that was left, and wait until it is gone.

    Raises:
        EnvironmentDied, EnvironmentStateError: It could not; the environment was killed.
    """
    with connection.ask(p.RESET, reset_request(config), []) as channel:
        try:
            kind, error, stage = channel.receive_numbers()
        except OSError as cause:
            raise connection.died(cause) from cause
    check_reset(connection, kind, error, stage)


def check_reset(connection: EnvironmentConnection, kind: bytes, error: int, stage: int) -> None:
    """Take PID 1's answer to RESET or REMOVE.

    Raises:
        EnvironmentStateError: Something could not be removed; the environment was killed.
    """
    if kind != p.OK:
        why = f"{p.STAGES[stage]}: {os.strerror(error)}" if kind == p.FAILED else "no answer"
        if kind == p.FAILED and p.STAGES[stage] == "worker":
            why = "its worker had ended"
        connection.kill(f"it could not be reset ({why})")
        raise EnvironmentStateError(
            f"environment {connection.env_id} could not be reset ({why}) and was killed; "
            "make a new one"
        )


def check_left(
    connection: EnvironmentConnection, kind: bytes, first: int, second: int
) -> LeftRunning | None:
    """Return what ran, or was killed and of what there are threads still: PID 1's answer to LEFT.

    None: the worker has ended, and with it all that it had left.

    Raises:
        EnvironmentDied: It could not be told, or killed; the environment was killed.
    """
    if kind == p.FAILED and p.STAGES[second] == "worker":
        return None
    if kind != p.OK or first < 0 or second < 0:
        why = os.strerror(first) if kind == p.FAILED else "no answer"
        connection.kill(f"what is left running in it is not known ({why})")
        raise connection.death()
    return LeftRunning(first, second) if first or second else NOTHING


def look_at_left(connection: EnvironmentConnection) -> LeftRunning | None:
    """Return what runs besides PID 1 and the worker, as its cgroup counts; None: it does not."""
    try:
        tasks = None if connection.reader is None else connection.reader.tasks()
    except SyscallError:
        return None  # the cgroup has just been removed
    if tasks is None:
        return None
    processes, threads = tasks
    return LeftRunning(max(0, processes - _OWN), max(0, threads - processes))


def expect_ok(
    connection: EnvironmentConnection, channel: Channel, call: str, path: str
) -> tuple[int, int]:
    """Return the numbers in PID 1's answer, or raise what it says went wrong with `path`.

    `call` is what transfers the bytes.
    """
    try:
        kind, first, second = channel.receive_numbers()
    except OSError as error:
        raise connection.failed(error) from error
    if kind == p.FAILED:
        name, note = _CALLS.get(p.STAGES[second], (call, ""))
        raise SyscallError(name, first, path, note)
    if kind != p.OK:
        raise connection.died(BrokenAnswer("PID 1 sent a malformed answer"))
    return first, second
