# SPDX-License-Identifier: Apache-2.0
"""For examples: what their global names keep in cycles is gone before leaks are looked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have versions, which hold a lock in the store each, gone before leaks are looked for."""
    yield
    gc.collect()
