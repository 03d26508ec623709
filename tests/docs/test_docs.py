# SPDX-License-Identifier: Apache-2.0
"""What the documents say is so: examples run, steps, names, numbers, tests and links exist."""

from __future__ import annotations

import ast
import asyncio
import configparser
import functools
import importlib
import importlib.metadata
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE, SOURCE

import nsbox
from nsbox.launcher import birth
from nsbox.values.config import ALLOWABLE

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    REPOSITORY / "benchmarks/README.md",
    REPOSITORY / "rootfs/README.md",
]
_FENCE = re.compile(r"(?:^<!-- needs: ([\w., ]+) -->\n)?^```(\w*)\n(.*?)^```$", re.M | re.S)


def read(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(name: str, language: str) -> list[tuple[str, str]]:
    """Return (needed features, text) of each block of code in a document."""
    return [(m[1] or "", m[3]) for m in _FENCE.finditer(read(name)) if m[2] == language]


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = text.split(f"\n{heading}\n", 1)[1]
    table: list[str] = []
    for line in section.splitlines():
        if line.startswith("|"):
            table.append(line)
        elif table or line.startswith("#"):
            break
    assert len(table) > 2, f"no table below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def words(cell: str) -> list[str]:
    """Return what stands in `code` in a cell."""
    return re.findall(r"`([^`]+)`", cell)


def matches(expected: str, found: str) -> bool:
    """Compare, with ``...`` for whatever depends on the host."""
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, found, re.S) is not None


def with_needs(name: str, language: str) -> list[object]:
    found = blocks(name, language)
    assert found
    return [
        pytest.param(
            text, marks=pytest.mark.needs("userns", *needed.replace(",", " ").split()), id=str(n)
        )
        for n, (needed, text) in enumerate(found)
    ]


# -- examples ------------------------------------------------------------------------------------


def check_python(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "<example>", "exec"), {"__name__": "example"})  # noqa: S102
    found = capsys.readouterr().out.splitlines()
    expected = [m[1] for m in re.finditer(r"^\s*print\(.*\)  # (.*)$", code, re.M)]
    assert expected, "an example prints something"
    assert len(found) == len(expected)
    for told, seen in zip(expected, found, strict=True):
        assert matches(told, seen)


@pytest.mark.parametrize("code", with_needs("README.md", "python"))
def test_readme_python(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_python(code, capsys)


@pytest.mark.parametrize(("seconds", "headers"), [(0.2, {"Retry-After": "1"}), (None, {})])
def test_readme_answers_a_throttled_call(seconds: float | None, headers: dict[str, str]) -> None:
    (handler,) = (
        node
        for _, code in blocks("README.md", "python")
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "throttled"
    )
    handler.decorator_list.clear()
    for argument in handler.args.args:
        argument.annotation = None
    names: dict[str, Any] = {"math": math, "JSONResponse": lambda *arguments: arguments}
    exec(compile(ast.Module([handler], []), "<README>", "exec"), names)  # noqa: S102
    error = nsbox.Throttled("full", reason="full", retry_after=seconds)
    assert asyncio.run(names["throttled"](None, error)) == ({"error": "full"}, 429, headers)


@pytest.mark.parametrize("code", with_needs("docs/api.md", "python"))
def test_api_python(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_python(code, capsys)


@pytest.mark.parametrize("code", with_needs("docs/functions.md", "python"))
def test_functions_python(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_python(code, capsys)


def sessions(text: str) -> Iterator[tuple[str, list[str]]]:
    command, output = "", list[str]()
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, output
            command, output = line[2:], []
        else:
            output.append(line)
    yield command, output


@pytest.mark.needs("userns")
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param(command, output, id=command)
        for _, text in blocks("README.md", "console")
        for command, output in sessions(text)
    ],
)
def test_readme_command(command: str, expected: list[str]) -> None:
    function = f'nsbox() {{ "{sys.executable}" -m nsbox "$@"; }}\n'
    path = os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        ["/bin/bash", "-c", function + command],
        env={**os.environ, "PYTHONPATH": path, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * PATIENCE,
    )
    # What this host cannot enforce is said in a line that the document leaves out.
    found = [
        line for line in done.stdout.splitlines() if not line.startswith("nsbox: not in force")
    ]
    assert matches("\n".join(expected), "\n".join(found)), done.stdout


def test_readme_begins_with_two_commands() -> None:
    first = _FENCE.search(read("README.md"))
    assert first is not None
    commands = [line.split("#")[0].strip() for line in first[3].splitlines()]
    assert commands == ["./scripts/run", "./scripts/test"]
    for command in commands:
        assert os.access(REPOSITORY / command, os.X_OK)


def test_readme_names_the_packages_that_the_scripts_install() -> None:
    # Where Python itself is there: what scripts/lib.sh asks for, one by one.
    wanted = re.findall(
        r"printf ' ((?:python3-venv|python3-dev|gcc|lib[\w-]+))'", read("scripts/lib.sh")
    )
    told = "python3-venv python3-dev gcc libc6-dev libcap-dev libseccomp2"
    assert set(wanted) == set(told.split())
    for name in ("README.md", "docs/host-setup.md"):
        assert told in read(name)


# -- steps, rooms, names ---------------------------------------------------------------------------


def test_steps_are_those_of_the_code() -> None:
    section = read("docs/architecture.md").split("\n## A birth, step by step\n")[1]
    launcher, _, rest = section.split("\n## ")[0].partition("\nIn the template:\n")
    template, _, environment = rest.partition("\nIn the environment:\n")
    sides = (("launcher", launcher), ("template", template), ("environment", environment))
    told = [
        (side, int(m[1]), m[2])
        for side, text in sides
        for m in re.finditer(r"^(\d+)\. `([\w-]+)`: ", text, re.M)
    ]
    assert told == [(step.side, n, step.name) for n, step in enumerate(birth.STEPS, 1)]


def test_rooms_are_those_of_the_test_of_imports() -> None:
    tree = ast.parse(read("tests/unit/test_architecture.py"))
    rooms = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ROOMS" and node.value
    )
    told = rows(read("docs/architecture.md"), "## Rooms, and who imports whom")
    assert tuple((room, (room, *words(beside))) for room, beside, _ in told) == rooms
    for room, _, text in told:
        modules = (Path(nsbox.__file__).parent / room).glob("[a-z]*.py")
        silent = {module.stem for module in modules} - set(re.findall(r"\w+", text))
        assert room in ("cli", "linux") or not silent, f"{room} has files that nobody is told of"


