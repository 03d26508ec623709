# SPDX-License-Identifier: Apache-2.0
"""The peers nsbox is measured against: the C floor, bubblewrap, crun and a plain subprocess.

Every peer that cannot run here says why, by name, in an `UnavailableError`.
"""

from __future__ import annotations

import importlib
import json
import marshal
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

INNER_ID = 1000
FIRST_HOST_ID = 0x70000000
BARE_HOST_ID = 0x71000000
"""Above all that nsbox gives to environments (`nsbox.isolation.namespaces`)."""
BARE_IDS = 1 << 20
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8"}  # noqa: S108 - inside
ROOT_LINKS = ("bin", "sbin", "lib", "lib64")


class UnavailableError(Exception):
    """A peer cannot be measured here; the text says why."""


def compile_floor(directory: Path) -> Path:
    """Compiles floor.c with `cc -O2` into `directory` and returns the program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise UnavailableError("no C compiler (apt install gcc libc6-dev linux-libc-dev)")
    program = directory / "floor"
    source = Path(__file__).with_name("floor.c")
    done = subprocess.run(
        [compiler, "-O2", "-o", program, source], capture_output=True, text=True, env=os.environ
    )
    if done.returncode != 0:
        raise UnavailableError(f"floor.c does not compile: {done.stderr.strip()}")
    return program


class FloorServer:
    """A running `floor --server`: one request a line, times taken in C."""

    def __init__(
        self,
        program: Path,
        command: list[str],
        *,
        spawn: bool = False,
        prefix: Sequence[str] = (),
        event: str | None = None,
    ) -> None:
        """Starts a server for `command`; with `spawn` it makes no sandbox of its own.

        `prefix` is a command that ends by executing its arguments; the server runs under it.
        `event` is the line that `answer` sends.
        """
        options = ["--spawn"] if spawn else []
        options += [] if event is None else ["--event", event]
        self._process = subprocess.Popen(
            [*prefix, str(program), *options, "--server", "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def one(self) -> float:
        """One sandbox, start to exit; microseconds."""
        duration, status = self._ask("one")
        if status:
            raise UnavailableError(f"the command ended with status {status}")
        return duration

    def answer(self) -> float:
        """One sandbox, start to its answer to the event; microseconds."""
        duration, status = self._ask("answer")
        if status:
            raise UnavailableError(f"no answer; the command ended with status {status}")
        return duration

    def steps(self) -> dict[str, float]:
        """The microseconds of each step of the last sandbox."""
        words = self._request("steps")
        return {name: float(time) for name, time in zip(words[::2], words[1::2], strict=True)}

    def rate(self, count: int, starters: int) -> float:
        """`count` sandboxes from `starters` C processes at once; sandboxes per second."""
        duration, failed = self._ask(f"batch {count} {starters}")
        if failed:
            raise UnavailableError(f"{failed} of {count} sandboxes failed")
        return count * 1e6 / duration

    def _ask(self, request: str) -> tuple[float, int]:
        duration, status = self._request(request)
        return float(duration), int(status)

    def _request(self, request: str) -> list[str]:
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise UnavailableError("the floor server has no pipes")
        requests.write(request.encode() + b"\n")
        requests.flush()
        answer = answers.readline().decode().split()
        if not answer:
            raise UnavailableError(f"the floor server ended with status {self._process.wait()}")
        return answer

    def close(self) -> None:
        """Ends the server (it ends by itself at end of file)."""
        with self._process:
            pass

    def __enter__(self) -> FloorServer:
        """The server itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the server."""
        self.close()


class BareServer:
    """Processes of `bare.py`: environments with a PID 1 in CPython and nothing around them."""

    def __init__(self, kind: str, starters: int) -> None:
        """Starts so many processes and waits until each has made a few environments.

        Of the kind ``"steps"``, without cgroup and output, or ``"whole"``, with them.

        Raises:
            UnavailableError: This is not root; or one ended.
        """
        if os.geteuid() != 0:
            raise UnavailableError("needs root, for cgroups and host ids of its own")
        client = importlib.import_module("nsbox.supervisor.launcher")
        config = importlib.import_module("nsbox.values.config").make_config(None, {})
        hello = client.get_launcher().hello
        plan = importlib.import_module("nsbox.supervisor.plan").make_plan(config, hello)
        spec = plan.spec.to_wire()
        program, paths = str(Path(__file__).with_name("bare.py")), client.import_paths()
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-I", "-S", program, kind, str(first_id), *paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for first_id in range(BARE_HOST_ID, BARE_HOST_ID + starters * BARE_IDS, BARE_IDS)
        ]
        try:
            for process in self._processes:
                self._tell(process, marshal.dumps(spec).hex())
            self._await(self._processes)
        except BaseException:
            self.close()
            raise

    def rate(self, count: int, starters: int) -> float:
        """`count` environments by so many of the processes together; environments a second."""
        busy = self._processes[:starters]
        begin = time.perf_counter_ns()
        for process in busy:
            self._tell(process, str(count // starters))
        self._await(busy)
        return count // starters * starters * 1e9 / (time.perf_counter_ns() - begin)

    def _tell(self, process: subprocess.Popen[str], line: str) -> None:
        if process.stdin is not None:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    def _await(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        for process in processes:
            if process.stdout is not None and not process.stdout.readline():
                raise UnavailableError(f"bare.py ended with status {process.wait()}")

    def close(self) -> None:
        """Ends them: at the end of their stdin they remove their cgroups and end."""
        for process in self._processes:
            with process:
                pass


def bubblewrap_argv(command: list[str]) -> list[str]:
    """bubblewrap as near to the floor as its options go (no other user's id, no filter)."""
    program = shutil.which("bwrap")
    if program is None:
        raise UnavailableError("not installed (apt install bubblewrap)")
    links = [
        option
        for name in ROOT_LINKS
        if (target := _link_target(name))
        for option in ("--symlink", target, f"/{name}")
    ]
    return [
        *(program, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"),
        *("--uid", str(INNER_ID), "--gid", str(INNER_ID), "--hostname", "sandbox"),
        *("--ro-bind", "/usr", "/usr", *links),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),  # noqa: S108
        *("--cap-drop", "ALL", "--", *command),
    ]


def run_subprocess(command: list[str]) -> float:
    """A plain `subprocess.run`; microseconds."""
    begin = time.perf_counter_ns()
    subprocess.run(command, check=True)
    return (time.perf_counter_ns() - begin) / 1e3


def crun_argv(directory: Path, command: list[str]) -> list[str]:
    """`crun run` of a bundle, written below `directory`, with the floor's namespaces and mounts."""
    program = shutil.which("crun")
    if program is None:
        raise UnavailableError("not installed (apt install crun)")
    bundle = directory / "bundle"
    root = bundle / "rootfs"
    for name in ("usr", "dev", "proc", "tmp"):
        (root / name).mkdir(parents=True)
    for name in ROOT_LINKS:
        if target := _link_target(name):
            (root / name).symlink_to(target)
    (bundle / "config.json").write_text(json.dumps(_crun_config(command)))
    # No cgroup: the floor and bubblewrap make none, and rootless there is none to be had.
    options = [f"--root={directory / 'crun'}", "--cgroup-manager=disabled"]
    return [program, *options, "run", f"--bundle={bundle}", f"nsbox-benchmark-{os.getpid()}"]


def crun_prefix() -> list[str]:
    """What has to stand before a program that starts crun on this host (nothing, as a rule).

    crun 1.8 refuses hybrid hosts whose v2 hierarchy has a controller, even when told to leave
    cgroups alone. Root can hide that hierarchy in a mount namespace of the benchmark's own.
    """
    unified = Path("/sys/fs/cgroup/unified")
    controllers = unified / "cgroup.controllers"
    hybrid = controllers.exists() and controllers.read_text().strip()
    if not hybrid or os.geteuid() != 0:
        return []
    return ["unshare", "--mount", "sh", "-c", 'umount "$0" && exec "$@"', str(unified)]


def check_runs(argv: list[str], event: str = "") -> None:
    """Runs `argv` once, a line on stdin; an UnavailableError with its own words if it fails."""
    done = subprocess.run(argv, input=f"{event}\n", capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        raise UnavailableError(f"does not run here: {words[-1]}")


def _crun_config(command: list[str]) -> dict[str, object]:
    quiet = ["nosuid", "nodev"]
    tmpfs = {"type": "tmpfs", "source": "tmpfs"}
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": [*quiet, "noexec"]},
        {"destination": "/dev", **tmpfs, "options": ["nosuid", "mode=755", "size=1m"]},
        {"destination": "/tmp", **tmpfs, "options": [*quiet, "mode=1777", "size=64m"]},  # noqa: S108
        {
            "destination": "/usr",
            "type": "bind",
            "source": "/usr",
            "options": ["rbind", "ro", *quiet],
        },
    ]
    root = os.geteuid() == 0
    user = {"containerID": INNER_ID, "hostID": FIRST_HOST_ID if root else os.geteuid(), "size": 1}
    group = {"containerID": INNER_ID, "hostID": FIRST_HOST_ID if root else os.getegid(), "size": 1}
    kinds = ("user", "pid", "network", "ipc", "uts", "mount", "cgroup")
    return {
        "ociVersion": "1.0.0",
        "process": {
            "terminal": False,
            "user": {"uid": INNER_ID, "gid": INNER_ID},
            "args": command,
            "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            "cwd": "/tmp",  # noqa: S108 - inside
            "capabilities": {},
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "uidMappings": [user],
            "gidMappings": [group],
        },
    }


def _link_target(name: str) -> str | None:
    path = Path("/", name)
    return str(path.readlink()) if path.is_symlink() else None
