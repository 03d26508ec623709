# SPDX-License-Identifier: Apache-2.0
"""Where code comes from: a directory, a zip file, an importable module; read without trusting it.

Whoever wrote the code may change it while it is read, and may have written the zip file byte by
byte. Everything goes through a `TreeWriter`, which knows what may be in a tree. Sizes are counted
as bytes arrive; what a header says about them is only compared.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import stat
import zipfile
import zlib
from typing import Final

from nsbox.errors import ConfigError
from nsbox.linux.owned import Descriptor
from nsbox.store.tree import ENTRIES_MAX, PATH_MAX, TreeWriter

# O_NONBLOCK: a FIFO put in the place of a file must not make us wait (open(2)).
_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_INDEX_MAX: Final = ENTRIES_MAX * 160
"""Bytes of a zip file's list of entries: 46 each and a name. zipfile reads it in one piece."""
_ENCRYPTED: Final = 0x1 | 0x40 | 0x2000  # APPNOTE.TXT 4.4.4: bits 0, 6 and 13
_UNIX: Final = (3, 19)  # made on Unix or macOS: the upper half of external_attr is st_mode
_FORMS: Final = "give a directory or a zip file"


def read_source(tree: TreeWriter, path: str) -> None:
    """Add what is in the directory or zip file at `path`."""
    try:
        opened = Descriptor(os.open, path, _OPEN)
    except OSError as error:
        raise ConfigError(f"{tree.what}: {error.strerror}; {_FORMS} that exists") from error
    with opened as fd:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            read_directory(tree, fd)
        elif stat.S_ISREG(mode):
            _read_zip(tree, fd)
        else:
            raise ConfigError(f"{tree.what}: neither a directory nor a file; {_FORMS}")


def read_module(tree: TreeWriter, name: str) -> None:
    """Add the file or package of the importable top-level module `name`. It is not imported."""
    remedy = "give its directory or zip file as code="
    if name == "__main__":
        raise ConfigError(f"{tree.what}: it is the running program, under no name; {remedy}")
    try:
        importlib.invalidate_caches()  # the file may be younger than the list of its directory
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{tree.what}: cannot be found: {error}; {remedy}") from error
    if spec is None:
        raise ConfigError(f"{tree.what}: no such module in sys.path; {remedy}")
    places = list(spec.submodule_search_locations or ())
    if len(places) > 1:
        raise ConfigError(f"{tree.what}: a package in {len(places)} directories; {remedy}")
    path = places[0] if places else spec.origin
    if path is None or not (os.path.isabs(path) and os.path.exists(path)):
        raise ConfigError(f"{tree.what}: it is no file ({spec.origin or 'no origin'}); {remedy}")
    try:
        opened = Descriptor(os.open, path, _OPEN)
    except OSError as error:
        raise ConfigError(f"{tree.what}: {path!r}: {error.strerror}; {remedy}") from error
    with opened as fd:
        if places:
            tree.add_directory(name)
            read_directory(tree, fd, f"{name}/")
        else:
            _read_file(tree, fd, os.path.basename(path))


def read_directory(tree: TreeWriter, fd: int, prefix: str = "") -> None:
    """Add what is below the directory `fd`, at `prefix`. No link is followed."""
    try:
        names = []
        with os.scandir(fd) as entries:
            for entry in entries:
                names.append(entry.name)
                if len(names) > ENTRIES_MAX:
                    raise ConfigError(f"{tree.what}: more than {ENTRIES_MAX} entries")
        for name in sorted(names):
            _read_entry(tree, fd, name, prefix + name)
    except OSError as error:
        raise tree.refuse(prefix or ".", f"it cannot be read: {error.strerror}") from error


def _read_entry(tree: TreeWriter, parent: int, name: str, path: str) -> None:
    # Looked at before it is opened: opening a device can already do something.
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        tree.add_link(path, os.readlink(name, dir_fd=parent))
        return
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise tree.refuse(path, "it is neither a file, a directory nor a link; remove it")
    try:
        opened = Descriptor(os.open, name, _OPEN | os.O_NOFOLLOW, dir_fd=parent)
    except PermissionError as error:
        raise tree.refuse(path, f"it cannot be opened: {error.strerror}") from error
    except OSError as error:
        raise tree.refuse(path, f"it changed while it was read ({error.strerror})") from error
    with opened as fd:
        if stat.S_IFMT(os.fstat(fd).st_mode) != stat.S_IFMT(mode):
            raise tree.refuse(path, "it changed while it was read")
        if stat.S_ISDIR(mode):
            tree.add_directory(path)
            read_directory(tree, fd, f"{path}/")
        else:
            _read_file(tree, fd, path)


