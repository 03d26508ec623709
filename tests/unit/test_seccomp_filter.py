# SPDX-License-Identifier: Apache-2.0
"""Compiled filters under the real kernel: every number, foreign ABIs, attacks, real programs.

A small C program loads a filter and makes raw calls. For the table it first loads a filter of its
own that answers errno 1234 to any call whose sixth argument is a mark. The kernel obeys the
strictest of two filters, and of two errnos the later filter's; so 1234 means "the filter under
test allows it", and nothing dangerous is ever carried out.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest
from tests.support import PATIENCE, SLOW_MACHINE, i386_only

from nsbox.errors import UnsupportedHostError
from nsbox.seccomp import cache as filter_cache
from nsbox.seccomp import compiler, filters
from nsbox.seccomp.policy import SeccompPolicy
from nsbox.seccomp.profiles import ALLOW, DOCKER, ENOSYS, NEW_NUMBERS

PROFILES = ("strict", "default", "docker")
ALLOWED = 1234
X32 = 0x40000000

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="attacks are in x86-64 numbers"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds the attacking program"),
]

PROBE = r"""
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#define MARK 0x6d61726b
static struct sock_filter code[4096];
static struct sock_fprog program = {0, code};
static void load(struct sock_fprog *p) {
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, p)) _exit(99);
}
static long raw(long n, long a, long b, long c, long d, long e, long f) {
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    /* r9 is cleared, else the mark would stay in it and exit_group would be answered, too. */
    __asm__ volatile("syscall; xor %%r9d, %%r9d" : "=a"(result), "+r"(r9)
                     : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
    return result;
}
static int table(long number, int *shared) {
    struct sock_filter answer[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MARK, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | 1234),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog marked = {4, answer};
    int status;
    pid_t child = fork();
    if (child == 0) {
        load(&marked);
        load(&program);
        *shared = -raw(number, 0, 0, 0, 0, 0, MARK);
        _exit(0);
    }
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : *shared;
}
int main(int argc, char **argv) {
    int fd = open(argv[1], O_RDONLY);
    program.len = read(fd, code, sizeof code) / 8;
    close(fd);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (!strcmp(argv[2], "table")) {
        int *shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        for (int i = 3; i + 1 < argc; i += 2)
            for (long n = strtoul(argv[i], 0, 0); n <= (long)strtoul(argv[i + 1], 0, 0); n++)
                printf("%ld %d\n", n, table(n, shared));
        return 0;
    }
    if (!strcmp(argv[2], "exec")) {
        load(&program);
        execvp(argv[3], argv + 3);
        return 98;
    }
    long n[7] = {0};
    for (int i = 3; i < argc; i++) n[i - 3] = strtoul(argv[i], 0, 0);
    load(&program);
    if (!strcmp(argv[2], "i386")) {
        long result;
        __asm__ volatile("int $0x80" : "=a"(result)
                         : "a"(n[0]), "b"(n[1]), "c"(n[2]) : "memory", "r8", "r9", "r10", "r11");
        printf("%ld\n", result);
        return 0;
    }
    printf("%ld\n", raw(n[0], n[1], n[2], n[3], n[4], n[5], n[6]));
    return 0;
}
"""


class Probe(Protocol):
    """Run the C program: probe(profile, mode, *words)."""

    def __call__(self, profile: str, *words: object) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seccomp")
    (path / "probe.c").write_text(PROBE)
    subprocess.run(["gcc", "-O1", "-o", path / "probe", path / "probe.c"], check=True)
    for name in PROFILES:
        (path / name).write_bytes(filters.compile_policy(SeccompPolicy.named(name)))
    return path


@pytest.fixture
def probe(directory: Path) -> Probe:
    def run(profile: str, *words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [directory / "probe", directory / profile, *map(str, words)],
            capture_output=True,
            text=True,
            timeout=60 * PATIENCE,
            cwd=directory,
        )

    return run


@pytest.fixture(scope="module")
def numbers() -> dict[str, int]:
    import pyseccomp

    return compiler.known_numbers(pyseccomp, pyseccomp.system_arch())


# A process for each number: User-Mode Linux takes ten seconds for a profile.
@pytest.mark.parametrize("profile", PROFILES if not SLOW_MACHINE else ["default"])
def test_every_number_native_and_x32(probe: Probe, numbers: dict[str, int], profile: str) -> None:
    policy = SeccompPolicy.named(profile)
    names = {number: name for name, number in numbers.items()}
    done = probe(profile, "table", 0, 500, X32, X32 + 500, 0xFFFFFFFF, 0xFFFFFFFF)
    found = {int(n): int(v) for n, v in (line.split() for line in done.stdout.splitlines())}
    assert len(found) == 1003
    wrong = {}
    for number, answer in found.items():
        name = names.get(number)
        action = policy.decide(name) if name else ENOSYS
        expected = ALLOWED if action == ALLOW else action & 0xFFFF
        if number >= X32:
            expected = -signal.SIGSYS
        if name in ("uretprobe", "uprobe") and number < X32:
            # The kernel (6.14, 6.18) lets these two past any filter, for tracing must not break
            # programs; outside a trampoline of its own they do nothing but fail.
            assert answer in (errno.EPERM, errno.ENXIO, -signal.SIGILL)
            continue
        if answer != expected:
            wrong[number, name] = answer, expected
    assert not wrong
    allowed = [number for number, answer in found.items() if answer == ALLOWED]
    assert len(allowed) == sum(policy.decide(name) == ALLOW for name in policy.allowed)


@i386_only
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("number", [20, 102, 1, 4, 359, 500])  # getpid, socketcall, exit, write..
def test_i386_is_killed(probe: Probe, profile: str, number: int) -> None:
    done = probe(profile, "i386", number, 1, 0)
    assert done.returncode == -signal.SIGSYS
    assert not done.stdout


@pytest.mark.parametrize("profile", PROFILES)
def test_int_0x80_is_no_way_around_the_filter(probe: Probe, profile: str) -> None:
    """With a native number that is refused, for a kernel that enters native calls by it."""
    done = probe(profile, "i386", 165, 0, 0)  # mount
    if SLOW_MACHINE:
        assert (done.returncode, done.stdout) == (0, f"{-errno.EPERM}\n")
    else:
        assert (done.returncode, done.stdout) == (-signal.SIGSYS, "")


HIGH = 1 << 32
ATTACKS = {
    "vsock": ("socket", 40, 1, 0),
    "vsock, high half set": ("socket", HIGH | 40, 1, 0),
    "alg": ("socket", 38, 5, 0),
    "alg, high half set": ("socket", 0xFFFFFFFF << 32 | 38, 5, 0),
    "tiocsti": ("ioctl", 0, 0x5412, 0),
    "tiocsti, high half set": ("ioctl", 0, HIGH | 0x5412, 0),
    "tioclinux": ("ioctl", 0, HIGH | 0x541C, 0),
    "tiocsetd": ("ioctl", 0, 0x5423, 0),
    "tioccons": ("ioctl", 0, 0x541D, 0),
    "user namespace by clone": ("clone", 0x10000011, 0, 0),
    "user namespace by clone, high half set": ("clone", HIGH | 0x10000011, 0, 0),
    "user namespace": ("unshare", 0x10000000, 0, 0),
    "join a namespace": ("setns", 0, 0, 0),
    "keyring": ("keyctl", 0, 0, 0),
    "add a key": ("add_key", 0, 0, 0),
    "bpf": ("bpf", 0, 0, 0),
    "io_uring": ("io_uring_setup", 1, 0, 0),
    "userfaultfd": ("userfaultfd", 1, 0, 0),
    "perf": ("perf_event_open", 0, 0, 0),
    "mount": ("mount", 0, 0, 0),
    "new mount api": ("fsopen", 0, 0, 0),
    "file handles": ("open_by_handle_at", 0, 0, 0),
    "steal a descriptor": ("pidfd_getfd", 0, 0, 0),
    "modules": ("init_module", 0, 0, 0),
    "kexec": ("kexec_load", 0, 0, 0),
    "lease": ("fcntl", 0, 1024, 0),
    "lease, high half set": ("fcntl", 0, HIGH | 1024, 1),
    "directory notification": ("fcntl", 0, 1026, 1),
    "directory notification, high half set": ("fcntl", 0, 0xFFFFFFFF << 32 | 1026, 1),
    "delegation": ("fcntl", 0, HIGH | 1040, 0),
    "fanotify": ("fanotify_init", 0, 0, 0),
    "limits of pid 1": ("prlimit64", 1, 7, 8),
    "limits of a high pid": ("prlimit64", HIGH | 1, 7, 8),
    "limits of pid 1 from where the low half is 0": ("prlimit64", 1, 7, HIGH),
    "limits of another": ("prlimit64", 7, 7, 8),
    "cpus of pid 1": ("sched_setaffinity", 1, 0, 0),
    "cpus of a high pid 1": ("sched_setaffinity", HIGH | 1, 0, 0),
    "scheduler of pid 1": ("sched_setscheduler", HIGH | 1, 0, 0),
    "priority of pid 1": ("setpriority", 0, HIGH | 1, 5),
    "priority of its user": ("setpriority", 2, 0, 5),
    "io priority of pid 1": ("ioprio_set", 1, 1, 0),
    "io priority of its group": ("ioprio_set", 2, 0, 0),
    "null page": ("personality", 0x100000, 0, 0),
}
STRICTER_THAN_DOCKER = {
    "packet": ("socket", 17, 3, 0),
    "packet, high half set": ("socket", HIGH | 17, 3, 0),
    "vsock pair": ("socketpair", HIGH | 40, 1, 0),
    "ptrace": ("ptrace", 0, 0, 0),
    "write by ptrace": ("ptrace", HIGH | 4, 0, 0),
    "read memory": ("process_vm_readv", 0, 0, 0),
    "filter listener": ("seccomp", 1, 8, 0),
    "filter listener, high half set": ("seccomp", 1, HIGH | 8, 0),
    "memory map of itself": ("prctl", HIGH | 35, 1, 0),
    "device": ("mknod", 0, 0o020600, 0x103),
    "device, at": ("mknodat", 0, 0, 0o060600),
}


@pytest.mark.parametrize(
    ("profile", "attack"),
    [(p, a) for p in PROFILES for a in ATTACKS]
    + [(p, a) for p in PROFILES if p != DOCKER for a in STRICTER_THAN_DOCKER],
)
def test_attacks_get_eperm(
    probe: Probe,
    numbers: dict[str, int],
    profile: str,
    attack: str,
) -> None:
    name, *args = (ATTACKS | STRICTER_THAN_DOCKER)[attack]
    done = probe(profile, "call", numbers[str(name)], *args)
    assert done.stdout.strip() == str(-errno.EPERM)


@pytest.mark.parametrize(
    ("profile", "answer", "call"),
    [
        *[(p, errno.EPROTONOSUPPORT, ("socket", 16, 3, 12)) for p in ("strict", "default")],
        ("default", errno.EPROTONOSUPPORT, ("socket", HIGH | 16, 3, HIGH | 9)),
        *[(p, errno.EINVAL, ("fcntl", 0, 1041)) for p in PROFILES],
        *[(p, errno.EOPNOTSUPP, ("setxattr", 0, 0, 0)) for p in ("strict", "default")],
        *[(p, errno.ENOSYS, ("io_setup", 1, 0)) for p in ("strict", "default")],
        *[(p, errno.ENOSYS, ("mbind", 0, 0)) for p in PROFILES],
        ("strict", errno.EINVAL, ("splice", 0, 0)),
        ("strict", errno.ENOSYS, ("inotify_init1", 0)),
        ("strict", errno.EPERM, ("prctl", 0x59616D61, 1, 0)),
    ],
)
def test_errnos_that_programs_are_prepared_for(
    probe: Probe, numbers: dict[str, int], profile: str, answer: int, call: tuple[str, int]
) -> None:
    name, *args = call
    assert probe(profile, "call", numbers[name], *args).stdout == f"{-answer}\n"


@pytest.mark.parametrize("profile", PROFILES)
def test_harmless_calls_are_made(probe: Probe, numbers: dict[str, int], profile: str) -> None:
    made = {
        "prlimit64": (1 << 32, 7, 0, 0),
        "personality": (0xFFFFFFFF,),
        "capget": (0, 0),  # EFAULT: the kernel has looked
        "sched_rr_get_interval": (0, 0),
        "fcntl": (1, 1),
    }
    answers = [int(probe(profile, "call", numbers[n], *a).stdout) for n, a in made.items()]
    assert [answer for answer in answers if answer < 0] == [-errno.EFAULT] * 2


def test_clone3_is_enosys_and_a_fork_works(probe: Probe, numbers: dict[str, int]) -> None:
    assert probe("strict", "call", NEW_NUMBERS["clone3"], 0, 0).stdout == f"{-errno.ENOSYS}\n"
    done = probe("strict", "call", numbers["socket"], HIGH | 1, 1, 0)
    assert int(done.stdout) >= 3  # the kernel reads 32 bits: this is AF_UNIX
    assert int(probe("strict", "call", numbers["socket"], 16, 3, 0).stdout) >= 3


@pytest.mark.parametrize("profile", PROFILES)
def test_python_forks_threads_pipes_and_sockets(probe: Probe, profile: str) -> None:
    code = """if True:
        import asyncio, os, socket, subprocess, tempfile, threading
        pid = os.fork()  # before the threads: the kernel may count one for a while after join()
        os.waitpid(pid, 0) if pid else os._exit(0)
        threads = [threading.Thread(target=os.getpid) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert subprocess.check_output(["sh", "-c", "echo a b | tr a c"]) == b"c b\\n"
        a, b = socket.socketpair(); a.send(b"x"); assert b.recv(1) == b"x"
        s = socket.create_server(("127.0.0.1", 0)); socket.create_connection(s.getsockname())
        with tempfile.TemporaryDirectory() as d: os.rename(d, d + "x"); os.mkdir(d)
        os.rmdir(d + "x")
        async def go(): return await asyncio.to_thread(sum, [1, 2])
        print(asyncio.run(go()))
    """
    done = probe(profile, "exec", sys.executable, "-I", "-c", code)
    assert (done.stdout, done.stderr) == ("3\n", "")


@pytest.mark.parametrize("profile", ["strict", "default"])
def test_node_and_gcc(probe: Probe, directory: Path, profile: str) -> None:
    if shutil.which("node"):
        script = "const c=require('child_process');console.log(6*7+c.execSync('echo x').length)"
        done = probe(profile, "exec", "node", "-e", script)
        assert (done.stdout, done.stderr) == ("44\n", "")
    done = probe(profile, "exec", "gcc", "-o", f"again-{profile}", "probe.c")
    assert (done.returncode, done.stderr) == (0, "")
    assert (directory / f"again-{profile}").exists()


def test_custom_and_oci_policies_compile_and_bite(
    probe: Probe,
    directory: Path,
    numbers: dict[str, int],
) -> None:
    custom = SeccompPolicy.strict().allow("setpriority").deny("socket")
    (directory / "custom").write_bytes(filters.compile_policy(custom))
    assert probe("custom", "call", numbers["socket"], 1, 1, 0).stdout == "-1\n"
    assert probe("custom", "call", numbers["personality"], 0xFFFFFFFF).stdout == "0\n"
    assert probe("custom", "call", numbers["setpriority"], 0, 0, 5).stdout == "0\n"
    assert probe("custom", "call", numbers["setpriority"], 0, 1, 5).stdout == "-1\n"
    strict = SeccompPolicy.strict()
    names = [name for name in strict.allowed if name not in ("clone", "socket", "getppid")]
    oci = SeccompPolicy.from_oci(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 13,
            "syscalls": [
                {"names": names, "action": "SCMP_ACT_ALLOW"},
                {"names": ["getppid"], "action": "SCMP_ACT_KILL_PROCESS"},
                *(
                    {
                        "names": ["socket"],
                        "action": "SCMP_ACT_ALLOW",
                        "args": [{"index": 0, "op": f"SCMP_CMP_{op}", "value": value}],
                    }
                    for op, value in (("LT", 38), ("EQ", 39), ("GT", 40))
                ),
            ],
        }
    )
    (directory / "oci").write_bytes(filters.compile_policy(oci))
    assert probe("oci", "call", numbers["getppid"]).returncode == -signal.SIGSYS
    for family in (38, 40, HIGH | 40, HIGH | 38):
        assert probe("oci", "call", numbers["socket"], family, 1, 0).stdout == "-13\n"
    assert int(probe("oci", "call", numbers["socket"], 1, 1, 0).stdout) >= 3
    assert probe("oci", "call", numbers["unshare"], 0).stdout == "-13\n"


def test_load_in_a_child_process(tmp_path: Path) -> None:
    program = filters.compile_policy(SeccompPolicy.strict())
    path = tmp_path / "program"
    path.write_bytes(program)
    code = f"""if True:
        import sys
        sys.path[:0] = {sys.path!r}
        from nsbox.seccomp import filters
        from nsbox.linux import calls
        heavy = {{"subprocess", "pyseccomp", "typing", "dataclasses", "re"}} & set(sys.modules)
        assert not heavy, heavy
        calls.prctl(38, 1)
        filters.load(open({str(path)!r}, "rb").read())
        import os
        print([line for line in open("/proc/self/status") if line.startswith("Seccomp:")])
        try:
            os.mkdir("/proc/x"); os.chroot("/")
        except OSError as err:
            print(err.errno)
    """
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert "Seccomp:\\t2" in done.stdout


def test_filter_is_small(directory: Path) -> None:
    sizes = {profile: (directory / profile).stat().st_size // 8 for profile in PROFILES}
    assert max(sizes.values()) < 200, sizes


def test_a_long_filter_jumps_far_enough() -> None:
    # More leaves that differ than conditional jumps reach over (8 bits): each with a value of its
    # own, on calls that are as far apart as can be. `compile_policy` runs every one of them.
    names = sorted(SeccompPolicy.docker().allowed - {"clone", "socket", "personality"})[:150]
    policy = SeccompPolicy.from_oci(
        {
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [
                {
                    "names": [name],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": 1000 + number}],
                }
                for number, name in enumerate(names)
            ],
        }
    )
    assert len(filters.compile_policy(policy)) // 8 > 2 * 256


def test_a_program_that_differs_from_the_policy_is_refused(numbers: dict[str, int]) -> None:
    arch = compiler.AUDIT_ARCH_X86_64
    everything = [(0x06, 0, 0, ALLOW)]
    with pytest.raises(UnsupportedHostError, match="instead of"):
        compiler.verify(everything, SeccompPolicy.strict(), numbers, arch)
    assert compiler.run_program(everything, arch, 1) == ALLOW


class TestCache:
    """The disk cache believes only files that nobody else can have written."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(filter_cache, "_programs", {})
        return tmp_path / "nsbox" / "seccomp"

    @pytest.fixture
    def compiled(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []

        def fake(policy: SeccompPolicy) -> bytes:
            made.append(policy.name)
            return b"12345678"

        monkeypatch.setattr(filter_cache, "_compile_in_child", fake)
        return made

    def get(self) -> bytes:
        filter_cache._programs.clear()
        return filter_cache.filter_for(SeccompPolicy.strict())

    def test_miss_is_compiled_in_a_child_and_kept(self, cache: Path) -> None:
        program = self.get()
        assert program == filters.compile_policy(SeccompPolicy.strict())
        (file,) = cache.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def test_hit_is_not_compiled(self, cache: Path, compiled: list[str]) -> None:
        assert self.get() == self.get() == b"12345678"
        assert compiled == ["strict"]
        filter_cache.filter_for(SeccompPolicy.strict())
        assert compiled == ["strict"]

    def test_those_used_last_are_kept_in_memory(
        self, compiled: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filter_cache, "_PROGRAMS_KEPT", 2)
        one, two, three = (SeccompPolicy.strict().allow(name) for name in ("ptrace", "sync", "tee"))
        for policy in (one, two, one, three, two):
            assert filter_cache.filter_for(policy) == b"12345678"
        assert list(filter_cache._programs) == [three.digest(), two.digest()]
        assert len(compiled) == 3, "the disk has the others"

    @pytest.mark.parametrize("spoil", ["content", "mode", "directory", "link", "fifo", "owner"])
    def test_spoilt_file_is_not_used(self, cache: Path, compiled: list[str], spoil: str) -> None:
        self.get()
        (file,) = cache.iterdir()
        if spoil == "content":
            file.write_bytes(file.read_bytes()[:-8] + b"allowall")
        elif spoil == "mode":
            file.chmod(0o620)
        elif spoil == "directory":
            cache.chmod(0o777)
        elif spoil == "link":
            file.rename(cache.parent / "elsewhere")
            file.symlink_to(cache.parent / "elsewhere")
        elif spoil == "fifo":
            file.unlink()
            os.mkfifo(file, 0o600)
        elif os.geteuid() == 0:
            os.chown(file, 12345, 12345)
        else:
            pytest.skip("only root can give a file away")
        assert self.get() == b"12345678"
        assert len(compiled) == 2

    def test_no_home_is_fine(
        self, monkeypatch: pytest.MonkeyPatch, compiled: list[str], cache: Path
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
        assert self.get() == b"12345678"
        assert not cache.exists()


WITHOUT_LIBSECCOMP = """
import sys
from nsbox.errors import UnsupportedHostError
from nsbox.seccomp import filters
from nsbox.seccomp.policy import SeccompPolicy
try:
    filters.filter_for(SeccompPolicy.default())
except UnsupportedHostError as error:
    print(error.feature, error.hint, error.reason, sep="\\n")
"""


@pytest.mark.needs("userns")
def test_missing_libseccomp_is_an_unsupported_host(tmp_path: Path) -> None:
    import pyseccomp  # loads it

    assert pyseccomp.system_arch()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    (library,) = (path for path in loaded if "libseccomp.so" in path)
    # In a mount namespace of its own, where the library is an empty file.
    script = 'mount --bind /dev/null "$1" && exec "$2" -c "$3"'
    words = ["sh", "-c", script, "sh", library, sys.executable, WITHOUT_LIBSECCOMP]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *words],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    feature, hint, reason = done.stdout.splitlines()
    assert feature == "seccomp"
    assert "apt install libseccomp2" in hint
    assert reason.startswith("libseccomp cannot be loaded: ")
    assert not list(tmp_path.rglob("*.bpf"))
