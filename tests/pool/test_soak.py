# SPDX-License-Identifier: Apache-2.0
"""The soak of benchmarks/soak.py, a tenth as long: what host and launcher have stays flat."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from benchmarks.soak import LOOKS, Soak, uneven

import nsbox


@pytest.mark.slow
@pytest.mark.needs("userns")
def test_all_is_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    nsbox.shutdown()  # it counts what is the launcher's own
    soak = Soak(tmp_path)
    assert soak.run(1000, 200) == []
    assert [len(samples) for samples in soak.samples.values()] == [LOOKS, LOOKS]
    assert {"RSS of the launcher", "descriptors of the host"} <= set(soak.samples["cold"][0][1])


@pytest.mark.static
@pytest.mark.parametrize("what", ["descriptors of the host", "RSS of the launcher"])
def test_what_grows_is_told(what: str) -> None:
    assert uneven("cold", [(1, {what: 10.0}), (2, {what: 13.0})]) == []
    assert len(uneven("cold", [(1, {what: 10.0}), (2, {what: 27.0})])) == 1
