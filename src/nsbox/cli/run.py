# SPDX-License-Identifier: Apache-2.0
"""``nsbox run`` and ``nsbox shell``."""

from __future__ import annotations

import json
import os
import signal
import stat
from typing import Any, Final

import click

from nsbox.cli import OWN_FAILURE
from nsbox.cli.app import explain, say, say_missing
from nsbox.cli.options import environment_options, make_config
from nsbox.cli.session import Session
from nsbox.environment.environment import EnvironmentFace, ExecutionEnvironment
from nsbox.environment.managed import ManagedEnvironment
from nsbox.errors import CommandStartError, ConfigError, NsboxError
from nsbox.supervisor.standby import set_standby
from nsbox.values.config import Config, check_argv, parse_seconds
from nsbox.values.result import Outcome, Result

_TIMEOUT: Final = 124
_SIGNAL_BASE: Final = 128
_WORDS: Final = {
    Outcome.TIMED_OUT: "timed out",
    Outcome.CPU_TIMED_OUT: "out of CPU time",
    Outcome.OOM_KILLED: "out of memory",
    Outcome.OUTPUT_LIMIT: "too much output",
    Outcome.SECCOMP_KILLED: "killed by the system call filter",
}
_LOOKED_FOR_SHELLS: Final = ("bash", "sh")

_json_option = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Write the whole result as JSON; - is stderr. What streamed through is not in it.",
)
_quiet_option = click.option("--quiet", "-q", is_flag=True, help="Say nothing about limits.")


def exit_status(result: Result) -> int:
    """Return the exit status of `nsbox run` for a result."""
    if result.outcome is Outcome.EXITED:
        return result.returncode
    if result.outcome in (Outcome.TIMED_OUT, Outcome.CPU_TIMED_OUT):
        return _TIMEOUT
    if result.outcome in (Outcome.SIGNALED, Outcome.SECCOMP_KILLED) and result.returncode < 0:
        return _SIGNAL_BASE - result.returncode
    return _SIGNAL_BASE + signal.SIGKILL


@click.command("run", context_settings={"allow_interspersed_args": False})
@environment_options
@_json_option
@_quiet_option
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True, metavar="-- CMD...")
def run_command(command: tuple[str, ...], **options: object) -> int:
    """Run a command in a fresh sandbox.

    stdin, stdout and stderr are the command's. At a terminal it gets a terminal of its own. The
    exit status is the command's; 124 timeout, 137 out of memory or killed, 125 nsbox's own failure.
    """
    return _run(command, options, interactive=False)


@click.command("shell")
@environment_options
@_json_option
@_quiet_option
def shell_command(**options: object) -> int:
    """Start an interactive shell in a fresh sandbox: yours if it is inside, else bash or sh."""
    return _run((), options, interactive=True)


def _run(command: tuple[str, ...], options: dict[str, Any], *, interactive: bool) -> int:
    json_file, quiet = options.pop("json_file"), options.pop("quiet")
    timeout = options.pop("timeout")
    _check_report(json_file)
    try:
        if timeout is not None:
            timeout = parse_seconds(timeout, "timeout")
        config = make_config(options)
        argv = ("sh",) if interactive else check_argv(command)
        result = _execute(argv, config, timeout, quiet=quiet, interactive=interactive)
    except NsboxError as error:
        status = error.exit_code if isinstance(error, CommandStartError) else OWN_FAILURE
        _write_report(json_file, {"error": _describe(error), "exit_status": status})
        raise
    _write_report(json_file, result.to_dict())
    if result.outcome in _WORDS and not quiet:
        more = ""
        if result.outcome is Outcome.OOM_KILLED and config.limits.memory_max is not None:
            limit = config.limits.memory_max / (1 << 20)
            more = f"; the limit is {limit:g}M, which --memory changes"
        say(f"{_WORDS[result.outcome]}: {result.evidence}{more}")
    return exit_status(result)


def _execute(
    argv: tuple[str, ...], config: Config, timeout: float | None, *, quiet: bool, interactive: bool
) -> Result:
    set_standby(0)  # there is no next one
    environment = ManagedEnvironment(config)
    try:
        if not quiet:
            say_missing(environment.protections)
        if interactive:
            argv = (_find_shell(EnvironmentFace(environment)),)
        named = "output_max" in config.limits.named
        session = Session(
            environment,
            timeout=timeout,
            output_max=config.limits.output_max if named else None,
            suspend=not interactive,
        )
        return session.run(argv)
    finally:
        environment.close(wait=False)


def _find_shell(environment: ExecutionEnvironment) -> str:
    own = os.path.basename(os.environ.get("SHELL", ""))
    for name in dict.fromkeys((own, *_LOOKED_FOR_SHELLS)):
        if name:
            try:
                if environment.run([name, "-c", ":"], timeout=10).ok:
                    return name
            except CommandStartError:
                continue
    return "sh"


# -- the report ----------------------------------------------------------------------------------


def _check_report(path: str | None) -> None:
    """Raise before anything runs when the report could not be written at the end."""
    if path in (None, "-"):
        return
    try:
        directory = os.path.dirname(os.path.abspath(path))
    except FileNotFoundError as error:
        raise ConfigError(
            f"--json {path!r}: the working directory is gone; give an absolute name"
        ) from error
    if os.path.isdir(path):
        raise ConfigError(f"--json {path!r}: is a directory; give the name of a file")
    if not os.path.exists(path) and not os.path.isdir(directory):
        raise ConfigError(f"--json {path!r}: there is no directory {directory!r}")
    if not os.access(path if os.path.exists(path) else directory, os.W_OK):
        raise ConfigError(f"--json {path!r}: not writable by you; choose another place")


def _write_report(path: str | None, report: dict[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(report, indent=2) + "\n"
    if path == "-":
        click.echo(text, err=True, nl=False)
        return
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        with open(path, "w") as file:  # /dev/fd/3, a FIFO: nothing to replace
            file.write(text)
        return
    # Whoever reads it sees the whole report or none.
    target = os.path.realpath(path)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "x") as file:
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _describe(error: NsboxError) -> dict[str, Any]:
    fields = ("feature", "reason", "hint", "step", "errno", "argv0")
    found = {name: getattr(error, name) for name in fields if hasattr(error, name)}
    return {"type": type(error).__name__, "message": explain(error), **found}
