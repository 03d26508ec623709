# SPDX-License-Identifier: Apache-2.0
"""What an invocation finds of the one before: all, nothing, or there is no next one."""

from __future__ import annotations

import pytest
from tests.functions.conftest import MakeFunction
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox import State

LEAVE_AND_LOOK = """
import atexit, builtins, ctypes, errno, fcntl, gc, json, mmap, os, resource, signal, socket, sys
import threading, time

libc = ctypes.CDLL(None, use_errno=True)
SEEN = []

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]

def daemonise():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.dup2(os.open("/dev/null", os.O_RDWR), 3)
            while True:
                time.sleep(1000)
        os._exit(0)
    os.wait()

def leave():
    SEEN.append(1)
    sys.modules["left"] = sys
    sys.path.append("/left")
    builtins.left = 1
    json.left = 1
    os.environ["LEFT"] = "1"
    os.chdir("/tmp")
    os.umask(0o077)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.setitimer(signal.ITIMER_REAL, 1000)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
    os.nice(5)
    gc.disable()
    sys.setrecursionlimit(5000)
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    for place in ("/tmp", "/dev/shm"):
        deep = place
        for _ in range(200):
            deep += "/deep"
            os.mkdir(deep)
        open(f"{place}/.hidden", "w").close()
        os.link(f"{place}/.hidden", f"{place}/link")
        os.symlink("/var/task", f"{place}/symlink")
        os.symlink("/nowhere", f"{place}/deep/broken")
        os.mkfifo(f"{place}/fifo")
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"{place}/socket")
        sock.listen()
        os.mkdir(f"{place}/locked")
        os.mkdir(f"{place}/locked/inner")
        open(f"{place}/locked/inner/file", "w").close()
        os.chmod(f"{place}/locked/inner", 0)
        os.chmod(f"{place}/locked", 0)
        os.mkdir(f"{place}/" + "n" * 255)
        open(f"{place}/odd\\n\\udcff", "w").close()
        os.chmod(place, 0o700)
    kept = [socket.socket(socket.AF_UNIX), socket.socket()]
    kept[0].bind("\\0left")
    kept[1].bind(("127.0.0.1", 7777))
    for item in kept:
        item.listen()
        item.set_inheritable(True)
    globals()["kept"] = kept
    lock = open("/tmp/lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    globals()["lock"] = lock
    libc.mq_open(b"/left", os.O_CREAT | os.O_RDWR, 0o600, None)
    libc.shmget(0x4c454654, 4096, 0o1600)
    libc.semget(0x4c454654, 1, 0o1600)
    libc.msgget(0x4c454654, 0o1600)
    os.open("/tmp/open", os.O_CREAT | os.O_RDWR)
    for fd in (1, 2):
        os.set_blocking(fd, False)
    daemonise()

def look():
    def bound(family, address):
        with socket.socket(family) as one:
            return attempt(one.bind, address)
    def tree(place):
        return sorted(os.path.join(top, name) for top, folders, files in os.walk(place)
                      for name in folders + files)
    return {
        "globals": [SEEN, sorted(name for name in globals() if name in ("kept", "lock"))],
        "modules": ["left" in sys.modules, hasattr(builtins, "left"), hasattr(json, "left")],
        "path": sys.path[-1],
        "environment": os.environ.get("LEFT"),
        "cwd": os.getcwd(),
        "umask": [line for line in open("/proc/self/status") if line.startswith("Umask")],
        "signals": [line for line in open("/proc/self/status")
                    if line.startswith(("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"))],
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "limits": [resource.getrlimit(which) for which in range(15)],
        "nice": os.nice(0),
        "nice of the parent": os.getpriority(os.PRIO_PROCESS, os.getppid()),
        "gc": [gc.isenabled(), sys.getrecursionlimit()],
        "threads": threading.active_count(),
        "files": [tree(place) for place in ("/tmp", "/dev/shm", "/dev/mqueue")],
        "modes": [os.stat(place).st_mode for place in ("/tmp", "/dev/shm", "/dev/mqueue")],
        "abstract": bound(socket.AF_UNIX, "\\0left"),
        "tcp": bound(socket.AF_INET, ("127.0.0.1", 7777)),
        "mq": libc.mq_open(b"/left", os.O_RDWR),
        "sysv": [open(f"/proc/sysvipc/{kind}").read() for kind in ("shm", "sem", "msg")
                 if os.path.exists(f"/proc/sysvipc/{kind}")],
        "sysv by key": [libc.shmget(0x4c454654, 0, 0), libc.semget(0x4c454654, 0, 0),
                        libc.msgget(0x4c454654, 0)],
        "descriptors": sorted(
            (int(fd), os.get_blocking(int(fd)))
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}") or int(fd) < 4
        ),
        "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
        # Those of open file descriptions (F_OFD_SETLK) are the whole host's, in every namespace.
        "locks": [line for line in open("/proc/locks") if " OFDLCK " not in line]
                 if os.path.exists("/proc/locks") else None,
    }

def handler(event, context):
    if event == "leave":
        leave()
        return None
    return look()
"""


