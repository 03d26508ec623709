# SPDX-License-Identifier: Apache-2.0
"""File trees as the code store keeps them: a manifest whose hash is their name, and their writer.

A tree is directories, files and symbolic links that stay inside it. Of permissions it keeps the
executable bit; owners, times and anything else a file may have are no part of it. So a directory
and a zip file with the same content are the same tree.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from nsbox.errors import ConfigError
from nsbox.linux.owned import Descriptor

UNPACKED_MAX: Final = 262_144_000
"""Bytes of a function's files, layers included; AWS Lambda's limit."""
ENTRIES_MAX: Final = 50_000
"""Files, directories and links of one tree."""
DEPTH_MAX: Final = 64
"""Components of a path in a tree."""
PATH_MAX: Final = 1024
"""Bytes of a path in a tree, and of a link's target."""
TREE_TIME: Final = 315_532_800
"""Modification time of everything in a tree: 1980-01-01, the first that a zip file can hold."""

DIRECTORY, FILE, PROGRAM, LINK = "dir", "file", "program", "link"
MODES: Final = {
    DIRECTORY: stat.S_IFDIR | 0o555,
    FILE: stat.S_IFREG | 0o444,
    PROGRAM: stat.S_IFREG | 0o555,
    LINK: stat.S_IFLNK | 0o777,
}
"""Types and permissions of what is in a tree (inode(7)): for all, and read only."""

_HEAD: Final = b"nsbox-tree-1\n"
_CHUNK: Final = 1 << 16  # malloc maps larger ones anew for each file
_DRIVE: Final = re.compile(r"[A-Za-z]:")
_HOPS_MAX: Final = 40  # what the kernel follows, path_resolution(7)
_STEPS_MAX: Final = 1_000_000
# A .pyc file begins with 4 bytes of magic and 4 of flags; bit 0 set: checked by hash (PEP 552).
_PYC_HEAD: Final = 8


class WriteError(Exception):
    """A tree could not be written; the cause says why. Not an OSError: those are the source's."""


class Node(NamedTuple):
    """One entry of a tree."""

    kind: str
    size: int = 0
    content: str = ""
    """SHA-256 of a file in hex, target of a link."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is in a tree, by path. Paths are relative, and a parent comes before its children."""

    nodes: Mapping[str, Node]
    digest: str
    """SHA-256 of `encode()`, in hex."""
    size: int
    """Bytes of all files."""

    @classmethod
    def of(cls, nodes: Mapping[str, Node]) -> Manifest:
        """Return the manifest of `nodes`, in the one order that counts."""
        ordered = dict(sorted(nodes.items()))
        digest = hashlib.sha256(_encode(ordered)).hexdigest()
        return cls(ordered, digest, sum(node.size for node in ordered.values()))

    def encode(self) -> bytes:
        """Return the manifest as it is kept: a line of JSON for each entry."""
        return _encode(self.nodes)

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """Return the manifest that was encoded. Raises ValueError when `data` is none."""
        lines = data.splitlines(keepends=True)
        if not lines or lines[0] != _HEAD or len(lines) > ENTRIES_MAX + 1:
            raise ValueError("no manifest of a tree")
        nodes: dict[str, Node] = {}
        for line in lines[1:]:
            fields = json.loads(line)
            if not isinstance(fields, list) or len(fields) != 4:
                raise ValueError("a line of the manifest is no entry")
            path, kind, size, content = fields
            if not isinstance(path, str) or kind not in (DIRECTORY, FILE, PROGRAM, LINK):
                raise ValueError("an entry of the manifest has no path or kind")
            if not isinstance(size, int) or not isinstance(content, str):
                raise ValueError(f"{path!r} has no size or content")
            check_path(path)
            nodes[path] = Node(kind, size, content)
        manifest = cls.of(nodes)
        if manifest.encode() != data:
            raise ValueError("the manifest is not written as nsbox writes it")
        return manifest


def _encode(nodes: Mapping[str, Node]) -> bytes:
    lines = [json.dumps([path, *node], separators=(",", ":")) for path, node in nodes.items()]
    return b"".join([_HEAD, *(line.encode("ascii") + b"\n" for line in lines)])


