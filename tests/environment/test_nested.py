# SPDX-License-Identifier: Apache-2.0
"""nsbox inside of user namespaces, in a chroot, and for users with subordinate ids."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import IS_ROOT, PATIENCE

import nsbox
from nsbox.supervisor.plan import interpreter_prefixes

pytestmark = pytest.mark.needs("userns")

RUN = [sys.executable, "-m", "nsbox", "run", "-q", "--"]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60 * PATIENCE, check=False, cwd="/"
    )


@pytest.mark.parametrize("namespaces", [["-Ur"], ["-Urn"], ["-Urnpf", "--mount-proc"]])
def test_root_of_a_user_namespace(namespaces: list[str]) -> None:
    """It is the user outside; where that is root, root must not mean root."""
    done = call("unshare", *namespaces, *RUN, "id", "-u")
    if IS_ROOT:
        assert done.returncode == 125
        assert "root outside as well" in done.stderr
    else:
        assert (done.returncode, done.stdout) == (0, "1000\n"), done.stderr


NO_PROC = 'mount -t tmpfs none /proc; exec "$@"'


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["unshare", "-U"], "The user namespace of this process has no id for it"),
        (["unshare", "-Urpf"], "/proc is that of another pid namespace. Mount that of this one"),
        (["unshare", "-Urm", "sh", "-c", NO_PROC, "sh"], "on this host: no /proc. Mount that of"),
    ],
)
def test_what_hinders_is_named(words: list[str], reason: str) -> None:
    done = call(*words, *RUN, "true")
    assert (done.returncode, reason in done.stderr) == (125, True), done


@pytest.mark.needs("root")
def test_root_with_few_capabilities() -> None:
    """It has no cgroups and mounts to give, and yet ids that are not root's."""
    done = call("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
                *RUN, "cat", "/proc/self/uid_map", "/proc/self/gid_map")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        inside, outside, count = line.split()
        assert (inside, count) == ("1000", "1")
        assert outside != "0"


IN_CHROOT = r"""
set -e
mount -t tmpfs none "$1"; cd "$1"; mkdir root; cd root
for name in bin sbin lib lib64; do [ ! -L /$name ] || ln -s "$(readlink /$name)" $name; done
shift
while [ "$1" != -- ]; do mkdir -p ".$1"; mount --rbind "$1" ".$1"; shift; done
shift
mkdir -p tmp; chmod 1777 tmp; exec "$@"
"""


@pytest.mark.needs("root")
@pytest.mark.parametrize("user", ["0", "65534"])
def test_a_chroot_is_told_of(tmp_path: Path, user: str) -> None:
    bound = ["/usr", "/etc", "/proc", "/dev", "/sys", *interpreter_prefixes()]
    source = os.path.dirname(os.path.dirname(nsbox.__file__))
    if not any(f"{source}/".startswith(f"{path}/") for path in bound):
        bound.append(source)
    change = ["chroot", f"--userspec={user}:{user}", "."]
    done = call("unshare", "-m", "sh", "-c", IN_CHROOT, "sh", str(tmp_path), *bound, "--",
                *change, *RUN, "true")  # fmt: skip
    assert done.returncode == 125, done.stderr
    assert "in a chroot" in done.stderr, done.stderr
    assert "AppArmor" not in done.stderr


HIDDEN = """
set -e
mount -t tmpfs none /mnt; mkdir -p /mnt/site /mnt/home; mount --bind "$1" /mnt/site
chmod 755 /mnt; chown 65534 /mnt/home
for options in hidepid=2 hidepid=2,gid=65534; do
    umount -l /proc 2>/dev/null || :
    mount -t proc -o $options proc /proc
    setpriv --reuid=65534 --regid=65534 --clear-groups \\
        env -i HOME=/mnt/home PATH=/usr/bin:/bin PYTHONPATH=/mnt/site "$2" -B -c "$3"
done
"""

BY_A_USER = """
import nsbox
try:
    print(nsbox.run(["id", "-u"]).text(), end="")
except nsbox.SetupError as error:
    print(error)
"""


@pytest.mark.needs("root")
def test_a_proc_that_hides_processes_is_told_of() -> None:
    """What the kernel says of an environment cannot be read then, and nothing else is believed."""
    source = os.path.dirname(os.path.dirname(nsbox.__file__))
    python = os.path.realpath(sys.executable)
    if not all(os.stat(place).st_mode & stat.S_IXOTH for place in Path(python).parents):
        pytest.skip("others may not execute this Python")
    done = call("unshare", "-m", "sh", "-c", HIDDEN, "sh", source, python, BY_A_USER)
    assert done.returncode == 0, done
    refused, seen = done.stdout.splitlines()
    assert "step 'verify' failed" in refused, done
    assert "/proc hides it (hidepid=" in refused, done
    assert seen == "1000", done


# -- subordinate ids ---------------------------------------------------------------------------

