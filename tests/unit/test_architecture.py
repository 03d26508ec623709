# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, read off the syntax trees: who imports whom, and what is done where."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import MAGIC_NUMBER
from itertools import pairwise, zip_longest
from pathlib import Path

import pytest

import nsbox
from nsbox import errors
from nsbox.guest.executed import executed_worker
from nsbox.supervisor import launcher

pytestmark = pytest.mark.static

SOURCE = Path(nsbox.__file__).parent

# A module may import from its own room and from rooms below it. A room is a package, and what else
# stands beside it; docs/architecture.md draws the same picture.
ROOMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("cli", ("cli", "__main__")),
    ("host", ("host",)),
    ("observe", ("observe", "prometheus")),
    ("pool", ("pool",)),
    ("environment", ("environment",)),
    ("functions", ("functions",)),
    ("supervisor", ("supervisor",)),
    ("launcher", ("launcher",)),
    ("guest", ("guest",)),
    ("isolation", ("isolation",)),
    ("store", ("store",)),
    ("values", ("values",)),
    ("seccomp", ("seccomp",)),
    ("linux", ("linux",)),
    ("errors", ("errors",)),
)

# One process each: neither side may load the other's code. `launcher.messages` and
# `guest.protocol`, the two descriptions of messages, belong to both.
LAUNCHER_SIDE = {
    "launcher.main", "launcher.server", "launcher.birth", "launcher.identity", "launcher.janitor",
    "launcher.layouts", "launcher.resources", "launcher.templates", "launcher.template",
    "launcher.inside", "launcher.steps", "launcher.instance", "guest.init", "guest.exec",
    "guest.files", "guest.processes", "guest.bootstrap",
    "guest.reset", "guest.prewarm",
}  # fmt: skip
SHARED = {
    "launcher", "launcher.messages", "launcher.protocol", "launcher.spawn", "guest",
    "guest.protocol", "guest.runtime", "guest.log_setup", "guest.failures", "guest.standard",
    "values.json_text",
}  # fmt: skip

MAX_LINES = 800

# Too slow to start (measured: dataclasses 28 ms, typing 22, subprocess 36; a bare interpreter 10)
# or too powerful for the process that every environment is a clone of.
NOT_IN_LAUNCHER = {
    "argparse", "asyncio", "click", "collections.abc.Callable", "dataclasses", "hashlib", "inspect",
    "logging", "multiprocessing", "nsbox.values.config", "nsbox.values.result", "pathlib", "pickle",
    "psutil",
    "pyseccomp", "shutil", "site", "ssl", "subprocess", "tempfile", "threading", "typing", "urllib",
}  # fmt: skip


@dataclass
class Module:
    """A source file, parsed."""

    name: str
    path: Path = field(repr=False)
    tree: ast.Module = field(repr=False)
    lines: int
    imports: set[str] = field(default_factory=set, repr=False)
    """Full names of what it imports at run time, as modules or as names in them."""
    annotations: set[str] = field(default_factory=set, repr=False)
    """Full names of what it imports for type checkers alone, or starts with ``-m``."""
    calls: set[str] = field(default_factory=set, repr=False)
    """What it calls, as written: ``os.fork``."""

    @property
    def nsbox_imports(self) -> set[str]:
        """Modules of nsbox that it imports, relative to the package, itself excepted."""
        return self._own(self.imports)

    @property
    def knows(self) -> set[str]:
        """As `nsbox_imports`, whoever reads the import, and with what it starts."""
        return self._own(self.imports | self.annotations)

    def _own(self, names: set[str]) -> set[str]:
        found = {to_module(name.removeprefix("nsbox.")) for name in names if is_own(name)}
        return found - {self.name}

    @property
    def external_roots(self) -> set[str]:
        return {name.partition(".")[0] for name in self.imports if not is_own(name)}


def is_own(name: str) -> bool:
    return name.startswith("nsbox.")


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without the blocks that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for other in node.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield node
        yield from run_time_nodes(node)