def check_path(path: str) -> None:
    """Raise ValueError, with the reason, unless `path` may be the path of an entry."""
    try:
        length = len(path.encode())
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8") from None
    if "\0" in path:
        raise ValueError("its name has a NUL byte")
    if "\\" in path:
        raise ValueError("its name has a backslash")
    if path.startswith("/"):
        raise ValueError("its name is absolute")
    if _DRIVE.match(path):
        raise ValueError("its name begins with a drive letter")
    parts = path.split("/")
    if ".." in parts:
        raise ValueError("its name has '..'")
    if "" in parts or "." in parts:
        raise ValueError("its name has an empty component or '.'")
    if length > PATH_MAX or len(parts) > DEPTH_MAX or any(len(p.encode()) > 255 for p in parts):
        raise ValueError(
            f"its name is too long: at most {PATH_MAX} bytes, {DEPTH_MAX} components of 255 each"
        )


def check_links(nodes: Mapping[str, Node], what: str) -> None:
    """Raise ConfigError unless every link leads to something in the tree, as the kernel walks.

    Comparing names is not enough: ``up/../x`` leaves the tree when ``up`` is a link to its top.
    """
    steps = 0
    for path, node in nodes.items():
        if node.kind != LINK:
            continue
        here = path.split("/")[:-1]
        pending = node.content.split("/")[::-1]
        hops, problem = 0, "leads out of the tree" if node.content.startswith("/") else ""
        while pending and not problem:
            steps += 1
            part = pending.pop()
            if part in ("", "."):
                continue
            if part == "..":
                if here:
                    here.pop()
                else:
                    problem = "leads out of the tree"
                continue
            found = nodes.get("/".join([*here, part]))
            if found is None:
                problem = "leads to nothing in the tree"
            elif found.kind == LINK:
                hops += 1
                pending += found.content.split("/")[::-1]
                if found.content.startswith("/"):
                    problem = "leads out of the tree"
            elif found.kind != DIRECTORY and pending:
                problem = "leads through a file"
            else:
                here.append(part)
            if hops > _HOPS_MAX or steps > _STEPS_MAX:
                problem = "leads through too many links"
        if problem:
            raise ConfigError(
                f"{what}: the link {path!r} to {node.content!r} {problem}; "
                "replace it by a copy or remove it"
            )


def merge(manifests: Sequence[Manifest], what: str) -> dict[str, tuple[int, Node]]:
    """Return the union of trees, later ones winning, with the index each entry comes from."""
    merged: dict[str, tuple[int, Node]] = {}
    for index, manifest in enumerate(manifests):
        replaced = {
            path
            for path, node in manifest.nodes.items()
            if node.kind != DIRECTORY and path in merged and merged[path][1].kind == DIRECTORY
        }
        if replaced:
            merged = {
                path: item for path, item in merged.items() if not replaced & set(_parents(path))
            }
        merged |= {path: (index, node) for path, node in manifest.nodes.items()}
    nodes = {path: node for path, (_, node) in merged.items()}
    if len(nodes) > ENTRIES_MAX:
        raise ConfigError(f"{what}: together more than {ENTRIES_MAX} entries")
    check_links(nodes, what)
    return merged


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts))]


