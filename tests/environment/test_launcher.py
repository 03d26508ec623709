# SPDX-License-Identifier: Apache-2.0
"""One launcher for any kind of host: threads, asyncio, forks, signals, and every way to end."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import select
import signal
import subprocess
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests import leaks
from tests.support import (
    IS_ROOT,
    SLOW_MACHINE,
    family_of,
    host_program,
    name_of,
    processes_with,
    publish_app,
    wait_until,
)

import nsbox
from nsbox.launcher import templates
from nsbox.launcher.layouts import LAYOUTS_KEPT, SPECS_KEPT
from nsbox.launcher.messages import Spec
from nsbox.supervisor import launcher as launcher_module
from nsbox.supervisor.launcher import Launcher, get_launcher

pytestmark = pytest.mark.needs("userns")

THREADS = 40


def run_host(code: str, *arguments: str, seconds: float = 60) -> tuple[int, str, str]:
    """Run another host to its end; return its status, stdout and stderr. Nothing of it is left."""
    pipe = subprocess.PIPE
    # In a group of its own, so that children it has forked end with it when it hangs.
    host = host_program(
        code, *arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, process_group=0
    )
    try:
        out, err = host.communicate(timeout=seconds)
    except BaseException:
        os.killpg(host.pid, signal.SIGKILL)
        host.communicate()
        raise
    wait_until(lambda: not family_of(host.pid), "nothing of that host is left")
    return host.returncode, out.decode(), err.decode()


# -- threads and tasks ---------------------------------------------------------------------------


def test_forty_threads_at_once() -> None:
    nsbox.shutdown()  # so that the first use is what they all do at once
    begin = threading.Barrier(THREADS)
    born = threading.Barrier(THREADS)

    def work(number: int) -> tuple[str, str, int]:
        begin.wait(30)
        with nsbox.ExecutionEnvironment() as env:
            launcher = get_launcher().pid
            born.wait(60)  # all forty are alive now
            env.write_file("/tmp/mine", str(number).encode())
            return env.id, env.run(["cat", "/tmp/mine"]).text(), launcher

    with ThreadPoolExecutor(THREADS) as pool:
        answers = list(pool.map(work, range(THREADS)))
    assert [text for _, text, _ in answers] == [str(number) for number in range(THREADS)]
    assert len({identity for identity, _, _ in answers}) == THREADS
    assert len({launcher for _, _, launcher in answers}) == 1, "they share one launcher"


def test_many_tasks_of_asyncio() -> None:
    async def task(number: int) -> str:
        def work() -> str:
            return nsbox.run(["sh", "-c", f"echo {number}"]).text()

        return await asyncio.to_thread(work)

    async def main() -> list[str]:
        return await asyncio.gather(*(task(number) for number in range(40)))

    assert asyncio.run(main()) == [f"{number}\n" for number in range(40)]


# -- a launcher in trouble -----------------------------------------------------------------------


def test_a_killed_launcher_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    """Each call under way raises one error of one kind, and the next use works."""
    envs = [nsbox.ExecutionEnvironment() for _ in range(4)]
    old = get_launcher()
    errors: list[BaseException] = []
    processes = [env.popen(["sleep", "60"]) for env in envs]

    def work(env: nsbox.ExecutionEnvironment) -> None:
        try:
            env.run(["sleep", "60"])
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(env,)) for env in envs]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(_count(env, "sleep") == 2 for env in envs), "all commands run")
    os.kill(old.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert [type(error) for error in errors] == [nsbox.EnvironmentDied] * len(envs)
    assert all("the launcher died" in str(error) for error in errors)
    for process in processes:
        for _ in range(2):  # the same answer each time it is asked
            with pytest.raises(nsbox.EnvironmentDied, match="the launcher died"):
                process.wait(5)
        process.close()
    for env in envs:
        assert env.state is nsbox.State.DEAD
        with pytest.raises(nsbox.EnvironmentStateError, match="the launcher died"):
            env.run(["true"])
    with caplog.at_level(logging.WARNING, "nsbox"):
        assert nsbox.run(["echo", "again"]).text() == "again\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"the launcher {old.pid} has died; starting another"
    ]
    assert get_launcher().pid != old.pid
    for env in envs:
        env.close()
        assert env.state is nsbox.State.CLOSED


def _count(env: nsbox.ExecutionEnvironment, name: str) -> int:
    """Return how many commands of that name an environment has, seen from outside."""
    try:
        with open(f"/proc/{env.pid}/task/{env.pid}/children") as file:
            children = file.read().split()
    except OSError:
        return 0
    found = 0
    for pid in children:
        try:
            with open(f"/proc/{pid}/comm") as file:
                found += file.read().strip() == name
        except OSError:
            continue
    return found


def _is_dead(launcher: Launcher) -> bool:
    return not launcher.alive


def test_a_launcher_killed_between_uses(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        launcher = get_launcher()
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(functools.partial(_is_dead, launcher), "its death is seen")
        assert nsbox.run(["true"]).ok
        assert get_launcher().pid != launcher.pid
    assert len(caplog.records) == 5


def test_a_launcher_killed_before_its_id_maps_are_written() -> None:
    launcher = Launcher()
    try:
        os.kill(launcher.pid, signal.SIGKILL)
        wait_until(lambda: not launcher.alive, "its death is seen")
        # Its janitor may have a copy of its socket for a moment more.
        poll = select.poll()
        poll.register(launcher._channel, 0)
        wait_until(lambda: poll.poll(0), "nobody has the other end of its socket")
        with pytest.raises(nsbox.LauncherError, match="id maps"):
            launcher._write_maps(launcher.pid)
    finally:
        launcher.close()


def test_a_stopped_launcher_holds_up_births_alone(env: nsbox.ExecutionEnvironment) -> None:
    launcher = get_launcher()
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(nsbox.run(["echo", "late"]).text()))
    os.kill(launcher.pid, signal.SIGSTOP)
    try:
        thread.start()
        assert env.run(["echo", "on time"]).text() == "on time\n"
        env.write_file("/tmp/x", b"written")
        assert env.read_file("/tmp/x") == b"written"
        with env.popen(["sleep", "60"]) as process:
            process.kill()
            assert process.wait(10).outcome is nsbox.Outcome.KILLED
        assert env.state is nsbox.State.READY
        assert answers == []
    finally:
        os.kill(launcher.pid, signal.SIGCONT)
    thread.join(30)
    assert answers == ["late\n"]


def test_a_launcher_that_ends_late_is_reaped_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher_module, "_REAP", 0.0)
    monkeypatch.setattr(launcher_module, "_EXIT_SECONDS", 0.0)
    late = Launcher()
    os.kill(late.pid, signal.SIGSTOP)
    late.close()
    assert os.path.exists(f"/proc/{late.pid}")
    os.kill(late.pid, signal.SIGCONT)

    def is_reaped() -> bool:
        get_launcher()
        return not os.path.exists(f"/proc/{late.pid}")

    wait_until(is_reaped, "it is reaped")


def test_a_stopped_launcher_can_be_killed(env: nsbox.ExecutionEnvironment) -> None:
    launcher = get_launcher()
    os.kill(launcher.pid, signal.SIGSTOP)
    os.kill(launcher.pid, signal.SIGKILL)
    wait_until(lambda: env.state is nsbox.State.DEAD, "the environment dies with it")
    assert nsbox.run(["true"]).ok


# -- what is kept of specs and layouts is bounded --------------------------------------------------


def test_more_specs_and_layouts_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host, launcher and template forget the oldest, which can be had again all the same."""
    launcher = get_launcher()
    forgotten: list[Spec] = []
    forget = Launcher.forget_spec

    def note(self: Launcher, spec: Spec) -> None:
        forgotten.append(spec)
        forget(self, spec)

    monkeypatch.setattr(Launcher, "forget_spec", note)

    def config(number: int) -> nsbox.Config:
        mounts = [nsbox.Mount.tmpfs(f"/tmp/{number}")] if number <= LAYOUTS_KEPT + 1 else []
        return nsbox.Config(limits=nsbox.Limits(open_files=100 + number), mounts=mounts)

    def check(number: int) -> None:
        script = "ulimit -n; grep -c ' /tmp/[0-9]* ' /proc/self/mounts"
        result = nsbox.run(["sh", "-c", script], config=config(number))
        assert result.text().split() == [str(100 + number), str(int(number <= LAYOUTS_KEPT + 1))]

    for number in range(max(SPECS_KEPT, templates.SPECS_KEPT) + 2):
        nsbox.ExecutionEnvironment(config(number)).close()
    assert forgotten == []
    check(0)
    assert len(forgotten) == 1
    check(SPECS_KEPT + 1)
    check(1)
    if IS_ROOT:
        held = [os.readlink(entry) for entry in Path(f"/proc/{launcher.pid}/fd").iterdir()]
        assert sum(name.startswith("mnt:") for name in held) <= LAYOUTS_KEPT + 1, "and its own"
    # The host forgets all that it has sent: it is sent again.
    monkeypatch.setattr(launcher_module, "_SPECS_NOTED", 2)
    for number in (0, 1, 2, 0):
        check(number)