def parse(path: Path) -> Module:
    text = path.read_text()
    relative = path.relative_to(SOURCE).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    module = Module(".".join(parts), path, ast.parse(text), len(text.splitlines()))
    for node in run_time_nodes(module.tree):
        module.imports |= imported(node)
        if isinstance(node, ast.Call):
            module.calls.add(ast.unparse(node.func))
    for node in ast.walk(module.tree):
        module.annotations |= imported(node)
        if isinstance(node, ast.List | ast.Tuple):
            words = [getattr(item, "value", None) for item in node.elts]
            module.annotations |= {str(after) for word, after in pairwise(words) if word == "-m"}
    return module


def imported(node: ast.AST) -> set[str]:
    """Return the full names that a statement imports; none for any other node."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


PATHS = sorted(SOURCE.rglob("*.py"))
NAMES = {
    ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for parts in (path.relative_to(SOURCE).with_suffix("").parts for path in PATHS)
}


def to_module(name: str) -> str:
    """Return the module that an imported name is, or is in."""
    while name not in NAMES:
        name = name.rpartition(".")[0]
    return name


MODULES = {module.name: module for module in map(parse, PATHS)}


def rule(offences: Callable[[Module], Iterable[object]]) -> Callable[[], None]:
    """Make one test of a rule for every module: `offences` says what is against it in one."""

    def test() -> None:
        found = [f"{m.name or 'nsbox'}: {what}" for m in MODULES.values() for what in offences(m)]
        assert not found, "\n" + "\n".join(found)

    test.__doc__ = offences.__doc__
    return test


def room_of(name: str) -> int:
    for index, (_, members) in enumerate(ROOMS):
        if name.partition(".")[0] in members:
            return index
    raise AssertionError(f"{name} is in no room: give it one in ROOMS and docs/architecture.md")


def test_the_package_is_what_is_looked_at() -> None:
    assert len(MODULES) >= 30
    assert {
        "",
        "environment.environment",
        "launcher.server",
        "isolation.cgroups.v2",
        "linux.calls",
    } <= NAMES


# -- imports -----------------------------------------------------------------------------------


@rule
def test_imports_go_downwards(module: Module) -> Iterator[str]:
    if not module.name:
        # The package's own names are loaded on first use.
        yield from (f"imports {name} when it is imported itself" for name in module.nsbox_imports)
        return
    own = room_of(module.name)
    for name in sorted(module.knows - {""}):
        if room_of(name) < own:
            yield f"imports {name} from above ({ROOMS[own][0]})"


@rule
def test_host_and_launcher_share_messages_only(module: Module) -> Iterator[str]:
    # What a module imports from launcher/ and guest/; isolation and linux are tools of both.
    processes = {
        name
        for name in module.nsbox_imports
        if name.partition(".")[0] in ("launcher", "guest") and name not in SHARED
    }
    if module.name in LAUNCHER_SIDE:
        wrong = processes - LAUNCHER_SIDE
        # The launcher is told a plain spec.
        wrong |= {name for name in module.nsbox_imports if name.startswith("values.")} - SHARED
    elif module.name in SHARED:
        wrong = processes
    elif module.name == "cli.plan":
        # It prints the steps of a birth and runs none; the command line is no program of a user's.
        wrong = processes - {"launcher.birth", "supervisor.launcher"}
    else:
        wrong = processes & LAUNCHER_SIDE
    yield from (f"imports {name}, which is another process's" for name in sorted(wrong))


def test_rooms_and_modules_have_no_circle_and_the_drawing_is_true() -> None:
    graph = Path(__file__).parents[2] / "scripts" / "graph"
    done = subprocess.run([sys.executable, graph, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


HOMES: dict[str, tuple[str, ...]] = {
    "ctypes": ("linux.",),
    "prctl": ("isolation.privileges",),
    "_prctl": (),
    "pyseccomp": ("seccomp.compiler",),
    "cgroupspy": ("isolation.cgroups.",),
    "click": ("cli",),
    "psutil": ("cli",),
    "prometheus_client": ("observe.prometheus",),
    "pickle": (),
    # By both ends of one socket, and of code made for the same version of Python.
    "marshal": ("launcher.template", "launcher.templates", "guest.executed"),
    "shelve": (),
    "multiprocessing": (),
    "pytest": (),
}


@rule
def test_package_has_one_home(module: Module) -> Iterator[str]:
    for package in sorted(module.external_roots & set(HOMES)):
        if not module.name.startswith(HOMES[package] or ("nowhere",)):
            yield f"imports {package}, which is for {HOMES[package] or 'nobody'}"


def test_only_declared_packages_are_imported() -> None:
    roots = set().union(*(module.external_roots for module in MODULES.values()))
    declared = {"prctl", "pyseccomp", "cgroupspy", "psutil", "click"}
    declared |= {"prometheus_client", "msgspec"}  # extras
    assert roots - sys.stdlib_module_names - declared == {"nsbox"}


# -- what is done where ------------------------------------------------------------------------


@rule
def test_only_the_launcher_forks(module: Module) -> set[str]:
    workers = ("guest.bootstrap", "guest.runtime", "linux.image")
    may = module.name.startswith(("launcher.", "isolation.")) or module.name in workers
    if may and module.name != "launcher.protocol":
        return set()
    return module.calls & {"os.fork", "os.forkpty", "pty.fork", "calls.clone3", "calls.fork"}


@rule
def test_nothing_runs_between_fork_and_exec_in_the_host(module: Module) -> Iterator[str]:
    yield from module.calls & {"os.system", "os.popen"}
    for node in run_time_nodes(module.tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            text = f"{keyword.arg}={ast.unparse(keyword.value)}"
            if keyword.arg == "preexec_fn" or (keyword.arg == "shell" and text != "shell=False"):
                yield f"line {node.lineno}: {text}"  # type: ignore[attr-defined]


@rule
def test_printing_and_leaving_is_for_the_command_line(module: Module) -> set[str]:
    # Probes are a program: what they print is their answer.
    if module.name.startswith(("cli", "__main__", "host.probes")):
        return set()
    return module.calls & {"print", "sys.exit", "exit", "input"}


@rule
def test_no_run_time_check_is_an_assert(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: python -O removes it"


@rule
def test_no_library_is_searched_for_and_nothing_evaluated(module: Module) -> Iterator[str]:
    # ctypes.util.find_library starts subprocesses.
    yield from (call for call in module.calls if call.endswith("find_library"))
    yield from module.calls & {"eval", "exec", "compile", "__import__"}


@rule
def test_time_limits_do_not_follow_the_wall_clock(module: Module) -> Iterator[str]:
    if "time.time" in module.calls:
        yield "time.time: a clock that somebody sets back stops a deadline"


@rule
def test_system_call_errors_name_a_system_call(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "SyscallError":
            name = node.args[0]
            if isinstance(name, ast.Constant) and not re.fullmatch("[a-z0-9_]+", str(name.value)):
                yield f"line {node.lineno}: {name.value!r}"


@rule
def test_nobody_reaches_into_the_privates_of_another_module(module: Module) -> Iterator[str]:
    own = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
            own.add(node.attr)  # perhaps a base's
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            is_known = node.attr in own or ast.unparse(node.value) in ("os", "sys")
            if not is_known:
                yield f"line {node.lineno}: {ast.unparse(node)}"


# -- form --------------------------------------------------------------------------------------


@rule
def test_module_is_short(module: Module) -> Iterator[str]:
    if module.lines > MAX_LINES:
        yield f"{module.lines} lines; over {MAX_LINES} means two concerns"


@rule
def test_module_begins_with_licence_and_docstring(module: Module) -> Iterator[str]:
    first, second = module.path.read_text().split("\n", 2)[:2]
    if first != "# SPDX-License-Identifier: Apache-2.0":
        yield first
    if not second.startswith('"""') or not ast.get_docstring(module.tree):
        yield second


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node.name, node
            # A derived class's methods may be those that its base documents.
            if isinstance(node, ast.ClassDef) and not node.bases:
                for item in node.body:
                    if isinstance(item, kinds) and not item.name.startswith("_"):
                        yield f"{node.name}.{item.name}", item


