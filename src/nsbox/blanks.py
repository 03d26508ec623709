# SPDX-License-Identifier: Apache-2.0
"""Blank environments: born ahead of need, so that the next cold start costs only the rest.

A blank is a whole environment, locked in, that nobody has used: for every kind of environment that
was used lately one is asked for as soon as the one before has been taken and has given its first
answer, so that its birth is on nobody's way. Nothing waits for it: its request is sent, and its
answers are read by whoever takes it. The launcher ends a blank that nobody takes in time.
"""

from __future__ import annotations

import collections
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from nsbox.errors import ConfigError, NsboxError
from nsbox.launcher.client import Launcher
from nsbox.launcher.wire import BLANK_LIFE
from nsbox.link import Furniture, Link, give_birth

KINDS_KEPT: Final = 4
"""Kinds of environments that blanks are kept of, the latest used."""
MOST: Final = 64
"""Blanks that may be kept of one kind."""
_TAKEN_UNTIL: Final = BLANK_LIFE - 10  # seconds; the launcher hears of it before it ends the blank


def _initial_count() -> int:
    text = os.environ.get("NSBOX_BLANKS", "1")
    if not (text.isascii() and text.isdigit()) or int(text) > MOST:
        raise ConfigError(f"NSBOX_BLANKS: {text!r} is not a number from 0 to {MOST}")
    return int(text)


class _Setting:
    count: int | None = None


def set_blanks(count: int) -> None:
    """Set how many blank environments are kept ready for each kind lately used.

    A blank costs about a megabyte and two processes' worth of kernel state, counts in no limit of
    a pool, and is ended when nobody takes it for a minute. The default is 1, or what the variable
    NSBOX_BLANKS says when the first environment is made.

    Raises:
        ConfigError: `count` is no number from 0 to 64.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST:
        raise ConfigError(f"blanks: must be a number from 0 to {MOST}, got {count!r}")
    _Setting.count = count


def kept() -> int:
    """Return how many are kept of each kind."""
    if _Setting.count is None:
        _Setting.count = _initial_count()
    return _Setting.count


def take(launcher: Launcher, spec: Mapping[str, Any], furniture: Furniture = ()) -> Link:
    """Return a link to an environment that nobody has used: a blank one, else one born now.

    It is being furnished then (`Link.await_furnished`).

    Raises:
        As `nsbox.link.Link`.
    """
    blanks = launcher.companions.get(spec["key"])
    while blanks:
        try:
            link: Link = blanks.popleft()
        except IndexError:
            break  # another thread was faster
        if time.monotonic() - link.asked_at < _TAKEN_UNTIL:
            try:
                if not furniture:
                    link.claim()
                link.await_birth(furniture)
            except NsboxError:
                continue  # whatever became of it: a birth now tells the caller what is wrong
            return link
        link.close()
    return give_birth(launcher, spec, secrets.token_hex(4), furniture)


def prepare(launcher: Launcher, spec: Mapping[str, Any]) -> Link | None:
    """Return what `refill` will need, made while there is time for it; None when nothing is."""
    if len(launcher.companions.get(spec["key"], ())) >= kept():
        return None
    try:
        return Link(launcher, spec, secrets.token_hex(4))
    except NsboxError:
        return None  # there is no room for its sockets


def refill(launcher: Launcher, spec: Mapping[str, Any], prepared: Link | None = None) -> None:
    """Ask for the blanks of this kind that are missing. Waits for nothing, raises nothing."""
    count = kept()
    companions = launcher.companions
    blanks = companions.setdefault(spec["key"], collections.deque())
    while len(companions) > KINDS_KEPT:
        _close_all(companions.pop(next(iter(companions)), ()))
    # What has become too old to be taken is only in the way.
    while blanks and time.monotonic() - blanks[0].asked_at >= _TAKEN_UNTIL:
        blanks.popleft().close()
    try:
        while len(blanks) < count:
            link, prepared = prepared or Link(launcher, spec, secrets.token_hex(4)), None
            link.ask_for_birth(blank=True)
            blanks.append(link)
    except NsboxError:
        return  # the next environment is born when it is needed, and says why it cannot be
    finally:
        if prepared is not None:
            prepared.close()


def drop(launcher: Launcher) -> None:
    """End all blanks of a launcher."""
    while launcher.companions:
        _close_all(launcher.companions.popitem()[1])


def _close_all(blanks: collections.abc.Iterable[Link]) -> None:
    for link in blanks:
        link.close()
