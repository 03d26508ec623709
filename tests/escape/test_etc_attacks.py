# SPDX-License-Identifier: Apache-2.0
"""Attacks on what environments see of the host's /etc: secrets planted there, in a copy of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support import IS_ROOT, PATIENCE, SOURCE, attack

import nsbox
from nsbox.isolation import etc

pytestmark = pytest.mark.needs("userns")

# In a mount namespace of its own: a copy of /etc, planted, and over the real one.
_PLANT = """
set -e
mount -t tmpfs tmpfs "$1"
cp -dR --preserve=mode /etc "$1/etc" 2>/dev/null || true
python3 -I -S -c "$3" "$1/etc" "$1"
mount --bind "$1/etc" /etc
if [ "$2" = mounted ]; then
    mkdir -p /etc/orchestrator
    mount -t tmpfs tmpfs /etc/orchestrator
    echo PLANTED > /etc/orchestrator/token
fi
shift 3
exec "$@"
"""

_SECRETS = """
import json, os, socket, sys
etc, outside = sys.argv[1:]
hidden, below = json.loads(os.environ['HIDDEN'])
def put(path, mode=0o644):
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if os.path.isdir(path):
        path += '/planted'
    if os.path.lexists(path):
        os.unlink(path)
    with open(path, 'w') as file:
        file.write('PLANTED')
    os.chmod(path, mode)
for number, name in enumerate([*hidden, *below]):
    put(f'{etc}/{name}/planted' if number % 2 and not os.path.isfile(f'{etc}/{name}')
        else f'{etc}/{name}')
for name in ('shadow.bak', 'passwd~', 'hosts.allow', 'ssh-old/planted', 'cron.d/planted'):
    put(f'{etc}/{name}')
for mode in (0o600, 0o640, 0o660, 0o000, 0o711, 0o751):
    put(f'{etc}/program/file-{mode:o}', mode)
for mode in (0o700, 0o750, 0o711, 0o744, 0o755):
    put(f'{etc}/program/directory-{mode:o}/deeper/planted')
    os.chmod(f'{etc}/program/directory-{mode:o}', mode)
os.unlink(f'{etc}/program/directory-755/deeper/planted')
listener = socket.socket(socket.AF_UNIX)
listener.bind(f'{etc}/program/socket')
os.chmod(f'{etc}/program/socket', 0o777)
os.mkfifo(f'{etc}/program/fifo', 0o666)
put(f'{outside}/secret')
os.symlink(f'{outside}/secret', f'{etc}/program/link')
os.symlink('/etc/shadow', f'{etc}/program/shadow')
with open(f'{etc}/program/config', 'w') as file:
    file.write('open')
with open(f'{etc}/program/large', 'wb') as file:
    file.write(b'x' * (3 << 20))
