# SPDX-License-Identifier: Apache-2.0
"""Blocks of host ids: who has one, and where the locks on them can be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support import IS_ROOT

from nsbox.isolation.namespaces import BLOCK, IdPool
from nsbox.launcher import identity

FIRST = 0x3F000000  # of nobody's range: only names and locks are taken here


def test_each_pool_has_a_block_of_its_own_and_one_file_is_left(tmp_path: Path) -> None:
    pools = [IdPool(FIRST, 3 * BLOCK, directory=str(tmp_path)) for _ in range(3)]
    assert sorted(pool.take() // BLOCK for pool in pools) == [
        FIRST // BLOCK + index for index in range(3)
    ]
    with pytest.raises(OSError, match="all blocks of host ids"):
        IdPool(FIRST, 3 * BLOCK, directory=str(tmp_path))
    assert os.listdir(tmp_path) == ["ids"]
    for pool in pools:
        pool.close()
    again = IdPool(FIRST, BLOCK, directory=str(tmp_path))
    assert again.take() == FIRST
    again.close()


def test_a_name_that_is_taken_keeps_a_block_only_while_there_is_another(tmp_path: Path) -> None:
    squatter = IdPool(FIRST, BLOCK)
    second = IdPool(FIRST, 2 * BLOCK, directory=str(tmp_path))
    assert second.take() == FIRST + BLOCK
    third = IdPool(FIRST, 2 * BLOCK, directory=str(tmp_path))
    assert third.take() == FIRST, "it was given back by the second, which has taken the other"
    for pool in (squatter, second, third):
        pool.close()


def test_locks_are_where_nobody_else_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    sticky, loose, shared = (tmp_path / name for name in ("sticky", "loose", "shared"))
    for path, mode in ((sticky, 0o1777), (loose, 0o777), (shared, 0o1777)):
        path.mkdir()
        path.chmod(mode)
    (sticky / "planted").symlink_to(tmp_path)
    (shared / "nsbox").mkdir()
    (shared / "nsbox").chmod(0o777)
    refused = [f"{sticky}/planted", f"{loose}/nsbox", f"{shared}/nsbox", f"{tmp_path}/none/nsbox"]
    if IS_ROOT:
        (sticky / "other").mkdir()
        os.chown(sticky / "other", 65534, 65534)
        refused.append(f"{sticky}/other")
    assert identity.lock_directory(*refused) is None
    assert identity.lock_directory(*refused, f"{sticky}/nsbox") == f"{sticky}/nsbox"
    assert os.stat(sticky / "nsbox").st_mode & 0o777 == 0o700
    assert identity.lock_directory(f"{tmp_path}/own") == f"{tmp_path}/own"
