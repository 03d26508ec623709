# SPDX-License-Identifier: Apache-2.0
"""A program that uses nsbox while a system call fails, and says what became of it.

It runs under tests/faults/tracer.c and answers each line of its stdin, a list: the scenario and,
but for a count, class, number of the call, errno and occurrence.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nsbox
from nsbox.isolation import readback
from nsbox.linux import proc
from nsbox.supervisor.launcher import get_launcher

ASK, COUNT, WRITE, FAIL, STOP = 0x4E534258, 1, 2, 3, 4  # tracer.c
COLD = {"cold"}  # scenarios in which the launcher itself is started
WAIT = 5.0
"""Seconds that a call may take: the timeout of each of them."""
_prctl = ctypes.CDLL(None).prctl
_IS_ROOT = os.geteuid() == 0
APP = """
import os
def handler(event, context):
    print("a line")
    if files := event.get("files"):
        return [open("/tmp/" + name).read() for name in files]
    return event
"""


def ask(*words: int) -> int:
    answer: int = _prctl(*(ctypes.c_ulong(word) for word in (ASK, *words)))
    return answer


class Failed(AssertionError):
    """What is not as it is to be."""


def expect(condition: object, what: str) -> None:
    if not condition:
        raise Failed(what)


def until(condition: Callable[[], object], what: str, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, what)
        time.sleep(0.01)


# -- scenarios -----------------------------------------------------------------------------------


class Subject:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "code").mkdir()
        (directory / "code" / "app.py").write_text(APP)
        limits: dict[str, Any] = {"timeout": WAIT, "init_timeout": WAIT}
        code = directory / "code"
        self.version = nsbox.Function("app.handler", code=code, **limits).publish()
        self.resetting = nsbox.Function("app.handler", code=code, reuse="reset", **limits).publish()
        self.sources = 0
        self.bystander: nsbox.ExecutionEnvironment | None = None
        self.made: dict[str, nsbox.ExecutionEnvironment] = {}
        self.layers: dict[str, list[tuple[str, bool]]] = {}
        self.scenario = ""  # what has been begun, how long it takes and what is there then
        self.usual = 0.0
        self.start: dict[str, int] = {}

    def environment(self, kind: str) -> nsbox.ExecutionEnvironment:
        """Return the environment of a kind which the last call has left, or another one."""
        env = self.made.get(kind)
        if env is not None and env.state is not nsbox.State.READY:
            del self.made[kind]
            env.close()
            env = None
        if env is None:
            if kind == "commands":
                env = nsbox.ExecutionEnvironment()
            else:
                version = self.resetting if kind == "resetting" else self.version
                env = nsbox.ExecutionEnvironment(version)
                self.made[kind] = env
                expect(env.invoke({"x": 1}) == {"x": 1}, "its first answer is right")
            self.made[kind] = env
        return env

    def source(self) -> nsbox.Mount:
        """Return a mount that no layout has yet."""
        self.sources += 1
        path = self.directory / f"{self.sources}"
        path.mkdir()
        return nsbox.Mount.bind(str(path), "/data")

    # What is prepared, and what is done while a call fails.

    def prepare_cold(self) -> None:
        self.close_all()
        nsbox.shutdown()

    def cold(self, _: None) -> None:
        self.made["commands"] = nsbox.ExecutionEnvironment()
        self.made["function"] = env = nsbox.ExecutionEnvironment(self.version)
        env.init()

    def prepare_birth(self) -> nsbox.Config:
        self.close_all()
        return nsbox.Config(mounts=(self.source(),))

    def birth(self, config: nsbox.Config) -> None:
        self.made["commands"] = nsbox.ExecutionEnvironment(config)
        self.made["function"] = env = nsbox.ExecutionEnvironment(self.version)
        env.init()

    def prepare_run(self) -> nsbox.ExecutionEnvironment:
        return self.environment("commands")

    def run(self, env: nsbox.ExecutionEnvironment) -> None:
        result = env.run(["cat"], input=b"x", timeout=WAIT)
        expect(result.ok and result.stdout == b"x", f"run: {result}")
        env.write_file("/tmp/x", b"x" * 5000)
        expect(env.read_file("/tmp/x") == b"x" * 5000, "what was written is read")
        with env.popen(["sleep", "60"]) as process:
            process.send_signal(15)
            process.wait(WAIT)

    def prepare_invoke(self) -> nsbox.ExecutionEnvironment:
        return self.environment("function")

    def invoke(self, env: nsbox.ExecutionEnvironment) -> None:
        expect(env.invoke({"x": "y"}) == {"x": "y"}, "the answer is right")
        answer = env.invoke({"files": ["a"]}, files={"a": b"b"}, env={"A": "B"})
        expect(answer == ["b"], f"the answer is right: {answer}")

    def prepare_reset(self) -> tuple[nsbox.ExecutionEnvironment, nsbox.ExecutionEnvironment]:
        env = self.environment("commands")
        env.run(["sh", "-c", "mkdir -p /tmp/a/b; echo x > /tmp/a/b/c"]).check()
        return env, self.environment("resetting")

    def reset(self, both: tuple[nsbox.ExecutionEnvironment, nsbox.ExecutionEnvironment]) -> None:
        both[0].reset()
        for number in range(2):
            expect(both[1].invoke({"x": number}) == {"x": number}, "the answer is right")

    def prepare_freeze(self) -> nsbox.ExecutionEnvironment:
        return self.environment("commands")

    def freeze(self, env: nsbox.ExecutionEnvironment) -> None:
        process = env.popen(["sleep", "60"])
        env.freeze()
        env.thaw()
        process.kill()
        process.wait(WAIT)
        expect(env.run(["echo", "x"], timeout=WAIT).stdout == b"x\n", "it runs again")

    def prepare_close(self) -> tuple[nsbox.ExecutionEnvironment, nsbox.ExecutionEnvironment]:
        return self.environment("commands"), self.environment("function")

    def close(self, both: tuple[nsbox.ExecutionEnvironment, nsbox.ExecutionEnvironment]) -> None:
        both[0].close()
        both[1].close(grace=0.2)

    # -- what is to hold -------------------------------------------------------------------------

    def close_all(self) -> None:
        while self.made:
            self.made.popitem()[1].close()

    def stand_by(self) -> None:
        """Have an environment, made before, which the fault is not to touch."""
        if self.bystander is None or self.bystander.state is not nsbox.State.READY:
            if self.bystander is not None:
                self.bystander.close()
            self.bystander = nsbox.ExecutionEnvironment()

    def drop_bystander(self) -> None:
        if self.bystander is not None:
            self.bystander.close()
            self.bystander = None

    def kept(self) -> dict[str, int]:
        """Count what this process and its launcher have: descriptors by kind, children, files."""
        found: collections.Counter[str] = collections.Counter()
        launcher = get_launcher().pid
        for whose, pid in (("host", os.getpid()), ("launcher", launcher)):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                try:
                    kind = os.readlink(f"/proc/{pid}/fd/{fd}").partition(":")[0]
                except OSError:
                    continue
                if kind.endswith("/ids"):
                    kind = "ids"  # in one of two places, as what may be done there goes
                # Layouts and network namespaces are kept for later births, up to a number.
                if kind not in ("mnt", "net"):
                    found[f"{whose}: {kind}"] += 1
            for child in proc.children(pid):
                try:
                    found[f"{whose}: child {proc.read_stat(child).state == 'Z'}"] += 1
                except OSError:
                    continue
        for tree in set(get_launcher().hello.trees.values()):
            found["cgroups"] += sum(entry.is_dir() for entry in os.scandir(tree))
        found["threads"] = len(os.listdir("/proc/self/task"))
        found["temporary files"] = len(os.listdir(tempfile.gettempdir()))
        return dict(found)

    def settled(self) -> dict[str, int]:
        """Return what is kept while no network namespace is made ahead of need, by a child."""
        seen = []
        for _ in range(5):
            seen.append(self.kept())
            time.sleep(0.02)
        return min(seen, key=lambda kept: sum(kept.values()))

    def expect_kept(self, wanted: dict[str, int]) -> None:
        more: dict[str, int] = {}

        def is_as_wanted() -> bool:
            more.clear()
            now = self.kept()
            more.update({k: n - wanted.get(k, 0) for k, n in now.items() if n > wanted.get(k, 0)})
            return not more

        try:
            until(is_as_wanted, "left")
        except Failed:
            raise Failed(f"left: {more}") from None

    def is_whole(self, env: nsbox.ExecutionEnvironment) -> None:
        """Look from outside and from inside whether an environment is a whole sandbox."""
        missing = readback.missing_lock(env.pid, filtered=True)
        expect(missing == "", f"weaker: {missing}")
        layers = sorted((layer.name, layer.in_force) for layer in env.protections.layers)
        kind = "function" if env is self.made.get("function") else "commands"
        wanted = self.layers.setdefault(kind, layers)
        expect(layers == wanted, f"weaker: {set(wanted) - set(layers)}")
        if _IS_ROOT:
            for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup"):
                own, inside = (os.readlink(f"/proc/{pid}/ns/{name}") for pid in ("self", env.pid))
                expect(own != inside, f"weaker: the host's {name} namespace")
            status = Path(f"/proc/{env.pid}/status").read_text()
            uids = status.partition("\nUid:\t")[2].partition("\n")[0].split()
            groups = status.partition("\nGroups:\t")[2].partition("\n")[0].strip()
            expect("0" not in uids and not groups, f"weaker: uids {uids}, groups {groups}")
        if kind == "function":
            return
        script = """id -u; id -g; ls /
            find /sys -mindepth 1 -maxdepth 2 ! -path /sys/fs ! -path /sys/fs/cgroup
            touch /x 2>&1; cat /proc/1/environ /proc/1/mem 2>&1; ulimit -c"""
        text = env.run(["sh", "-c", script]).text()
        lines = text.splitlines()
        expect(lines[:2] == ["1000", "1000"], f"weaker: {text}")
        on_the_way = {sys.prefix.split("/")[1]}  # to the interpreter, which may be in a home
        expect(not ({"root", "home", "boot", "srv"} - on_the_way) & set(lines), f"weaker: {text}")
        expect("/sys" not in text, f"weaker: {text}")
        expect("Read-only" in text, f"weaker: {text}")
        expect(text.count("Permission denied") == 2, f"weaker: PID 1 is dumpable: {text}")
        expect(lines[-1] == "0", f"weaker: {text}")

    # -- one fault -------------------------------------------------------------------------------

    def live(self, scenario: str, arm: Callable[[], object]) -> tuple[str, float]:
        """Do what the scenario is, armed; return what was raised, and the seconds it took."""
        state = getattr(self, f"prepare_{scenario}")()
        act = getattr(self, scenario)
        begin = time.monotonic()
        try:
            arm()
            act(state)
        except nsbox.NsboxError as error:
            answer = f"{type(error).__name__}: {error}"
        except Failed as error:
            answer = f"wrong: {error}"
        except MemoryError as error:
            answer = f"MemoryError: {error}"
        except BaseException as error:  # noqa: BLE001 - to be told
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = f"untyped: {error!r} at {place.filename}:{place.lineno}"
        else:
            answer = ""
        return answer, time.monotonic() - begin

    def begin(self, scenario: str) -> None:
        """Do it twice without a fault: nothing is new afterwards, and what is kept is known."""
        self.drop_bystander()
        for _ in range(1 if scenario in COLD else 2):
            answer, self.usual = self.live(scenario, lambda: None)
            expect(not answer, f"without a fault: {answer}")
            if scenario in ("cold", "birth"):
                for env in self.made.values():
                    self.is_whole(env)
            self.close_all()
            if scenario not in COLD:
                self.stand_by()
        if scenario in COLD:
            nsbox.run(["true"]).check()
        gc.collect()
        self.scenario, self.start = scenario, self.settled()

    def count(self, scenario: str) -> dict[str, object]:
        self.begin(scenario)
        answer, seconds = self.live(scenario, lambda: ask(COUNT))
        ask(WRITE)
        expect(not answer, f"without a fault: {answer}")
        return {"seconds": seconds}

    def fail(self, scenario: str, class_: int, call: int, error: int, at: int) -> dict[str, object]:
        if scenario != self.scenario:
            self.begin(scenario)
        launcher = None if scenario in COLD else get_launcher()
        answer, seconds = self.live(scenario, lambda: ask(FAIL, class_ << 16 | call, error, at))
        met = ask(STOP)
        told: dict[str, object] = {
            "met": met, "answer": answer, "seconds": round(seconds, 3), "usual": self.usual,
        }  # fmt: skip
        try:
            self.judge(scenario, launcher, whole=not answer)
        except Failed as failure:
            told["not held"] = str(failure)
        except BaseException as failure:  # noqa: BLE001 - to be told
            told["not held"] = f"afterwards: {failure!r}"
        if "not held" in told:
            self.scenario = ""
            try:
                self.close_all()
                self.drop_bystander()
                nsbox.shutdown()
            except nsbox.NsboxError as failure:
                told["not held"] = f"{told['not held']}; the end: {failure!r}"
        return told

    def judge(self, scenario: str, launcher: object, *, whole: bool) -> None:
        if scenario in ("cold", "birth"):
            for env in self.made.values():
                if env.state is nsbox.State.READY:
                    self.is_whole(env)
            self.close_all()
        if launcher is not None:
            expect(get_launcher() is launcher, "the launcher has ended")
            assert self.bystander is not None
            result = self.bystander.run(["echo", "fine"], timeout=WAIT)
            expect(result.stdout == b"fine\n", f"another environment: {result}")
        if scenario in COLD:
            nsbox.run(["true"], timeout=WAIT).check()
            with nsbox.ExecutionEnvironment(self.version) as env:
                env.init()
        else:
            answer, _ = self.live(scenario, lambda: None)
            if whole and answer and not answer.startswith(("untyped", "wrong")):
                # What waited for the next call has met it, and that is the one that it costs.
                answer, _ = self.live(scenario, lambda: None)
            expect(not answer, f"the next: {answer}")
            if scenario in ("birth", "close"):
                self.close_all()
        self.close_all()
        gc.collect()
        self.expect_kept(self.start)


def main() -> None:
    nsbox.set_standby(0)  # what is there ahead of need is no part of a birth
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        temporary = Path(directory) / "temporary"
        temporary.mkdir()
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        subject = Subject(Path(directory))
        say: Callable[[object], None] = functools.partial(print, flush=True)
        say(json.dumps("ready"))
        for line in sys.stdin:
            scenario, *fault = json.loads(line)
            try:
                say(
                    json.dumps(subject.fail(scenario, *fault) if fault else subject.count(scenario))
                )
            except BaseException as error:  # noqa: BLE001 - to be told
                subject.scenario = ""
                told = {"not held": f"before: {error!r}", "trace": traceback.format_exc()}
                say(json.dumps(told))
        subject.close_all()
        subject.drop_bystander()
        nsbox.shutdown()


if __name__ == "__main__":
    main()
