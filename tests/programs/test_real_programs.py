# SPDX-License-Identifier: Apache-2.0
"""Programs people run, as they run them, with the default limits and filter."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.support import PATIENCE

import nsbox
from nsbox import ExecutionEnvironment, Limits, Mount, Outcome


def requires(program: str) -> pytest.MarkDecorator:
    """Skip where a program that is no feature of the host's kernel is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory of the host that the user inside can read, whoever runs the tests."""
    for directory in (tmp_path, *tmp_path.parents[:2]):
        if os.stat(directory).st_uid == os.geteuid():
            directory.chmod(0o755)
    return tmp_path


# -- compilers ---------------------------------------------------------------------------------

C_PROGRAM = rb"""
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
int main(int argc, char **argv) {
    double x = atof(argv[1]);
    printf("%.6f uid=%d\n", sqrt(x), (int)getuid());
    return argc;
}
"""


@pytest.mark.needs("gcc")
def test_gcc_compiles_and_the_program_runs(env: ExecutionEnvironment) -> None:
    env.write_file("/tmp/a.c", C_PROGRAM)
    built = env.run(
        ["gcc", "-O2", "-Wall", "-Werror", "-o", "/tmp/a", "/tmp/a.c", "-lm"], timeout=60
    )
    assert (built.stdout, built.stderr, built.returncode) == (b"", b"", 0)
    result = env.run(["/tmp/a", "2"], timeout=10 * PATIENCE)
    assert result.stdout == b"1.414214 uid=1000\n"
    assert (result.outcome, result.exit_code) == (Outcome.EXITED, 2)


@pytest.mark.needs("gcc")
def test_gcc_tells_of_errors_with_its_own_exit_code(env: ExecutionEnvironment) -> None:
    result = env.run(
        ["gcc", "-x", "c", "-o", "/tmp/a", "-"], input=b"int main( {", timeout=60 * PATIENCE
    )
    assert result.exit_code == 1
    assert b"error:" in result.stderr


@pytest.mark.needs("gcc")
@requires("make")
def test_make_builds_a_project_of_several_files_in_parallel(
    shared: Path, env: ExecutionEnvironment
) -> None:
    env.run(["mkdir", "/tmp/project"]).check()
    makefile = b"a: a.o b.o c.o\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -c -o $@ $<\n"
    env.write_file("/tmp/project/Makefile", makefile)
    env.write_file(
        "/tmp/project/a.c", b"int b(void), c(void); int main(void) { return b() + c(); }"
    )
    env.write_file("/tmp/project/b.c", b"int b(void) { return 40; }")
    env.write_file("/tmp/project/c.c", b"int c(void) { return 2; }")
    env.run(["make", "-j3"], cwd="/tmp/project", timeout=60 * PATIENCE).check()
    assert env.run(["./a"], cwd="/tmp/project").exit_code == 42


# -- node --------------------------------------------------------------------------------------

NODE_PROGRAM = b"""
const { Worker } = require('worker_threads');
const { execFileSync } = require('child_process');
const zlib = require('zlib'), fs = require('fs'), crypto = require('crypto');
const text = 'x'.repeat(100000);
fs.writeFileSync('/tmp/packed', zlib.gzipSync(text));
const same = zlib.gunzipSync(fs.readFileSync('/tmp/packed')).toString() === text;
const digest = crypto.createHash('sha256').update('abc').digest('hex').slice(0, 8);
const echoed = execFileSync('echo', ['child']).toString().trim();
const source = "require('worker_threads').parentPort.postMessage(6 * 7)";
const worker = new Worker(source, { eval: true });
worker.on('message', (n) => console.log(JSON.stringify({ n, same, digest, echoed })));
"""


@pytest.mark.needs("node")
def test_node_runs_a_script_with_workers_children_and_zlib() -> None:
    # V8 reserves gigabytes of addresses, which cost nothing: the limit counts what is used.
    with ExecutionEnvironment() as env:
        env.write_file("/tmp/a.js", NODE_PROGRAM)
        result = env.run(["node", "/tmp/a.js"], timeout=60 * PATIENCE).check()
    assert result.stdout == b'{"n":42,"same":true,"digest":"ba7816bf","echoed":"child"}\n'


