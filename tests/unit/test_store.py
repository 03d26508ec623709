# SPDX-License-Identifier: Apache-2.0
"""The code store: what may be in a tree, and what happens to whoever tries something else."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import py_compile
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support import SLOW_MACHINE, host_program, wait_until

from nsbox import ConfigError, Store, StoreError
from nsbox.store import integrity, sources
from nsbox.store import tree as trees
from nsbox.store.sources import read_source
from nsbox.store.store import Entry, remove_tree
from nsbox.store.tree import TREE_TIME, UNPACKED_MAX, Manifest, TreeWriter, check_path

OTHER = "0" * 64


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have entries, which hold a lock each, gone with the tracebacks that pytest keeps of them."""
    yield
    gc.collect()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A directory outside the store that nothing may touch."""
    directory = tmp_path / "canary"
    (directory / "deep").mkdir(parents=True)
    (directory / "deep/file").write_text("alive")
    (directory / "file").write_text("alive")
    before = sorted((str(p), p.lstat().st_mode, p.lstat().st_mtime) for p in directory.rglob("*"))
    yield directory
    assert before == sorted(
        (str(p), p.lstat().st_mode, p.lstat().st_mtime) for p in directory.rglob("*")
    )


def publish(store: Store, path: str | os.PathLike[str]) -> Entry:
    return store.add(partial(read_source, path=os.fspath(path)), "code")


def names(store: Store) -> list[str]:
    """Return the kinds of what is in the store, the lock excepted."""
    return sorted(name.partition("-")[0] for name in os.listdir(store.path) if name != "lock")


def fill(directory: Path, files: dict[str, str] | None = None) -> Path:
    for name, text in (files or {"app.py": "x = 1\n", "pkg/mod.py": "y = 2\n"}).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


Member = tuple[str, bytes, int]
"""Name, content, st_mode."""


def pack(path: Path, *members: Member, **fields: Any) -> Path:
    """Write a zip file with exactly these members."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = info.orig_filename = name
            info.create_system = 3
            info.external_attr = mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            for field, value in fields.items():
                setattr(info, field, value)
            with contextlib.ExitStack() as quiet:
                quiet.enter_context(pytest.warns(UserWarning, match="Duplicate name")) if (
                    name in archive.namelist()
                ) else None
                archive.writestr(info, content)
    return path


FILE, LINK, DIR = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755


# -- what a tree is ------------------------------------------------------------------------------


def test_result_is_readable_by_all_and_writable_by_none(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o6711)
    (source / "app.py").chmod(0o606)
    (source / "pkg").chmod(0o3700)
    (source / "empty").mkdir()
    (source / "link").symlink_to("pkg/mod.py")
    before = os.umask(0o077)
    try:
        entry = publish(store, source)
    finally:
        os.umask(before)
    tree = Path(entry.path)
    modes = {str(p.relative_to(tree)): stat.S_IMODE(p.lstat().st_mode) for p in tree.rglob("*")}
    assert modes == {
        "app.py": 0o444, "empty": 0o555, "link": 0o777, "pkg": 0o555, "pkg/mod.py": 0o444,
        "run": 0o555,
    }  # fmt: skip
    assert stat.S_IMODE(tree.stat().st_mode) == 0o555
    assert {p.lstat().st_mtime for p in (tree, *tree.rglob("*"))} == {TREE_TIME}
    assert os.readlink(tree / "link") == "pkg/mod.py"
    assert stat.S_IMODE(tree.parent.stat().st_mode) == 0o700
    assert entry.size == sum(p.stat().st_size for p in source.rglob("*") if p.is_file()) - 6
    assert entry.digest in entry.path


def test_manifest_is_kept_and_its_hash_is_the_name(store: Store, tmp_path: Path) -> None:
    entry = publish(store, fill(tmp_path / "src"))
    data = (Path(entry.path).parent / "manifest").read_bytes()
    assert Manifest.decode(data) == entry.manifest
    assert Manifest.decode(data).digest == entry.digest
    assert list(entry.manifest.nodes) == ["app.py", "pkg", "pkg/mod.py"]


NAME = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\\0:"),
    min_size=1,
    max_size=8,
).filter(lambda text: text not in (".", "..", "__pycache__"))
TREES = st.recursive(
    st.tuples(st.binary(max_size=50), st.booleans()),
    lambda inner: st.dictionaries(NAME, inner, max_size=4),
    max_leaves=12,
).filter(lambda tree: isinstance(tree, dict))


def build(directory: Path, tree: dict[str, Any]) -> None:
    directory.mkdir()
    for name, item in tree.items():
        if isinstance(item, dict):
            build(directory / name, item)
        else:
            (directory / name).write_bytes(item[0])
            (directory / name).chmod(0o755 if item[1] else 0o644)


