# SPDX-License-Identifier: Apache-2.0
"""What callers get wrong: an error that names the value, and an environment that is still good.

What `Config` and its parts refuse by themselves is in tests/unit/test_config.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import PATIENCE, host_program

import nsbox
from nsbox import (
    CommandStartError,
    ConfigError,
    EnvironmentStateError,
    ExecutionEnvironment,
    Limits,
    NsboxError,
    SetupError,
)

Misuse = Callable[[ExecutionEnvironment], object]

BAD: list[tuple[Misuse, type[NsboxError], str]] = [
    (lambda e: e.run([]), ConfigError, "argv: a command is needed, got []"),
    (lambda e: e.run(["a\0b"]), ConfigError, r"argv[0]: 'a\x00b' contains a NUL byte"),
    (lambda e: e.run(["printf", "\ud800"]), ConfigError, r"argv[1]: '\ud800' stands for no bytes"),
    (lambda e: e.run(["true"], env={"A": "\0"}), ConfigError, "env['A']"),
    (lambda e: e.run(["true"], timeout=0), ConfigError, "timeout: must be above zero"),
    (lambda e: e.run(["true"], timeout=-1), ConfigError, "got -1"),
    (lambda e: e.run(["true"], cpu_time=float("nan")), ConfigError, "cpu_time: "),
    (lambda e: e.run(["true"], cwd="there"), ConfigError, "cwd: must be absolute, got 'there'"),
    (lambda e: e.run(["true"], cwd="/no/such"), SetupError, "'/no/such': No such file"),
    (lambda e: e.run(["true"], cwd="/etc/passwd"), SetupError, "'/etc/passwd': Not a directory"),
    (lambda e: e.run(["cat"], input="text"), ConfigError, "input: must be bytes, got str"),  # type: ignore[arg-type]
    (lambda e: e.run(["cat"], input=b"x", stdin=0), ConfigError, "input and stdin: give one"),
    (lambda e: e.run(["cat"], stdin="name"), ConfigError, "stdin: must be an open file, a descr"),  # type: ignore[arg-type]
    (lambda e: e.run(["cat"], stdin=1 << 20), ConfigError, "stdin: descriptor 1048576: Bad file"),
    (lambda e: e.run(["cat"], stdout=True), ConfigError, "stdout: must be an open file"),
    (lambda e: e.run(["cat"], stderr=-7), ConfigError, "stderr: descriptor -7: Bad file"),
    (lambda e: e.run(["no-such"]), CommandStartError, "cannot execute 'no-such': No such file"),
    (lambda e: e.run(["/etc/passwd"]), CommandStartError, "'/etc/passwd': Permission denied"),
    (lambda e: e.run(["true", "x" * (1 << 20)]), CommandStartError, "Argument list too long"),
    (lambda e: e.run(["true", "x" * (9 << 20)]), CommandStartError, "Argument list too long"),
    (lambda e: e.popen(["true"], tty=(0, 80)), ConfigError, "tty: must be from 1 to 65535, got 0"),
    (lambda e: e.popen(["true"], tty=80), ConfigError, "tty: must be (rows, columns), got 80"),  # type: ignore[arg-type]
    (lambda e: e.write_file("x", b""), ConfigError, "path: must be absolute"),
    (lambda e: e.write_file("/tmp/\0", b""), ConfigError, "path: "),
    (lambda e: e.write_file("/tmp/x", "text"), ConfigError, "data: must be bytes, got str"),  # type: ignore[arg-type]
    (lambda e: e.write_file("/tmp/x", b"", mode=0o4755), ConfigError, "mode: must be permission"),
    (lambda e: e.read_file("/tmp/x", max_bytes=-1), ConfigError, "max_bytes: must not be negative"),
    (lambda e: e.read_file("/tmp/none"), nsbox.SyscallError, "openat2 on /tmp/none: No such file"),
    (lambda e: e.read_file("/dev/null"), nsbox.SyscallError, "(EINVAL); it is no regular file"),
    (lambda e: e.write_file("/usr/x", b""), nsbox.SyscallError, "on /usr/x: Read-only file system"),
]


@pytest.mark.parametrize(("misuse", "kind", "words"), BAD, ids=[words for *_, words in BAD])
def test_misuse_is_named_and_costs_nothing(
    env: ExecutionEnvironment, misuse: Misuse, kind: type[NsboxError], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)):
        misuse(env)
    assert env.run(["true"]).ok, "the environment is as good as before"


def test_exit_codes_of_programs_that_cannot_be_started(env: ExecutionEnvironment) -> None:
    for program, code in (
        ("no-such", 127), ("/no/such", 127), ("/etc/passwd/x", 127), ("/etc/passwd", 126),
        ("/usr", 126),
    ):  # fmt: skip
        with pytest.raises(CommandStartError) as caught:
            env.run([program])
        assert (caught.value.argv0, caught.value.exit_code) == (program, code)


@pytest.mark.parametrize("number", [0, -1, 999, "TERM", None])
def test_a_signal_that_is_none_is_refused(env: ExecutionEnvironment, number: object) -> None:
    with env.popen(["cat"]) as process:
        with pytest.raises(ConfigError, match=r"signal: must be a number such as signal\.SIGTERM"):
            process.send_signal(number)  # type: ignore[arg-type]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10).signal is signal.SIGTERM


def test_unknown_options_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'memory' of Config; there are mounts, rootfs, "):
        nsbox.run(["true"], memory="1M")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"limits=nsbox\.Limits\(memory_max=\.\.\.\)"):
        ExecutionEnvironment(memory_max="1M")  # type: ignore[call-arg]


def test_the_smallest_limits_are_enough_for_a_command() -> None:
    limits = Limits(memory_max="2M", pids_max=2, open_files=16)
    allowed = {"cgroup.memory", "cgroup.pids"}
    assert nsbox.run(["true"], limits=limits, allow_missing=allowed).ok


def test_more_commands_at_once_than_there_are_descriptors_for(
    make_env: Callable[..., ExecutionEnvironment],
) -> None:
    env = make_env(limits=Limits(open_files=20))
    running: list[nsbox.Process] = []
    with contextlib.ExitStack() as stack:

        def start_many() -> None:
            while True:
                running.append(stack.enter_context(env.popen(["sleep", "60"])))

        with pytest.raises(CommandStartError, match="open_files leaves PID 1 room for; raise it"):
            start_many()
        assert len(running) >= 2
        ended = running.pop()
        ended.kill()
        ended.wait(10)
        assert env.run(["true"]).ok
        env.write_file("/tmp/x", b"there is room for this")
        assert [process.poll() for process in running] == [None] * len(running), "the others go on"


def test_bytes_that_are_no_utf_8_go_in_and_come_out(env: ExecutionEnvironment) -> None:
    odd = b"\xff\xfe\x80"
    assert env.run([b"printf", b"%s", odd]).stdout == odd
    assert env.run(["printf", "%s", os.fsdecode(odd)]).stdout == odd
    assert env.run(["sh", "-c", 'printf %s "$A"'], env={"A": os.fsdecode(odd)}).stdout == odd
    env.write_file(os.fsdecode(b"/tmp/" + odd), odd)
    assert env.read_file(os.fsdecode(b"/tmp/" + odd)) == odd
    assert odd in env.run(["ls", "/tmp"]).stdout.splitlines()


def test_non_utf_8_mounts(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"dir-\xff")
    source.mkdir(mode=0o755)
    (source / "file").write_text("found")
    for path in (tmp_path.parent, tmp_path):
        path.chmod(0o755)  # as root the command is another user
    destination = os.fsdecode(b"/data-\xfe")
    result = nsbox.run(
        ["cat", f"{destination}/file"], mounts=[nsbox.Mount.bind(source, destination)]
    )
    assert result.check().text() == "found"


def test_a_source_that_goes_between_config_and_birth(tmp_path: Path) -> None:
    source = tmp_path / "gone"
    source.mkdir()
    mount = nsbox.Mount.bind(source, "/data")
    source.rmdir()
    with pytest.raises(SetupError, match=f"No such file or directory.*{source}|{source}.*No such"):
        nsbox.run(["true"], mounts=[mount])


USES: list[tuple[str, Misuse]] = [
    ("run", lambda e: e.run(["true"])),
    ("popen", lambda e: e.popen(["true"])),
    ("write_file", lambda e: e.write_file("/tmp/x", b"")),
    ("read_file", lambda e: e.read_file("/etc/passwd")),
    ("freeze", lambda e: e.freeze()),
    ("usage", lambda e: e.usage()),
]


@pytest.mark.parametrize(("name", "use"), USES, ids=[name for name, _ in USES])
def test_use_after_close(env: ExecutionEnvironment, name: str, use: Misuse) -> None:
    env.close()
    with pytest.raises(EnvironmentStateError, match=f"{env.id} is closed; make a new one"):
        use(env)
    env.close()


def test_a_forked_child_has_no_part_in_it(env: ExecutionEnvironment) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        seen = []
        try:
            os.close(read)
            for name, use in USES:
                try:
                    use(env)
                    seen.append(f"{name} worked")
                except EnvironmentStateError as error:
                    if f"belongs to process {os.getppid()}" not in str(error):
                        seen.append(f"{name}: {error}")
            env.close()
            seen.append(nsbox.run(["echo", "own"]).text().strip())
            nsbox.shutdown()
            os.write(write, "; ".join(seen).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as report:
        assert report.read() == b"own"
    assert os.waitpid(pid, 0)[1] == 0
    assert env.run(["true"]).ok, "the child's close was of its copies only"


def test_messages_name_the_unit_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match="cpu_max: must be a number of CPUs, got '2s'"):
        Limits(cpu_max="2s")  # type: ignore[arg-type]
    function = nsbox.Function(command=["cat"])
    for make in (nsbox.ExecutionEnvironment, lambda f: nsbox.run(["true"], config=f)):
        with pytest.raises(ConfigError, match=r"give what its publish\(\) returns"):
            make(function)  # type: ignore[arg-type]


REFUSED = """
import os, nsbox
fd = os.open("/tmp", os.O_RDONLY)
for bad in ({"stdin": fd}, {"stdout": fd}, {"stderr": fd}, {"timeout": -1}, {"env": {"=": "x"}},
            {"cwd": "here"}, {"cpu_time": "1"}, {"input": "text"}, {"input": b"", "stdin": fd}):
    try:
        nsbox.run(["true"], **bad)
    except nsbox.ConfigError as error:
        print(error)
with open(f"/proc/self/task/{os.getpid()}/children") as file:
    print(file.read().split())
"""


def test_what_is_bad_is_refused_before_anything_is_made() -> None:
    out, _ = host_program(REFUSED, stdout=subprocess.PIPE).communicate(timeout=60 * PATIENCE)
    *refusals, children = out.decode().splitlines()
    told = [line.partition(":")[0] for line in refusals]
    assert told[:3] == ["stdin", "stdout", "stderr"]
    assert all("is a directory" in line for line in refusals[:3])
    assert told[3:] == ["timeout", "env", "cwd", "cpu_time", "input", "input and stdin"]
    assert children == "[]"