def _read_file(tree: TreeWriter, fd: int, path: str) -> None:
    def read(length: int) -> bytes:
        try:
            return os.read(fd, length)
        except OSError as error:
            raise tree.refuse(path, f"it cannot be read: {error.strerror}") from error

    before = os.fstat(fd)
    tree.add_file(path, read, executable=bool(before.st_mode & stat.S_IXUSR))
    after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise tree.refuse(path, "it changed while it was read; publish when nobody writes to it")


class _Unreachable(zipfile.BadZipFile, OSError):
    """A place that the file does not have; zipfile looks for what is optional there, too."""


class _BoundedFile(io.BufferedReader):
    """A zip file whose list of entries is not taken into memory when it is too long.

    zipfile seeks and reads where the file says; what the kernel refuses then is the file's fault,
    and not to be taken for a failure to write.
    """

    def seek(self, target: int, whence: int = os.SEEK_SET, /) -> int:
        try:
            return super().seek(target, whence)
        except OSError as error:
            raise _Unreachable(f"cannot be read at {target}: {error.strerror}") from error

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = _INDEX_MAX + 1 if size is None or size < 0 else size
        try:
            data = super().read(min(wanted, _INDEX_MAX + 1))
        except OSError as error:
            raise zipfile.BadZipFile(f"cannot be read: {error.strerror}") from error
        if len(data) > _INDEX_MAX:
            raise zipfile.BadZipFile(f"its list of entries is longer than {_INDEX_MAX} bytes")
        return data


def _read_zip(tree: TreeWriter, fd: int) -> None:
    raw = io.FileIO(fd, "rb", closefd=False)
    try:
        with _BoundedFile(raw) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > ENTRIES_MAX:
                raise ConfigError(f"{tree.what}: more than {ENTRIES_MAX} entries")
            seen: set[str] = set()
            for entry in entries:
                path = entry.filename.removesuffix("/")
                if path in seen:
                    raise tree.refuse(path, "it is there twice")
                seen.add(path)
                _read_member(tree, archive, entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ConfigError(f"{tree.what}: no sound zip file: {error}; {_FORMS}") from error
    except (RuntimeError, ValueError, UnicodeError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        # zipfile's own checks of numbers and names that make no sense end in these.
        raise ConfigError(f"{tree.what}: no sound zip file: {error}; {_FORMS}") from error


def _read_member(tree: TreeWriter, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    path = entry.filename
    if "\0" in entry.orig_filename:  # zipfile cuts the name there
        raise tree.refuse(path, "its name has a NUL byte")
    if entry.flag_bits & _ENCRYPTED:
        raise tree.refuse(path, "it is encrypted; give a zip file without password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise tree.refuse(path, "its compression is neither 'stored' nor 'deflate'")
    mode = entry.external_attr >> 16 if entry.create_system in _UNIX else 0
    form = stat.S_IFMT(mode)
    if path.endswith("/") or form == stat.S_IFDIR:
        if form not in (0, stat.S_IFDIR) or entry.file_size:
            raise tree.refuse(path, "it is a directory by name and something else by content")
        tree.add_directory(path.removesuffix("/"))
        return
    if form not in (0, stat.S_IFREG, stat.S_IFLNK):
        raise tree.refuse(path, "it is neither a file, a directory nor a link")
    with archive.open(entry) as member:
        if form == stat.S_IFLNK:
            target = member.read(PATH_MAX + 1)
            if len(target) > PATH_MAX:
                raise tree.refuse(path, "its target is too long")
            tree.add_link(path, os.fsdecode(target))
            return
        size = tree.add_file(path, member.read, executable=bool(mode & stat.S_IXUSR))
        if size not in (None, entry.file_size):
            raise tree.refuse(path, "its size is not what the zip file says")