def test_reset_leaves_nothing(make_function: MakeFunction) -> None:
    env = make_function(LEAVE_AND_LOOK, reuse="reset", timeout=60)
    before = env.invoke("look")
    assert env.invoke("look") == before
    for _ in range(2):
        env.invoke("leave")
        after = env.invoke("look")
        different = {key: (before[key], after[key]) for key in before if before[key] != after[key]}
        assert not different
    assert env.state is State.READY


def test_keep_keeps(make_function: MakeFunction) -> None:
    env = make_function("""
        import os
        SEEN = []
        def handler(event, context):
            SEEN.append(event)
            with open("/tmp/seen", "a") as file:
                file.write(str(event))
            return [SEEN, open("/tmp/seen").read(), os.getpid()]
    """)
    first, second = env.invoke(1), env.invoke(2)
    assert first == [[1], "1", first[2]]
    assert second == [[1, 2], "12", first[2]]


@pytest.mark.parametrize("event", ["fine", "raise", "exit"])
def test_never_serves_one(make_function: MakeFunction, event: str) -> None:
    env = make_function(
        """
        import os
        def handler(event, context):
            if event == "raise":
                raise ValueError
            if event == "exit":
                os._exit(1)
            return event
        """,
        reuse="never",
    )
    if event == "fine":
        assert env.invoke(event) == event
    else:
        with pytest.raises(nsbox.FunctionError):
            env.invoke(event)
    assert env.state is State.CLOSED
    assert env.last is not None
    with pytest.raises(nsbox.EnvironmentStateError, match="closed"):
        env.invoke(event)


def test_reset_after_an_error_and_with_commands_between(make_function: MakeFunction) -> None:
    env = make_function(
        """
        import os
        SEEN = []
        def handler(event, context):
            SEEN.append(event)
            found = os.path.exists("/tmp/mine"), len(SEEN)
            open("/tmp/mine", "w").close()
            if event:
                raise ValueError
            return found
        """,
        reuse="reset",
    )
    assert env.invoke(0) == [False, 1]
    with pytest.raises(nsbox.FunctionError):
        env.invoke(1)
    assert env.invoke(0) == [False, 1]


@pytest.mark.needs("cgroup.pids")
def test_reset_against_what_breeds(make_function: MakeFunction) -> None:
    """It is gone before the next event, or the environment is; never is there a survivor."""
    env = make_function(
        """
        import os
        def handler(event, context):
            if event == "breed":
                if os.fork() == 0:
                    os.dup2(os.open("/dev/null", os.O_RDWR), 3)
                    while True:
                        try:
                            if os.fork() == 0:
                                os.setsid()
                        except OSError:
                            pass
                return None
            return len([name for name in os.listdir("/proc") if name.isdigit()])
        """,
        reuse="reset",
        limits=nsbox.Limits(pids_max=40),
        timeout=30 * PATIENCE,
    )
    count = env.invoke("look")
    env.invoke("breed")
    try:
        assert env.invoke("look") == count
    except (nsbox.EnvironmentStateError, nsbox.EnvironmentDied, nsbox.FunctionError):
        wait_until(lambda: env.state is State.DEAD, "it is killed")


DUPLICATES = """
import os, subprocess
out, err = os.dup(1), os.dup(2)
os.set_inheritable(err, True)
CLOSE

def handler(event, context):
    os.write(out, b"out")
    subprocess.run(["sh", "-c", f"printf %s err >&{err}"], close_fds=False)
    return [os.get_inheritable(fd) for fd in (out, err)]
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize("close", ["", "os.close(1); os.close(2)"])
def test_duplicates_of_outputs_are_each_events_own(
    make_function: MakeFunction, start: str, close: str
) -> None:
    env = make_function(DUPLICATES.replace("CLOSE", close), reuse="reset", start=start)
    for _ in range(2):
        invocation = env.invoke_bytes(b"1")
        assert invocation.payload == b"[false, true]"
        assert (invocation.stdout, invocation.stderr) == (b"out", b"err")


NO_ROOM = """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

def handler(event, context):
    return event
"""


def test_a_worker_that_cannot_fork_has_ended_and_says_why(make_function: MakeFunction) -> None:
    env = make_function(NO_ROOM, reuse="reset")
    heard = []
    with pytest.raises(nsbox.InvokeError, match="exit status 1"):
        env.invoke(1, on_log=lambda _, data: heard.append(data))
    assert b"BlockingIOError" in b"".join(heard)


WAITED_FOR = """
import os, signal, threading, time

def wait():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)

IMPORT

def handler(event, context):
    return event or os._exit(3)
"""


@pytest.mark.parametrize(
    "code",
    ["signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "threading.Thread(target=wait).start()"],
)
def test_a_function_that_waits_for_all_children_is_served(
    make_function: MakeFunction, code: str
) -> None:
    """Then nobody can tell the worker how a fork has ended, and it does not guess."""
    env = make_function(WAITED_FOR.replace("IMPORT", code), reuse="reset")
    assert [env.invoke(event) for event in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(nsbox.FunctionError, match=r"providing a reason|exit status 3"):
        env.invoke(0)
    with pytest.raises(nsbox.EnvironmentStateError, match=r"nobody knows how|exit status 3"):
        env.invoke(1)
