# SPDX-License-Identifier: Apache-2.0
"""Attacks by descriptors handed in: opened again with more rights than they were given with."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import nsbox

pytestmark = pytest.mark.needs("userns")

REOPEN = r"""
import fcntl, os, sys
number, words = int(sys.argv[1]), []
for name, flags in (('r', os.O_RDONLY), ('w', os.O_WRONLY), ('rw', os.O_RDWR),
                    ('t', os.O_WRONLY | os.O_TRUNC), ('a', os.O_WRONLY | os.O_APPEND)):
    try:
        fd = os.open(f'/proc/self/fd/{number}', flags | os.O_NONBLOCK)
    except OSError:
        continue
    for act in (lambda: os.write(fd, b'EVIL'), lambda: os.pwrite(fd, b'EVIL', 0),
                lambda: words.append(os.pread(fd, 4096, 0)), lambda: os.ftruncate(fd, 0)):
        try:
            act()
        except OSError:
            pass
for act in (lambda: os.fchmod(number, 0o4777), lambda: os.ftruncate(number, 0),
            lambda: fcntl.fcntl(number, fcntl.F_SETFL, 0), lambda: os.pwrite(number, b'EVIL', 0),
            lambda: os.write(number, b'EVIL')):
    try:
        act()
    except OSError:
        pass
sys.stderr.write(repr(b''.join(words)))
"""
SECRET = b"written before\n" * 3
MODE = 0o666  # what others may; where environments have the caller's id it does not count


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(SECRET)
    path.chmod(MODE)
    return path


def reopen(number: int) -> list[str]:
    return ["python3", "-I", "-S", "-c", REOPEN, str(number)]


def test_a_file_that_may_be_read_is_not_written(
    env: nsbox.ExecutionEnvironment, file: Path
) -> None:
    with file.open("rb") as stream:
        assert env.run(reopen(0), stdin=stream).ok
    assert file.read_bytes() == SECRET
    assert stat.S_IMODE(file.stat().st_mode) == MODE


def test_a_file_that_may_be_written_is_not_read(
    env: nsbox.ExecutionEnvironment, file: Path
) -> None:
    """Nor changed but at its end; and no set-user-ID program is made of it."""
    with file.open("ab") as stream:
        result = env.run(reopen(1), stdout=stream)
    assert "before" not in result.check().stderr_text()
    assert file.read_bytes().startswith(SECRET)
    assert stat.S_IMODE(file.stat().st_mode) == MODE


def test_the_same_through_the_command(file: Path) -> None:
    command = [sys.executable, "-m", "nsbox", "run", "-q", "--"]
    with file.open("rb") as stream:
        subprocess.run([*command, *reopen(0)], stdin=stream, check=True, capture_output=True)
    with file.open("ab") as stream:
        done = subprocess.run(
            [*command, *reopen(1)], stdout=stream, stderr=subprocess.PIPE, check=True
        )
    assert b"before" not in done.stderr
    assert file.read_bytes().startswith(SECRET)
    assert stat.S_IMODE(file.stat().st_mode) == MODE


def test_a_named_pipe_is_used_in_one_direction(
    env: nsbox.ExecutionEnvironment, tmp_path: Path
) -> None:
    """Who may write to it reads nothing that others have written."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    path.chmod(MODE)
    ours = os.open(path, os.O_RDWR)
    try:
        os.write(ours, b"of another")
        with open(os.open(path, os.O_WRONLY), "wb") as stream:
            assert "another" not in env.run(reopen(1), stdout=stream).check().stderr_text()
        assert os.read(ours, 4096).startswith(b"of another")
    finally:
        os.close(ours)


def test_what_is_no_open_file_is_refused(env: nsbox.ExecutionEnvironment, file: Path) -> None:
    for path, flags, words in ((file, os.O_PATH, "O_PATH"), (file.parent, 0, "directory")):
        fd = os.open(path, os.O_RDONLY | flags)
        try:
            with pytest.raises(nsbox.ConfigError, match=words):
                env.run(["cat"], stdin=fd)
        finally:
            os.close(fd)


def test_what_gives_no_more_is_handed_in(env: nsbox.ExecutionEnvironment, tmp_path: Path) -> None:
    """Pipes cost nothing; as root a file that is no business of others stays a file."""
    look = ["python3", "-I", "-S", "-c", "import os; print(os.fstat(0).st_ino)"]
    read, write = os.pipe()
    os.close(write)
    (tmp_path / "file").touch(0o600)
    with open(read, "rb") as pipe, (tmp_path / "file").open("rb") as file:
        assert int(env.run(look, stdin=pipe).text()) == os.fstat(read).st_ino
        is_handed_in = int(env.run(look, stdin=file).text()) == os.fstat(file.fileno()).st_ino
    assert is_handed_in is ("the caller's own id" not in env.protections["identity"].detail)


# -- a relay is no worse than the file -------------------------------------------------------------


def test_all_of_it_comes_and_goes(env: nsbox.ExecutionEnvironment, file: Path) -> None:
    data = os.urandom(3 << 20)
    file.write_bytes(data)
    copy = file.with_name("copy")
    copy.touch()
    copy.chmod(0o666)
    with file.open("rb") as source, copy.open("wb") as sink:
        env.run(["cat"], stdin=source, stdout=sink).check()
    assert copy.read_bytes() == data


def test_a_loop_over_a_file_reads_on(env: nsbox.ExecutionEnvironment, file: Path) -> None:
    """What a command has not read is there for who reads next, as without a relay."""
    for size in (0, 1 << 20):
        file.write_bytes(b"12" * 8 + bytes(size))
        with file.open("rb", buffering=0) as stream:
            env.run(["true"], stdin=stream).check()
            assert stream.tell() == 0
            code = "import os; os.read(0, 6)"
            env.run(["python3", "-I", "-S", "-c", code], stdin=stream).check()
            assert stream.tell() == 6
            evil = "import os; os.write(os.open('/proc/self/fd/0', 2049), bytes(99))"
            env.run(["python3", "-I", "-S", "-c", evil], stdin=stream)
            assert stream.tell() >= 6, "never before where it began"


def test_both_outputs_to_one_file_keep_their_order(
    env: nsbox.ExecutionEnvironment, file: Path
) -> None:
    with file.open("wb") as stream:
        lines = "for i in 1 2 3 4 5; do echo $i; echo $i >&2; done"
        env.run(["sh", "-c", lines], stdout=stream, stderr=stream).check()
    assert file.read_text().split() == [digit for digit in "12345" for _ in range(2)]


def test_a_file_that_takes_no_more_is_told_of(env: nsbox.ExecutionEnvironment, file: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with file.open("wb") as stream, pytest.raises(nsbox.SyscallError, match="stdout") as told:
            env.run(["head", "-c", "1M", "/dev/zero"], stdout=stream)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.errno == errno.EFBIG
    assert env.run(["true"]).ok


def test_who_is_silent_holds_up_nobody(env: nsbox.ExecutionEnvironment, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    path.chmod(MODE)
    before = threading.active_count()
    with open(os.open(path, os.O_RDWR), "rb", buffering=0) as silent:
        env.run(["true"], stdin=silent).check()
        with env.popen(["sleep", "60"], stdin=silent):
            pass
    assert threading.active_count() == before
