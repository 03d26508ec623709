# SPDX-License-Identifier: Apache-2.0
"""Take away what an invocation may have left outside its memory: files, and System V ipc."""

from __future__ import annotations

import errno
import os

from nsbox.linux import sysv

PLACES = ("/tmp", "/dev/shm", "/dev/mqueue")  # noqa: S108 - the environment's own
"""Everything that is writable inside."""


def reset() -> None:
    """Empty all writable places.

    Raises:
        OSError: Something cannot be removed.
    """
    for place in PLACES:
        try:
            fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            _empty(fd)
        finally:
            os.close(fd)
    sysv.remove_all()


def _empty(top: int) -> None:
    """Remove everything below the directory `top`, without following a link, however deep it is.

    What is deeper than one level is moved up first: neither depth nor the length of a path, both of
    which may be chosen to be too much, ever grows.
    """
    moved = 0
    again = True
    while again:
        again = False
        for name in os.listdir(top):
            try:
                os.unlink(name, dir_fd=top)
                continue
            except IsADirectoryError:
                pass
            except OSError as error:
                if error.errno == errno.EBUSY:
                    continue  # a mount of the configuration's
                raise
            os.chmod(name, 0o700, dir_fd=top)  # the link check was unlink's: it is a directory
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(name, flags, dir_fd=top)
            try:
                for child in os.listdir(inner):
                    try:
                        os.unlink(child, dir_fd=inner)
                    except IsADirectoryError:
                        # A directory that may not be written to cannot be moved either.
                        os.chmod(child, 0o700, dir_fd=inner)
                        moved += 1
                        os.rename(child, f".nsbox-{moved}", src_dir_fd=inner, dst_dir_fd=top)
                        again = True
            finally:
                os.close(inner)
            try:
                os.rmdir(name, dir_fd=top)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
