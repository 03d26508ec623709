# SPDX-License-Identifier: Apache-2.0
"""The group of subcommands, loaded one by one, and what becomes of errors."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Final

import click

from nsbox.cli import INTERRUPTED, OWN_FAILURE
from nsbox.errors import CommandStartError, ConfigError, NsboxError, UnsupportedHostError

if TYPE_CHECKING:
    from nsbox.values.result import Protections

_COMMANDS: Final = {
    "run": ("run", "run_command", "Run a command in a fresh sandbox."),
    "shell": ("run", "shell_command", "Start an interactive shell in a fresh sandbox."),
    "invoke": ("invoke", "invoke_command", "Call a function with an event; print its answer."),
    "doctor": ("doctor", "doctor_command", "Try everything a sandbox needs; name the remedies."),
    "plan": ("plan", "plan_command", "Print the steps and protections for given options."),
    "ps": ("ps", "ps_command", "List the live environments."),
    "top": ("top", "top_command", "Show what the live environments do, again and again."),
    "gc": ("gc", "gc_command", "Remove the cgroups of dead owners."),
    "bench": ("bench", "bench_command", "Measure nsbox beside its peers (in a checkout)."),
}
_OPTION_NAMES: Final = {
    "memory_max": "--memory",
    "pids_max": "--pids",
    "cpu_max": "--cpus",
    "cpuset_cpus": "--cpuset",
    "io_max": "--io",
    "cpu_time": "--cpu-time",
    "open_files": "--open-files",
    "file_size": "--file-size",
    "output_max": "--output-max",
    "tmp_size": "--tmp-size",
    "hostname": "--hostname",
    "rootfs": "--rootfs",
    "mount": "--bind/--tmpfs",
    "mounts": "--bind/--tmpfs",
    "init_timeout": "--init-timeout",
    "timeout": "--timeout",
    "preload": "--preload",
    "cwd": "--cwd",
    "allow_missing": "--allow-missing",
}
_NAMED_FIELD: Final = re.compile(rf"({'|'.join(_OPTION_NAMES)})(?=[:\s])")
_CALLS: Final = (
    (re.compile(r"allow_missing=\{'([\w.]+)'\}"), r"--allow-missing \1"),
    (re.compile(r"allow_dangerous\('(\w+)'\)"), r"--seccomp-allow-dangerous \1"),
)


# The control codes of ASCII and ISO 6429 but tabs and ends of lines; and those of Unicode that
# change the direction of what follows (UAX 9, table 2), by which one text looks like another.
_CODES: Final = re.compile(
    "[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
    "|\\r(?!\\n)"
)


class _Commands(click.Group):
    """A group whose commands are imported only when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"nsbox.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        import nsbox

        click.echo(f"nsbox {nsbox.__version__}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def app() -> None:
    """Run untrusted programs in a complete sandbox: namespaces, cgroups, seccomp, own root.

    Try: nsbox run -- python3 -c "print(6 * 7)"
    """


def harmless(text: str) -> str:
    """Return text of others without what a terminal would act on, each such code as its escape."""
    return _CODES.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text of others: as it is to a pipe or file, harmless at a terminal."""
    stream = sys.stderr if err else sys.stdout
    is_terminal = stream is not None and stream.isatty()
    click.echo(harmless(text) if is_terminal else text, nl=nl, err=err)


def say(text: str) -> None:
    """Print one line about nsbox itself on stderr."""
    try:
        # A terminal may be in raw mode, and a name may have any bytes in it.
        line = " ".join(text.split())
        sys.stderr.write(f"nsbox: {harmless(line) if sys.stderr.isatty() else line}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is closed: there is nobody to tell


def say_missing(protections: Protections) -> None:
    """Say on stderr what is wanted and not in force, and what programs may miss, if anything."""
    found = protections["proc"].detail
    if not found.startswith("its own, sensitive"):
        # Programs that miss it say something else ("Error, do this: mount -t proc proc /proc").
        from nsbox.host.features import host_facts, remedy

        known = host_facts()
        facts = dict.fromkeys(known, "") | {"container": known["container"]}  # nothing else failed
        what = remedy("proc", hint="run nsbox where nothing is mounted over it", facts=facts)
        say(f"/proc inside: {found}. Remedy: {what} [--quiet hides this]")
    if protections.missing:
        told = "; ".join(f"{layer.name} ({layer.detail})" for layer in protections.missing)
        say(f"not in force on this host: {told} [--quiet hides this; see 'nsbox doctor']")


def explain(error: BaseException) -> str:
    """Return the message of an error in the words of the command line."""
    text = str(error)
    if isinstance(error, ConfigError | UnsupportedHostError):
        text = _NAMED_FIELD.sub(lambda match: _OPTION_NAMES[match[0]], text, count=1)
    if isinstance(error, UnsupportedHostError) and "allow_missing" not in text:
        from nsbox.values.config import ALLOWABLE  # ps and top do without it

        if error.feature in ALLOWABLE:
            text += f"; or do without it: --allow-missing {error.feature}"
    for pattern, replacement in _CALLS:
        text = pattern.sub(replacement, text)
    return text


def run_app(words: list[str]) -> int:
    """Run a command line; return the exit status."""
    try:
        # Names and messages may hold bytes that are no UTF-8; printing them must not fail.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        status = app.main(args=words, prog_name="nsbox", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return OWN_FAILURE
    except click.ClickException as error:
        hint = ""
        if isinstance(error, click.UsageError) and error.ctx is not None:
            hint = f" (see '{error.ctx.command_path} --help')"
        say(f"{error.format_message().rstrip('.')}{hint}")
        return OWN_FAILURE
    except CommandStartError as error:
        say(explain(error))
        return error.exit_code
    except NsboxError as error:
        say(explain(error))
        return OWN_FAILURE
    except click.Abort:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our own output has gone. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OWN_FAILURE
    except OSError as error:
        say(str(error))
        return OWN_FAILURE
    return status if isinstance(status, int) else 0
