# SPDX-License-Identifier: Apache-2.0
"""`nsbox doctor`, `plan`, `ps` and `gc`; and the features they stand on."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.terminals import ENVIRONMENT, NSBOX, nsbox_run
from tests.support import PATIENCE, host_program

import nsbox
from nsbox.host import features
from nsbox.isolation.cgroups import Hierarchies


def test_doctor_json_names_every_feature() -> None:
    done = nsbox_run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert [finding["name"] for finding in findings] == list(features.PROBED)
    assert all(set(finding) == {"name", "works", "detail", "remedy"} for finding in findings)
    assert all(finding["detail"] for finding in findings)
    assert all(not finding["remedy"] for finding in findings if finding["works"])
    works = {finding["name"]: finding["works"] for finding in findings}
    for name in features.NEEDED:
        assert works[name], name


def test_doctor_for_people() -> None:
    done = nsbox_run("doctor")
    text = done.stdout.decode()
    assert done.returncode == 0
    assert text.startswith("nsbox doctor: ")
    assert re.search(r"^works +environment ", text, re.MULTILINE)
    assert "A default environment can be made." in text


def test_doctor_fails_where_there_is_no_environment() -> None:
    # The limit holds for this user namespace and its children only.
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"'
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", *NSBOX, "doctor"],
        env=ENVIRONMENT,
        capture_output=True,
        timeout=60 * PATIENCE,
    )
    text = done.stdout.decode()
    assert done.returncode == 1, text + done.stderr.decode()
    assert re.search(r"^MISSING +userns ", text, re.MULTILINE)
    assert "sysctl -w user.max_user_namespaces=" in text
    assert "No default environment can be made." in text


def test_probes_answer_and_refuse_unknown_names() -> None:
    works, detail = features.probe("userns")
    assert works, detail
    assert features.probe("root") == (os.geteuid() == 0, f"the user id is {os.geteuid()}")
    with pytest.raises(ValueError, match="telepathy"):
        features.probe("telepathy")


FACTS = {
    "chroot": "",
    "apparmor": "", "userns_clone": "1", "max_userns": "1000", "container": "", "systemd": "yes",
    "apt": "/usr/bin/apt-get", "user": "1000",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "error", "facts", "words"),
    [
        ("userns", errno.EPERM, {"apparmor": "1"}, "kernel.apparmor_restrict_unprivileged_userns"),
        ("userns", errno.EPERM, {"userns_clone": "0"}, "kernel.unprivileged_userns_clone=1"),
        ("userns", errno.ENOSPC, {"max_userns": "0"}, "user.max_user_namespaces"),
        ("userns", errno.ENOSPC, {}, "user.max_user_namespaces"),
        ("userns", errno.EPERM, {"container": "docker"}, "--security-opt seccomp=unconfined"),
        ("proc", errno.EPERM, {"container": "kubernetes"}, "procMount: Unmasked"),
        ("userns", errno.EINVAL, {}, "CONFIG_USER_NS"),
        ("newuidmap", 0, {}, "--add-subuids"),
        ("seccomp", 0, {}, "apt-get install libseccomp2"),
    ],
)
def test_remedies_fit_the_host(name: str, error: int, facts: dict[str, str], words: str) -> None:
    assert words in features.remedy(name, error, facts={**FACTS, **facts})


def test_plan_numbers_the_steps_and_says_what_is_in_force() -> None:
    done = nsbox_run("plan", "--tmp-size", "3M", "--hostname", "box", "--bind", "/usr/lib:/data")
    text = done.stdout.decode()
    assert done.returncode == 0, done.stderr
    numbers = [int(number) for number in re.findall(r"^ +(\d+)  ", text, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 12
    assert text.index("In the launcher:") < text.index("In the environment:")
    for word in (str(3 << 20), "'box'", "/data", "clone3", "pivot_root", "policy 'default'"):
        assert word in text, word
    assert re.search(r"^  yes  namespace.user ", text, re.MULTILINE)


def test_plan_refuses_as_run_does() -> None:
    assert nsbox_run("plan", "--memory", "x").returncode == 125
    data = json.loads(nsbox_run("plan", "--json").stdout)
    assert [step["number"] for step in data["steps"]] == list(range(1, len(data["steps"]) + 1))
    assert data["protections"]


def test_ps_shows_a_live_environment(env: nsbox.ExecutionEnvironment) -> None:
    with env.popen(["sleep", "60"]):
        entries = {entry["id"]: entry for entry in json.loads(nsbox_run("ps", "--json").stdout)}
        entry = entries[env.id]
        assert entry["pid"] == env.pid
        assert entry["host_pid"] == os.getpid()
        assert entry["uid"] == os.getuid()
        assert (entry["state"], entry["processes"]) == ("running", 2)
        assert entry["memory_bytes"] > 0
        assert 0 <= entry["age_seconds"] < 120
        lines = nsbox_run("ps").stdout.decode().splitlines()
        assert lines[0].split()[:3] == ["ID", "STATE", "PID"]
        assert any(line.startswith(env.id) for line in lines[1:])
    env.freeze()
    entries = {entry["id"]: entry for entry in json.loads(nsbox_run("ps", "--json").stdout)}
    assert entries[env.id]["state"] == "frozen"
    env.thaw()
    env.close()
    assert env.id not in nsbox_run("ps").stdout.decode()


def test_ps_is_not_fooled_by_a_name(env: nsbox.ExecutionEnvironment) -> None:
    code = (
        "open('/proc/self/comm','w').write('nsbox-0badf00d'); print(flush=True);"
        "import time; time.sleep(60)"
    )
    with env.popen([sys.executable, "-I", "-S", "-c", code]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"
        assert b"0badf00d" not in nsbox_run("ps").stdout


# Runs as a program of its own, since the limit is the interpreter's.
SHALLOW_PS = """
import json, sys
from nsbox.cli.ps import live_environments
sys.setrecursionlimit(100)
print(json.dumps(list(live_environments())))
"""


def test_ps_follows_a_guest_that_nests_its_processes_deeply(
    env: nsbox.ExecutionEnvironment,
) -> None:
    depth = 150
    code = f"""
