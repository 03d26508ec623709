# SPDX-License-Identifier: Apache-2.0
"""Environments whose userland is a directory: `rootfs=`, and the recipes in rootfs/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import nsbox
from nsbox import CommandStartError, ConfigError, ExecutionEnvironment, Mount, SetupError

REPOSITORY = Path(__file__).resolve().parents[2]

SHOW = r"""
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char text[4096] = "";
        int fd = open(argv[i], O_RDONLY);
        ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
        printf("%s: %s\n", argv[i], size < 0 ? strerror(errno) : text);
    }
    DIR *root = opendir("/");
    for (struct dirent *entry; (entry = readdir(root));)
        if (entry->d_name[0] != '.') printf("/%s\n", entry->d_name);
    printf("touch: %d\n", open("/usr/new", O_CREAT | O_WRONLY, 0644) < 0 ? errno : 0);
    return 0;
}
"""


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    """A root of one static program, below /tmp as most temporary directories are."""
    root = tmp_path / "root"
    for name in ("usr/bin", "etc", "srv"):
        (root / name).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "etc/passwd").write_text("image:x:5:5::/:/bin/sh\n")
    (root / "etc/own").write_text("of the image\n")
    (tmp_path / "show.c").write_text(SHOW)
    command = ["gcc", "-static", "-o", str(root / "usr/bin/show"), str(tmp_path / "show.c")]
    subprocess.run(command, check=True)
    for path in (tmp_path.parent, tmp_path, root):
        path.chmod(0o755)  # as root the command is another user
    return root


@pytest.mark.needs("gcc")
def test_a_directory_is_the_userland(rootfs: Path) -> None:
    words = ["show", "/etc/passwd", "/etc/own", "/etc/group"]
    done = nsbox.run(words, rootfs=str(rootfs)).check()
    lines = done.text().splitlines()
    assert "/etc/passwd: root:x:0:0:root:/:/usr/sbin/nologin" in lines, "nsbox's, over the image's"
    assert "image:x:5:5::/:/bin/sh" not in lines
    assert "/etc/own: of the image" in lines
    assert "/etc/group: No such file or directory" in lines, "nothing is added to a bound /etc"
    assert {f"/{name}" for name in ("bin", "dev", "etc", "proc", "srv", "tmp", "usr")} <= set(lines)
    assert "touch: 30" in lines, "EROFS"
    assert sorted(path.name for path in (rootfs / "usr").iterdir()) == ["bin"]
    assert str(rootfs) in done.protections["rootfs"].detail


@pytest.mark.needs("gcc")
def test_mounts_go_into_a_rootfs_where_there_is_a_place(rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    (tmp_path / "data/file").write_text("bound\n")
    mount = Mount.bind(tmp_path / "data", "/srv")
    with ExecutionEnvironment(rootfs=str(rootfs), mounts=[mount]) as env:
        assert "/srv/file: bound" in env.run(["show", "/srv/file"]).check().text()
    mount = Mount.bind(tmp_path / "data", "/usr/missing")
    with pytest.raises(SetupError, match=r"on /usr/missing: .*must exist there already") as caught:
        ExecutionEnvironment(rootfs=str(rootfs), mounts=[mount])
    assert caught.value.step == "layout"
    assert not (rootfs / "usr/missing").exists()


def test_a_rootfs_without_the_program_is_127(tmp_path: Path) -> None:
    with pytest.raises(CommandStartError, match="cannot execute 'true': No such file") as caught:
        nsbox.run(["true"], rootfs=str(tmp_path))
    assert caught.value.exit_code == 127
    assert list(tmp_path.iterdir()) == []


def test_an_etc_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "etc").symlink_to("/etc")
    with pytest.raises(SetupError, match=r"open on /etc: .*a symbolic link in the rootfs"):
        nsbox.run(["true"], rootfs=str(tmp_path))


def test_a_rootfs_that_this_user_cannot_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root can read everything")
    tmp_path.chmod(0o300)
    with pytest.raises(ConfigError, match=r"rootfs .*: not readable by this user"):
        nsbox.run(["true"], rootfs=str(tmp_path))
    tmp_path.chmod(0o700)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the recipes unpack Debian packages")
@pytest.mark.parametrize(
    ("recipe", "command", "expected"),
    [
        ("busybox.sh", ["sh", "-c", "id -u; ls /usr | head -n 1"], "1000\nbin\n"),
        ("python.sh", ["python3", "-c", "import json, ssl, sqlite3; print(6 * 7)"], "42\n"),
    ],
)
def test_recipes(tmp_path: Path, recipe: str, command: list[str], expected: str) -> None:
    target = tmp_path / "root"
    build = [str(REPOSITORY / "rootfs" / recipe), str(target)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path.parent, tmp_path):
        path.chmod(0o755)
    assert nsbox.run(command, rootfs=str(target), timeout=30).check().text() == expected
    with pytest.raises(CommandStartError):
        nsbox.run(["nosuchprogram"], rootfs=str(target))
    again = subprocess.run(build, capture_output=True, text=True, timeout=110)
    assert again.returncode == 0
    assert "already" in again.stderr
    other = [str(REPOSITORY / "rootfs" / recipe), str(tmp_path)]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=110)
    assert refused.returncode == 1
    assert "not empty" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="the recipes unpack Debian packages")
def test_a_function_is_executed_by_the_interpreter_of_a_rootfs(tmp_path: Path) -> None:
    tree, code = tmp_path / "root", tmp_path / "code"
    build = [str(REPOSITORY / "rootfs/python.sh"), str(tree)]
    subprocess.run(build, check=True, capture_output=True, timeout=110)
    for path in (tmp_path.parent, tmp_path):
        path.chmod(0o755)
    code.mkdir()
    (code / "app.py").write_text(
        "import decimal, sys\n"
        "def handler(event, context): return [event, sys.prefix, decimal.__file__]\n"
    )
    function = nsbox.Function("app.handler", code=code, rootfs=tree, start="exec", init_timeout=60)
    with nsbox.ExecutionEnvironment(function.publish()) as env:
        answer = env.invoke({"a": 1})
    assert answer[:2] == [{"a": 1}, "/usr"]
    assert answer[2].startswith("/usr/lib/python3")