@rule
def test_public_definition_has_a_docstring(module: Module) -> Iterator[str]:
    for name, node in public_definitions(module.tree):
        if not ast.get_docstring(node) and not is_overload_or_setter(node):  # type: ignore[arg-type]
            yield name


def is_overload_or_setter(node: ast.AST) -> bool:
    words = [ast.unparse(item) for item in getattr(node, "decorator_list", [])]
    return any(word == "overload" or word.endswith(".setter") for word in words)


def attributes_of(node: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """Yield the public attributes of a class, and whether a string follows the annotation."""
    for item, after in zip_longest(node.body, node.body[1:]):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id, isinstance(getattr(after, "value", None), ast.Constant)
        elif isinstance(item, ast.FunctionDef) and item.name == "__init__":
            for inner in ast.walk(item):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    yield inner.attr, False


@rule
def test_each_attribute_of_a_class_with_more_than_five_has_a_line(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        # The keys of a TypedDict (total=) are told by who takes them.
        if isinstance(node, ast.ClassDef) and not node.keywords:
            found = dict(sorted(attributes_of(node)))
            public = {name: is_told for name, is_told in found.items() if name[0] != "_"}
            text = ast.get_docstring(node) or ""
            for name, is_told in public.items() if len(public) > 5 else ():
                if not is_told and not re.search(rf"(?m)^ +(\w+, )*{name}\b[^:\n]*:", text):
                    yield f"{node.name}.{name}"


EXCEPTIONS = sorted(
    name
    for name in nsbox.__all__
    if isinstance(value := getattr(nsbox, name), type) and issubclass(value, nsbox.NsboxError)
)


def test_exceptions_are_used() -> None:
    calls = {call.rpartition(".")[2] for module in MODULES.values() for call in module.calls}
    assert set(EXCEPTIONS) - calls <= {"NsboxError", "InvokeError"}, "nothing raises them"


def test_exceptions_are_drawn_in_the_docstring() -> None:
    drawn = [name for name in EXCEPTIONS if f" {name} " in f" {errors.__doc__} ".replace("\n", " ")]
    assert drawn == EXCEPTIONS


# -- what a start of the launcher loads ----------------------------------------------------------


def loaded_by(module: str) -> set[str]:
    code = (
        f"import sys; sys.path[:0] = {launcher.import_paths()!r}\n"
        f"import {module}\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True, env={}
    )
    return set(done.stdout.split())


def test_launcher_starts_light() -> None:
    loaded = loaded_by("nsbox.launcher.server")
    assert not loaded & (NOT_IN_LAUNCHER | {"json", "re"})
    # socket brings enum and selectors, signal brings enum; nothing else of that size may come.
    assert len(loaded) < 130, sorted(loaded)


def test_template_is_small() -> None:
    loaded = loaded_by("nsbox.launcher.template")
    assert "nsbox.guest.init" in loaded, (
        "PID 1 of every environment is a clone: nothing comes later"
    )
    # Every page of them is one more to copy for each environment.
    assert not loaded & (NOT_IN_LAUNCHER | {"json", "socket", "signal", "enum", "re", "selectors"})
    assert len(loaded) < 84, sorted(loaded)  # Python 3.13 has 80


@pytest.mark.parametrize("is_same", [True, False], ids=["same Python", "another Python"])
def test_executed_worker_starts_light(is_same: bool) -> None:
    ours, theirs = socket.socketpair()
    program, codes, sources = executed_worker(theirs.fileno())
    words = [program, codes, ""]
    if not is_same:
        words = [program.replace(repr(MAGIC_NUMBER), "b''"), "", sources]
    assert max(map(len, executed_worker(3))) < 128 << 10  # execve(2), MAX_ARG_STRLEN
    ours.shutdown(socket.SHUT_WR)
    argv = [sys.executable, "-I", "-S", "-X", "importtime", "-c", *words]
    done = subprocess.run(argv, capture_output=True, text=True, env={}, pass_fds=[theirs.fileno()])
    ours.close()
    theirs.close()
    assert done.returncode == 0, done.stderr  # as a worker ends that the host has let go of
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "_socket" in loaded
    # The Python half of json brings re and enum: as much as all the rest.
    assert not loaded & (NOT_IN_LAUNCHER | {"json", "re", "enum", "socket"})