def test_the_end_of_one_template_costs_no_birth_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clones are ended with it; another's, which has not told of them yet, is no such one."""
    function = publish_app(tmp_path, "def handler(event, context): return event")
    nsbox.shutdown()  # and the templates of other tests
    launcher = get_launcher()

    def children(name: str) -> set[int]:
        return {child.pid for child in leaks.children(launcher.pid) if child.name == name}

    def inits() -> set[int]:
        helpers = ("nsbox-template", "nsbox-janitor")
        return {each.pid for each in leaks.children(launcher.pid) if each.name not in helpers}

    with nsbox.ExecutionEnvironment():
        (of_commands,) = children("nsbox-template")
    with nsbox.ExecutionEnvironment(function) as env:
        assert env.invoke(1) == 1
    (of_functions,) = children("nsbox-template") - {of_commands}
    wait_until(lambda: not inits(), "only helpers are left")
    answers: list[object] = []
    is_asked = threading.Event()
    request_birth = Launcher.request_birth

    def note(self: Launcher, *arguments: Any, **options: Any) -> None:
        request_birth(self, *arguments, **options)
        is_asked.set()

    def call() -> None:
        with nsbox.ExecutionEnvironment(function) as env:
            answers.append(env.invoke(2))

    thread = threading.Thread(target=call)
    monkeypatch.setattr(Launcher, "request_birth", note)
    try:
        os.kill(of_functions, signal.SIGSTOP)
        thread.start()
        assert is_asked.wait(30)
        nsbox.run(["true"])  # asked for later, and there: the template has been sent the first
        wait_until(lambda: not inits(), "only helpers are left")
        os.kill(launcher.pid, signal.SIGSTOP)
        os.kill(of_commands, signal.SIGKILL)  # what the launcher hears of first
        wait_until(lambda: psutil.Process(of_commands).status() == "zombie", "it has ended")
        os.kill(of_functions, signal.SIGCONT)
        wait_until(inits, "the other has made its clone")
    finally:
        os.kill(of_functions, signal.SIGCONT)
        os.kill(launcher.pid, signal.SIGCONT)
    thread.join()
    assert answers == [2]
    with nsbox.ExecutionEnvironment() as env:
        assert env.run(["true"]).ok


