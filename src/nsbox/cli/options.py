# SPDX-License-Identifier: Apache-2.0
"""The options that describe an environment, shared by ``run``, ``shell``, ``plan``, ``invoke``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from nsbox.errors import ConfigError
from nsbox.seccomp.policy import SeccompPolicy
from nsbox.values.config import ALLOWABLE, Config, IoMax, Limits, Mount

_SECTION: Final = (
    click.option("--memory", metavar="SIZE", help="Memory of everything in it; default 512M."),
    click.option("--pids", metavar="N", help="Live processes and threads; default 256."),
    click.option("--cpus", type=float, metavar="N", help="CPUs' worth of time, e.g. 0.5."),
    click.option("--cpuset", metavar="LIST", help="CPUs to run on, e.g. 0-1,3."),
    click.option("--timeout", type=float, metavar="S", help="Kill it after S seconds (124)."),
    click.option("--cpu-time", type=float, metavar="S", help="Kill it after S CPU seconds (124)."),
    click.option("--tmp-size", metavar="SIZE", help="Size of the private /tmp; default 64M."),
    click.option("--open-files", type=int, metavar="N", help="Descriptors of a process; 1024."),
    click.option("--file-size", metavar="SIZE", help="Largest file a process may write."),
    click.option(
        "--io",
        multiple=True,
        metavar="DEV:rbps=1M,...",
        help="Rates of a block device: rbps, wbps, riops, wiops.",
    ),
    click.option(
        "--bind",
        multiple=True,
        metavar="SRC:DST[:rw]",
        help="Make a file or directory of the host visible, read-only unless :rw.",
    ),
    click.option("--tmpfs", multiple=True, metavar="DST[:SIZE]", help="An empty writable tree."),
    click.option("--env", multiple=True, metavar="K=V", help="A variable; none is inherited."),
    click.option("--cwd", metavar="DIR", help="Working directory inside; default /tmp."),
    click.option("--network", type=click.Choice(["none", "host"]), help="Default none."),
    click.option("--rootfs", metavar="DIR", help="A directory instead of the host's userland."),
    click.option(
        "--userland",
        type=click.Choice(["full", "minimal"]),
        help="The host's /usr with its programs' configuration in /etc, or with little of it; "
        "default full.",
    ),
    click.option("--hostname", metavar="NAME", help="Host name inside; default sandbox."),
    click.option(
        "--seccomp",
        metavar="PROFILE",
        help="strict, default, docker, or the path of an OCI or Docker profile (JSON).",
    ),
    click.option("--seccomp-allow", multiple=True, metavar="CALL", help="Allow a system call."),
    click.option("--seccomp-deny", multiple=True, metavar="CALL", help="Refuse a system call."),
    click.option(
        "--seccomp-allow-dangerous",
        multiple=True,
        metavar="CALL",
        help="Allow a system call that opens a way out.",
    ),
    click.option(
        "--allow-missing",
        multiple=True,
        metavar="NAME",
        help="Do without a protection that the host cannot enforce: "
        + ", ".join(sorted(ALLOWABLE))
        + ".",
    ),
    click.option(
        "--output-max",
        metavar="SIZE",
        help="Kill it after SIZE bytes on stdout, or on stderr. Makes nsbox relay both.",
    ),
)
_OF_COMMANDS: Final = frozenset({"timeout", "cpu_time", "cwd", "hostname", "output_max"})
"""What a `Function` has none of, or has otherwise."""
_RATES: Final = {"rbps": str, "wbps": str, "riops": int, "wiops": int}
_NO_LIMIT: Final = ("none", "max")


def environment_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a click command; it gets them as keywords for `make_config`."""
    for decorate in reversed(_SECTION):
        command = decorate(command)
    return command


def function_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add those of the options that a function's environment has, for `make_fields`."""
    command = environment_options(command)
    added: list[click.Option] = command.__click_params__  # type: ignore[attr-defined]
    added[:] = [option for option in added if option.name not in _OF_COMMANDS]
    return command


def make_config(options: dict[str, Any]) -> Config:
    """Return the configuration that the options describe.

    Raises:
        ConfigError: A value is wrong; the message names the option.
    """
    return Config(**make_fields(options))