import os, time
for _ in range({depth - 1}):
    if os.fork():
        break
else:
    print(flush=True)
time.sleep(60)
"""
    with env.popen([sys.executable, "-I", "-S", "-c", code]) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"\n"
        out, _ = host_program(SHALLOW_PS, stdout=subprocess.PIPE).communicate(timeout=60 * PATIENCE)
    entries = {entry["id"]: entry for entry in json.loads(out)}
    assert entries[env.id]["processes"] == 1 + depth


# Runs as a program of its own, since a hook stays and modules are there.
WHAT_IS_READ = """
import json, sys
opened = []
sys.addaudithook(lambda event, words: event == "open" and opened.append(str(words[0])))
from nsbox.cli import app, ps
looks = []
for look in (ps.live_environments, ps.cpu_seconds):
    opened.clear()
    list(look())
    looks.append(list(opened))
print(json.dumps({"modules": list(sys.modules), "looks": looks}))
"""


def test_ps_reads_little(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    """At 2,800 environments each file is 30 ms, and 2,800 more files of each make it slow."""
    envs = [make_env() for _ in range(3)]
    out, _ = host_program(WHAT_IS_READ, stdout=subprocess.PIPE).communicate(timeout=60 * PATIENCE)
    seen = json.loads(out)
    assert "nsbox.values.config" not in seen["modules"]
    for look, at_most in zip(seen["looks"], (3, 1), strict=True):
        of_cgroups = [path for path in look if path in {f"/proc/{env.pid}/cgroup" for env in envs}]
        assert len(of_cgroups) <= 1, "they are side by side"
        for env in envs:
            files = [path for path in look if env.id in path]
            assert len(files) <= at_most, files
            assert look.count(f"{env.pid}/stat") == 1


@pytest.mark.needs("root")
def test_gc_removes_what_a_dead_owner_left() -> None:
    places = Hierarchies.detect()
    dead = f"nsbox.1.999999999999.{os.stat('/proc/self/ns/pid').st_ino}.00000000"
    made = [f"{base}/{dead}" for base in places.bases]
    assert made
    try:
        for path in made:
            os.mkdir(path)
        done = nsbox_run("gc")
        assert done.returncode == 0
        assert sorted(done.stdout.decode().split("\n")[:-1]) == sorted(f"removed {p}" for p in made)
        assert not any(os.path.exists(path) for path in made)
    finally:
        for path in made:
            if os.path.exists(path):
                os.rmdir(path)


def test_gc_removes_code_that_nobody_uses(tmp_path: Path) -> None:
    def gc(*words: str) -> list[str]:
        environment = {**ENVIRONMENT, "NSBOX_STORE": str(tmp_path / "store")}
        done = subprocess.run(
            [*NSBOX, "gc", "--quiet", *words], capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [line for line in done.stdout.splitlines() if str(tmp_path) in line]

    assert gc("--store-days", "0") == []
    assert not (tmp_path / "store").exists(), "nothing is made to be looked at"
    (tmp_path / "src").mkdir()
    store = nsbox.Store(tmp_path / "store")
    paths = []
    for text in ("x = 1", "x = 22"):
        (tmp_path / "src/app.py").write_text(text)
        version = nsbox.Function("app.handler", code=tmp_path / "src").publish(store)
        assert version.code is not None
        paths.append(os.path.dirname(version.code.path))
        os.utime(paths[-1], (0, 40 * len(paths)))
    version = version.function.publish(store)
    assert gc() == [f"removed {paths[0]}"], "the other was used a moment ago"
    assert gc("--store-days", "0", "--store-size", "1") == [], "and is in use"
    del version
    assert gc() == []
    assert gc("--store-size", "1") == [f"removed {paths[1]}"]


def test_gc_refuses_what_is_no_size() -> None:
    done = nsbox_run("gc", "--store-size", "x")
    assert done.returncode == 125
    assert b"store-size: 'x' is no size" in done.stderr


def test_gc_with_nothing_to_do() -> None:
    done = nsbox_run("gc")
    assert done.returncode == 0
    assert nsbox_run("gc", "--quiet").stderr == b""
