# SPDX-License-Identifier: Apache-2.0
"""Files of an environment: its PID 1 writes and removes them, and the host opens none."""

from __future__ import annotations

from collections.abc import Iterable

from nsbox.errors import SyscallError
from nsbox.guest import protocol as p
from nsbox.link import Channel, Link
from nsbox.linux.descriptors import close_all

_CALLS = {"open": "openat2", "kind": "open (regular files only)", "size": "read"}
"""What failed at a stage, where it is not called as the stage."""


def send_file(link: Link, operation: bytes, path: bytes, data: bytes, mode: int) -> None:
    """Have PID 1 write a file: `operation` is WRITE or PLACE.

    Raises:
        SyscallError: It cannot; the file is named as `path`.
        EnvironmentDied: PID 1 is gone, or does not listen.
    """
    channel = link.ask(operation, p.write_request(path, mode, len(data)), [])
    with channel.socket:
        try:
            channel.socket.sendall(data)
        except BrokenPipeError:
            pass  # it has answered with an error already
        except OSError as error:
            raise link.died(error) from error
        expect_ok(link, channel, path.decode(errors="surrogateescape"))


def place_files(link: Link, files: Iterable[tuple[str, bytes]]) -> None:
    """Have PID 1 write files below /tmp; see `send_file`."""
    for name, data in files:
        send_file(link, p.PLACE, name.encode(), data, 0o644)


def remove_files(link: Link, names: Iterable[str]) -> Channel:
    """Ask PID 1 to remove what was placed; its answer is on the channel."""
    return link.ask(p.REMOVE, p.names_request([name.encode() for name in names]), [])


def expect_ok(link: Link, channel: Channel, path: str) -> int:
    """Return the number in PID 1's answer, or raise what it says went wrong with `path`."""
    try:
        kind, first, stage, _, fds = channel.receive_answer()
    except OSError as error:
        raise link.died(error) from error
    close_all(fds)
    if kind == p.FAILED:
        raise SyscallError(_CALLS.get(p.STAGES[stage], p.STAGES[stage]), first, path)
    return first