def test_every_public_name_is_in_the_api_document() -> None:
    prose = re.sub(r"^```.*?^```$", "", read("docs/api.md"), flags=re.M | re.S)
    told = set(re.findall(r"\w+", " ".join(words(prose))))
    assert set(nsbox.__all__) - {"__version__"} <= told
    for value in (nsbox.Config, nsbox.Limits, nsbox.IoMax, nsbox.Result, nsbox.Invocation):
        assert {item.name for item in fields(value) if item.init} <= told
    for kind in (
        nsbox.ExecutionEnvironment,
        nsbox.Process,
        nsbox.Function,
        nsbox.FunctionVersion,
        nsbox.Invocation,
    ):
        public = {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}
        assert (
            public
            - {
                "register",
                "communicate",
                "kill_with_verdict",
                "poll_milliseconds",
                "abandon",
                "descriptors",
                # What a pool asks its environments for.
                "is_closed",
                "heard_nothing",
                "death_descriptor",
                "send_kill",
                "on_kill_of_left_running",
                "left_running_of_last",
                "ask_to_end",
            }
            - {"call", "call_async"}  # for pools
            <= told
        )
    assert {item.name for item in nsbox.Outcome} | {item.name for item in nsbox.State} <= told


def test_what_may_be_missing_is_told() -> None:
    line = next(
        line for line in read("docs/api.md").splitlines() if "`allow_missing` takes" in line
    )
    assert set(words(line)) - {"allow_missing"} == set(ALLOWABLE)


def test_outcomes_are_told_with_the_status_of_the_command_line() -> None:
    told = [words(row[0])[0] for row in rows(read("README.md"), "## Truthful results")]
    assert told == [item.name for item in nsbox.Outcome]


def test_error_types_of_functions_are_told() -> None:
    named = re.compile(r"\b(?:Runtime|Function|Sandbox)\.[A-Z]\w+")
    made = {
        word
        for path in (REPOSITORY / "src/nsbox").rglob("*.py")
        for word in re.findall(rf'"({named.pattern})"', path.read_text())
    }
    table = rows(read("docs/functions.md"), "### What goes wrong")
    assert set(named.findall("\n".join(" ".join(row) for row in table))) == made
    for _, _, state in table:
        assert not words(state) or words(state)[0] in nsbox.State.__members__


def test_every_command_is_told() -> None:
    from nsbox.cli import app

    text = "\n".join(" ".join(row) for row in rows(read("README.md"), "## Quickstart: the command"))
    assert set(re.findall(r"`nsbox (\w+)", text)) == set(app._COMMANDS)


# -- numbers ---------------------------------------------------------------------------------------


def size_text(value: object) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, int) and value and value % (1 << 20) == 0:
        return f"{value >> 20} MiB"
    return str(value)


def test_defaults_are_those_of_the_code() -> None:
    defaults = {
        name: getattr(nsbox.Limits(), name) for name in (f.name for f in fields(nsbox.Limits))
    }
    del defaults["named"]
    defaults |= {"tmp_size": nsbox.Config().tmp_size, "timeout": None}
    told = {words(row[0])[0]: row[2] for row in rows(read("README.md"), "## Limits and defaults")}
    assert told == {name: size_text(value) for name, value in defaults.items()}


def test_options_of_limits_exist() -> None:
    from nsbox.cli.run import run_command

    options = {name for item in run_command.params for name in item.opts}
    for row in rows(read("README.md"), "## Limits and defaults"):
        assert set(words(row[1])) <= options


