# SPDX-License-Identifier: Apache-2.0
"""The leak check of tests/conftest.py: what a test or module has left behind fails it, by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tests.leaks import cgroup_bases
from tests.support import PATIENCE

REPOSITORY = str(Path(__file__).resolve().parents[2])

LEAKS_OF_A_TEST = """
    import os, subprocess, sys, tempfile, threading
    import nsbox, pytest
    from nsbox.supervisor.launcher import get_launcher

    kept = []

    def test_clean():
        nsbox.run(["true"])

    @pytest.mark.static
    def test_static():
        os.open("/dev/null", os.O_RDONLY)

    def test_process():
        kept.append(subprocess.Popen(["sleep", "60"]))

    def test_descriptor():
        os.open("/dev/null", os.O_RDONLY)

    def test_thread():
        kept.append(threading.Thread(target=threading.Event().wait, name="waiting", daemon=True))
        kept[-1].start()

    def test_file():
        open(os.path.join(tempfile.gettempdir(), "forgotten"), "x").close()

    def test_environment():
        kept.append(nsbox.ExecutionEnvironment())

    def test_cgroup():
        kept[-1].close()
        for tree in set(get_launcher().hello.trees.values()):
            os.mkdir(f"{tree}/forgotten")

    def test_clean_again():
        for tree in set(get_launcher().hello.trees.values()):
            os.rmdir(f"{tree}/forgotten")
"""

NOBODY = 4_000_000
"""No process has this number."""

LEAKS_OF_A_MODULE = {
    "mount": """
        import subprocess
        def test(tmp_path):
            subprocess.run(["mount", "-t", "tmpfs", "forgotten", str(tmp_path)], check=True)
    """,
    "stray": """
        def test():
            open("/dev/shm/nsbox-0123abcd", "x").close()
    """,
    # Its parent is not who its command line says; it is named as a script is.
    "orphan": """
        import os, subprocess, nsbox
        def test(tmp_path):
            os.mkfifo(tmp_path / "begun")
            script = tmp_path / "nsbox-launcher"
            script.write_text(f"#!/bin/sh\\necho >{tmp_path}/begun; read line\\n")
            script.chmod(0o755)
            main = os.path.join(os.path.dirname(nsbox.__file__), "launcher", "main.py")
            waiting = '{ sleep 60 | "$0" "$1"; } >/dev/null 2>&1 &'
            subprocess.run(["sh", "-c", waiting, script, main], check=True)
            (tmp_path / "begun").read_text()
    """,
    "socket": """
        import subprocess
        def test():
            code = (
                "import os, socket, time; s = socket.socket(socket.AF_UNIX);"
                "s.bind('\\\\0nsbox/forgotten'); os.fork() and os._exit(0); time.sleep(60)"
            )
            subprocess.run(["python3", "-c", code], stdout=subprocess.DEVNULL, check=True)
    """,
    "cgroup": f"""
        import os
        from nsbox.isolation.cgroups import Owner
        from tests import leaks
        def test():
            owner = Owner.current()
            owner.pid, owner.start_time = {NOBODY}, 1
            for base in leaks.cgroup_bases():
                if os.access(base, os.W_OK):
                    os.mkdir(os.path.join(base, owner.name))
    """,
}


# What they leave is seen by nobody else, and is gone with them; of the cgroups' names, each has the
# number of a namespace of processes.
ALONE = ["unshare", "-rmnp", "--fork", "--mount-proc", "--kill-child", "sh", "-c"]
ALONE += ['mount -t tmpfs none /dev/shm && "$@"; exit $?', "sh"]


def run_pytest(directory: Path, *wrapper: str) -> dict[str, str]:
    """Run the tests below `directory` under this conftest.py; return what is left, by who told."""
    temporary = directory / "tmp"
    temporary.mkdir()
    options = f"-p tests.conftest -p no:cacheprovider -c {REPOSITORY}/pyproject.toml --tb=line"
    options += f" --leak-grace=0.2 --rootdir {directory} {directory}"
    done = subprocess.run(
        [*wrapper, sys.executable, "-m", "pytest", *options.split()],
        env={**os.environ, "PYTHONPATH": REPOSITORY, "TMPDIR": str(temporary), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )
    found: dict[str, str] = {}
    # The summary repeats them where CI is set.
    told, _, _ = done.stdout.partition(" short test summary info ")
    for part in told.split(" ERROR at teardown of ")[1:]:
        for who, what in re.findall(r"AssertionError: left behind by (.*?): (.*)", part):
            found[part.split()[0] if who == "the test" else who] = what
    print(done.stdout, done.stderr)  # for whoever looks at a failure
    assert "failed" not in done.stdout.splitlines()[-1]
    return found


@pytest.mark.needs("userns")
def test_what_a_test_leaves_is_told_after_it(tmp_path: Path) -> None:
    (tmp_path / "test_each.py").write_text(textwrap.dedent(LEAKS_OF_A_TEST))
    found = run_pytest(tmp_path)
    assert re.search(r"\{'children': \['\d+ sleep'\]\}", found.pop("test_process"))
    assert re.search(r"\{'descriptors': \['\d+ -> /dev/null'\]\}", found.pop("test_descriptor"))
    assert re.search(r"\{'threads': \['\d+ waiting'\]\}", found.pop("test_thread"))
    assert re.search(r"\{'temporary files': \['/.*/forgotten'\]\}", found.pop("test_file"))
    assert re.search(r"'children': \['\d+ nsbox-[0-9a-f]{8}'\]", found.pop("test_environment"))
    if cgroups := found.pop("test_cgroup", None):  # where there are some
        assert re.search(r"\{'own cgroups': \['/sys/fs/cgroup/.*/forgotten'.*\]\}", cgroups)
    # What tests have left, their module and the session have.
    assert "sleep" in found.pop("test_each.py")
    assert "sleep" in found.pop("the session")
    assert not found


@pytest.mark.needs("userns")
def test_what_is_nobodys_is_told_after_the_module(tmp_path: Path) -> None:
    for name, text in LEAKS_OF_A_MODULE.items():
        (tmp_path / f"test_{name}.py").write_text(textwrap.dedent(text))
    try:
        found = run_pytest(tmp_path, *ALONE)
    finally:
        for base in cgroup_bases():
            for left in Path(base).glob(f"nsbox.{NOBODY}.1.*"):
                left.rmdir()
    assert re.search(r"\{'mounts': \['.* tmpfs forgotten rw", found.pop("test_mount.py"))
    assert found.pop("test_stray.py").startswith("{'stray files': ['/dev/shm/nsbox-0123abcd']}")
    assert re.search(r"'processes': \['\d+ nsbox-launcher'\]", found.pop("test_orphan.py"))
    assert found.pop("test_socket.py").startswith("{'sockets': ['@nsbox/forgotten']}")
    if cgroups := found.pop("test_cgroup.py", None):  # where this user may make some
        assert re.match(rf"\{{'cgroups': \['/sys/.*/nsbox\.{NOBODY}\.1\.", cgroups)
    assert "forgotten" in found.pop("the session")
    assert not found
