# SPDX-License-Identifier: Apache-2.0
"""Hosts as they are: on each a command and a function work, or both are refused by name.

A host is a process of its own: words that start it, and what it does before it imports nsbox. It
tells what it has met and what is left of it in the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.support import IS_ROOT, PATIENCE, SOURCE

pytestmark = pytest.mark.needs("userns")

LIFE = """
import contextlib, ctypes, json, os, signal, sys, threading, traceback

def libc(name, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), name)

def without(error, *names):
    # A seccomp filter, as whoever starts a program may put on it.
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(0x7FFF0000))
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        assert library.seccomp_rule_add(context, 0x50000 | error, number, 0) == 0, name
    assert library.seccomp_load(context) == 0

def tried(call):
    try:
        return call()
    except nsbox.NsboxError as error:
        return f"{type(error).__name__}: {error}"
    except BaseException:
        return "untyped: " + traceback.format_exc()

def run():
    result = nsbox.run(["id", "-u"], timeout=30)
    assert result.ok and result.text() == "1000\\n", (result, result.stderr)
    missing.extend(layer.name for layer in result.protections.layers if not layer.in_force)
    return "works"

def call():
    with nsbox.WarmPool(version, max_environments=1) as pool:
        assert [pool.invoke(number, timeout=30) for number in range(2)] == [0, 1]
    return "works"

def held():
    descriptors = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            descriptors.append(os.readlink(f"/proc/self/fd/{name}"))
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return sorted(descriptors), file.read()

out, code = int(sys.argv[1]), sys.argv[2]
os.set_inheritable(out, False)
PRELUDE
import nsbox
nsbox.set_standby(0)
missing, limits = [], {"timeout": 30, "init_timeout": 30}
version = nsbox.Function("app.handler", code=code, reuse="reset", **limits).publish()
before = tried(held)
said = {"run": tried(run), "call": tried(call), "missing": missing}
nsbox.shutdown()
after = tried(held)
said["left"] = "" if before == after else f"{before}, and then {after}"
with open(out, "w") as file:
    json.dump(said, file)
