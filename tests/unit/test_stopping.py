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
from nsbox.linux import proc
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


def test_a_number_that_is_another_process_by_now_gets_no_signal(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in the namespace when that was listed, and has ended before it could be stopped."""
    stranger = subprocess.Popen(["sleep", "1000"])
    listed = iter([[stranger.pid]])
    monkeypatch.setattr(proc, "descendants", lambda _pid: next(listed, []))
    stopper = sigstop.Stopper(child)
    stopper.stop()
    wait_until(lambda: is_stopped(child), "it stands still")
    assert not is_stopped(stranger.pid)
    stopper.go_on()
    stranger.kill()
    stranger.wait()


def test_what_cannot_be_stopped_is_let_go(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the freezers: nothing stands still half."""
    monkeypatch.setattr(sigstop, "_PASSES", 1)
    with pytest.raises(OSError, match="faster than they can be stopped") as info:
        sigstop.Stopper(child).stop()
    assert info.value.errno == errno.EBUSY
    wait_until(lambda: not is_stopped(child), "it goes on")
