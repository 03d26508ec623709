# SPDX-License-Identifier: Apache-2.0
"""What nsbox asks the kernel at its start: a call that fails in passing is no "no" for its life."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
from tests.support import SOURCE

pytestmark = pytest.mark.needs("userns", "strace")

START = """
import nsbox
nsbox.set_standby(0)
try:
    with nsbox.ExecutionEnvironment() as env:
        print("made", *sorted(layer.name for layer in env.protections.layers if layer.in_force))
except nsbox.NsboxError as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0])
"""

# A call, the path it is about (None: whatever), and what it fails with.
QUESTIONS = [
    ("openat", "/proc/self/cgroup", "ENFILE"),
    ("openat", "/proc/self/mountinfo", "ENOMEM"),
    ("newfstatat", "/proc/self/ns/ipc", "ENOMEM"),
    ("landlock_create_ruleset", None, "ENOMEM"),
]


def start_with(*injection: str) -> str:
    traced = ["strace", "-f", "-qq", "-o", "/dev/null", *injection] if injection else []
    done = subprocess.run(
        [*traced, sys.executable, "-c", START],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "strace" in done.stderr and not done.stdout:
        pytest.skip(f"strace cannot be used here: {done.stderr.strip().splitlines()[0]}")
    return done.stdout.strip() or done.stderr


@pytest.fixture(scope="module")
def whole() -> str:
    """What there is when nothing fails."""
    found = start_with()
    assert found.startswith("made "), found
    return found


@pytest.mark.parametrize(("call", "path", "error"), QUESTIONS)
def test_what_is_not_known_is_no_answer(
    call: str, path: str | None, error: str, whole: str
) -> None:
    """The start fails and names it; or all is as ever, where it is asked again or not at all."""
    only = ["-P", path] if path else []
    found = start_with(*only, "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1")
    is_named = found.startswith(("LauncherError: ", "SetupError: "))
    assert found == whole or (is_named and os.strerror(getattr(errno, error)) in found), found