def make_fields(options: dict[str, Any]) -> dict[str, Any]:
    """Return what the options describe, as the fields that `Config` and `Function` share.

    Raises:
        ConfigError: A value is wrong; the message names the option.
    """
    fields: dict[str, Any] = {
        "limits": Limits(**_limits(options)),
        "mounts": (
            *(_parse_bind(text) for text in options["bind"]),
            *(_parse_tmpfs(text) for text in options["tmpfs"]),
        ),
        "env": dict(_parse_variable(text) for text in options["env"]),
        "allow_missing": frozenset(options["allow_missing"]),
        "seccomp": _make_policy(options),
    }
    for name in ("tmp_size", "network", "rootfs", "userland", "hostname", "cwd"):
        if options.get(name) is not None:
            fields[name] = options[name]
    return fields


def _limits(options: dict[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for option, field in (
        ("memory", "memory_max"),
        ("cpus", "cpu_max"),
        ("cpuset", "cpuset_cpus"),
        ("cpu_time", "cpu_time"),
        ("open_files", "open_files"),
        ("file_size", "file_size"),
        ("output_max", "output_max"),
    ):
        value = options.get(option)
        if value is not None:
            limits[field] = None if value in _NO_LIMIT else value
    pids = options["pids"]
    if pids is not None:
        limits["pids_max"] = None if pids in _NO_LIMIT else _whole(pids, "--pids")
    if options["io"]:
        limits["io_max"] = tuple(_parse_io(text) for text in options["io"])
    return limits


def _whole(text: str, what: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{what}: must be a whole number, got {text!r}") from None


def _parse_bind(text: str) -> Mount:
    rest, _, last = text.rpartition(":")
    writable = last == "rw"
    if last not in ("rw", "ro") or ":" not in rest:
        rest = text
    source, colon, destination = rest.rpartition(":")
    if not colon or not source or not destination:
        raise ConfigError(f"--bind {text!r}: must be SRC:DST or SRC:DST:rw, e.g. /srv/data:/data")
    return Mount.bind(source, destination, rw=writable)


def _parse_tmpfs(text: str) -> Mount:
    destination, colon, size = text.partition(":")
    return Mount.tmpfs(destination, size=size) if colon else Mount.tmpfs(destination)


def _parse_variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--env {text!r}: must be NAME=VALUE; nothing is taken from the host")
    return name, value


def _parse_io(text: str) -> IoMax:
    device, colon, rates = text.rpartition(":")
    values: dict[str, Any] = {}
    for part in rates.split(",") if colon and device else ():
        name, equals, value = part.partition("=")
        if not equals or name not in _RATES:
            raise ConfigError(f"--io {text!r}: {part!r} is none of {', '.join(_RATES)} with =N")
        values[name] = _whole(value, f"--io {name}") if _RATES[name] is int else value
    if not values:
        raise ConfigError(f"--io {text!r}: must be DEVICE:NAME=N,..., e.g. /dev/sda:wbps=1M")
    return IoMax(device=device, **values)


def _make_policy(options: dict[str, Any]) -> SeccompPolicy:
    name = options["seccomp"] or "default"
    dangerous = options["seccomp_allow_dangerous"]
    if name in ("strict", "default", "docker"):
        policy = SeccompPolicy.named(name)
    elif "/" in name or name.endswith(".json"):
        try:
            with open(name, "rb") as file:
                text = file.read(4 << 20)
        except OSError as error:
            raise ConfigError(f"--seccomp {name!r}: {error.strerror}") from error
        try:
            policy = SeccompPolicy.from_oci(text, allow_dangerous=dangerous)
        except ConfigError as error:
            raise ConfigError(f"--seccomp {name!r}: {error}") from error
    else:
        raise ConfigError(
            f"--seccomp {name!r}: must be strict, default, docker, or the path of a .json profile"
        )
    if options["seccomp_allow"]:
        policy = policy.allow(*options["seccomp_allow"])
    if dangerous:
        policy = policy.allow_dangerous(*dangerous)
    if options["seccomp_deny"]:
        policy = policy.deny(*options["seccomp_deny"])
    return policy