"""

_LOOK = """
import nsbox
inside = '''
import json, os
names, planted, config = [], [], []
for directory, directories, files in os.walk("/etc"):
    for name in [*directories, *files]:
        path = os.path.join(directory, name)
        names.append(path)
        try:
            with open(path) as file:
                if "PLANTED" in file.read():
                    planted.append(path)
        except (OSError, ValueError):
            pass
print(json.dumps({"names": names, "planted": planted,
                  "mounts": [line for line in open("/proc/self/mounts") if " /etc" in line],
                  "large": os.path.getsize("/etc/program/large"),
                  "config": open("/etc/program/config").read()}))
'''
result = nsbox.run(["python3", "-I", "-S", "-c", inside], timeout=60)
print(result.check().text())
"""


def look(place: Path, mode: str = "") -> dict[str, Any]:
    """Return what an environment finds where secrets are planted in /etc."""
    words = ["unshare", "--mount", "--propagation", "private"]
    if not IS_ROOT:
        words += ["--user", "--map-root-user"]
    # Who is in a second user namespace may not look under what is mounted in the first.
    is_inner = mode == "mounted" or not IS_ROOT
    inner = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if is_inner else []
    words += ["sh", "-c", _PLANT, "sh", str(place), mode, _SECRETS]
    words += [*inner, sys.executable, "-c", _LOOK]
    below = [f"{parent}/{name}" for parent, names in etc.HIDDEN_BELOW.items() for name in names]
    hidden = json.dumps([sorted(etc.HIDDEN), below])
    done = subprocess.run(
        words,
        capture_output=True,
        timeout=120 * PATIENCE,
        env={**os.environ, "PYTHONPATH": SOURCE, "HIDDEN": hidden},
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def check(found: dict[str, Any]) -> None:
    allowed = {"passwd", "group", "hosts", "hostname", "resolv.conf", "gitconfig"}  # nsbox's own
    names = {name.removeprefix("/etc/") for name in found["names"]}
    assert found["planted"] == []
    assert not names & (etc.HIDDEN - allowed)
    assert not names & {"shadow.bak", "passwd~", "hosts.allow", "ssh-old", "cron.d"}
    assert {name for name in names if name.split("/")[0] == "program"} == {
        *("program", "program/config", "program/large", "program/link", "program/shadow"),
        *("program/directory-755", "program/directory-755/deeper"),
    }
    assert (found["config"], found["large"]) == ("open", 3 << 20)


def test_no_secret_of_etc_is_seen_not_even_its_name(tmp_path: Path) -> None:
    found = look(tmp_path)
    check(found)
    assert len(found["mounts"]) == 1, "one mount, whatever is left out"


def test_what_others_mounted_in_etc_is_not_seen(tmp_path: Path) -> None:
    """Where the kernel refuses an overlay, as on /etc of a container, it is a copy."""
    found = look(tmp_path, "mounted")
    check(found)
    assert found["mounts"] == []
    assert not any("orchestrator/" in name for name in found["names"])


def test_etc_cannot_be_written_or_uncovered(env: nsbox.ExecutionEnvironment) -> None:
    code = """
        answer = [
            attempt(open, '/etc/new', 'w'), attempt(open, '/etc/ld.so.cache', 'r+b'),
            attempt(os.unlink, '/etc/passwd'), attempt(os.chmod, '/etc/passwd', 0o666),
            attempt(os.rename, '/etc/passwd', '/etc/x'), attempt(os.mkdir, '/etc/ssh'),
            attempt(os.mknod, '/etc/shadow', 0o20000, 0),
            attempt(os.setxattr, '/etc', 'user.overlay.opaque', b'y'),
            syscall(NUMBERS['umount2'], b'/etc', 2), syscall(NUMBERS['mount'], b'none', b'/etc',
            b'overlay', 32, b'lowerdir=/:/etc'),
        ]
    """
    found = attack(env, code, NUMBERS={"umount2": 166, "mount": 165})
    assert set(found) <= {"EROFS", "EPERM", "EACCES", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"}


def test_a_mount_inside_a_hidden_directory_uncovers_nothing(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("mine")
    tmp_path.chmod(0o755)
    mounts = [
        nsbox.Mount.bind(tmp_path / "own", "/etc/ssh/own"),
        nsbox.Mount.bind(tmp_path / "own", "/etc/hosts"),
        nsbox.Mount.tmpfs("/etc/alternatives/more"),
    ]
    with nsbox.ExecutionEnvironment(mounts=mounts) as env:
        code = "answer = [os.listdir('/etc/ssh'), read('/etc/hosts'), read('/etc/ssh/own'), "
        code += "os.listdir('/etc/alternatives/more'), len(os.listdir('/etc/alternatives'))]"
        found = attack(env, code)
    assert found[:4] == [["own"], "mine", "mine", []]
    assert found[4] >= 1


def test_the_minimal_userland_has_little(tmp_path: Path) -> None:
    with nsbox.ExecutionEnvironment(userland="minimal") as env:
        found = attack(env, "answer = [sorted(os.listdir('/etc')), os.listdir('/var')]")
    assert set(found[0]) <= {
        *("bash.bashrc", "debian_version", "gai.conf", "host.conf", "inputrc", "ld.so.cache"),
        *("ld.so.conf", "locale.alias", "localtime", "magic", "mime.types", "networks"),
        *("os-release", "profile", "protocols", "rpc", "services", "shells", "ssl", "timezone"),
        *("alternatives", "fonts", "ld.so.conf.d", "pki", "terminfo", "passwd", "group", "hosts"),
        *("hostname", "nsswitch.conf", "resolv.conf", "gitconfig"),
    }
    assert "lib" not in found[1]