@pytest.mark.needs("node")
def test_node_serves_and_fetches_on_loopback(env: ExecutionEnvironment) -> None:
    script = (
        "const http = require('http');"
        "const s = http.createServer((q, r) => r.end('served ' + q.url));"
        "s.listen(0, '127.0.0.1', async () => {"
        "  const r = await fetch(`http://127.0.0.1:${s.address().port}/x`);"
        "  console.log(await r.text()); s.close(); });"
    )
    result = env.run(["node", "-e", script], timeout=60 * PATIENCE).check()
    assert result.stdout == b"served /x\n"


# -- git ---------------------------------------------------------------------------------------


def make_repository(directory: Path) -> str:
    """Make a repository with one commit and return the commit's name."""
    settings = {
        "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null", "HOME": str(directory),
        "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b", "PATH": os.environ["PATH"],
    }  # fmt: skip

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", directory, *words],
            env=settings,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    directory.mkdir()
    (directory / "file").write_text("one\n")
    (directory / "link").symlink_to("file")
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    return git("rev-parse", "HEAD")


@pytest.mark.needs("git")
def test_git_clones_a_bound_repository_and_commits(shared: Path) -> None:
    commit = make_repository(shared / "repository")
    with ExecutionEnvironment(mounts=[Mount.bind(shared / "repository", "/repository")]) as env:
        # As root the files are nobody's inside, which git would call dubious ownership.
        status = env.run(["git", "status", "--porcelain"], cwd="/repository")
        assert (status.stdout, status.stderr, status.exit_code) == (b"", b"", 0)
        env.run(["git", "clone", "-q", "/repository", "/tmp/w"], timeout=60 * PATIENCE).check()
        assert env.read_file("/tmp/w/file") == b"one\n"
        env.write_file("/tmp/w/file", b"one\ntwo\n")
        who = ["-c", "user.name=x", "-c", "user.email=x@y"]
        env.run(
            ["git", *who, "commit", "-q", "-am", "second"], cwd="/tmp/w", timeout=60 * PATIENCE
        ).check()
        log = env.run(["git", "log", "--format=%H %s"], cwd="/tmp/w").check().text().splitlines()
        assert [line.split()[1] for line in log] == ["second", "first"]
        assert log[1].split()[0] == commit
        assert env.run(["git", "fsck", "--strict"], cwd="/tmp/w", timeout=60 * PATIENCE).ok
        # What is bound read-only cannot be pushed to.
        pushed = env.run(["git", "push", "-q", "origin", "HEAD:new"], cwd="/tmp/w")
        assert not pushed.ok
    assert not (shared / "repository/.git/refs/heads/new").exists()


# -- pip ---------------------------------------------------------------------------------------


def make_wheel(directory: Path) -> None:
    """Write the wheel of a package of one module, without any tool."""
    files = {
        "tiny_answer.py": b"def answer():\n    return 42\n",
        "tiny_answer-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\n"
        b"Name: tiny-answer\nVersion: 1.0\n",
        "tiny_answer-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: hand\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(directory / "tiny_answer-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            digest = (
                base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            )
            record += f"{name},sha256={digest},{len(content)}\n"
            wheel.writestr(name, content)
        wheel.writestr(
            "tiny_answer-1.0.dist-info/RECORD", record + "tiny_answer-1.0.dist-info/RECORD,,\n"
        )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pip") is None, reason="the interpreter of the tests has no pip"
)
def test_pip_installs_a_wheel_and_it_can_be_imported(shared: Path) -> None:
    (shared / "wheels").mkdir()
    make_wheel(shared / "wheels")
    with ExecutionEnvironment(mounts=[Mount.bind(shared / "wheels", "/wheels")]) as env:
        install = [sys.executable, "-m", "pip", "install", "--no-index", "--find-links", "/wheels"]
        env.run([*install, "--target", "/tmp/lib", "tiny-answer"], timeout=90 * PATIENCE).check()
        code = "import tiny_answer; print(tiny_answer.answer(), tiny_answer.__file__)"
        result = env.run([sys.executable, "-c", code], env={"PYTHONPATH": "/tmp/lib"}).check()
        assert result.stdout == b"42 /tmp/lib/tiny_answer.py\n"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ensurepip") is None, reason="python3-venv is not installed"
)
def test_virtual_environment_is_made_and_used(shared: Path) -> None:
    make_wheel(shared)
    with ExecutionEnvironment(
        mounts=[Mount.bind(shared, "/wheels")],
        tmp_size="256M",  # charged to the memory limit, which must be larger
        limits=Limits(memory_max="1G"),
        allow_missing={"cgroup.memory"},
    ) as env:
        made = env.run([sys.executable, "-m", "venv", "/tmp/venv"], timeout=100 * PATIENCE)
        if not made.ok and b"ensurepip is not" in made.stdout:
            pytest.skip("this interpreter's ensurepip has no wheels (Debian: python3-venv)")
        made.check()
        pip = ["/tmp/venv/bin/pip", "install", "--no-index", "--find-links", "/wheels"]
        env.run([*pip, "tiny-answer"], timeout=60 * PATIENCE).check()
        code = "import sys, tiny_answer; print(sys.prefix, tiny_answer.answer())"
        assert env.run(["/tmp/venv/bin/python", "-c", code]).check().stdout == b"/tmp/venv 42\n"


