# SPDX-License-Identifier: Apache-2.0
"""Compiled seccomp filters, kept in memory and on disk; compiled in a child process on a miss.

The disk cache holds programs that will guard untrusted code, so a file counts only when nobody
but this user can have written it, and its content matches the checksum in its head.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import nsbox
from nsbox.errors import UnsupportedHostError
from nsbox.linux.owned import Descriptor
from nsbox.seccomp import profiles

if TYPE_CHECKING:
    from nsbox.seccomp.policy import SeccompPolicy

_MAGIC = b"nsbox-bpf-1\n"
_HEAD = len(_MAGIC) + hashlib.sha256().digest_size
_PROGRAM_MAX = 4096 * 8
_COMPILE_TIMEOUT = 60.0  # seconds; about 0.3 are needed
_EXIT_UNSUPPORTED = 3  # compiler.EXIT_UNSUPPORTED, which must not be imported here
_COMPILER = Path(__file__).with_name("compiler.py")

_PROGRAMS_KEPT = 32

_programs: dict[str, bytes] = {}  # by digest of the policy, the most recently used last
_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: another thread may have held the lock, and does not exist here."""
    global _lock  # noqa: PLW0603 - the child's only thread is this one
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def filter_for(policy: SeccompPolicy) -> bytes:
    """Return the BPF program of `policy`. See `nsbox.seccomp.filters.filter_for`."""
    digest = policy.digest()
    with _lock:
        program = _programs.pop(digest, None)
        if program is None:
            if len(_programs) >= _PROGRAMS_KEPT:
                del _programs[next(iter(_programs))]
            name = _file_name(digest)
            program = _read(name)
            if program is None:
                program = _compile_in_child(policy)
                _write(name, program)
        _programs[digest] = program
    return program


def _file_name(digest: str) -> str:
    parts = [digest.encode(), os.uname().machine.encode()]
    parts.append(str(getattr(nsbox, "__version__", "")).encode())
    # The two files that decide what a program looks like: an edited nsbox makes a new one.
    parts += [path.read_bytes() for path in (_COMPILER, Path(profiles.__file__))]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _open_directory(*, create: bool) -> Descriptor:
    """Return a descriptor of the cache directory. Raises OSError when it cannot be trusted."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise FileNotFoundError("no home directory")
    path = os.path.join(base, "nsbox", "seccomp")
    if create:
        # Under sudo HOME may be another user's: leave no file of root in it.
        owner = next(p for p in (base, os.path.dirname(base), "/") if os.path.isdir(p))
        if os.stat(owner).st_uid != os.geteuid():
            raise PermissionError(f"{owner} belongs to another user")
        for directory in (base, os.path.dirname(path), path):
            os.makedirs(directory, mode=0o700, exist_ok=True)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = Descriptor(os.open, path, flags)
    if not _is_ours(os.fstat(opened.number)):
        opened.close()
        raise PermissionError(f"{path} can be written by others")
    return opened


def _is_ours(status: os.stat_result) -> bool:
    writable_by_others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not writable_by_others


def _read(name: str) -> bytes | None:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with _open_directory(create=False) as directory:
            opened = Descriptor(os.open, f"{name}.bpf", flags, dir_fd=directory)
        with opened as fd, open(fd, "rb", closefd=False) as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
                return None
            content = file.read(_HEAD + _PROGRAM_MAX + 1)
    except OSError:
        return None
    program = content[_HEAD:]
    head = _MAGIC + hashlib.sha256(program).digest()
    return program if content[:_HEAD] == head and _is_program(program) else None


def _write(name: str, program: bytes) -> None:
    """Keep `program`; without a home, or on a full disk, do without."""
    content = _MAGIC + hashlib.sha256(program).digest() + program
    temporary = f".{name}.{os.getpid()}.{threading.get_ident()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError), _open_directory(create=True) as directory:
        try:
            with (
                Descriptor(os.open, temporary, flags, 0o600, dir_fd=directory) as fd,
                open(fd, "wb", closefd=False) as file,
            ):
                file.write(content)
            os.rename(temporary, f"{name}.bpf", src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException as error:
            if not isinstance(error, FileExistsError):  # another process's of the same number
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
            raise


def _is_program(program: bytes) -> bool:
    return 0 < len(program) <= _PROGRAM_MAX and len(program) % 8 == 0


def _compile_in_child(policy: SeccompPolicy) -> bytes:
    spec = importlib.util.find_spec("pyseccomp")  # finds the file, does not import it
    if spec is None or spec.origin is None:
        raise UnsupportedHostError(
            "seccomp", "the package pyseccomp is not installed", "Use `pip install pyseccomp`"
        )
    # -I -S leave only the standard library; the two packages come after it, so that nothing that
    # lies beside them can shadow it, and this nsbox is used, not another installed one.
    paths = [str(_COMPILER.parents[2]), os.path.dirname(os.path.abspath(spec.origin))]
    code = f"import sys; sys.path += {paths!r}; from nsbox.seccomp.compiler import main; main()"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", code],
            input=policy.to_json().encode(),
            capture_output=True,
            timeout=_COMPILE_TIMEOUT,
            cwd="/",
            # PATH: quick_decoder looks for ldconfig and gcc.
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            check=False,
        )
    except (OSError, ValueError, subprocess.TimeoutExpired) as err:
        raise UnsupportedHostError(
            "seccomp", f"the filter compiler did not run: {err}", "Check sys.executable"
        ) from err
    if done.returncode == 0 and _is_program(done.stdout):
        return done.stdout
    told = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
    if done.returncode == _EXIT_UNSUPPORTED:
        raise UnsupportedHostError("seccomp", told[0], told[-1])
    raise UnsupportedHostError(
        "seccomp",
        f"the filter compiler failed with {done.returncode}: {told[-1]}",
        "Use a simpler policy, or check that libseccomp2 is installed",
    )