@pytest.mark.parametrize("name", ["nsbox-template", "nsbox-janitor"])
def test_a_stopped_helper_holds_up_no_environment(
    env: nsbox.ExecutionEnvironment, name: str
) -> None:
    """Births wait for a template; for the janitor nobody waits."""
    helpers = [each.pid for each in leaks.children(get_launcher().pid) if each.name == name]
    outcomes: list[bool] = []
    birth = threading.Thread(target=lambda: outcomes.append(nsbox.run(["true"]).ok))
    try:
        for pid in helpers:
            os.kill(pid, signal.SIGSTOP)
        birth.start()
        if name == "nsbox-janitor":
            birth.join()
        assert env.run(["echo", "on"], timeout=30).text() == "on\n"
        env.write_file("/tmp/x", b"x")
        assert env.read_file("/tmp/x") == b"x"
    finally:
        for pid in helpers:
            os.kill(pid, signal.SIGCONT)
    birth.join()
    assert outcomes == [True]


def test_a_killed_janitor_is_replaced(env: nsbox.ExecutionEnvironment) -> None:
    launcher = get_launcher()
    if not launcher.hello.trees:
        pytest.skip("no cgroup is usable here, so there is no janitor")

    def janitor() -> int:
        with open(f"/proc/{launcher.pid}/task/{launcher.pid}/children") as file:
            children = [int(word) for word in file.read().split()]
        return next((pid for pid in children if name_of(pid) == "nsbox-janitor"), 0)

    first = janitor()
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: janitor() not in (0, first), "another one stands by")
    assert env.run(["true"]).ok


# -- forks ---------------------------------------------------------------------------------------

