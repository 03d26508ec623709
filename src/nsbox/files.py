# SPDX-License-Identifier: Apache-2.0
"""Files of an environment: written and read by its PID 1, inside."""

from __future__ import annotations

import os
from collections.abc import Callable

from nsbox.config import check_text
from nsbox.errors import ConfigError, EnvironmentDied, SyscallError
from nsbox.guest import protocol as p
from nsbox.link import Channel, Link
from nsbox.linux.descriptors import close_all


def write_file(get_link: Callable[[], Link], path: str, data: bytes, mode: int) -> None:
    """See `ExecutionEnvironment.write_file`."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ConfigError(f"data: must be bytes, got {type(data).__name__}; encode it")
    if isinstance(mode, bool) or not isinstance(mode, int) or mode & ~0o777:
        raise ConfigError(f"mode: must be permission bits such as 0o644, got {mode!r}")
    request = p.write_request(os.fsencode(_inside(path)), mode, len(data))
    link = get_link()
    channel = link.ask(p.WRITE, request, [])
    with channel.socket:
        try:
            channel.socket.sendall(data)
        except BrokenPipeError:
            pass  # it has answered with an error already
        except OSError as error:
            raise link.died(error) from error
        _expect_ok(link, channel, path)


def read_file(get_link: Callable[[], Link], path: str, max_bytes: int) -> bytes:
    """See `ExecutionEnvironment.read_file`."""
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
        raise ConfigError(f"max_bytes: must not be negative, got {max_bytes!r}")
    request = p.read_request(os.fsencode(_inside(path)), max_bytes)
    link = get_link()
    channel = link.ask(p.READ, request, [])
    with channel.socket:
        size = _expect_ok(link, channel, path)
        if not 0 <= size <= max_bytes:
            link.kill()
            raise EnvironmentDied("PID 1 sent a malformed answer")
        data = bytearray()
        while len(data) < size:
            chunk = channel.socket.recv(min(size - len(data), 1 << 20))
            if not chunk:
                break
            data += chunk
    return bytes(data)


def _inside(path: str) -> str:
    text = check_text(path, "path")
    if not text.startswith("/"):
        raise ConfigError(f"path: must be absolute inside the environment, got {path!r}")
    return text


def _expect_ok(link: Link, channel: Channel, path: str) -> int:
    try:
        kind, first, stage, _, fds = channel.receive_answer()
    except OSError as error:
        raise link.died(error) from error
    close_all(fds)
    if kind == p.FAILED:
        what = {"open": "openat2", "kind": "open (regular files only)", "size": "read"}
        raise SyscallError(what.get(p.STAGES[stage], p.STAGES[stage]), first, path)
    return first
