# SPDX-License-Identifier: Apache-2.0
"""Freezing by SIGSTOP, where there is no freezer."""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Iterator

import pytest
from tests.support import wait_until

from nsbox.isolation import sigstop
from nsbox.linux.proc import read_status


@pytest.fixture
def child() -> Iterator[int]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.send_signal(signal.SIGKILL)
    process.wait()


def is_stopped(pid: int) -> bool:
    return read_status(pid)["State"].startswith("T")


def test_stop_and_go_on(child: int) -> None:
    stopper = sigstop.Stopper(child)
    stopper.stop()
    wait_until(lambda: is_stopped(child), "it stands still")
    stopper.go_on()
    wait_until(lambda: not is_stopped(child), "it goes on")


def test_what_cannot_be_stopped_is_let_go(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the freezers: nothing stands still half."""
    monkeypatch.setattr(sigstop, "_PASSES", 1)
    with pytest.raises(OSError, match="faster than they can be stopped") as info:
        sigstop.Stopper(child).stop()
    assert info.value.errno == errno.EBUSY
    wait_until(lambda: not is_stopped(child), "it goes on")
