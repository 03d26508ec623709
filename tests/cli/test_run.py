# SPDX-License-Identifier: Apache-2.0
"""`nsbox run` in pipelines: streams, exit statuses, messages, signals, the JSON report."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.cli.terminals import ENVIRONMENT, NSBOX, Terminal, nsbox_run, start
from tests.support import PATIENCE, x86_64_only

import nsbox
from nsbox.cli.app import explain

PYTHON = sys.executable
TICKS = "while :; do echo tick; sleep 0.02; done"


def last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode().strip().rpartition("\n")[2]


def test_version_and_help() -> None:
    done = nsbox_run("--version")
    assert (done.returncode, done.stdout[:6]) == (0, b"nsbox ")
    done = nsbox_run("run", "--help")
    assert done.returncode == 0
    assert b"--memory" in done.stdout


def test_streams_pass_through() -> None:
    done = nsbox_run("run", "-q", command=["sh", "-c", "cat; echo oops >&2"], data=b"a\0b\xff\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a\0b\xff\n", b"oops\n")


def test_much_data_passes_both_ways() -> None:
    data = bytes(range(256)) * (20 << 12)  # 20 MiB
    done = nsbox_run("run", "-q", command=["cat"], data=data)
    assert (done.returncode, done.stdout == data, done.stderr) == (0, True, b"")


def test_stdin_and_stdout_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file\n")
    words = ("run", "-q", "--", "cat")
    with (
        (tmp_path / "in").open("rb") as stdin,
        (tmp_path / "out").open("wb") as stdout,
        start(*words, stdin=stdin.fileno(), stdout=stdout.fileno()) as process,
    ):
        assert process.wait(20) == 0
    assert (tmp_path / "out").read_bytes() == b"from a file\n"


def test_from_a_directory_that_is_gone(tmp_path: Path) -> None:
    script = 'mkdir gone && cd gone && rmdir "$PWD" && exec "$@"'
    for words, status, text in (
        (["--json", str(tmp_path / "report"), "--", "pwd"], 0, b""),
        (["--json", "report", "--", "pwd"], 125, b"the working directory is gone"),
        (["--bind", "here:/data", "--", "pwd"], 125, b"'here': No such file"),
    ):
        done = subprocess.run(
            ["sh", "-c", script, "sh", *NSBOX, "run", "-q", *words],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        assert text in done.stderr
        assert done.stdout == (b"" if status else b"/tmp\n")
    assert json.loads((tmp_path / "report").read_text())["exit_code"] == 0


def test_output_comes_while_the_command_runs() -> None:
    with start("run", "-q", "--", "cat") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"one\n"
        process.stdin.close()
        assert process.wait(20 * PATIENCE) == 0


def test_a_reader_that_goes_ends_the_writer() -> None:
    with start("run", "-q", "--", "yes") as process:
        assert process.stdout is not None
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.wait(20 * PATIENCE) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 3"], 3),
        (["sh", "-c", "exit 137"], 137),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["sh", "-c", "kill -KILL $$"], 128 + signal.SIGKILL),
    ],
)
def test_exit_status_is_the_commands(command: list[str], status: int) -> None:
    done = nsbox_run("run", "-q", command=command)
    assert (done.returncode, done.stderr) == (status, b"")


def test_timeout_is_124() -> None:
    done = nsbox_run("run", "--timeout", "0.2", command=["sleep", "20"])
    assert done.returncode == 124
    assert last_line(done) == "nsbox: timed out: not over after 0.2 s; nsbox killed it"


@pytest.mark.needs("cgroup.cpu_accounting")
def test_cpu_time_is_124() -> None:
    done = nsbox_run("run", "--cpu-time", "0.2", command=["sh", "-c", "while :; do :; done"])
    assert done.returncode == 124
    assert "out of CPU time" in last_line(done)


@pytest.mark.needs("cgroup.memory")
def test_out_of_memory_is_137() -> None:
    code = "x = b'x' * (200 << 20)"
    done = nsbox_run("run", "--memory", "48M", command=[PYTHON, "-I", "-S", "-c", code])
    assert done.returncode == 137
    assert "out of memory" in last_line(done)


@x86_64_only
def test_a_kill_by_the_filter_is_159() -> None:
    code = "import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)"  # getpid of x32
    done = nsbox_run("run", command=[PYTHON, "-I", "-S", "-c", code])
    assert done.returncode == 128 + signal.SIGSYS == 159, done.stderr


@pytest.mark.parametrize(("command", "status"), [("nosuchprogram", 127), ("/etc/passwd", 126)])
def test_what_cannot_be_started(command: str, status: int) -> None:
    done = nsbox_run("run", "-q", command=[command])
    assert done.returncode == status
    assert last_line(done).startswith(f"nsbox: cannot execute '{command}': ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "lots"], ["--memory", "'lots'", "256M"]),
        (["--memory", "-1"], ["--memory", "'-1'"]),
        (["--memory", "0"], ["--memory", "above zero"]),
        (["--pids", "many"], ["--pids", "'many'", "whole number"]),
        (["--pids", "0"], ["--pids", "from 2"]),
        (["--cpus", "x"], ["--cpus", "'x'"]),
        (["--cpus", "-1"], ["--cpus", "-1"]),
        (["--cpuset", "a-b"], ["--cpuset", "a-b", "0-1,3"]),
        (["--timeout", "0"], ["--timeout", "above zero"]),
        (["--timeout", "nan"], ["--timeout", "nan"]),
        (["--tmp-size", "1X"], ["--tmp-size", "1X"]),
        (["--file-size", "x"], ["--file-size", "'x'"]),
        (["--bind", "/srv"], ["--bind", "SRC:DST"]),
        (["--bind", "/nosuchdir:/data"], ["/nosuchdir", "exists"]),
        (["--bind", "/usr:data"], ["'data'", "absolute"]),
        (["--bind", "/usr:/../etc"], ["'..'"]),
        (["--bind", "/usr:/proc/1"], ["/proc"]),
        (["--tmpfs", "/scratch:big"], ["'big'"]),
        (["--env", "NAME"], ["NAME=VALUE"]),
        (["--io", "8:0"], ["rbps"]),
        (["--io", "8:0:speed=1"], ["speed"]),
        (["--rootfs", "/nosuchdir"], ["--rootfs", "/nosuchdir"]),
        (["--hostname", "-bad-"], ["--hostname"]),
        (["--network", "some"], ["--network", "none"]),
        (["--seccomp", "mine"], ["--seccomp", "strict"]),
        (["--seccomp", "/nosuch.json"], ["/nosuch.json"]),
        (["--seccomp-allow", "opne"], ["'opne'", "open"]),
        (["--seccomp-allow", "mount"], ["'mount'", "--seccomp-allow-dangerous mount"]),
        (["--allow-missing", "luck"], ["--allow-missing", "'luck'", "cgroup.memory"]),
        (["--cwd", "tmp"], ["--cwd", "absolute"]),
        (["--json", "/nosuchdir/x"], ["--json", "/nosuchdir"]),
        (["--no-such-option"], ["--no-such-option", "--help"]),
    ],
)
def test_wrong_options_are_125_and_one_line(options: list[str], words: list[str]) -> None:
    done = nsbox_run("run", *options, command=["true"])
    text = done.stderr.decode()
    assert done.returncode == 125, text
    assert text.startswith("nsbox: ")
    assert text.count("\n") == 1, text
    assert all(word in text for word in words), text


@pytest.mark.needs("cgroup.io")
def test_io_wants_a_block_device() -> None:
    done = nsbox_run("run", "--io", "/dev/null:rbps=1M", command=["true"])
    assert done.returncode == 125
    assert "block device" in last_line(done)


def test_suspended_and_continued_with_pipes() -> None:
    # The kernel stops no process group that nobody is there to continue. With a group of its own
    # it has this very process, in the same session and in another group, whoever started that.
    words = ["run", "-q", "--", "sh", "-c", f"echo ready; {TICKS}"]
    with start(*words, process_group=0) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read():
            pass
        time.sleep(0.2)
        assert process.stdout.read() is None, "the command goes on while nsbox is stopped"
        os.set_blocking(process.stdout.fileno(), True)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == b"tick\n"
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(20 * PATIENCE) == 128 + signal.SIGTERM


def test_no_command_is_125() -> None:
    assert nsbox_run("run").returncode == 125
    assert nsbox_run("frobnicate").returncode == 125
    assert nsbox_run().returncode == 125


def test_a_directory_is_not_handed_in(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        # Python does not start with such a stdin, but with such a stderr it does.
        with start("run", "-q", "--", "true", stdin=subprocess.DEVNULL, stderr=fd) as process:
            assert process.wait(20 * PATIENCE) != 0
    finally:
        os.close(fd)


def test_options_reach_the_environment(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("from outside\n")
    tmp_path.chmod(0o755)  # as root the command is another user
    script = (
        "cat /data/file; echo $COLOUR; pwd; hostname; df --output=size -B1 /tmp /scratch | tail -2;"
        " ulimit -n; touch /data/x 2>/dev/null || echo read-only"
    )
    done = nsbox_run(
        "run", "-q", "--bind", f"{tmp_path}:/data", "--env", "COLOUR=blue=1", "--cwd", "/usr",
        "--hostname", "box", "--tmp-size", "2M", "--tmpfs", "/scratch:3M", "--open-files", "77",
        command=["sh", "-c", script],
    )  # fmt: skip
    assert done.stderr == b""
    sizes = [str(2 << 20), str(3 << 20)]
    expected = ["from outside", "blue=1", "/usr", "box", *sizes, "77", "read-only"]
    assert [text.strip() for text in done.stdout.decode().splitlines()] == expected


def test_seccomp_options(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": []}')
    done = nsbox_run("run", "-q", "--seccomp", str(profile), command=["true"])
    assert done.returncode == 125
    assert "profile.json" in last_line(done)
    done = nsbox_run("run", "-q", "--seccomp-deny", "uname", command=["uname"])
    assert done.returncode not in (0, 125)


def test_json_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    done = nsbox_run("run", "-q", "--json", str(path), command=["sh", "-c", "echo hi; exit 4"])
    assert (done.returncode, done.stdout) == (4, b"hi\n")
    report = json.loads(path.read_text())
    assert report["argv"] == ["sh", "-c", "echo hi; exit 4"]
    assert (report["outcome"], report["exit_code"], report["stdout"]) == ("exited", 4, "")
    assert report["protections"]["no_new_privs"]["in_force"] is True
    assert report["usage"]["wall_seconds"] > 0
    assert set(report) >= {item.name for item in dataclasses.fields(nsbox.Result)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_json_report_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = nsbox_run("run", "-q", "--json", str(path), command=["nosuchprogram"])
    report = json.loads(path.read_text())
    assert report["exit_status"] == done.returncode == 127
    assert report["error"]["type"] == "CommandStartError"
    done = nsbox_run("run", "-q", "--json", "-", command=["true"])
    assert json.loads(done.stderr)["outcome"] == "exited"


def test_output_max_is_enforced_when_named() -> None:
    done = nsbox_run("run", "--output-max", "100K", command=["yes"])
    assert done.returncode == 137
    assert done.stdout == b"y\n" * (50 << 10), "not a byte more, however late it is killed"
    assert "too much output" in last_line(done)
    done = nsbox_run("run", "--output-max", "1M", command=["head", "-c", "300000", "/dev/zero"])
    assert (done.returncode, len(done.stdout)) == (0, 300000)


def after_signal(name: str, script: str) -> tuple[bytes, int]:
    """Return what a shell says, and its status, when nsbox gets a signal once it is ready."""
    with start("run", "-q", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.Signals[name])
        return process.stdout.read(), process.wait(20 * PATIENCE)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_signals_are_forwarded(name: str) -> None:
    short = name.removeprefix("SIG")
    script = f"trap 'echo got; exit 9' {short}; echo ready; while :; do sleep 0.02; done"
    assert after_signal(name, script) == (b"got\n", 9)


@pytest.mark.parametrize("name", ["SIGINT", "SIGQUIT", "SIGHUP"])
def test_signals_of_terminals_are_for_the_whole_group(name: str) -> None:
    """As Ctrl-C is: a shell waits for its child, which must have it, too."""
    short = name.removeprefix("SIG")
    child = f"trap 'echo child; exit' {short}; echo ready; while :; do sleep 0.02; done"
    script = f"trap 'echo shell; exit 9' {short}; (trap - {short}; {child}); sleep 60"
    assert after_signal(name, script) == (b"child\nshell\n", 9)


def test_other_signals_are_for_the_command_alone() -> None:
    child = "(trap - TERM; read line <&3; echo child) &"
    script = f"exec 3<&0; trap 'echo shell' TERM; {child} echo ready; wait; wait"
    with start("run", "-q", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"shell\n"
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b"child\n"


def test_an_interrupt_at_a_terminal_is_for_its_foreground() -> None:
    """Job control inside: the job in the foreground gets it, and not the shell."""
    job = "trap 'echo job; exit' INT; echo ready; while :; do sleep 0.02; done"
    script = f"set -m; trap 'echo shell' INT; sh -c \"{job}\"; echo went on"
    with Terminal([*NSBOX, "run", "-q", "--", "bash", "-c", script]) as terminal:
        terminal.expect(b"ready\r\n")
        os.kill(terminal.pid, signal.SIGINT)
        assert terminal.expect(b"went on\r\n") == b"job\r\nwent on\r\n"
        assert terminal.wait() == 0


def test_a_second_interrupt_kills() -> None:
    script = "trap 'echo got' INT; echo ready; while :; do sleep 0.02; done"
    with start("run", "-q", "--", "sh", "-c", script) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"got\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20 * PATIENCE) == 137


def test_ignored_signals_stay_ignored() -> None:
    script = "echo ready; read line; echo $line"
    words = ["run", "-q", "--", "sh", "-c", script]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup(1) does
    try:
        process = start(*words)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        process.stdin.write(b"still here\n")
        process.stdin.close()
        assert process.stdout.read() == b"still here\n"


def test_kill_of_the_command_line_leaves_nothing() -> None:
    with start("run", "-q", "--", "sh", "-c", "echo ready; sleep 60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.read() == b""  # every holder of the pipe is gone


def test_closed_streams() -> None:
    script = 'exec "$@" <&- >&-'
    command = ["sh", "-c", script, "sh", PYTHON, "-m", "nsbox", "run", "-q", "--", "sh", "-c"]
    done = subprocess.run(
        [*command, "cat; echo gone; exit 5"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=30 * PATIENCE,
    )
    assert done.returncode == 5, done.stderr


def test_non_utf8_names_and_output() -> None:
    done = nsbox_run("run", "-q", command=["printf", "%s", os.fsdecode(b"\xff\xfe")])
    assert done.stdout == b"\xff\xfe"
    done = nsbox_run("run", "-q", command=[os.fsdecode(b"no\xff")])
    assert done.returncode == 127


def test_default_limits_that_are_missing_are_told_in_one_line() -> None:
    done = nsbox_run("run", command=["true"])
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 0
    assert len(lines) <= 1
    assert all(line.startswith("nsbox: not in force on this host: ") for line in lines)
    assert nsbox_run("run", "--quiet", command=["true"]).stderr == b""


def test_an_interrupt_while_it_starts() -> None:
    program = """if True:
        import os, signal, sys
        class Finder:
            def find_spec(self, name, path, target=None):
                if name == sys.argv[1]:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder())
        from nsbox.cli import main
        sys.exit(main(["run", "--", "true"]))
    """
    for module in ("nsbox.cli.app", "nsbox.cli.run"):
        done = subprocess.run([sys.executable, "-c", program, module], capture_output=True)
        assert (done.returncode, done.stderr.strip()) == (130, b"")


def test_a_job_in_the_background_of_a_shell() -> None:
    """Its SIGINT is ignored from the start: it stays so outside, and is as ever inside."""
    inside = "import signal; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    done = subprocess.run(
        ["sh", "-c", '"$@" & wait $!', "sh", *NSBOX, "run", "--", PYTHON, "-c", inside],
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_program_whose_interpreter_is_missing(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#! /no/such/python3 -u\nprint(1)\n")
    script.chmod(0o755)
    tmp_path.chmod(0o755)  # in sight also where no mount can be idmapped
    for words in (("/data/script",), ("sh", "-c", "exec /data/script")):
        done = nsbox_run("run", "--quiet", "--bind", f"{tmp_path}:/data", command=words)
        assert done.returncode == 127
        if words[0] == "/data/script":
            assert done.stderr.decode() == (
                "nsbox: cannot execute '/data/script': its interpreter, '/no/such/python3' in its "
                "first line, does not exist inside the environment\n"
            )
    done = nsbox_run("run", "--quiet", command=["/data/script"])
    assert b"No such file or directory, inside the environment" in done.stderr
    script.write_bytes(b"#!/bin/sh\r\necho 1\r\n")
    done = nsbox_run("run", "--quiet", "--bind", f"{tmp_path}:/data", command=["/data/script"])
    assert rb"'/bin/sh\r' in its first line (which ends in CR LF, as on Windows)" in done.stderr
    program = Path("/usr/bin/true").read_bytes()
    script.write_bytes(program.replace(b"/ld-linux", b"/no-linux"))
    done = nsbox_run("run", "--quiet", "--bind", f"{tmp_path}:/data", command=["/data/script"])
    assert re.search(rb"linked for, '/lib.*/no-linux-.*', does not exist inside", done.stderr)


@pytest.mark.needs("cgroup.memory")
def test_out_of_memory_names_limit_and_option() -> None:
    done = nsbox_run("run", "--memory", "64M", command=["python3", "-c", "bytearray(1 << 30)"])
    assert done.returncode == 137
    assert b"; the limit is 64M, which --memory changes\n" in done.stderr


def test_a_limit_that_is_refused_names_the_way_without() -> None:
    error = nsbox.UnsupportedHostError("cgroup.memory", "no", "Ask root")
    assert explain(error).endswith("Ask root; or do without it: --allow-missing cgroup.memory")
    error = nsbox.UnsupportedHostError("namespace.user", "no", "Ask root")
    assert explain(error).endswith("Ask root")


@pytest.mark.parametrize("path", ["/no/such/file", "/tmp"])
def test_an_event_that_is_no_file(path: str) -> None:
    done = nsbox_run("invoke", "app.handler", "--event", path)
    assert done.returncode == 125
    assert b"; give a file that has the event in JSON, or - and the event on stdin" in done.stderr
