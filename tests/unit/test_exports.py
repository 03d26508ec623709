# SPDX-License-Identifier: Apache-2.0
"""The public face: every name once, documented, and loaded on first use only."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import nsbox
from nsbox import errors

pytestmark = pytest.mark.static

SOURCE = Path(nsbox.__file__).parent
PUBLIC = sorted(set(nsbox.__all__) - {"__version__"})


def test_all_is_sorted_complete_and_without_repetition() -> None:
    assert len(nsbox.__all__) == len(set(nsbox.__all__))
    assert dir(nsbox) == sorted(nsbox.__all__)
    assert sorted(PUBLIC) == PUBLIC


def test_type_checkers_see_the_names_that_are_loaded_lazily() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    shown = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
        if alias.asname == alias.name
    }
    assert shown == nsbox._HOME_OF


@pytest.mark.parametrize("name", PUBLIC)
def test_name_exists_and_is_documented(name: str) -> None:
    value = getattr(nsbox, name)
    if isinstance(value, type | FunctionType):
        assert value.__module__ == nsbox._HOME_OF[name]
        assert inspect.getdoc(value), f"{name} has no docstring"


def public_members() -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = []
    for name in PUBLIC:
        value = getattr(nsbox, name)
        if not isinstance(value, type) or issubclass(value, enum.Enum):
            continue
        for member, item in vars(value).items():
            if member.startswith("_"):
                continue
            if isinstance(item, property | FunctionType | classmethod | staticmethod):
                found.append((f"{name}.{member}", item))
    return found


@pytest.mark.parametrize("name", [name for name, _ in public_members()])
def test_method_and_property_is_documented(name: str) -> None:
    assert inspect.getdoc(dict(public_members())[name]), f"{name} has no docstring"


NAMED = " ".join(
    code
    for path in (Path(__file__).parents[2] / "docs").glob("*.md")
    for code in re.findall("`+[^`]+`+", path.read_text())
)


def test_what_classes_show_is_what_the_documents_name() -> None:
    """What is no user's is underscored, or a method of a class below the public one."""
    silent = []
    for name in PUBLIC:
        value = getattr(nsbox, name)
        if isinstance(value, type) and not issubclass(value, Exception):
            inherited = {*dir(dict), *dir(enum.Enum)}
            fields = getattr(value, "__dataclass_fields__", {})
            names = [n for n in {*dir(value), *fields} if n[0] != "_" and n not in inherited]
            silent += [f"{name}.{item}" for item in names if not re.search(rf"\b{item}\b", NAMED)]
    assert not silent


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'nsbox' has no attribute 'Sandbox'"):
        nsbox.Sandbox  # noqa: B018 - the access is the test


def test_each_public_exception_is_raised_by_a_test() -> None:
    """In a test of its own, or in a program that one starts."""
    tests = "".join(path.read_text() for path in Path(__file__).parents[1].rglob("*.py"))
    raised = " ".join(re.findall(r"(?:pytest\.raises\(|except )[^:\n]*", tests))
    named = vars(errors) | {name: getattr(nsbox, name) for name in PUBLIC}
    for name, value in named.items():
        if isinstance(value, type) and issubclass(value, errors.NsboxError):
            assert re.search(rf"\b{name}\b", raised), f"no test raises {name}"


def test_public_exceptions_are_all_of_one_family() -> None:
    errors = [
        value
        for name in PUBLIC
        if isinstance(value := getattr(nsbox, name), type) and issubclass(value, BaseException)
    ]
    assert len(errors) >= 12
    assert all(issubclass(error, nsbox.NsboxError) for error in errors)
    from nsbox import errors as module

    defined = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    assert defined <= set(nsbox.__all__), "every exception can be caught by its public name"


def loaded_by(statement: str) -> set[str]:
    """Return the modules that `statement` loads in a fresh interpreter."""
    code = (
        f"import sys; sys.path.insert(0, {str(SOURCE.parent)!r}); before = set(sys.modules)\n"
        f"{statement}\n"
        "print('\\n'.join(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_but_the_face() -> None:
    loaded = {name for name in loaded_by("import nsbox") if name.startswith("nsbox")}
    assert loaded == {"nsbox"}


@pytest.mark.parametrize(
    "name", ["Config", "Result", "NsboxError", "SeccompPolicy", "Function", "FunctionVersion"]
)
def test_values_load_no_third_party_package_and_no_kernel_binding(name: str) -> None:
    loaded = loaded_by(f"import nsbox; nsbox.{name}")
    roots = {module.partition(".")[0] for module in loaded}
    assert not roots & {"click", "psutil", "pyseccomp", "cgroupspy", "prctl", "_prctl", "ctypes"}
    assert "nsbox.environment.managed" not in loaded


def test_modules_of_the_package_are_no_public_names() -> None:
    assert not [name for name in PUBLIC if isinstance(getattr(nsbox, name), ModuleType)]


def test_help_tells_of_every_field() -> None:
    for name in PUBLIC:
        value = getattr(nsbox, name)
        if not dataclasses.is_dataclass(value):
            continue
        fields = [item.name for item in dataclasses.fields(value) if item.name[0] != "_"]
        text = str(value.__doc__)
        silent = [
            field
            for field in fields
            if not re.search(rf"^ +(\w+, )*{field}(, \w+)*: ", text, re.MULTILINE)
        ]
        assert len(fields) <= 5 or not silent, f"help({name}) says nothing of {silent}"