FORK = """
import os, sys, warnings
import nsbox
from nsbox.supervisor.launcher import get_launcher

env = nsbox.ExecutionEnvironment()
env.write_file("/tmp/x", b"of the parent")
process = env.popen(["cat"])
launcher = get_launcher().pid
child = os.fork()
if child == 0:
    calls = {
        "run": lambda: env.run(["true"]),
        "popen": lambda: env.popen(["true"]),
        "write_file": lambda: env.write_file("/tmp/x", b""),
        "read_file": lambda: env.read_file("/tmp/x"),
        "freeze": env.freeze,
        "thaw": env.thaw,
        "usage": env.usage,
    }
    for name, call in calls.items():
        try:
            call()
        except nsbox.EnvironmentStateError as error:
            assert str(os.getppid()) in str(error) and "forked" in str(error), error
        else:
            raise SystemExit(f"{name} works in the child")
    with nsbox.ExecutionEnvironment() as own:
        assert own.run(["echo", "own"]).text() == "own\\n"
        assert get_launcher().pid != launcher
    env.close()
    # The copies of the parent's pipes are let go of by the interpreter's end.
    warnings.simplefilter("ignore", ResourceWarning)
    if sys.argv[1] == "hard":
        os._exit(0)
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert env.state is nsbox.State.READY
assert get_launcher().pid == launcher
process.stdin.write(b"still there")
process.stdin.close()
assert process.wait(10).ok
assert process.stdout.read() == b"still there"
assert env.read_file("/tmp/x") == b"of the parent"
process.close()
env.close()
print("fine")
"""


@pytest.mark.parametrize("end", ["hard", "soft"])
def test_a_forked_child_has_a_launcher_of_its_own(end: str) -> None:
    assert run_host(FORK, end) == (0, "fine\n", "")


def test_a_fork_while_other_threads_use_the_launcher() -> None:
    """The child must find no lock held by a thread that it does not have."""
    code = """
    import os, threading, warnings
    import nsbox
    warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is what is tested
    nsbox.run(["true"]).check()  # a module that another thread imports at a fork is Python's matter
    over = threading.Event()
    def work():
        while not over.is_set():
            nsbox.run(["true"]).check()
    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for number in range(FORKS):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = nsbox.run(["sh", "-c", "exit 7"]).returncode
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    over.set()
    for thread in threads:
        thread.join()
    """
    counts = "THREADS, FORKS = 2, 3" if SLOW_MACHINE else "THREADS, FORKS = 4, 5"
    assert run_host(f"{counts}\n{textwrap.dedent(code)}") == (0, "", "")


def test_multiprocessing_by_fork() -> None:
    code = """
    import multiprocessing, warnings
    import nsbox
    warnings.simplefilter("ignore", DeprecationWarning)
    def work(number):
        return nsbox.run(["sh", "-c", f"echo {number}"]).text()
    with nsbox.ExecutionEnvironment() as env:
        with multiprocessing.get_context("fork").Pool(3) as pool:
            assert pool.map(work, range(9)) == [f"{number}\\n" for number in range(9)]
        assert env.run(["echo", "fine"]).text() == "fine\\n"
    """
    assert run_host(code) == (0, "", "")


PREFORK = """
import os, signal, socket, sys
import nsbox

nsbox.run(["true"]).check()  # as an application does that is loaded before the workers are forked
listener = socket.create_server(("127.0.0.1", 0))

def serve():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    env = nsbox.ExecutionEnvironment()
    while True:
        connection, _ = listener.accept()
        with connection:
            answer = env.run(["cat"], input=connection.recv(100)).stdout
            connection.sendall(b"%d %s" % (os.getpid(), answer))

def start():
    pid = os.fork()
    if pid == 0:
        try:
            serve()
        finally:
            sys.stdout.flush()
    return pid

workers = [start() for _ in range(3)]
def ask(text):
    with socket.create_connection(listener.getsockname()) as connection:
        connection.sendall(text)
        answer = b""
        while data := connection.recv(100):
            answer += data
    return answer.split()
for number in range(12):
    pid, answer = ask(b"%d" % number)
    assert int(pid) in workers and int(answer) == number
os.kill(workers[0], signal.SIGKILL)
os.waitpid(workers[0], 0)
workers[0] = start()
for number in range(12):
    assert int(ask(b"%d" % number)[1]) == number
for pid in workers:
    os.kill(pid, signal.SIGTERM)
for pid in workers:
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
nsbox.run(["true"]).check()
print("fine")
"""


def test_workers_forked_by_a_server() -> None:
    # Their environments are closed by the interpreter's end, which is not what is tested here.
    code = "import warnings; warnings.simplefilter('ignore', ResourceWarning)\n" + PREFORK
    assert run_host(code) == (0, "fine\n", "")


# -- signals -------------------------------------------------------------------------------------