@pytest.mark.parametrize(
    ("told", "name"),
    [
        pytest.param(row[0], words(row[1])[0], id=words(row[1])[0])
        for row in rows(read("docs/architecture.md"), "## Numbers")
    ],
)
def test_number_is_that_of_the_code(told: str, name: str) -> None:
    parts = name.split(".")
    module = next(
        ".".join(parts[:end])
        for end in range(len(parts), 0, -1)
        if (REPOSITORY / "src" / Path(*parts[:end])).with_suffix(".py").is_file()
    )
    value: object = importlib.import_module(module)
    for part in parts[module.count(".") + 1 :]:
        value = getattr(value, part)
    assert float(told) == value


def test_profiles_allow_as_many_calls_as_told() -> None:
    counts = {
        name: len(nsbox.SeccompPolicy.named(name).allowed)
        for name in ("default", "strict", "docker")
    }
    text = " ".join(read("README.md").split())
    assert (
        f"{counts['default']} system calls (`default`; `strict` has {counts['strict']}, "
        f"`docker` {counts['docker']})"
    ) in text


# -- tests and links -------------------------------------------------------------------------------


@functools.cache
def functions_in(module: str) -> frozenset[str]:
    path = REPOSITORY / "tests" / f"{module}.py"
    assert path.is_file(), f"{path} does not exist"
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def assert_tests_exist(named: list[str]) -> None:
    module = ""
    for word in named:
        path, _, function = word.rpartition("::")
        module = path or module  # `::name` is in the module named before it
        assert function in functions_in(module), f"{module}.py has no {function}"


THREATS = rows(read("docs/threat-model.md"), "## Threats, controls, tests")


@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in THREATS])
def test_threat_has_a_control_and_tests_that_exist(row: list[str]) -> None:
    threat, control, tests = row
    assert threat
    assert control
    named = words(tests)
    assert named, "a control without a test that attacks it"
    assert_tests_exist(named)


def test_every_attack_is_in_the_threat_table() -> None:
    told = {word.rpartition("::")[2] for row in THREATS for word in words(row[2])}
    for path in sorted((REPOSITORY / "tests/escape").glob("test_*.py")):
        written = {name for name in functions_in(f"escape/{path.stem}") if name.startswith("test_")}
        assert written <= told, f"{path.name}: attacks that docs/threat-model.md does not list"


def promises() -> list[list[str]]:
    text = read("docs/promises.md")
    heads = [m[1] for m in re.finditer(r"\n(#+ [^\n]+)\n(?:\n[^|#][^\n]*\n)*\n\|", text)]
    found = [row for head in heads for row in rows(text, head)]
    assert len(found) == text.count("\n| ") - len(heads), "a table that is not read"
    return found


@pytest.mark.static
@pytest.mark.parametrize("row", [pytest.param(row, id=row[0]) for row in promises()])
def test_promise_has_a_proof_that_exists_or_says_that_it_has_none(row: list[str]) -> None:
    promise, number, proof = row
    assert promise
    named = words(proof)
    assert_tests_exist([word for word in named if "::" in word])
    if proof.startswith("measured, not tested"):
        assert (REPOSITORY / named[0]).is_file()
        assert named[0].startswith("benchmarks/")
        told = f"{read('README.md')} {read('docs/pool.md')} {read('benchmarks/README.md')}"
        for ratio in re.findall(r"\b\d+\.\d+\b", number):
            assert re.search(rf"(?<![\d.]){re.escape(ratio)}(?![\d.])", told), ratio
    else:
        assert "**unproven**" in proof or any("::" in word for word in named)


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_resolve(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), f"{link} leads nowhere"
        assert file.is_relative_to(REPOSITORY)
        if anchor:
            assert anchor in anchors(file / "README.md" if file.is_dir() else file), link


@pytest.mark.parametrize("path", DOCUMENTS[:3] + [p for p in DOCUMENTS if p.parent.name == "docs"],
                         ids=lambda path: path.name)  # fmt: skip
def test_names_of_the_package_exist(path: Path) -> None:
    for name in re.findall(r"\bnsbox\.([A-Z]\w+)\b", path.read_text()):
        assert name in nsbox.__all__


def test_changelog_tells_the_newest_release() -> None:
    unreleased, newest, *_ = re.findall(r"^## (.*)$", read("CHANGELOG.md"), re.M)
    assert unreleased == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(nsbox.__version__)}\] - \d{{4}}-\d\d-\d\d", newest)


def test_package_index_shows_no_link_that_leads_nowhere() -> None:
    shown = importlib.metadata.metadata("nsbox")
    text = str(shown.json["description"])
    assert "docs/api.md has the other names" in text
    assert all(link.startswith(("#", "https://")) for link in re.findall(r"\]\(([^)]*)\)", text))
    assert (shown["Version"], shown["License-Expression"]) == (nsbox.__version__, "Apache-2.0")


def test_versions_of_frameworks_are_those_that_are_installed() -> None:
    told = rows(read("docs/frameworks.md"), "## What holds everywhere")
    versions = " ".join(row[1] for row in told)
    config = configparser.ConfigParser()
    config.read_string(read("setup.cfg"))
    for line in config["options.extras_require"]["frameworks"].split("\n")[1:]:
        name, _, version = line.partition(" >= ")
        assert version in versions, name
