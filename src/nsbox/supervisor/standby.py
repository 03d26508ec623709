# SPDX-License-Identifier: Apache-2.0
"""Standby environments: born ahead of need, so that the next cold start costs only the rest.

One is a whole environment, locked in, that nobody has used: for every kind of environment that
was used lately one is asked for as soon as the one before has been taken and has given its first
answer, so that its birth is on nobody's way. Nothing waits for it: its request is sent, and its
answers are read by whoever takes it. The launcher ends one that nobody takes in time.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from typing import ClassVar, Final

from nsbox.errors import ConfigError, NsboxError
from nsbox.launcher import messages
from nsbox.launcher.messages import Spec
from nsbox.launcher.protocol import STANDBY_LIFE
from nsbox.supervisor.connection import Attachments, EnvironmentConnection, ForgottenSpec
from nsbox.supervisor.launcher import Launcher, running_launcher

KINDS_KEPT: Final = 4
"""Kinds of environments that are kept on standby, the latest used."""
MOST: Final = 64
"""Environments that may be kept of one kind."""
_TAKEN_UNTIL: Final = STANDBY_LIFE - 10  # seconds; the launcher hears of it before it ends it


def _initial_count() -> int:
    name = "NSBOX_STANDBY"
    if name not in os.environ and "NSBOX_BLANKS" in os.environ:
        what = f"NSBOX_BLANKS is {name} now; the old name goes with the next release"
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        name = "NSBOX_BLANKS"
    text = os.environ.get(name, "1")
    if not (text.isascii() and text.isdigit()) or int(text) > MOST:
        raise ConfigError(f"{name}: {text!r} is not a number from 0 to {MOST}")
    return int(text)


class _Setting:
    count: int | None = None
    wishes: ClassVar[dict[object, tuple[frozenset[str], int]]] = {}
    """Of each pool: keys of its kinds, and how many it wants of each."""


def set_standby(count: int) -> None:
    """Set how many standby environments are kept ready for each kind lately used.

    One costs about a megabyte and two processes' worth of kernel state, counts in no limit of
    a pool, and is ended when nobody takes it for a minute. The default is 1, or what the variable
    NSBOX_STANDBY says when the first environment is made.

    Pools may want more of their own kinds (`WarmPool(standby=...)`): what counts is the most that
    is wanted. What is kept beyond that is ended at once.

    Raises:
        ConfigError: `count` is no number from 0 to 64.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST:
        raise ConfigError(f"standby: must be a number from 0 to {MOST}, got {count!r}")
    _Setting.count = count
    _trim()


def wish(owner: object, launcher: Launcher, specs: Sequence[Spec], count: int) -> None:
    """Keep `count` standby environments of each of these kinds, and of no others, for `owner`.

    To be said again within a minute: the launcher ends those that nobody wants.
    """
    _Setting.wishes[owner] = (frozenset(spec.key for spec in specs), count)
    _trim()
    for spec in specs:
        for connection in launcher.companions.of(spec.key):
            if connection.tell_of_taker(messages.Keep()):
                connection.asked_at = time.monotonic()
            elif launcher.companions.remove(spec.key, connection):
                connection.close()
        refill(launcher, spec)


def forget(owner: object) -> None:
    """Drop the wishes of `owner`."""
    if _Setting.wishes.pop(owner, None) is not None:
        _trim()


def kept(key: str) -> int:
    """Return the number of standby environments that a kind is to have."""
    if _Setting.count is None:
        _Setting.count = _initial_count()
    return max([_Setting.count, *_wishes(key)]) if _Setting.wishes else _Setting.count


def _wishes(key: str) -> list[int]:
    return [count for keys, count in list(_Setting.wishes.values()) if key in keys]


def _trim() -> None:
    """Close standby environments beyond the wanted number."""
    launcher = running_launcher()
    if launcher is not None:
        for key in launcher.companions.keys():  # noqa: SIM118 - no mapping
            surplus = len(launcher.companions.of(key)) - kept(key)
            for _ in range(surplus):
                if (connection := launcher.companions.take(key)) is not None:
                    connection.close()


def take(
    launcher: Launcher,
    spec: Spec,
    attachments: Attachments = (),
    *,
    is_brief: bool = False,
    lends_control: bool = False,
) -> EnvironmentConnection:
    """Return the connection to an unused environment: one on standby, else one born now.

    It is being given its attachments then (`EnvironmentConnection.await_attached`).

    Raises:
        As `nsbox.supervisor.connection.EnvironmentConnection`.
    """
    while True:
        connection: EnvironmentConnection | None = launcher.companions.take(spec.key)
        if connection is None:
            break
        if time.monotonic() - connection.asked_at < _TAKEN_UNTIL:
            try:
                if not attachments and not connection.tell_of_taker(messages.Claim()):
                    connection.close()  # the launcher would end it in the midst of its use
                    continue
                connection.await_birth(attachments, lends_control=lends_control)
            except NsboxError:
                continue  # whatever became of it: a birth now tells the caller what is wrong
            return connection
        connection.close()
    try:
        connection = _give_birth(launcher, spec, attachments, is_brief=is_brief)
        connection.await_birth(attachments, lends_control=lends_control)
    except ForgottenSpec:  # it is sent this time
        connection = _give_birth(launcher, spec, attachments, is_brief=is_brief)
        connection.await_birth(attachments, lends_control=lends_control)
    return connection


def _give_birth(
    launcher: Launcher, spec: Spec, attachments: Attachments, *, is_brief: bool
) -> EnvironmentConnection:
    connection = EnvironmentConnection(launcher, spec, _new_id(), is_brief=is_brief)
    connection.ask_for_birth("attachments" if attachments else "")
    return connection


def _new_id() -> str:
    return os.urandom(4).hex()


def prepare(launcher: Launcher, spec: Spec) -> EnvironmentConnection | None:
    """Return what `refill` will need, made while there is time for it; None when nothing is."""
    if len(launcher.companions.of(spec.key)) >= kept(spec.key):
        return None
    try:
        return EnvironmentConnection(launcher, spec, _new_id())
    except NsboxError:
        return None  # there is no room for its sockets


def refill(launcher: Launcher, spec: Spec, prepared: EnvironmentConnection | None = None) -> None:
    """Ask for those of this kind that are missing. Waits for nothing, raises nothing."""
    count = kept(spec.key)
    companions = launcher.companions
    # What has become too old to be taken is only in the way.
    unwanted = companions.take_old(spec.key, time.monotonic() - _TAKEN_UNTIL)
    if len(keys := companions.keys()) > KINDS_KEPT:
        others = [key for key in keys if not _wishes(key)]
        for key in others[: max(0, len(others) - KINDS_KEPT)]:
            unwanted += companions.take_all(key)
    for connection in unwanted:
        connection.close()
    try:
        for _ in range(count - len(companions.of(spec.key))):
            connection, prepared = (
                prepared or EnvironmentConnection(launcher, spec, _new_id()),
                None,
            )
            connection.ask_for_birth("taker")
            if not companions.put(spec.key, connection, count):
                connection.close()
    except (NsboxError, OSError):
        return  # the next environment is born when it is needed, and says why it cannot be
    finally:
        if prepared is not None:
            prepared.close()
