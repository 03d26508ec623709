# SPDX-License-Identifier: Apache-2.0
"""Network interfaces, by ioctl(2) (netdevice(7))."""

from __future__ import annotations

import sys

# The C half of `socket`, whose Python half costs 10 ms (selectors, enum).
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM
from _socket import socket as _Socket
from fcntl import ioctl

from nsbox.errors import SyscallError
from nsbox.linux import constants as c
from nsbox.linux.binding import encode


def set_link_up(name: str) -> None:
    """ioctl(2) SIOCGIFFLAGS and SIOCSIFFLAGS: set IFF_UP, as netdevice(7) has it."""
    raw = encode(name)
    if len(raw) >= c.IFNAMSIZ:
        raise ValueError(f"interface name too long: {name!r}")
    # struct ifreq: 16 bytes of name, then a union of 24 that begins with `short ifr_flags`.
    request = bytearray(40)
    request[: len(raw)] = raw
    # Any family will do; AF_UNIX is there without CONFIG_INET too.
    link_socket = _Socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        ioctl(link_socket.fileno(), c.SIOCGIFFLAGS, request)
        flags = int.from_bytes(request[16:18], sys.byteorder) | c.IFF_UP
        request[16:18] = flags.to_bytes(2, sys.byteorder)
        ioctl(link_socket.fileno(), c.SIOCSIFFLAGS, request)
    except OSError as err:
        raise SyscallError("ioctl", err.errno or 0, name) from err
    finally:
        link_socket.close()