@given(tree=TREES)
@example(tree={})
@settings(max_examples=30)
def test_directory_and_zip_file_share_an_entry(tree: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        build(Path(place, "src"), tree)
        packed = Path(place, "packed.zip")
        with zipfile.ZipFile(packed, "w") as archive:
            for path in Path(place, "src").rglob("*"):
                archive.write(path, path.relative_to(Path(place, "src")))
        store = Store(Path(place, "store"))
        one, two = publish(store, Path(place, "src")), publish(store, packed)
        assert (one.digest, one.path) == (two.digest, two.path)
        assert names(store) == ["sha256"]
        assert Manifest.decode(one.manifest.encode()) == one.manifest
        # The tree in the store is the same tree again.
        assert publish(store, one.path).digest == one.digest
        assert store.get(one.digest) == one
        two.verify()


@given(st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    for text in (data, b"nsbox-tree-1\n" + data):
        if text != b"nsbox-tree-1\n":
            with pytest.raises(ValueError):  # noqa: PT011 - RecursionError and others would be wrong
                Manifest.decode(text)


@pytest.mark.parametrize(
    "line",
    [
        '["../x","file",0,""]', '["/x","file",0,""]', '["x","fifo",0,""]', '["x","file","0",""]',
        '["x","file",0]', '["x", "file",0,""]', '[5,"file",0,""]', '{"x":1}',
        '["x","dir",0,""]\n["x","dir",0,""]', '["y","dir",0,""]\n["x","dir",0,""]',
    ],
)  # fmt: skip
def test_manifest_is_read_strictly(line: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - one of several reasons
        Manifest.decode(b"nsbox-tree-1\n" + line.encode() + b"\n")


@given(st.text(max_size=30))
def test_path_that_is_allowed_stays_inside(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/a/tree", path)) == f"/a/tree/{path}"


def test_compiled_files_with_a_time_are_left_out(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"app.py": "x = 1\n", "mod.py": "y = 1\n"})
    plain = publish(store, source)
    timed = py_compile.compile(
        str(source / "app.py"), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP
    )
    assert timed is not None
    (source / "__pycache__/torn.cpython-311.pyc").write_bytes(b"\0")
    assert publish(store, source) == plain, "what importing the code leaves makes no version"
    hashed = py_compile.compile(
        str(source / "mod.py"), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
    )
    assert hashed is not None
    assert sorted(publish(store, source).manifest.nodes) == [
        "__pycache__", f"__pycache__/{os.path.basename(hashed)}", "app.py", "mod.py",
    ]  # fmt: skip
    assert os.path.exists(importlib.util.cache_from_source(str(source / "app.py")))


# -- zip files -----------------------------------------------------------------------------------

GOOD: Member = ("good.py", b"x = 1\n", FILE)

# What is refused, and words of the message. The name of the entry is in it, where there is one.
HOSTILE_ZIPS: dict[str, tuple[list[Member], str]] = {
    "absolute": ([("/etc/passwd", b"", FILE)], "'/etc/passwd' .* absolute"),
    "dotdot": ([("../evil", b"", FILE)], r"'../evil' .* '\.\.'"),
    "dotdot inside": ([("a/../../evil", b"", FILE)], r"has '\.\.'"),
    "dotdot directory": ([("../evil/", b"", DIR)], r"has '\.\.'"),
    "dotdot alone": ([("..", b"", FILE)], r"has '\.\.'"),
    "backslash": ([("..\\evil", b"", FILE)], "backslash"),
    "drive": ([("C:/evil", b"", FILE)], "drive letter"),
    "drive relative": ([("c:evil", b"", FILE)], "drive letter"),
    "dot": ([("./evil", b"", FILE)], "empty component or '.'"),
    "doubled slash": ([("a//b", b"", FILE)], "empty component"),
    "slash alone": ([("/", b"", DIR)], "'' .*empty component"),
    "no name": ([("", b"", FILE)], "'' .*empty component"),
    "long name": ([("a" * 256, b"", FILE)], "too long"),
    "long path": ([("/".join(["a" * 200] * 6), b"", FILE)], "too long"),
    "deep path": ([("/".join("a" * 65), b"", FILE)], "too long"),
    "link absolute": ([("l", b"/etc/passwd", LINK)], "the link 'l' to '/etc/passwd' leads out"),
    "link out": ([("a/l", b"../../x", LINK)], "the link 'a/l' .* leads out"),
    "link to the outside of the top": ([("l", b"..", LINK)], "leads out"),
    "link out by a link": (
        [("x", b"", FILE), ("a/b/up", b"../..", LINK), ("a/b/evil", b"up/../x", LINK)],
        "the link 'a/b/evil' .* leads out",
    ),
    "link through a link": (
        [("up", b"..", LINK), ("up/evil", b"", FILE)], "'up/evil' .* 'up' is no directory",
    ),
    "write through a link": (
        [("d", b"/tmp", LINK), ("d/evil", b"", FILE)], "'d/evil' .* 'd' is no directory",
    ),
    "link in the place of a file": ([("d/evil", b"", FILE), ("d", b"/tmp", LINK)], "there twice"),
    "dangling": ([("l", b"nothing", LINK)], "leads to nothing"),
    "loop": ([("a", b"b", LINK), ("b", b"a", LINK)], "too many links"),
    "loop of one": ([("a", b"a", LINK)], "too many links"),
    "link through a file": ([GOOD, ("l", b"good.py/../good.py", LINK)], "through a file"),
    "link to no name": ([("l", b"", LINK)], "is no path"),
    "link with NUL": ([("l", b"a\0b", LINK)], "is no path"),
    "link not UTF-8": ([("l", b"\xff", LINK)], "not UTF-8"),
    "link too long": ([("l", b"a/" * 1000, LINK)], "target is too long"),
    "fifo": ([("p", b"", stat.S_IFIFO | 0o644)], "'p' .* neither a file, a directory nor a link"),
    "device": ([("d", b"", stat.S_IFCHR | 0o644)], "neither a file, a directory nor a link"),
    "block device": ([("d", b"", stat.S_IFBLK | 0o644)], "neither a file, a directory nor a link"),
    "socket": ([("s", b"", stat.S_IFSOCK | 0o644)], "neither a file, a directory nor a link"),
    "twice": ([GOOD, ("good.py", b"y", FILE)], "'good.py' .* twice"),
    "directory twice": ([("d/", b"", DIR), ("d/", b"", DIR)], "'d' .* twice"),
    "file and directory": ([("d", b"", FILE), ("d/", b"", DIR)], "'d' .* twice"),
    "file as directory": ([("d", b"", FILE), ("d/x", b"", FILE)], "'d' is no directory"),
    "directory as file": ([("d/x", b"", FILE), ("d", b"", FILE)], "'d' .* twice"),
    "directory with content": ([("d/", b"content", DIR)], "directory by name and something else"),
    "directory that is a link": ([("d/", b"x", LINK)], "directory by name and something else"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_ZIPS)
@pytest.mark.parametrize("position", ["first", "last"])
def test_hostile_zip_is_refused_and_leaves_nothing(
    name: str, position: str, store: Store, tmp_path: Path, canary: Path
) -> None:
    members, message = HOSTILE_ZIPS[name]
    extra: Member = ("zz-other.py", b"x", FILE)
    order = [*members, extra] if position == "first" else [extra, *members]
    packed = pack(tmp_path / "packed.zip", *order)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=message) as caught:
        publish(store, packed)
    assert str(caught.value).startswith("code: ")
    assert names(store) == []
    assert sorted(os.listdir(tmp_path)) == before
    # The second reading, which writes, is no less careful than the first.
    with pytest.raises(ConfigError, match=message):
        store._make(partial(read_source, path=str(packed)), "code", exact=False)
    assert names(store) == []
    assert sorted(os.listdir(tmp_path)) == before


def test_zip_that_was_not_made_on_unix_has_plain_files(store: Store, tmp_path: Path) -> None:
    # The upper half of external_attr means nothing then: this is a file with a path in it.
    packed = pack(tmp_path / "packed.zip", ("l", b"/etc/passwd", LINK), create_system=0)
    entry = publish(store, packed)
    assert entry.manifest.nodes["l"].kind == "file"
    assert (Path(entry.path) / "l").read_bytes() == b"/etc/passwd"


def test_permissions_in_a_zip_are_reduced(store: Store, tmp_path: Path) -> None:
    packed = pack(
        tmp_path / "packed.zip",
        ("setuid", b"x", stat.S_IFREG | 0o6755),
        ("none", b"x", stat.S_IFREG),
        ("d/", b"", stat.S_IFDIR),
    )
    tree = Path(publish(store, packed).path)
    assert [stat.S_IMODE((tree / n).stat().st_mode) for n in ("setuid", "none", "d")] == [
        0o555, 0o444, 0o555,
    ]  # fmt: skip


def test_links_inside_are_kept(store: Store, tmp_path: Path) -> None:
    packed = pack(
        tmp_path / "packed.zip",
        ("d/l", b"../good.py", LINK),
        GOOD,
        ("d/self", b".", LINK),
        ("d/self2", b"self/self/l", LINK),
    )
    tree = Path(publish(store, packed).path)
    assert (tree / "d/self2").read_bytes() == b"x = 1\n"


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(method: int, store: Store, tmp_path: Path) -> None:
    # A few bytes of LZMA properties make the decoder ask for gigabytes.
    packed = pack(tmp_path / "packed.zip", GOOD, compress_type=method)
    with pytest.raises(ConfigError, match=r"'good.py' .* neither 'stored' nor 'deflate'"):
        publish(store, packed)


def patched(path: Path, offset_in_central: int, layout: str, value: int, local: int = -1) -> Path:
    """Overwrite a number in the first central header, and in the local one."""
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\1\2")
    struct.pack_into(layout, data, central + offset_in_central, value)
    if local >= 0:
        struct.pack_into(layout, data, local, value)
    path.write_bytes(bytes(data))
    return path


@pytest.mark.parametrize("flag", [0x1, 0x40, 0x2001])
def test_encrypted_zip_is_refused(flag: int, store: Store, tmp_path: Path) -> None:
    packed = patched(pack(tmp_path / "packed.zip", GOOD), 8, "<H", flag, local=6)
    with pytest.raises(ConfigError, match=r"'good.py' .* encrypted; give a zip file without"):
        publish(store, packed)


def test_name_with_nul_is_refused(store: Store, tmp_path: Path) -> None:
    packed = pack(tmp_path / "packed.zip", ("good.py#evil", b"", FILE))
    packed.write_bytes(packed.read_bytes().replace(b"good.py#evil", b"good.py\0evil"))
    with pytest.raises(ConfigError, match="NUL byte"):
        publish(store, packed)


@pytest.mark.parametrize("claim", [0, 1, 5, 7, 1 << 20, 0xFFFFFFF0])
@pytest.mark.parametrize("both", [False, True])
def test_lying_sizes_are_refused(claim: int, both: bool, store: Store, tmp_path: Path) -> None:
    packed = patched(pack(tmp_path / "packed.zip", GOOD), 24, "<I", claim, local=22 if both else -1)
    with pytest.raises(ConfigError, match="code: "):
        publish(store, packed)
    assert names(store) == []


def test_bomb_is_stopped_by_what_it_unpacks(store: Store, tmp_path: Path) -> None:
    packed = tmp_path / "bomb.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number in range(3):
            with archive.open(f"zeros{number}", "w") as member:
                for _ in range(90):
                    member.write(bytes(1_000_000))
    assert packed.stat().st_size < 2 << 20
    with pytest.raises(ConfigError, match=f"more than {UNPACKED_MAX} bytes of files"):
        publish(store, packed)
    patched(packed, 24, "<I", 10)  # the first entry claims to be tiny
    with pytest.raises(ConfigError, match="code: no sound zip file"):
        publish(store, packed)
    assert names(store) == []


def test_entries_that_share_their_data_are_refused(store: Store, tmp_path: Path) -> None:
    # Many names for one compressed block: each unpacks it again.
    packed = pack(tmp_path / "packed.zip", *((f"f{n}", bytes(1000), FILE) for n in range(3)))
    data = bytearray(packed.read_bytes())
    at = data.index(b"PK\1\2")
    for _ in range(3):
        struct.pack_into("<I", data, at + 42, 0)
        at = data.find(b"PK\1\2", at + 4)
    packed.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="no sound zip file"):
        publish(store, packed)


def test_number_of_entries_is_limited(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sources, trees):
        monkeypatch.setattr(module, "ENTRIES_MAX", 10)
    for kind in ("many/{}", "{}/d/d"):
        members = [(kind.format(n), b"", FILE) for n in range(11 if kind[0] == "m" else 4)]
        with pytest.raises(ConfigError, match="code: more than 10 entries"):
            publish(store, pack(tmp_path / "packed.zip", *members))
    with pytest.raises(ConfigError, match="code: more than 10 entries"):
        publish(store, fill(tmp_path / "src", {f"f{n}": "" for n in range(11)}))
    publish(store, fill(tmp_path / "fits", {f"f{n}": "" for n in range(10)}))


def test_list_of_entries_is_not_read_when_it_is_too_long(store: Store, tmp_path: Path) -> None:
    members = [(f"f{n}", b"", FILE) for n in range(sources._INDEX_MAX // 65_000 + 1)]
    packed = pack(tmp_path / "packed.zip", *members, comment=b"c" * 65_000)
    with pytest.raises(ConfigError, match=f"list of entries is longer than {sources._INDEX_MAX}"):
        publish(store, packed)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"PK\3\4" + bytes(100), b"PK\5\6"])
def test_file_that_is_no_zip_is_refused(content: bytes, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "code"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"no sound zip file: .*; give a directory or a zip file"):
        publish(store, path)


@given(st.data())
@settings(max_examples=60 if not SLOW_MACHINE else 30)
def test_spoiled_zip_is_refused_or_is_a_sound_tree(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        packed = pack(
            Path(place, "packed.zip"), GOOD, ("a/b.py", b"y" * 100, FILE), ("a/l", b"b.py", LINK)
        )
        content = bytearray(packed.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        cut = data.draw(st.sampled_from([len(content)] * 5 + [len(content) // 2]))
        packed.write_bytes(content[:cut])
        store = Store(Path(place, "store"))
        try:
            entry = publish(store, packed)
        except ConfigError:
            assert names(store) == []
        else:
            entry.verify()
            assert names(store) == ["sha256"]
        assert sorted(os.listdir(place)) == ["packed.zip", "store"]


# -- directories ---------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))


HOSTILE_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (lambda d: os.mkfifo(d / "p"), "'p' .* neither a file, a directory nor a link; remove"),
    "socket": (lambda d: make_socket(d / "s"), "'s' .* neither a file, a directory nor a link"),
    "link out": (lambda d: (d / "l").symlink_to("../canary/file"), "'l' .* leads out"),
    "link absolute": (lambda d: (d / "l").symlink_to("/etc"), "'l' to '/etc' leads out"),
    "dangling": (lambda d: (d / ".#lock").symlink_to("me@host.1"), "'.#lock' .* leads to nothing"),
    "backslash": (lambda d: (d / "a\\b").write_text(""), "backslash"),
    "drive": (lambda d: (d / "c:x").write_text(""), "drive letter"),
    "not UTF-8": (lambda d: Path(os.fsdecode(os.fsencode(d) + b"/\xff")).touch(), "not UTF-8"),
    "too deep": (lambda d: (d / "/".join("d" * 65)).mkdir(parents=True), "too long"),
    "too large": (
        lambda d: os.truncate(fill(d, {"big": ""}) / "big", UNPACKED_MAX + 1),
        "bytes of",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_DIRECTORIES)
def test_hostile_directory_is_refused(
    name: str, store: Store, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "src")
    monkeypatch.chdir(source)  # a socket's path may have 108 bytes
    spoil, message = HOSTILE_DIRECTORIES[name]
    spoil(source)
    with pytest.raises(ConfigError, match=message):
        publish(store, source)
    assert names(store) == []


@pytest.mark.needs("root")
def test_device_in_a_directory_is_refused(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    try:
        os.mknod(source / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no devices may be made here (a container)")
    with pytest.raises(ConfigError, match=r"'null' .* neither a file, a directory nor a link"):
        publish(store, source)


def test_unreadable_file_is_named(store: Store, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    source = fill(tmp_path / "src")
    (source / "app.py").chmod(0)
    with pytest.raises(ConfigError, match=r"'app.py' cannot be taken: it cannot be opened: Perm"):
        publish(store, source)


@pytest.mark.parametrize("source", ["fifo", "device", "missing"])
def test_source_that_is_neither_directory_nor_file(
    source: str, store: Store, tmp_path: Path
) -> None:
    path = {"fifo": tmp_path / "p", "device": Path("/dev/null"), "missing": tmp_path / "x"}[source]
    if source == "fifo":
        os.mkfifo(path)  # opened without a writer: must not wait for one
    with pytest.raises(ConfigError, match=r"code: .*; give a directory or a zip file"):
        publish(store, path)


def test_source_may_itself_be_reached_by_a_link(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    (tmp_path / "current").symlink_to("src")
    assert publish(store, tmp_path / "current") == publish(store, source)


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = fill(tmp_path / "src")

    class Meddler(TreeWriter):
        def add_file(self, path: str, *args: Any, **options: Any) -> int | None:
            size = super().add_file(path, *args, **options)
            (source / path).write_text("something else")
            return size

    with pytest.raises(ConfigError, match=r"'app.py' .* changed while it was read; publish when"):
        read_source(Meddler("code"), str(source))


@pytest.mark.parametrize("new", ["link", "fifo", "directory", "nothing"])
def test_file_that_is_exchanged_while_it_is_read_is_not_followed(
    new: str, tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = fill(tmp_path / "src")
    real = os.open

    def exchange(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if path == "app.py":
            (source / "app.py").unlink()
            if new == "link":
                (source / "app.py").symlink_to(canary / "file")
            elif new == "fifo":
                os.mkfifo(source / "app.py")
            elif new == "directory":
                (source / "app.py").mkdir()
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(ConfigError, match=r"'app.py' cannot be taken: it changed while"):
        read_source(TreeWriter("code"), str(source))


def test_source_that_becomes_another_between_readings_counts_as_made(
    store: Store, tmp_path: Path
) -> None:
    source = fill(tmp_path / "src")
    readings = []

    def read(tree: TreeWriter) -> None:
        read_source(tree, str(source))
        readings.append(1)
        (source / "app.py").write_text("x = 2\n")

    entry = store.add(read, "code")
    assert len(readings) == 2
    assert (Path(entry.path) / "app.py").read_text() == "x = 2\n"
    entry.verify()
    assert names(store) == ["sha256"]


# -- the store's own directory -------------------------------------------------------------------


def test_store_is_made_for_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = Store(tmp_path / "a/b/store").path
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_store_that_others_can_write_is_refused(mode: int, store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    entry = publish(store, source)
    os.chmod(store.path, mode)
    for call in (
        lambda: Store(store.path),
        lambda: publish(store, source),
        lambda: store.get(entry.digest),
        entry.verify,
        lambda: store.collect(max_age=0),
    ):
        with pytest.raises(StoreError, match="can be written by others; `chmod go-w` it"):
            call()
    os.chmod(store.path, 0o700)
    entry.verify()


@pytest.mark.needs("root")
def test_store_of_another_user_is_refused(store: Store) -> None:
    os.chown(store.path, 12345, 12345)
    with pytest.raises(
        StoreError, match="belongs to uid 12345, not to 0; name one of your"
    ) as caught:
        Store(store.path)
    assert caught.value.path == store.path


def test_store_that_is_a_link_or_file_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.path)
    with pytest.raises(StoreError, match="cannot be opened: Not a directory"):
        Store(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be made: .*; name another in NSBOX_STORE"):
        Store(tmp_path / "file/store")


def test_place_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NSBOX_STORE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert Store().path == str(tmp_path / ".cache/nsbox/store")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().path == str(tmp_path / "cache/nsbox/store")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification says: ignore it
    assert Store().path == str(tmp_path / ".cache/nsbox/store")
    monkeypatch.setenv("NSBOX_STORE", str(tmp_path / "mine"))
    assert Store().path == str(tmp_path / "mine")
    monkeypatch.setenv("NSBOX_STORE", "relative")
    with pytest.raises(StoreError, match="NSBOX_STORE must be an absolute path"):
        Store()


@pytest.mark.needs("root")
def test_root_leaves_nothing_in_the_home_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NSBOX_STORE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 12345, 12345)
    monkeypatch.setenv("HOME", str(home))
    with pytest.raises(StoreError, match="belongs to uid 12345; use `sudo -H`, or name one in"):
        Store()
    assert os.listdir(home) == []


# -- verified before use -------------------------------------------------------------------------


@contextlib.contextmanager
def unlocked(*paths: Path) -> Iterator[None]:
    """Let the owner write to a file or directory of an entry, and set its times back."""
    before = {path: path.stat() for path in paths}
    for path in paths:
        path.chmod(0o755)
    yield
    for path, status in before.items():
        if path.exists() and not path.is_symlink():
            path.chmod(stat.S_IMODE(status.st_mode))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite(path: Path, content: bytes) -> None:
    with unlocked(path):
        path.write_bytes(content)


def plant(path: Path, content: bytes = b"evil") -> None:
    with unlocked(path.parent):
        path.write_bytes(content)
        path.chmod(0o444)
        os.utime(path, (TREE_TIME, TREE_TIME))


def exchange_by_link(path: Path, target: str) -> None:
    with unlocked(path.parent):
        if path.is_dir():
            shutil.copytree(path, path.parent.parent / "moved")
            path.chmod(0o755)
            shutil.rmtree(path)
        else:
            path.unlink()
        path.symlink_to(target)


def plant_compiled(entry: Path) -> None:
    # The file that the writer leaves out when it reads a source, and that Python would run.
    with unlocked(entry / "tree"):
        (entry / "tree/__pycache__").mkdir()
        plant(entry / "tree/__pycache__/app.cpython-311.pyc", bytes(20))
        (entry / "tree/__pycache__").chmod(0o555)


def remove(path: Path) -> None:
    with unlocked(path.parent):
        path.unlink()


def behind_a_link(path: Path) -> None:
    path.rename(path.parent / "elsewhere")
    path.symlink_to("elsewhere")


def exchange_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "content": lambda e: rewrite(e / "tree/app.py", b"x = 2\n"),
    "content appended": lambda e: rewrite(e / "tree/app.py", b"x = 1\n#"),
    "content gone": lambda e: rewrite(e / "tree/app.py", b""),
    "file added": lambda e: plant(e / "tree/new.py"),
    "file added below": lambda e: plant(e / "tree/pkg/new.py"),
    "compiled file added": plant_compiled,
    "file removed": lambda e: remove(e / "tree/pkg/mod.py"),
    "set-uid bit": lambda e: (e / "tree/app.py").chmod(0o4555),
    "executable bit": lambda e: (e / "tree/app.py").chmod(0o555),
    "writable file": lambda e: (e / "tree/app.py").chmod(0o644),
    "writable directory": lambda e: (e / "tree/pkg").chmod(0o777),
    "writable top": lambda e: (e / "tree").chmod(0o777),
    "file is a link": lambda e: exchange_by_link(e / "tree/app.py", "pkg/mod.py"),
    "directory is a link": lambda e: exchange_by_link(e / "tree/pkg", "../../moved"),
    "tree is a link": lambda e: behind_a_link(e / "tree"),
    "tree is gone": lambda e: (e / "tree").rename(e / "t"),
    "entry is a link": behind_a_link,
    "entry is a file": lambda e: (e.rename(e.parent / "elsewhere"), e.write_text("")),
    "manifest": lambda e: rewrite(e / "manifest", b"nsbox-tree-1\n"),
    "manifest is empty": lambda e: rewrite(e / "manifest", b""),
    "manifest is gone": lambda e: (e / "manifest").unlink(),
    "manifest is a link": lambda e: behind_a_link(e / "manifest"),
    "manifest is a fifo": lambda e: exchange_by_fifo(e / "manifest"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERINGS)
def test_tampering_is_detected_and_mended(
    name: str, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = fill(tmp_path / "src")
    entry = publish(store, source)
    entry.verify()
    TAMPERINGS[name](Path(entry.path).parent)
    with caplog.at_level("WARNING", "nsbox"):
        again = publish(store, source)
    assert f"sha256-{entry.digest} set aside as bad-{entry.digest}-" in caplog.text
    assert again.digest == entry.digest
    assert again.path == entry.path
    assert (Path(entry.path) / "app.py").read_text() == "x = 1\n"
    assert names(store).count("bad") == 1
    assert names(store).count("sha256") == 1
    again.verify()


@pytest.mark.parametrize("name", TAMPERINGS)
@pytest.mark.parametrize("way", ["get", "verify"])
def test_tampered_entry_is_refused_where_it_cannot_be_mended(
    name: str, way: str, store: Store, tmp_path: Path
) -> None:
    entry = publish(store, fill(tmp_path / "src"))
    TAMPERINGS[name](Path(entry.path).parent)
    if way == "verify" and name in ("manifest", "manifest is empty"):
        entry.verify()  # the manifest was read when the entry was taken: its tree is sound
    else:
        with pytest.raises(StoreError, match=r"publish the code again"):
            store.get(entry.digest) if way == "get" else entry.verify()
        assert names(store).count("bad") == 1
    with pytest.raises(StoreError, match=f"has no sound entry {entry.digest}; publish the code"):
        store.get(entry.digest)


@pytest.mark.needs("root")
def test_file_of_another_owner_is_detected(store: Store, tmp_path: Path) -> None:
    entry = publish(store, fill(tmp_path / "src"))
    os.chown(Path(entry.path) / "app.py", 12345, -1)
    with pytest.raises(StoreError, match=r"'app.py' has mode 100444 and owner 12345, not"):
        entry.verify()


def tick(place: Path) -> None:
    """Wait until the file system's clock has moved."""
    probe = place / "probe"
    probe.touch()
    first = probe.stat().st_ctime_ns

    def moved() -> bool:
        probe.chmod(0o600)
        return probe.stat().st_ctime_ns != first

    wait_until(moved, "the file system's clock moves")


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by one whenever the files of an entry are read."""
    hashed: list[str] = []

    def read(tree: TreeWriter, fd: int) -> None:
        hashed.append(tree.what)
        sources.read_directory(tree, fd)

    monkeypatch.setattr(integrity, "read_directory", read)
    return hashed


def test_what_was_hashed_is_hashed_again_only_after_a_change(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "_SETTLED", -(1 << 62))  # as if everything were old
    hashed = count_hashing(monkeypatch)
    source = fill(tmp_path / "src")
    entry = publish(store, source)
    assert len(hashed) == 1, "what was written is read back once"
    entry.verify()
    publish(store, source)
    store.get(entry.digest)
    assert len(hashed) == 1
    tick(tmp_path)
    # The same size and modification time: only the time of change tells.
    rewrite(Path(entry.path) / "app.py", b"x = 2\n")
    with pytest.raises(StoreError, match="other content"):
        entry.verify()
    assert len(hashed) == 2


def test_what_changed_a_moment_ago_is_hashed_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two changes within a tick of the clock have the same time of change.
    monkeypatch.setattr(integrity, "_SETTLED", 1 << 62)
    hashed = count_hashing(monkeypatch)
    entry = publish(store, fill(tmp_path / "src"))
    entry.verify()
    entry.verify()
    assert len(hashed) == 3


def test_entry_that_was_replaced_is_told(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    entry = publish(store, source)
    root = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        remove_tree(root, f"sha256-{entry.digest}")
    finally:
        os.close(root)
    with pytest.raises(StoreError, match=r"was changed: .*No such file"):
        entry.verify()
    publish(store, source)
    with pytest.raises(StoreError, match="was changed: it was replaced"):
        entry.verify()


def test_get_takes_digests_only(store: Store) -> None:
    for digest in ("", "..", "../x", OTHER[:63], OTHER.replace("0", "G"), OTHER + "\n"):
        with pytest.raises(ConfigError, match=r"digest: .* must be 64 hexadecimal digits"):
            store.get(digest)
    with pytest.raises(StoreError, match=f"has no sound entry {OTHER}; publish the code again"):
        store.get(OTHER)


# -- many at once --------------------------------------------------------------------------------

PUBLISH = """
    import sys, functools, nsbox
    from nsbox.store.sources import read_source
    store = nsbox.Store(sys.argv[1])
    print(flush=True)
    sys.stdin.readline()
    for n in range(int(sys.argv[3])):
        entry = store.add(functools.partial(read_source, path=sys.argv[2]), "code")
        entry.verify()
    print(entry.digest, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def publishers(store: Store, source: Path, count: int, rounds: int = 1) -> Iterator[list[Any]]:
    """Processes that publish `source` and keep the entry until they are told to end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [
        host_program(PUBLISH, store.path, str(source), str(rounds), **pipes) for _ in range(count)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == b"\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def test_many_processes_publish_the_same_code(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {f"d{n}/f{n}": str(n) * 1000 for n in range(50)})
    with publishers(store, source, 4) as started:
        for process in started:
            go(process)
        digests = {answer(process) for process in started}
        assert len(digests) == 1
        assert names(store) == ["sha256"]
        assert store.collect(max_age=0, max_bytes=0) == [], "all four use it"
    store.get(digests.pop()).verify()


def test_publishers_and_collectors_at_once(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src")
    with publishers(store, source, 2, rounds=20) as started:
        for process in started:
            go(process)
        removed = 0
        for _ in range(40):
            removed += len(store.collect(max_age=0, max_bytes=0))
        digests = {answer(process) for process in started}
        assert len(digests) == 1, "each has had a sound entry in every round"
        assert digests != {""}
        assert names(store) == ["sha256"]
    store.collect(max_bytes=0)
    assert names(store) == []


def test_entry_in_use_by_another_process_stays(store: Store, tmp_path: Path) -> None:
    with publishers(store, fill(tmp_path / "src"), 1) as (process,):
        go(process)
        path = Path(store.path, f"sha256-{answer(process)}")
        os.utime(path, (0, 0))
        assert store.collect(max_age=1, max_bytes=0) == []
        assert (path / "tree/app.py").exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert store.collect(max_age=1) == [str(path)]
        assert names(store) == []


def test_what_a_killed_publisher_had_not_finished_is_removed(store: Store, tmp_path: Path) -> None:
    code = """
        import sys, nsbox
        readings = []
        def read(tree):
            tree.add_file("a/b", lambda n: b"", executable=False)
            readings.append(1)
            if len(readings) == 2:
                print(flush=True)
                sys.stdin.readline()
        nsbox.Store(sys.argv[1]).add(read, "code")
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with host_program(textwrap.dedent(code), store.path, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert names(store) == ["tmp"]
        assert store.collect(max_age=0, max_bytes=0) == [], "it is being made"
        assert names(store) == ["tmp"]
        process.kill()
        process.wait()
        assert [os.path.basename(p)[:4] for p in store.collect()] == ["tmp-"]
    assert names(store) == []


def test_want_of_descriptors_is_told_and_spoils_nothing(store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {"a/b/c/d/e": "x", "app.py": "x = 1\n"})
    publish(store, source)
    program = """
        import functools, os, resource, sys, nsbox
        from nsbox.store.sources import read_source
        from nsbox.store import integrity
        store = nsbox.Store(sys.argv[1])
        add = lambda path: store.add(functools.partial(read_source, path=path), "code")
        add(sys.argv[2])
        lowest = os.open("/", os.O_RDONLY)
        os.close(lowest)
        done = []
        for free in range(30):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, 4096))
            integrity._seals.clear()
            for path in sys.argv[2:]:
                try:
                    add(path)
                except nsbox.NsboxError as error:
                    assert "Too many open files" in str(error), error
                else:
                    done.append(free)
        print(len(done), min(done))
    """
    other = fill(tmp_path / "other", {"new/b/c/d/e": "y"})
    process = host_program(
        program, store.path, str(source), str(other), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    count, least = map(int, out.split())
    assert count >= 20
    assert least > 3
    store.collect()
    assert names(store) == ["sha256", "sha256"]


@pytest.mark.needs("userns")
@pytest.mark.parametrize("form", ["directory", "zip"])
def test_full_disk_is_told_and_leaves_nothing(form: str, store: Store, tmp_path: Path) -> None:
    source = fill(tmp_path / "src", {f"d{n}/f": os.urandom(20_000).hex() for n in range(10)})
    if form == "zip":
        source = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", source))
    program = """
        import functools, os, subprocess, sys, nsbox
        from nsbox.store.sources import read_source
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "x", sys.argv[1]], check=True)
        os.chmod(sys.argv[1], 0o700)
        try:
            nsbox.Store(sys.argv[1]).add(functools.partial(read_source, path=sys.argv[2]), "code")
        except nsbox.StoreError as error:
            print(error, os.listdir(sys.argv[1]))
    """
    out, err = in_mount_namespace(program, store.path, str(source))
    assert "code cannot be kept: d" in out, err
    assert "No space left on device ['lock']" in out


def in_mount_namespace(program: str, *arguments: str) -> tuple[str, str]:
    """Run a Python program that may mount; return what it has written."""
    child = host_program(
        "import os, sys; os.execvp('unshare', ['unshare', '-rm', sys.executable, *sys.argv[1:]])",
        "-c", textwrap.dedent(program), *arguments,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = (text.decode() for text in child.communicate())
    assert child.returncode == 0, err
    return out, err


# -- garbage collection --------------------------------------------------------------------------


def age(path: str, seconds: float) -> None:
    status = os.stat(path)
    os.utime(path, (status.st_atime, status.st_mtime - seconds))


def three(store: Store, tmp_path: Path) -> list[str]:
    """Publish trees of 100, 200 and 300 bytes, used 30, 20 and 10 seconds ago, in no use now."""
    made = []
    for n in (1, 2, 3):
        source = fill(tmp_path / f"src{n}", {"f": "x" * n * 100})
        made.append(os.path.dirname(publish(store, source).path))
        age(made[-1], 40 - 10 * n)
    return made


def test_age_is_counted_from_the_last_use(store: Store, tmp_path: Path) -> None:
    one, two, three_ = three(store, tmp_path)
    assert store.collect() == []
    assert store.collect(max_age=100) == []
    publish(store, tmp_path / "src1")
    assert store.collect(max_age=15) == [two]
    assert store.collect(max_age=5) == [three_]
    assert os.path.exists(one)


@pytest.mark.parametrize(("limit", "removed"), [(600, 0), (599, 1), (500, 1), (499, 2), (299, 3)])
def test_longest_unused_go_first(limit: int, removed: int, store: Store, tmp_path: Path) -> None:
    made = three(store, tmp_path)
    assert sorted(store.collect(max_bytes=limit)) == sorted(made[:removed])
    assert [os.path.exists(path) for path in made] == [n >= removed for n in range(3)]


def test_what_is_in_use_counts_and_stays(store: Store, tmp_path: Path) -> None:
    made = three(store, tmp_path)
    entry = publish(store, tmp_path / "src1")
    assert sorted(store.collect(max_bytes=0)) == sorted(made[1:])
    entry.verify()


@pytest.mark.parametrize("options", [{"max_age": -1}, {"max_bytes": -1}, {"max_age": float("nan")}])
def test_limits_of_a_collection_are_checked(options: dict[str, Any], store: Store) -> None:
    with pytest.raises(ConfigError, match=r"max_.*: must not be below zero, got"):
        store.collect(**options)


def test_spoiled_entries_are_removed(store: Store, tmp_path: Path) -> None:
    entry = publish(store, fill(tmp_path / "src"))
    plant(Path(entry.path) / "pkg/evil")
    with pytest.raises(StoreError):
        store.get(entry.digest)
    assert store.collect() == [], "this process still holds it"
    del entry
    assert len(store.collect()) == 1
    assert names(store) == []


STRANGERS = [
    f"sha256-{OTHER}x", f"sha256-{OTHER[:63]}", f"sha256-{OTHER[:63]}G", f"SHA256-{OTHER}", "tmp-x",
    "tmp-", "trash", "trash-0123", f"bad-{OTHER}", "mine", "...", f"sha256-{OTHER}\n", "trash-\n",
]  # fmt: skip


def test_only_names_of_the_store_are_removed(store: Store) -> None:
    for name in STRANGERS:
        fill(Path(store.path, name))
        age(os.path.join(store.path, name), 1000)
    assert store.collect(max_age=0, max_bytes=0) == []
    assert sorted(os.listdir(store.path)) == sorted([*STRANGERS, "lock"])
    for name in STRANGERS:
        assert Path(store.path, name, "app.py").exists()


def test_collection_follows_no_link(store: Store, tmp_path: Path, canary: Path) -> None:
    links = [
        f"sha256-{OTHER}",
        f"tmp-{OTHER[:16]}",
        f"trash-{OTHER[:16]}",
        f"bad-{OTHER}-{OTHER[:16]}",
    ]
    for name in links:
        os.symlink(canary, os.path.join(store.path, name))
        os.utime(os.path.join(store.path, name), (0, 0), follow_symlinks=False)
    entry = publish(store, fill(tmp_path / "src"))
    tree = Path(entry.path)
    for place in (tree, tree / "pkg"):
        with unlocked(place):
            (place / "out").symlink_to(canary)
            (place / "file").symlink_to(canary / "file")
            (place / "up").symlink_to("../..")
    path = str(tree.parent)
    del entry
    age(path, 1000)
    assert store.collect(max_age=500, max_bytes=0) == [path]
    # The canary fixture looks at what the links lead to.
    left = sorted(os.listdir(store.path))
    assert left == sorted(
        ["lock", f"sha256-{OTHER}", f"tmp-{OTHER[:16]}", f"bad-{OTHER}-{OTHER[:16]}"]
    )


def test_directory_exchanged_by_a_link_is_not_followed(tmp_path: Path, canary: Path) -> None:
    # Between looking at a name and opening it.
    parent = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    real = os.stat

    def exchange(path: Any, *args: Any, **options: Any) -> os.stat_result:
        status = real(path, *args, **options)
        if path == "victim":
            (tmp_path / "victim").rmdir()
            (tmp_path / "victim").symlink_to(canary)
        return status

    (tmp_path / "victim").mkdir()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "stat", exchange)
            with pytest.raises(OSError, match="openat2"):
                remove_tree(parent, "victim")
    finally:
        os.close(parent)


@pytest.mark.needs("userns")
def test_collection_enters_no_mount(store: Store, tmp_path: Path, canary: Path) -> None:
    path = Path(store.path, f"trash-{OTHER[:16]}")
    (path / "a/mounted").mkdir(parents=True)
    program = f"""
        import subprocess, sys, nsbox
        places = [{str(canary)!r}, {str(path / "a/mounted")!r}]
        subprocess.run(["mount", "--bind", *places], check=True)
        print(nsbox.Store(sys.argv[1]).collect())
    """
    out, err = in_mount_namespace(program, store.path)
    assert out == "[]\n"
    assert "stays: openat2" in err
    assert (path / "a/mounted").exists()
    store.collect()
    assert names(store) == []


def test_removal_goes_on_where_another_was_killed(store: Store) -> None:
    fill(Path(store.path, f"trash-{OTHER[:16]}"))
    Path(store.path, f"trash-{OTHER[:16]}", "pkg").chmod(0o500)
    store.collect()
    assert names(store) == []
