# SPDX-License-Identifier: Apache-2.0
"""The memory of the process that environments are clones of, as a sealed file.

A clone copies each page that it writes to, and Python writes to whatever it looks at: a reference
count goes up, and down again. Two fifths of what an environment has copied are pages with the
template's content. Where memory is a private mapping of a file, such a page can be given back: the
file's is there again with madvise(MADV_DONTNEED). So the template, once it has settled, puts its
memory into a memfd that nobody can write to any more, and has it mapped in the memory's place; and
what is idle in an environment compares, and gives back.

The two functions for that are C (`_image.c`), and not there where it could not be compiled:
environments then keep their copies.
"""

from __future__ import annotations

import gc
import os

try:
    from nsbox.linux import _image
except ImportError as error:
    _image, WHY_NOT = None, str(error)  # type: ignore[assignment]
else:
    WHY_NOT = ""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SOME = 10000
_THREADS = "/proc/self/task"
_NOEXEC_SEAL = 8  # MFD_NOEXEC_SEAL, linux/memfd.h; Linux 6.3


class Image:
    """The file, without a descriptor: its mappings hold it."""

    __slots__ = ("_inode", "size")

    def __init__(self) -> None:
        """Take the image of this process, which must have one thread.

        Raises:
            OSError: It cannot be had; nothing has changed, or part of the memory is mapped from it.
        """
        if _image is None:
            raise OSError(f"nsbox was installed without its compiled part ({WHY_NOT})")
        _expect_one_thread()
        fd = _memfd()
        try:
            self._inode = os.fstat(fd).st_ino
            self.size = _image.take(fd)
            """Bytes."""
        finally:
            os.close(fd)

    def drop(self, pagemap: int = -1) -> int:
        """Give back, in a clone, the pages that are as in the image; returns the bytes of them.

        With more than one thread, without /proc, or where the filter refuses, none.

        Args:
            pagemap: A descriptor of its /proc/self/pagemap, for who is not dumpable and may not
                open it; closed. Without one every page is compared, which takes 2 ms, not one.
        """
        try:
            _expect_one_thread()
            return _image.drop(self._inode, pagemap)
        except OSError:
            return 0
        finally:
            if pagemap >= 0:
                os.close(pagemap)


def take_when_tried() -> Image | None:
    """Take the image of this process, if a child has done so, and lived; else there is none.

    Every environment to come is a clone of this process: it must not die of this.
    """
    if _image is None:
        return None
    try:
        pid = os.fork()
        if pid == 0:
            _try_and_end()
        _, status = os.waitpid(pid, 0)
        return None if status else Image()
    except OSError:
        return None


def _try_and_end() -> NoReturn:
    try:
        image = Image()
        list(map(str, range(_SOME)))  # writes to memory old and new
        given = image.drop()
        gc.collect()
        os._exit(0 if given > 0 else 1)
    finally:
        os._exit(1)


def _memfd() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("nsbox-image", flags | _NOEXEC_SEAL)
    except OSError:
        return os.memfd_create("nsbox-image", flags)


def _expect_one_thread() -> None:
    count = len(os.listdir(_THREADS))
    if count != 1:
        raise OSError(f"{count} threads")
