# SPDX-License-Identifier: Apache-2.0
"""Attacks on the host's memory, processes, disk and time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from tests.support import PATIENCE, attack, resident_bytes

import nsbox
from nsbox import Limits, Outcome
from nsbox.supervisor import process

pytestmark = pytest.mark.needs("userns")

MIB = 1 << 20
BOUND = 64 * MIB

WAYS_TO_MEMORY = {
    "mmap": """
import mmap
held = []
for _ in range(256):
    held.append(mmap.mmap(-1, 1 << 20))
    for offset in range(0, 1 << 20, 4096):
        held[-1][offset] = 1
""",
    "shared mmap": """
import mmap
m = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_SHARED)
for offset in range(0, 256 << 20, 4096):
    m[offset] = 1
""",
    "memfd": """
import os
for n in range(256):
    os.write(os.memfd_create(str(n)), bytes(1 << 20))
""",
    "shm": "open('/dev/shm/x', 'wb').write(bytes(256 << 20))",
    "tmp": """
import os
for n in range(64):
    open(f'/tmp/{n}', 'wb').write(bytes(4 << 20))
""",
    "many processes": """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(b'x') * (32 << 20)
        time.sleep(30)
        os._exit(0)
for _ in range(8):
    os.wait()
""",
    "pipes and sockets": """
import socket
held = []
for _ in range(400):
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        end.setblocking(False)
        try:
            while True:
                end.send(bytes(65536))
        except BlockingIOError:
            pass
    held.append(pair)
""",
    "system V": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
for _ in range(64):
    address = libc.shmat(libc.shmget(0, 4 << 20, 0o1600), None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise SystemExit('refused')
    ctypes.memset(address, 1, 4 << 20)
""",
}


@pytest.mark.needs("cgroup.memory")
@pytest.mark.parametrize("way", WAYS_TO_MEMORY)
def test_memory_by_every_way(make_env: Callable[..., nsbox.ExecutionEnvironment], way: str) -> None:
    env = make_env(limits=Limits(memory_max=BOUND, pids_max=16), tmp_size=1 << 30)
    result = env.run(["python3", "-c", WAYS_TO_MEMORY[way]], timeout=60 * PATIENCE)
    if result.outcome is Outcome.OOM_KILLED:
        assert "OOM" in result.evidence
        assert result.usage.oom_kills is not None
    else:
        # It was refused, or the kernel bounds it otherwise (sockets, by wmem_max): never a success
        # above the limit.
        peak = result.usage.memory_peak_bytes
        assert peak is not None
        assert peak <= BOUND, result
        assert way in ("system V", "pipes and sockets"), result