def test_a_storm_of_signals_loses_nothing() -> None:
    code = """
    import signal
    import nsbox
    count = 0
    def tick(*_):
        global count
        count += 1
    signal.signal(signal.SIGALRM, tick)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    data = bytes(range(256)) * 4096
    for number in range(8):
        with nsbox.ExecutionEnvironment(tmp_size="16M") as env:
            assert env.run(["cat"], input=data).check().stdout == data
            env.write_file("/tmp/x", data)
            assert env.read_file("/tmp/x") == data
            process = env.popen(["sh", "-c", "exit 9"])
            assert process.wait().exit_code == 9
            process.close()
            result = env.run(["sleep", "60"], timeout=0.05)
            assert result.outcome is nsbox.Outcome.TIMED_OUT
            env.freeze()
            env.thaw()
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert count > 100, count
    nsbox.shutdown()
    """
    assert run_host(code) == (0, "", "")


REAPERS = {
    "a handler that reaps all": """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)
""",
    "ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n",
    "a thread that reaps all": """
def reap():
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.001)
threading.Thread(target=reap, daemon=True).start()
""",
}


@pytest.mark.parametrize("how", REAPERS)
def test_a_host_that_reaps_every_child(how: str) -> None:
    code = """
for _ in range(3):
    assert nsbox.run(["sh", "-c", "exit 5"]).returncode == 5
    with nsbox.ExecutionEnvironment() as env:
        os.kill(get_launcher().pid, signal.SIGKILL)
        try:
            env.run(["sleep", "60"])
        except (nsbox.EnvironmentDied, nsbox.EnvironmentStateError):
            pass
nsbox.shutdown()
nsbox.run(["true"]).check()
"""
    head = """
import logging, os, signal, threading, time
import nsbox
from nsbox.supervisor.launcher import get_launcher
logging.getLogger("nsbox").setLevel(logging.ERROR)
"""
    assert run_host(head + REAPERS[how] + code) == (0, "", "")


# -- the end of the host -------------------------------------------------------------------------

ENDS = {
    "the last line": ("pass", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "os._exit": ("os._exit(4)", 4),
    "an exception": ("raise ValueError('of the program')", 1),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
    "SIGKILL": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "Ctrl-C": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT),
    "abort": ("os.abort()", -signal.SIGABRT),
    "exec": ("os.execv('/bin/sh', ['sh', '-c', 'exit 6'])", 6),
}

ENDING = """
import os, resource, signal, sys, threading, time, warnings
import nsbox
warnings.simplefilter("ignore", ResourceWarning)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
idle, busy, frozen = [nsbox.ExecutionEnvironment() for _ in range(3)]
process = busy.popen(["sh", "-c", "setsid sleep MARK & sleep MARK"])
def work():
    try:
        busy.run(["sleep", "MARK"])
    except nsbox.NsboxError:
        pass
threading.Thread(target=work, daemon=True).start()
frozen.freeze()
print("ready", flush=True)
END
"""


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left_however_the_host_ends(end: str) -> None:
    code, status = ENDS[end]
    mark = f"61.{os.getpid()}"
    found = run_host(ENDING.replace("MARK", mark).replace("END", code), seconds=30)
    assert found[:2] == (status, "ready\n"), found
    expected = {"an exception": "ValueError: of the program", "Ctrl-C": "KeyboardInterrupt"}
    assert found[2].strip().rpartition("\n")[2] == expected.get(end, ""), found[2]
    assert found[2].count("Traceback") == (end in expected), found[2]
    wait_until(lambda: not processes_with(mark), "no command outlives its host")


def test_the_host_may_end_in_the_middle_of_a_birth() -> None:
    code = """
    import os, threading, time
    import nsbox
    nsbox.run(["true"])
    def work():
        while True:
            nsbox.run(["true"])
    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    time.sleep(0.05)
    os._exit(0)
    """
    assert run_host(code) == (0, "", "")


def test_shutdown_while_others_start_environments() -> None:
    """Each use sees a launcher or a typed error; no thread hangs."""
    over = threading.Event()
    seen: list[BaseException] = []

    def work() -> None:
        while not over.is_set():
            try:
                assert nsbox.run(["true"]).ok
            except (nsbox.LauncherError, nsbox.SetupError, nsbox.EnvironmentDied,
                    nsbox.EnvironmentStateError):  # fmt: skip
                continue
            except BaseException as error:  # noqa: BLE001 - the test looks at it
                seen.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        nsbox.shutdown()
        time.sleep(0.02)
    over.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert seen == []
    assert nsbox.run(["true"]).ok
