# SPDX-License-Identifier: Apache-2.0
"""Probes that set a limit on a real environment, exceed it, and check that it is enforced."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Final, Unpack

from nsbox.environment.environment import ExecutionEnvironment
from nsbox.environment.managed import State
from nsbox.errors import NsboxError, UnsupportedHostError
from nsbox.isolation.cgroups import Hierarchies
from nsbox.supervisor.launcher import get_launcher
from nsbox.values.config import ConfigFields, IoMax, Limits, Mount
from nsbox.values.result import Outcome, Result

_MEGABYTE: Final = 1 << 20


class _NotSeenError(NsboxError):
    """The limit was set and did not bite."""


def _python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *arguments]


def _run(
    argv: list[str],
    *,
    timeout: float = 20,
    cpu_time: float | None = None,
    **fields: Unpack[ConfigFields],
) -> Result:
    with ExecutionEnvironment(None, **fields) as environment:
        return environment.run(argv, timeout=timeout, cpu_time=cpu_time)


def _expect(condition: bool, result: Result, what: str) -> None:
    if not condition:
        last = result.stderr_text().strip().rpartition("\n")[2]
        raise _NotSeenError(f"{what}: {result.outcome.value}, {result.evidence} {last}")


def _supported(feature: str) -> None:
    found = get_launcher().hello.cgroups[feature]
    if "missing" in found:
        raise UnsupportedHostError(feature, found["missing"], found["hint"])


def _version(feature: str) -> str:
    return f"cgroup v{get_launcher().hello.cgroups[feature]['version']}"


def _environment() -> str:
    with ExecutionEnvironment() as environment:
        result = environment.run(["true"], timeout=20)
        _expect(result.ok, result, "true did not run")
        missing = [layer.name for layer in environment.protections.missing]
    return f"made; not in force: {', '.join(missing)}" if missing else "made, everything in force"


def _memory() -> str:
    _supported("cgroup.memory")
    code = f"x = []\nwhile 1: x.append(bytes({_MEGABYTE}).replace(b'\\0', b'x'))"
    result = _run(_python(code), limits=Limits(memory_max="48M"))
    _expect(result.outcome is Outcome.OOM_KILLED, result, "it was not killed at memory_max")
    return f"killed at 48M; {_version('cgroup.memory')}"


def _pids() -> str:
    code = (
        "import os,time\nn=0\n"
        "try:\n while n<200:\n  if os.fork()==0: time.sleep(30)\n  n+=1\n"
        "except BlockingIOError: pass\nprint(n)"
    )
    result = _run(_python(code), limits=Limits(pids_max=16))
    _expect(result.ok and int(result.text() or 999) < 16, result, "more than pids_max processes")
    how = get_launcher().hello.cgroups["cgroup.pids"]
    if "missing" in how:
        # RLIMIT_NPROC does the work in the environment; the controller is what was asked about.
        raise UnsupportedHostError(
            "cgroup.pids", f"{how['missing']}; RLIMIT_NPROC bounds it instead", how["hint"]
        )
    return f"{result.text().strip()} forks at pids_max=16; {_version('cgroup.pids')}"


def _cpu() -> str:
    _supported("cgroup.cpu")
    code = (
        "import sys,time\ne=time.monotonic()+float(sys.argv[1])\nwhile time.monotonic()<e: pass\n"
        "print(time.process_time())"
    )
    # A virtual CPU that its host does not run counts as used meanwhile. The kernel takes what was
    # used over the quota off the next periods, which takes longer to see.
    for seconds in (0.5, 3.0):
        result = _run(_python(code, str(seconds)), limits=Limits(cpu_max=0.2))
        used = float(result.text() or 9)
        seen = f"{used:.2f} s of CPU in {seconds:g} s at 0.2 CPUs"
        if result.ok and used < 0.7 * seconds:
            return f"{seen}; {_version('cgroup.cpu')}"
    raise _NotSeenError(f"{seen}: {result.outcome.value}, {result.evidence}")


def _cpuset() -> str:
    _supported("cgroup.cpuset")
    last = str(max(os.sched_getaffinity(0)))
    code = "import os\nprint(*os.sched_getaffinity(0))"
    result = _run(_python(code), limits=Limits(cpuset_cpus=last))
    _expect(result.ok and result.text().split() == [last], result, "it runs on other CPUs")
    return f"CPU {last} only; {_version('cgroup.cpuset')}"


def _disk_of(path: str) -> str:
    """Return the number of the whole disk that `path` is on: partitions take no limit."""
    device = os.stat(path).st_dev
    entry = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not os.path.exists(entry):
        raise UnsupportedHostError(
            "cgroup.io", f"{path} is on no block device, so there is nothing to try it with", ""
        )
    if os.path.exists(f"{entry}/partition"):
        entry = os.path.dirname(os.path.realpath(entry))
    with open(f"{entry}/dev") as file:
        return file.read().strip()


def _io() -> str:
    _supported("cgroup.io")
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="nsbox-probe-") as directory:
        # Whoever the environment's user is on the host, it may write here for this second.
        os.chmod(directory, 0o777)  # noqa: S103
        device = _disk_of(directory)
        code = (
            "import os,mmap,time\n"
            "fd=os.open('/probe/f',os.O_WRONLY|os.O_CREAT|os.O_DIRECT)\n"
            f"m=mmap.mmap(-1,{_MEGABYTE // 2})\nb=time.monotonic()\n"
            "for _ in range(2): os.write(fd,m)\n"
            "os.fsync(fd)\nprint(time.monotonic()-b)"
        )
        result = _run(
            _python(code),
            limits=Limits(io_max=(IoMax(device=device, wbps="1M"),)),
            mounts=(Mount.bind(directory, "/probe", rw=True),),
            allow_missing={"idmapped_mounts"},
        )
    seconds = float(result.text() or 0)
    _expect(result.ok and seconds > 0.4, result, f"1M took {seconds:.2f} s at wbps=1M")
    return f"1M took {seconds:.2f} s at wbps=1M on {device}; {_version('cgroup.io')}"


def _freeze() -> str:
    _supported("cgroup.freeze")
    code = "import time\nwhile 1: print(flush=True); time.sleep(0.005)"
    with ExecutionEnvironment() as environment, environment.popen(_python(code)) as process:
        if process.stdout is None:
            raise _NotSeenError("there is no pipe to read")
        process.stdout.read(1)
        environment.freeze()
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read(1 << 16):
            pass
        time.sleep(0.1)
        moved = process.stdout.read(1 << 16)
        environment.thaw()
        os.set_blocking(process.stdout.fileno(), True)
        went_on = process.stdout.read(1)
    if moved or not went_on:
        raise _NotSeenError("a frozen environment went on" if moved else "it did not go on")
    return f"stood still, and went on; {_version('cgroup.freeze')}"


def _kill() -> str:
    _supported("cgroup.kill")
    unified = get_launcher().hello.trees["unified"]
    with ExecutionEnvironment() as environment:
        with open(f"{unified}/{environment.id}/cgroup.kill", "w") as file:
            file.write("1")
        deadline = time.monotonic() + 5
        while environment.state is not State.DEAD:
            if time.monotonic() > deadline:
                raise _NotSeenError("the environment lived on")
            time.sleep(0.002)
    return "the environment died"


def _cpu_time() -> str:
    _supported("cgroup.cpu_accounting")
    result = _run(_python("while 1: pass"), cpu_time=0.2)
    _expect(result.outcome is Outcome.CPU_TIMED_OUT, result, "it ran on")
    return f"{result.evidence}; {_version('cgroup.cpu_accounting')}"


def _tmp_size() -> str:
    code = "open('/tmp/f','wb').write(bytes(3<<20))"
    result = _run(_python(code), tmp_size="2M")
    _expect(b"No space left" in result.stderr, result, "more than tmp_size was written")
    return "ENOSPC at 2M"


def _rlimits() -> str:
    code = (
        "import os,resource,signal\nsignal.signal(signal.SIGXFSZ,signal.SIG_IGN)\nw=[]\n"
        "try:\n while 1: w.append(os.dup(0))\nexcept OSError as e: print(e.errno)\n"
        "os.close(w.pop())\n"
        "try: f=os.open('/tmp/f',os.O_WRONLY|os.O_CREAT)\nexcept OSError as e: f=-1\n"
        "try:\n while 1: os.write(f,bytes(65536))\nexcept OSError as e: print(e.errno)\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[1])"
    )
    result = _run(_python(code), limits=Limits(open_files=32, file_size="1M"))
    _expect(result.text().split() == ["24", "27", "0"], result, f"seen {result.text()!r}")
    return "EMFILE at 32, EFBIG at 1M, no core dumps"


def _timeout() -> str:
    result = _run(["sleep", "20"], timeout=0.1)
    _expect(result.outcome is Outcome.TIMED_OUT, result, "it was not killed")
    return "killed after 0.1 s"


def _network_none() -> str:
    code = (
        "import socket\nprint(*(name for _, name in socket.if_nameindex()))\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "try: s.connect(('192.0.2.1',9))\nexcept OSError as e: print(e.errno)"
    )
    result = _run(_python(code))
    interfaces, _, error = result.text().strip().partition("\n")
    _expect(interfaces == "lo" and bool(error), result, f"seen {result.text()!r}")
    return "lo is all there is"


def delegation() -> list[str]:
    """Return the own cgroup directories that can be used, for the heading of the report."""
    return Hierarchies.detect().bases


PROBES: Final[dict[str, Callable[[], str]]] = {
    "environment": _environment,
    "cgroup.memory": _memory,
    "cgroup.pids": _pids,
    "cgroup.cpu": _cpu,
    "cgroup.cpuset": _cpuset,
    "cgroup.io": _io,
    "cgroup.freeze": _freeze,
    "cgroup.kill": _kill,
    "cgroup.cpu_accounting": _cpu_time,
    "tmp_size": _tmp_size,
    "rlimits": _rlimits,
    "timeout": _timeout,
    "network_none": _network_none,
}