def test_tmpfs_sizes_hold_without_any_cgroup(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env(tmp_size="4M")
    found = attack(
        env,
        """
        answer = {}
        for directory in ('/tmp', '/dev/shm'):
            written = 0
            try:
                with open(directory + '/flood', 'wb', buffering=0) as file:
                    while written < 64 << 20:
                        written += file.write(bytes(65536))
            except OSError as error:
                answer[directory] = [errno.errorcode[error.errno], written]
        """,
    )
    for code, written in found.values():
        assert code == "ENOSPC"
        assert written <= 4 * MIB
    # Nothing else can be written at all: no unlimited tmpfs is hidden anywhere.
    found = attack(
        env,
        """
        answer = []
        for line in read('/proc/self/mounts').splitlines():
            place, kind, options = line.split()[1:4]
            words = options.split(',')
            if kind == 'tmpfs' and 'rw' in words and not any(w.startswith('size=') for w in words):
                answer.append(line)
        """,
    )
    assert found == []


@pytest.mark.parametrize("directory", ["/tmp", "/dev/shm"])
def test_inode_flood(make_env: Callable[..., nsbox.ExecutionEnvironment], directory: str) -> None:
    env = make_env(tmp_size="1M")
    count, code = attack(
        env,
        """
        code = 0
        for count in range(100000):
            code = attempt(os.mkdir, f'{directory}/{count}')
            if code:
                break
        answer = [count, code]
        """,
        directory=directory,
    )
    assert code == "ENOSPC"
    assert count <= 1024


def test_many_files_and_links_fit(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    """Each name of a hard link counts as a file does, in the default size and in a small one."""
    code = """
        answer = []
        os.mkdir('/tmp/d'); open('/tmp/d/0', 'w').close()
        for number in range(1, limit):
            code = attempt(os.link, '/tmp/d/0', f'/tmp/d/{number}')
            if code:
                answer.append([number, code])
                break
    """
    assert attack(make_env(), code, limit=20000) == []
    ((count, error),) = attack(make_env(tmp_size="1M"), code, limit=20000)
    assert error == "ENOSPC"
    assert 900 < count <= 1024


@pytest.mark.needs("cgroup.pids")
def test_fork_bomb(
    make_env: Callable[..., nsbox.ExecutionEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Past it the environment is killed as a whole, as it should be on a machine this slow.
    monkeypatch.setattr(process, "KILL_DEADLINE", process.KILL_DEADLINE * PATIENCE)
    env = make_env(limits=Limits(pids_max=32))
    result = env.run(
        ["python3", "-c", "import os\nwhile True:\n try: os.fork()\n except OSError: pass"],
        timeout=1.0,
    )
    assert result.outcome is Outcome.TIMED_OUT
    assert result.usage.pids_peak is None or result.usage.pids_peak <= 32
    left = attack(env, "answer = sorted(name for name in os.listdir('/proc') if name.isdigit())")
    assert len(left) == 2, "all of it is gone when run returns, but PID 1 and who looks"


def test_fork_bomb_is_bounded_for_everybody(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    """Where the host gives no cgroup, RLIMIT_NPROC of the user namespace does it."""
    env = make_env(limits=Limits(pids_max=24))
    count = attack(
        env,
        """
        import time
        count = 0
        for _ in range(100):
            pid = attempt(os.fork)
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            count += isinstance(pid, int)
        answer = count
        """,
    )
    assert 10 <= count < 24


def test_output_flood_costs_the_host_no_more_than_the_cap(env: nsbox.ExecutionEnvironment) -> None:
    before = resident_bytes()
    result = env.run(["sh", "-c", "yes & head -c 10000000000 /dev/zero >&2"], timeout=60 * PATIENCE)
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert max(len(result.stdout), len(result.stderr)) == 16 * MIB
    grown = resident_bytes() - before
    # Two streams; what they are read into grows by an eighth at a time, and malloc keeps some.
    assert grown < 2 * 16 * MIB * 9 / 8 + 20 * MIB, grown
    assert env.run(["true"]).ok


def test_output_that_nobody_reads_costs_nothing(env: nsbox.ExecutionEnvironment) -> None:
    before = resident_bytes()
    with env.popen(["yes"]) as process:
        time.sleep(0.2)
        assert process.poll() is None
        assert env.run(["echo", "others go on"]).ok
    assert resident_bytes() - before < 8 * MIB


def test_output_of_daemons_and_of_many_processes_counts(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    env = make_env(limits=Limits(output_max=1 << 20))
    line = "for i in 1 2 3 4 5 6; do setsid yes & done; sleep 60"
    result = env.run(["sh", "-c", line], timeout=30 * PATIENCE)
    assert result.outcome is Outcome.OUTPUT_LIMIT
    assert len(result.stdout) == 1 << 20


def test_exactly_the_cap_is_allowed(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    env = make_env(limits=Limits(output_max=100_000))
    exact = env.run(["head", "-c", "100000", "/dev/zero"])
    assert (exact.outcome, len(exact.stdout)) == (Outcome.EXITED, 100_000)
    more = env.run(["head", "-c", "100001", "/dev/zero"])
    assert (more.outcome, len(more.stdout)) == (Outcome.OUTPUT_LIMIT, 100_000)


def test_descriptor_flood(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        held = []
        try:
            while True:
                held.append(os.open('/dev/null', os.O_RDONLY))
        except OSError as error:
            answer = [errno.errorcode[error.errno], len(held)]
        for fd in held[-20:]:
            os.close(fd)
        import resource
        answer.append(attempt(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096)))
                      if False else resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        """,
    )
    assert found[0] == "EMFILE"
    assert found[1] <= 1024
    assert found[2] == 1024


def test_processor_and_clock_tricks_do_not_stretch_the_timeout(
    env: nsbox.ExecutionEnvironment,
) -> None:
    code = """
import os, signal
for number in set(range(1, 65)) - {9, 19, 32, 33}:
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
while True:
    pass
"""
    started = time.monotonic()
    result = env.run(["python3", "-c", code], timeout=0.5)
    assert result.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - started < 0.5 + 2 * PATIENCE


def test_a_stopped_command_times_out(env: nsbox.ExecutionEnvironment) -> None:
    started = time.monotonic()
    result = env.run(["sh", "-c", "kill -STOP $$"], timeout=0.3)
    assert result.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - started < 0.3 + 2 * PATIENCE


def test_no_core_file(env: nsbox.ExecutionEnvironment) -> None:
    result = env.run(["python3", "-c", "import os; os.abort()"])
    assert result.outcome is Outcome.SIGNALED
    assert env.run(["sh", "-c", "ls /tmp | grep core; ulimit -c"]).text() == "0\n"


def test_sparse_and_huge_files_cost_nothing_to_read(env: nsbox.ExecutionEnvironment) -> None:
    env.run(["python3", "-c", "import os; os.truncate(os.open('/tmp/huge', 66), 1 << 50)"])
    before = resident_bytes()
    with pytest.raises(nsbox.SyscallError) as caught:
        env.read_file("/tmp/huge")
    assert "EFBIG" in str(caught.value)
    assert resident_bytes() - before < 8 * MIB