"""


class Host(NamedTuple):
    """How it is made; what it is refused with ("": it works); what it cannot protect by."""

    words: tuple[str, ...] = ()
    prelude: str = ""
    refusal: str = ""
    missing: tuple[str, ...] = ()


def shell(script: str, *prefix: str) -> tuple[str, ...]:
    return (*prefix, "sh", "-c", f'{script}; exec "$@"', "sh")


def mounted(script: str) -> tuple[str, ...]:
    """A mount namespace of its own; for a user that is in a user namespace whose root it is."""
    return shell(script, "unshare", *(["-m"] if IS_ROOT else ["-Urmpf", "--mount-proc"]))


def limited(name: str, value: int) -> str:
    return f"import resource; resource.setrlimit(resource.RLIMIT_{name}, ({value}, {value}))"


ROOT_OUTSIDE = "root outside as well" if IS_ROOT else ""
"""Root of a user namespace is the user outside, which works; where that is root, it must not."""
CLOSED = "for n in range(3): os.close(n)"
THREADS = "for _ in range(9): threading.Thread(target=threading.Event().wait, daemon=True).start()"
# Of Python 3.12 and later, that the child may hang.
NO_WARNING = "import warnings; warnings.filterwarnings('ignore', 'This process')"
PLACES = {
    "/proc: hidepid=1": Host(mounted("mount -t proc -o hidepid=1 proc /proc")),
    "/proc: hidepid=2": Host(mounted("mount -t proc -o hidepid=2 proc /proc")),
    "/proc: a part is covered": Host(mounted("mount -t tmpfs none /proc/tty")),
    "/proc: read-only": Host(
        mounted("mount --rbind /proc /proc; mount -o remount,bind,ro /proc"),
        refusal="Read-only file system: '/proc/",
    ),
    "/proc: none": Host(mounted("mount -t tmpfs none /proc"), refusal="no /proc. Mount that"),
    "/sys: read-only": Host(mounted("mount --rbind /sys /sys; mount -o remount,bind,ro /sys")),
    "/sys: empty": Host(mounted("mount -t tmpfs none /sys"), missing=("cgroup.memory",)),
    "/sys/fs/cgroup: empty": Host(
        mounted("mount -t tmpfs none /sys/fs/cgroup"), missing=("cgroup.memory",)
    ),
    "/dev: empty": Host(mounted("mount -t tmpfs none /dev"), refusal="directory: '/dev/null'"),
    "/dev/shm: none": Host(mounted("mount -t tmpfs -o mode=0 none /dev/shm")),
    "/etc: nearly empty": Host(mounted("mount -t tmpfs none /etc; echo '::1 l' > /etc/hosts")),
    **{
        f"temporary files: {options}": Host(
            mounted(f"mount -t tmpfs -o {options} none /mnt; export TMPDIR=/mnt")
        )
        for options in ("ro", "noexec,nosuid,nodev", "size=4k,nr_inodes=1")
    },
}
NAMESPACES = {
    "root of a user namespace": Host(("unshare", "-Ur"), refusal=ROOT_OUTSIDE),
    "with its network namespace": Host(("unshare", "-Urn"), refusal=ROOT_OUTSIDE),
    "PID 1": Host(("unshare", "-Urpf", "--mount-proc"), refusal=ROOT_OUTSIDE),
    "no id": Host(("unshare", "-U"), refusal="namespace.user cannot be enforced on this host: "),
    **{
        f"no {kind} namespaces": Host(
            shell(f"echo 0 > /proc/sys/user/max_{kind}_namespaces", "unshare", "-Ur"),
            refusal=refusal,
        )
        for kind, refusal in {
            "user": "unshare: No space left on device (ENOSPC). No more namespaces may be made",
            "mnt": ROOT_OUTSIDE or "namespace.mount cannot be enforced on this host: ",
            "net": ROOT_OUTSIDE or "raise /proc/sys/user/max_*_namespaces",
            "pid": ROOT_OUTSIDE or "raise /proc/sys/user/max_*_namespaces",
        }.items()
    },
    "no capabilities": Host(
        ("setpriv", "--bounding-set=-all", "--inh-caps=-all"), refusal=ROOT_OUTSIDE
    ),
    "no new privileges": Host(("setpriv", "--no-new-privs")),
    "the filter of a container": Host(
        prelude="from nsbox.seccomp import filters, policy\n"
        "libc('prctl', 38, 1, 0, 0, 0)\n"
        "filters.load(filters.compile_policy(policy.SeccompPolicy.docker()))",
        refusal="the seccomp filter around this process refuses them",
    ),
}
MIB = 1 << 20
LIMITS = {
    f"RLIMIT_{name}={value}": Host(prelude=limited(name, value), refusal=refusal)
    for name, value, refusal in (
        ("NPROC", 0, "over this process's hard limit of 0" if IS_ROOT else "(RLIMIT_NPROC)"),
        ("NPROC", 100, ""),
        ("NOFILE", 16, "the limit of open files is 16 (RLIMIT_NOFILE"),
        ("NOFILE", 40, ""),
        ("AS", 300 * MIB, ""),
        ("DATA", 100 * MIB, ""),
        ("STACK", MIB, ""),
        ("FSIZE", 0, "RLIMIT_FSIZE of this process holds"),
        ("FSIZE", MIB, ""),
        ("MEMLOCK", 0, ""),
        ("SIGPENDING", 0, ""),
        ("CPU", 60, ""),
        ("CORE", 0, ""),
        ("MSGQUEUE", 0, ""),
    )
}
STARTS = {
    "umask": Host(prelude="os.umask(0o777)"),
    "streams: closed": Host(shell("exec <&- >&- 2>&-")),
    "SIGCHLD: ignored": Host(shell("trap '' CHLD")),
    "signals: blocked": Host(prelude="signal.pthread_sigmask(0, signal.valid_signals())"),
    "signals: ignored": Host(
        prelude="for n in signal.valid_signals() - {9, 19}: signal.signal(n, signal.SIG_IGN)"
    ),
    "variables: none": Host(
        prelude="store = os.environ['NSBOX_STORE']; os.environ.clear()\n"
        "os.environ['NSBOX_STORE'] = store"
    ),
    "LC_ALL=C": Host(("env", "LC_ALL=C", "PYTHONCOERCECLOCALE=0", "PYTHONUTF8=0")),
    "TMPDIR: not there": Host(prelude="os.environ['TMPDIR'] = '/nowhere/\\udcff'"),
    # Python 3.13.0 itself imports no socket there, unless its path is without that directory.
    "working directory: removed": Host(
        shell('d=$(mktemp -d); cd "$d"; rmdir "$d"; export PYTHONSAFEPATH=1')
    ),
    "a session of its own": Host(("setsid", "-w")),
    "nice": Host(("nice", "-n", "19")),
    "SCHED_IDLE": Host(prelude="os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"),
    "one CPU": Host(prelude="os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"),
    "a subreaper": Host(prelude="libc('prctl', 36, 1, 0, 0, 0)"),
    "not dumpable": Host(prelude="libc('prctl', 4, 0, 0, 0, 0)"),
    "threads": Host(prelude=THREADS),
    "a fork of threads": Host(
        prelude=f"{THREADS}\n{NO_WARNING}\n"
        "if pid := os.fork(): os._exit(os.waitpid(pid, 0)[1] >> 8)"
    ),
    "personality: ADDR_NO_RANDOMIZE": Host(("setarch", "-R")),
    "personality: PER_LINUX32": Host(("setarch", "linux32")),
}
ENOSYS, EPERM = 38, 1
POOLS = "pools: "  # whether a command works depends on the version of the cgroups
KERNELS = {
    f"{'no' if error == ENOSYS else 'refused:'} {names}": Host(
        prelude=f"without({error}, *{names.split()!r})", refusal=refusal
    )
    for error, names, refusal in (
        (ENOSYS, "clone3", "clone3: Function not implemented (ENOSYS)"),
        (EPERM, "clone3", "posix_spawn on "),
        (ENOSYS, "eventfd2", POOLS + "eventfd: Function not implemented (ENOSYS)"),
        (ENOSYS, "pidfd_open", "pidfd_open: Function not implemented (ENOSYS)"),
        (ENOSYS, "close_range", "close_range: Function not implemented (ENOSYS)"),
        (ENOSYS, "fsopen fsconfig fsmount open_tree move_mount", "step 'layout' failed: "),
        (ENOSYS, "mount_setattr", "mount_setattr: Function not implemented (ENOSYS)"),
        (ENOSYS, "openat2", ""),
        (ENOSYS, "landlock_create_ruleset landlock_add_rule landlock_restrict_self", ""),
        (ENOSYS, "statx", ""),
        (ENOSYS, "memfd_create", ""),
        (ENOSYS, "pidfd_send_signal", ""),
        (ENOSYS, "sched_setattr sched_getattr ioprio_get ioprio_set", ""),
        (ENOSYS, "keyctl add_key request_key", "keyctl: Function not implemented (ENOSYS)"),
        (ENOSYS, "seccomp", "seccomp: Function not implemented (ENOSYS)"),
        (ENOSYS, "prlimit64", "Function not implemented"),
        (ENOSYS, "signalfd4", "signalfd: Function not implemented (ENOSYS)"),
        (ENOSYS, "clone", "fork: Function not implemented (ENOSYS)"),
        (EPERM, "mount umount2", "step 'mounts': mount on /: Operation not permitted (EPERM)"),
        (EPERM, "unshare", "the seccomp filter around this process refuses them"),
        (EPERM, "setns", "setns: Operation not permitted (EPERM)"),
        (EPERM, "pivot_root", "pivot_root on .: Operation not permitted (EPERM)"),
        (EPERM, "socketpair", "socketpair: Operation not permitted (EPERM)"),
        (EPERM, "ptrace personality userfaultfd io_uring_setup bpf perf_event_open", ""),
    )
}


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Not below /tmp, which hosts cover."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.mkdir(f"{directory}/code")
        Path(directory, "code", "app.py").write_text("def handler(event, context): return event\n")
        yield Path(directory)


def live(host: Host, place: Path) -> dict[str, object]:
    report, out = os.pipe()
    paths = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))
    program = LIFE.replace("PRELUDE", host.prelude)
    with os.fdopen(report) as file:
        with os.fdopen(out, "w"):
            process = subprocess.Popen(
                [*host.words, sys.executable, "-c", program, str(out), str(place / "code")],
                env={**os.environ, "PYTHONPATH": paths, "NSBOX_STORE": f"{place}/store"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[out],
            )
        try:
            output, _ = process.communicate(timeout=60 * PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return {"hangs": output.decode()}
        text = file.read()
    said: dict[str, object] = json.loads(text) if text else {"status": process.returncode}
    return {**said, "output": output.decode()}


def wrong(name: str, host: Host, place: Path) -> str:
    """Return what is not as the table says; "" when all is."""
    said = live(host, place)
    told = f"{name}: {said}"
    if said.get("output") != "" or said.get("left") != "":
        return told
    refusal = host.refusal.removeprefix(POOLS)
    for answer in (str(said["run"]), str(said["call"])):
        is_refused = "Error: " in answer and refusal in answer and "Traceback" not in answer
        works = answer == "works"
        if host.refusal.startswith(POOLS) and answer is said["run"]:
            if not (works or is_refused):
                return told
        elif not (is_refused if refusal else works):
            return told
    missing = said["missing"]
    assert isinstance(missing, list)
    return told if set(host.missing) - set(missing) else ""


@pytest.mark.parametrize("hosts", [PLACES, NAMESPACES, LIMITS, STARTS, KERNELS])
def test_it_works_or_is_refused_by_name(hosts: dict[str, Host], place: Path) -> None:
    with ThreadPoolExecutor(3) as threads:
        told = threads.map(lambda name: wrong(name, hosts[name], place), hosts)
        found = list(filter(None, told))
    assert not found, "\n".join(found)
