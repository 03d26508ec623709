# SPDX-License-Identifier: Apache-2.0
"""Attacks on the system call filter: high bits, foreign ABIs, families that escape namespaces."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from tests.support import attack, i386_only, x86_64_only

import nsbox

pytestmark = [pytest.mark.needs("userns", "seccomp"), x86_64_only]

AF_ALG, AF_VSOCK, AF_PACKET, AF_NETLINK, AF_KEY, AF_BLUETOOTH, AF_XDP = 38, 40, 17, 16, 15, 31, 44

PROFILES = ["strict", "default", "docker"]

# mov eax, NUMBER; int 0x80 or syscall; ret
INT80 = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # i386 getpid
X32 = b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"  # x32 getpid
# push rbx; mov eax, 102; mov ebx, 1 (SYS_SOCKET); xor ecx, ecx; int 0x80; pop rbx; ret
SOCKETCALL = b"\x53\xb8\x66\x00\x00\x00\xbb\x01\x00\x00\x00\x31\xc9\xcd\x80\x5b\xc3"


@pytest.mark.parametrize("profile", PROFILES)
def test_address_families_with_and_without_high_bits(
    make_env: Callable[..., nsbox.ExecutionEnvironment], profile: str
) -> None:
    found = attack(
        make_env(seccomp=profile),
        """
        answer = {}
        for family in families:
            for high in (0, 1 << 32, 0xdeadbeef << 32):
                for kind in (1, 2, 3, 5):
                    answer[f'{family} {high:x} {kind}'] = syscall(41, high | family, kind, 0)
                pair = ctypes.byref((ctypes.c_int * 2)())
                answer[f'pair {family} {high:x}'] = syscall(53, high | family, 1, 0, pair)
        """,
        families=[AF_ALG, AF_VSOCK],
    )
    pairs = {found.pop(name) for name in list(found) if name.startswith("pair")}
    # EPERM and not EAFNOSUPPORT: it is the filter that says no, on a kernel that has them as well.
    assert set(found.values()) == {"EPERM"}, found
    # Docker's list does not look at the family of a pair; these families can make none.
    unsupported = {"EAFNOSUPPORT", "ENOTSUP", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT"}
    assert pairs <= {"EPERM"} | (unsupported if profile == "docker" else set())


def test_other_families_are_refused(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        answer = {f: [syscall(41, f, 3, 0), syscall(41, f | 1 << 32, 3, 0)] for f in families}
        answer['netlink audit'] = [syscall(41, 16, 3, 9), syscall(41, 16 | 1 << 32, 3, 9 | 1 << 32)]
        """,
        families=[AF_PACKET, AF_KEY, AF_BLUETOOTH, AF_XDP],
    )
    audit = found.pop("netlink audit")
    for results in found.values():
        assert set(results) <= {"EPERM", "EAFNOSUPPORT", "ENOSYS"}, found
    assert audit == ["EPROTONOSUPPORT"] * 2, "as libaudit goes on with"


def test_allowed_families_work(env: nsbox.ExecutionEnvironment) -> None:
    code = "answer = [syscall(41, f, 1, 0) for f in (1, 2, 10)] + [syscall(41, 16, 3, 0)]"
    found = attack(env, code)
    assert all(isinstance(fd, int) or fd == "EAFNOSUPPORT" for fd in found), found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "code",
    [
        pytest.param(INT80, id="i386", marks=i386_only),
        pytest.param(X32, id="x32"),
        pytest.param(SOCKETCALL, id="socketcall", marks=i386_only),
    ],
)
def test_foreign_abis_are_killed(
    make_env: Callable[..., nsbox.ExecutionEnvironment], profile: str, code: bytes
) -> None:
    env = make_env(seccomp=profile)
    program = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write({code!r})
call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print('about to', flush=True)
print('got', call(), flush=True)
"""
    result = env.run(["python3", "-I", "-S", "-c", program])
    assert result.text() == "about to\n", result
    # SIGSEGV: a kernel built or booted without the i386 ABI, which is as good.
    assert result.signal in (signal.SIGSYS, signal.SIGSEGV), result
    assert result.outcome in (nsbox.Outcome.SECCOMP_KILLED, nsbox.Outcome.SIGNALED)
    assert env.run(["true"]).ok, "the environment lives on"


@pytest.mark.parametrize("profile", PROFILES)
def test_terminal_injection_is_refused_on_a_real_terminal(
    make_env: Callable[..., nsbox.ExecutionEnvironment], profile: str
) -> None:
    program = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def ioctl(request, argument):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(16), ctypes.c_long(0), ctypes.c_ulong(request), argument)
    return errno.errorcode.get(ctypes.get_errno(), 'done')
byte = ctypes.create_string_buffer(b'x')
found = [ioctl(r | high, byte) for r in (0x5412, 0x541c) for high in (0, 1 << 32, 0xabcd << 32)]
print('found', *found, 'end', flush=True)
"""
    env = make_env(seccomp=profile)
    with env.popen(["python3", "-I", "-S", "-c", program], tty=(24, 80)) as process:
        import os

        text = b""
        while b"end" not in text:
            text += os.read(process.tty, 4096)
        process.wait(10)
    words = text.decode().split("found ")[1].split(" end")[0].split()
    assert words == ["EPERM"] * 6


def test_no_controlling_terminal(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        "answer = [attempt(os.open, '/dev/tty', os.O_RDWR), os.getsid(0) == os.getpid(), "
        "[os.isatty(fd) for fd in range(3)]]",
    )
    assert found == ["ENXIO", True, [False] * 3]


def test_a_filter_cannot_be_taken_off_or_listened_to(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        import struct
        allow = struct.pack('HBBI', 6, 0, 0, 0x7fff0000)
        filters = ctypes.create_string_buffer(allow)
        class Program(ctypes.Structure):
            _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
        program = ctypes.byref(Program(1, ctypes.addressof(filters)))
        answer = {
            'strict off': libc.prctl(22, 0, 0, 0, 0),
            'listener': syscall(317, 1, 8, program),
            'listener high': syscall(317, 1, 8 | 1 << 32, program),
            'one more': syscall(317, 1, 0, program),
            'unshare after it': syscall(272, 0x10000000),
            'no_new_privs off': libc.prctl(38, 0, 0, 0, 0),
        }
        """,
    )
    assert found.pop("one more") == 0, "a program may add filters of its own"
    assert found["strict off"] == found["no_new_privs off"] == -1
    assert found["listener"] in ("EPERM", "EINVAL")
    assert found["listener high"] in ("EPERM", "EINVAL")
    assert found["unshare after it"] == "EPERM"