class TreeWriter:
    """Takes the entries of a tree in any order, and refuses what may not be in one.

    With a descriptor of an empty directory it writes them there; without, it only finds out which
    tree they are. `exact` takes everything as it is; otherwise compiled Python files are left out
    that the loader would not believe, since they are checked by a time that is not kept.
    """

    def __init__(self, what: str, root: int = -1, *, exact: bool = False) -> None:
        self.what = what
        self._root = root
        self._exact = exact
        self._nodes: dict[str, Node] = {}
        self._size = 0

    def refuse(self, path: str, reason: str) -> ConfigError:
        """Return the error that says why `path` cannot be in the tree."""
        return ConfigError(f"{self.what}: {path!r} cannot be taken: {reason}")

    def add_directory(self, path: str) -> None:
        """Add a directory, and those above it."""
        self._check(path)
        if self._exact or path.rpartition("/")[2] != "__pycache__":
            if self._nodes.get(path, Node(DIRECTORY)).kind != DIRECTORY:
                raise self.refuse(path, "it is there twice")
            self._add_parents(f"{path}/")

    def add_file(self, path: str, read: Callable[[int], bytes], *, executable: bool) -> int | None:
        """Add a file with what `read` returns until it returns nothing.

        Returns its size, or None when the file is left out.
        """
        self._check(path)
        chunk = read(_CHUNK)
        if not self._exact and _is_timed_pyc(path, chunk):
            return None
        self._claim(path)
        opened = Descriptor()
        if self._root >= 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with _writing(path):
                opened = Descriptor(os.open, path, flags, 0o600, dir_fd=self._root)
        with opened as fd:
            content = hashlib.sha256()
            size = 0
            while chunk:
                size += len(chunk)
                self._size += len(chunk)
                if self._size > UNPACKED_MAX:
                    raise ConfigError(
                        f"{self.what}: more than {UNPACKED_MAX} bytes of files; "
                        "move data that is not code elsewhere, and mount it"
                    )
                content.update(chunk)
                if fd >= 0:
                    with _writing(path):
                        _write(fd, chunk)
                chunk = read(_CHUNK)
            if fd >= 0:
                with _writing(path):
                    os.fchmod(fd, stat.S_IMODE(MODES[PROGRAM if executable else FILE]))
                    os.utime(fd, (TREE_TIME, TREE_TIME))
        kind = PROGRAM if executable else FILE
        self._nodes[path] = Node(kind, size, content.hexdigest())
        return size

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link; where it leads is looked at by `finish`."""
        self._check(path)
        try:
            length = len(target.encode())
        except UnicodeEncodeError:
            raise self.refuse(path, "its target is not UTF-8") from None
        if not target or length > PATH_MAX or "\0" in target or "\\" in target:
            raise self.refuse(path, f"its target {target[:80]!r} is no path of a tree")
        self._claim(path)
        self._nodes[path] = Node(LINK, 0, target)

    def finish(self) -> Manifest:
        """Make the links, seal the permissions, and return the manifest."""
        check_links(self._nodes, self.what)
        manifest = Manifest.of(self._nodes)
        if self._root >= 0:
            with _writing("."):
                self._seal(manifest)
        return manifest

    def _seal(self, manifest: Manifest) -> None:
        # Links come last: until now no path of the tree could lead through one.
        for path, node in manifest.nodes.items():
            if node.kind == LINK:
                os.symlink(node.content, path, dir_fd=self._root)
                times = (TREE_TIME, TREE_TIME)
                os.utime(path, times, dir_fd=self._root, follow_symlinks=False)
        for path in reversed(tuple(manifest.nodes)):
            if manifest.nodes[path].kind == DIRECTORY:
                with Descriptor(os.open, path, _OPEN_DIRECTORY, dir_fd=self._root) as fd:
                    _seal_directory(fd)
        _seal_directory(self._root)

    def _check(self, path: str) -> None:
        try:
            check_path(path)
        except ValueError as error:
            raise self.refuse(path, str(error)) from None

    def _claim(self, path: str) -> None:
        if path in self._nodes:
            raise self.refuse(path, "it is there twice")
        self._add_parents(path)
        self._count()

    def _add_parents(self, path: str) -> None:
        for parent in _parents(path):
            node = self._nodes.get(parent)
            if node is None:
                self._count()
                if self._root >= 0:
                    with _writing(parent):
                        os.mkdir(parent, 0o700, dir_fd=self._root)
                self._nodes[parent] = Node(DIRECTORY)
            elif node.kind != DIRECTORY:
                raise self.refuse(path, f"{parent!r} is no directory")

    def _count(self) -> None:
        if len(self._nodes) >= ENTRIES_MAX:
            raise ConfigError(f"{self.what}: more than {ENTRIES_MAX} entries")


_OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror}") from error


def _seal_directory(fd: int) -> None:
    os.fchmod(fd, stat.S_IMODE(MODES[DIRECTORY]))
    os.utime(fd, (TREE_TIME, TREE_TIME))


def _write(fd: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(fd, view) :]


def _is_timed_pyc(path: str, head: bytes) -> bool:
    parts = path.split("/")
    if len(parts) < 2 or parts[-2] != "__pycache__" or ".pyc" not in parts[-1]:
        return False
    return len(head) < _PYC_HEAD or not head[4] & 1