# -- databases, shells, scripting languages ------------------------------------------------------


@requires("sqlite3")
def test_sqlite_of_the_command_line_with_wal(env: ExecutionEnvironment) -> None:
    # Write-ahead logging maps a shared-memory file and locks byte ranges.
    sql = (
        b"pragma journal_mode=wal; create table t(a integer primary key, b text);"
        b"begin; insert into t(b) values ('one'), ('two'); commit; select sum(a), max(b) from t;"
        b"pragma integrity_check;"
    )
    result = env.run(["sqlite3", "/tmp/data.db"], input=sql, timeout=30 * PATIENCE).check()
    assert result.stdout == b"wal\n3|two\nok\n"
    again = env.run(["sqlite3", "-json", "/tmp/data.db", "select count(*) n from t"]).check()
    assert again.stdout == b'[{"n":2}]\n'


def test_shell_pipeline(env: ExecutionEnvironment) -> None:
    line = (
        "seq 1 20000 | sort -rn | awk '$1 % 7 == 0' | head -n 3 | tr '\\n' ' '"
        " && wc -l < /etc/passwd"
    )
    result = env.run(["sh", "-c", line], timeout=30 * PATIENCE).check()
    assert result.stdout == b"19999 19992 19985 3\n"
    assert result.stderr == b""


@requires("bash")
def test_bash_with_here_documents_process_substitution_traps_and_jobs(
    env: ExecutionEnvironment,
) -> None:
    script = b"""
set -euo pipefail
trap 'echo trapped' EXIT
diff <(printf '1\\n2\\n') <(printf '1\\n3\\n') || true
cat <<< "here"
sleep 0 & wait $!
mapfile -t lines < <(seq 3); echo "${#lines[@]}"
echo "to stderr" > /dev/stderr
echo $(( $(ulimit -n) ))
"""
    result = env.run(["bash"], input=script, timeout=30 * PATIENCE).check()
    assert result.text().splitlines() == [
        "2c2", "< 2", "---", "> 3", "here", "3", "1024", "trapped",
    ]  # fmt: skip
    assert result.stderr == b"to stderr\n"


def test_named_pipe_between_two_programs(env: ExecutionEnvironment) -> None:
    line = "mkfifo /tmp/pipe && (echo through > /tmp/pipe &) && cat /tmp/pipe"
    assert env.run(["sh", "-c", line], timeout=10 * PATIENCE).check().stdout == b"through\n"
    refused = env.run(["mknod", "/tmp/null", "c", "1", "3"])
    assert refused.exit_code == 1
    assert b"Operation not permitted" in refused.stderr


@requires("perl")
def test_perl_with_fork_pipes_and_sockets(env: ExecutionEnvironment) -> None:
    script = (
        "use Socket; use IO::Handle; socketpair(A, B, AF_UNIX, SOCK_STREAM, 0) or die $!;"
        "my $pid = fork() // die $!;"
        "if (!$pid) { syswrite B, 'child'; exit 3 }"
        "sysread A, my $got, 5; waitpid $pid, 0;"
        "open my $p, '-|', 'echo', 'piped' or die; my $line = <$p>; chomp $line;"
        "print join(' ', $got, $? >> 8, $line, (getpwuid $<)[0]), \"\\n\""
    )
    result = env.run(["perl", "-e", script], timeout=30 * PATIENCE).check()
    assert result.stdout == b"child 3 piped sandbox\n"


@requires("java")
@pytest.mark.slow
def test_java_virtual_machine_starts(env: ExecutionEnvironment) -> None:
    result = env.run(["java", "-XX:+UseSerialGC", "-Xmx64m", "-version"], timeout=60 * PATIENCE)
    assert result.ok, result.stderr
    assert b"version" in result.stderr