SUBORDINATE = """
import os, sys, tempfile, nsbox
with tempfile.TemporaryDirectory() as own:
    os.chmod(own, 0o700)
    with open(f"{own}/file", "w") as file:
        file.write("private")
    os.chmod(f"{own}/file", 0o600)
    for rw in (False, True):
        config = nsbox.Config(mounts=[nsbox.Mount.bind(own, "/data", rw=rw)])
        with nsbox.ExecutionEnvironment(config) as env:
            assert "the caller's own id" in env.protections["identity"].detail
            assert env.run(["cat", "/data/file"]).check().text() == "private"
            assert env.run(["stat", "-c", "%u", "/data"]).text() == "1000\\n"
            assert env.run(["sh", "-c", "echo 1 > /data/new"]).ok is rw
            assert not env.run(["chmod", "4755", "/data/file"]).ok
    assert os.stat(f"{own}/new").st_uid == os.getuid()
    other = nsbox.Config(mounts=[nsbox.Mount.bind("/usr/share", "/data")])
    for config in (nsbox.Config(), other):
        with nsbox.ExecutionEnvironment(config) as env:
            assert "subordinate id" in env.protections["identity"].detail
            with open(f"{own}/file", "r+b") as file:
                assert env.run(["sh", "-c", "exec 3<> /proc/self/fd/0"], stdin=file).exit_code
print("well")
"""


@pytest.mark.needs("newuidmap")
def test_users_with_subordinate_ids_have_their_own_files() -> None:
    done = call(sys.executable, "-c", SUBORDINATE)
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr


GRANTED = r"""
set -e
printf 'nobody:200000:1000\nnobody:300000:500\n' > "$1/ids"
for file in subuid subgid; do mount --bind "$1/ids" /etc/$file; done
shift
# The capability is for the way to the interpreter and to nsbox; a launcher has no use for it.
exec setpriv --reuid=65534 --regid=65534 --clear-groups \
    --inh-caps=+dac_read_search --ambient-caps=+dac_read_search "$@"
"""
NAMED = """
import os, sys, nsbox
from nsbox.supervisor.launcher import get_launcher
for os.environ["NSBOX_ID_RANGE"] in sys.argv[1:]:
    try:
        launcher = get_launcher()
    except nsbox.ConfigError as error:
        print(error)
        continue
    maps = [open(f"/proc/{launcher.pid}/{name}_map").read().split() for name in ("uid", "gid")]
    print(launcher.hello.ids, *maps[0][3:], *maps[1][3:])
    nsbox.shutdown()
"""


@pytest.mark.needs("root")
def test_a_user_names_some_of_the_subordinate_ids(tmp_path: Path) -> None:
    """They are used; others are refused by name, and nothing is done with less."""
    ranges = ["300100:50", "200000:1000", "200990:20", "100000:10", "0:10"]
    done = call("unshare", "-m", "sh", "-c", GRANTED, "sh", str(tmp_path),
                sys.executable, "-c", NAMED, *ranges)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    *told, zero = done.stdout.splitlines()
    assert "NSBOX_ID_RANGE: '0:10' is not FIRST:COUNT" in zero
    if shutil.which("newuidmap") is None:
        for line in told:
            assert "needs newuidmap and newgidmap, which are not installed" in line
        return
    granted = "200000:1000, 300000:500"
    refusal = f"is not among this user's subordinate ids, {granted} in /etc/subuid and {granted} in"
    assert told[:2] == ["subordinate 1 300100 50 1 300100 50",
                        "subordinate 1 200000 1000 1 200000 1000"]  # fmt: skip
    for line, text in zip(told[2:], ranges[2:4], strict=True):
        assert line.startswith(f"NSBOX_ID_RANGE: {text} {refusal}")


def test_a_range_of_ids_that_cannot_be_had_is_refused() -> None:
    done = call(sys.executable, "-c", NAMED, "4294967290:100")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1), done.stderr
    assert done.stdout.startswith("NSBOX_ID_RANGE: 4294967290:100 "), done.stdout
    assert done.stdout.endswith("unset it\n")
    if IS_ROOT:
        done = call("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
                    sys.executable, "-c", NAMED, "1879048192:10", "4294967290:100")  # fmt: skip
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        used, refused = done.stdout.splitlines()
        assert used == "subordinate 1 1879048192 10 1 1879048192 10"
        assert refused.startswith("NSBOX_ID_RANGE: 4294967290:100 cannot be mapped by this root")


def test_where_a_part_of_proc_is_covered_that_is_told() -> None:
    """As in a container: there is no /proc inside, which `ps` explains by a wrong remedy."""
    flags = "-m" if IS_ROOT else "-Urm"
    covered = 'mount -t tmpfs none /proc/tty && exec "$@"'
    words = [word for word in RUN if word != "-q"]
    done = call("unshare", flags, "sh", "-c", covered, "sh", *words, "ls", "/proc")
    # The newest kernels (7.2) mount one of processes only all the same.
    inside = done.stdout
    kind = "its own, processes only" if inside else "none"
    assert (done.returncode, inside) in [(0, ""), (0, "1\n2\nself\nthread-self\n")], done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("nsbox: /proc inside: ")]
    assert len(told) == 1
    for word in (f"{kind}: something is mounted over", "findmnt -R /proc", "Remedy: ", "--quiet"):
        assert word in told[0]
    done = call("unshare", flags, "sh", "-c", covered, "sh", *RUN, "ls", "/proc")
    assert (done.returncode, done.stdout, done.stderr) == (0, inside, "")
