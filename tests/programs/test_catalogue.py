# SPDX-License-Identifier: Apache-2.0
"""The small rows of the catalogue of programs, in the profiles that they work with."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.programs.catalogue import PROGRAMS, Program, in_nsbox
from tests.support import PATIENCE, SLOW_MACHINE

from nsbox.values.config import ProfileChoice

SMALL = [
    program for program in PROGRAMS if program.small and not (program.maps_widely and SLOW_MACHINE)
]


def profiles_of(program: Program) -> list[str]:
    """Return the profiles that it works with; in User-Mode Linux the strictest of them."""
    profiles = [*(["strict"] if program.strict else []), "default", "docker"]
    return profiles[:1] if SLOW_MACHINE else profiles


@pytest.mark.needs("userns", "seccomp")
@pytest.mark.parametrize(
    ("program", "profile"),
    [
        pytest.param(program, profile, id=f"{program.name}-{profile}")
        for program in SMALL
        for profile in profiles_of(program)
    ],
)
def test_program_passes(program: Program, profile: ProfileChoice) -> None:
    if not program.is_installed():
        pytest.skip(f"not installed: {program.packages}")
    passed, output = in_nsbox(replace(program, timeout=program.timeout * PATIENCE), profile)
    assert passed, output


def test_rows_have_names_of_their_own() -> None:
    names = [program.name for program in PROGRAMS]
    assert len(names) == len(set(names))