@requires("tar")
@requires("xz")
def test_archives_are_packed_and_unpacked(env: ExecutionEnvironment) -> None:
    line = (
        "mkdir a && seq 10000 > a/b && ln a/b a/c && tar cJf x a"
        " && mkdir u && tar xf x -C u && cmp a/b u/a/c"
    )
    assert env.run(["sh", "-ec", line], cwd="/tmp", timeout=30 * PATIENCE).check().stderr == b""


@requires("script")
def test_program_that_wants_a_terminal_makes_one(env: ExecutionEnvironment) -> None:
    # script(1) opens a pseudo-terminal of the environment's own devpts.
    command = ["script", "-qec", "tty; test -t 0 && test -t 1 && echo yes", "/dev/null"]
    result = env.run(command, timeout=30 * PATIENCE).check()
    assert result.text().split() == ["/dev/pts/0", "yes"]


def test_common_tools_know_the_user_the_host_and_the_time(env: ExecutionEnvironment) -> None:
    result = env.run(
        ["sh", "-c", "id -un; id -G; hostname; date +%Z; nproc; df -P /tmp | tail -n 1"]
    )
    user, groups, hostname, zone, cpus, disk = result.check().text().splitlines()
    assert (user, hostname) == ("sandbox", "sandbox")
    assert groups.split()[0] == "1000"
    assert zone
    assert int(cpus) >= 1
    assert disk.split()[-1] == "/tmp"


def test_run_in_one_call() -> None:
    result = nsbox.run(["sort", "-n"], input=b"10\n9\n8\n", timeout=10 * PATIENCE)
    assert result.check().stdout == b"8\n9\n10\n"


# -- runtimes that fit into their limits ---------------------------------------------------------

CHURN = b"""
public class Churn {
    public static void main(String[] arguments) {
        byte[][] kept = new byte[64][];
        long sum = 0;
        for (int i = 0; i < 12_000; i++) {
            kept[i % 64] = new byte[65536];
            sum += kept[i % 64].length;
        }
        System.out.println((sum >> 20) + " MiB in a heap of at most "
            + (Runtime.getRuntime().maxMemory() >> 20));
    }
}
"""


@pytest.mark.needs("cgroup.memory", "cgroup.cpu", "cgroup.cpuset")  # else Java 17 looks no further
@pytest.mark.skipif(shutil.which("javac") is None, reason="not installed: javac")
def test_a_java_program_is_not_killed_for_its_garbage() -> None:
    """4 MiB of live data, 750 MiB of garbage: by the host's memory the heap would outgrow this."""
    with ExecutionEnvironment(limits=Limits(memory_max="512M", cpu_max=1, pids_max=512)) as env:
        env.write_file("/tmp/Churn.java", CHURN)
        words = ["java", "-XX:+UseG1GC", "-XshowSettings:system", "Churn.java"]
        result = env.run(words, timeout=60 * PATIENCE)
    assert result.outcome is Outcome.EXITED, result.evidence
    text, _, heap = result.text().rpartition(" ")
    assert text == "750 MiB in a heap of at most"
    assert 100 <= int(heap) <= 128, "a quarter of the limit"
    words_of_java = " ".join(result.stderr_text().split())
    assert "Effective CPU Count: 1 " in words_of_java
    assert "CPU Quota: 100000us" in words_of_java
    assert "Memory Limit: 512.00M" in words_of_java


@pytest.mark.needs("cgroup.memory", "node")
def test_node_sees_its_limit_of_memory() -> None:
    script = (
        "console.log(JSON.stringify([process.constrainedMemory() / 2 ** 20,"
        "require('v8').getHeapStatistics().heap_size_limit / 2 ** 20]))"
    )
    with ExecutionEnvironment(limits=Limits(memory_max="512M")) as env:
        result = env.run(["node", "-e", script], timeout=60 * PATIENCE).check()
    constrained, heap = json.loads(result.stdout)
    assert constrained == 512
    assert 200 < heap <= 300


@pytest.mark.needs("node")
def test_where_no_cgroup_is_node_is_told_by_a_variable() -> None:
    script = "console.log(require('v8').getHeapStatistics().heap_size_limit / 2 ** 20)"
    told = {"NODE_OPTIONS": "--max-old-space-size=256"}
    with ExecutionEnvironment(env=told, limits=Limits(memory_max=None)) as env:
        result = env.run(["node", "-e", script], timeout=60 * PATIENCE).check()
        assert not env.run(["test", "-e", "/sys"]).ok
    assert (250 < float(result.text()) <= 320, result.stderr) == (True, b"")
