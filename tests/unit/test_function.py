# SPDX-License-Identifier: Apache-2.0
"""Function, Layer, FunctionVersion: what is refused, in which words, and what makes a version."""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import SOURCE

from nsbox import (
    Config,
    ConfigError,
    ExecutionEnvironment,
    Function,
    FunctionVersion,
    IoMax,
    Layer,
    Limits,
    Mount,
    SeccompPolicy,
    Store,
    StoreError,
    run,
)
from nsbox.functions.deployment import deployment_of
from nsbox.functions.function import ENV_MAX
from nsbox.store.tree import UNPACKED_MAX


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is the default one too."""
    monkeypatch.setenv("NSBOX_STORE", str(tmp_path / "store"))
    return Store()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A directory with a function in it."""
    directory = tmp_path / "src"
    directory.mkdir()
    (directory / "app.py").write_text("def handler(event, context):\n    return event\n")
    return directory


def make(**changes: Any) -> Function:
    return Function("app.handler", code="/usr/lib", **changes)


# Each row is one thing somebody will write, and words its message must have.
BAD: list[tuple[Callable[[], object], str]] = [
    (Function, "give one of handler and command, got None and None"),
    (lambda: Function("a.b", command=["c"]), "give one of handler and command, got 'a.b' and"),
    (lambda: Function("app"), "handler: 'app' is none; give 'module.function', e.g. 'app.handler'"),
    (lambda: Function(""), "handler: '' is none"),
    (lambda: Function("app."), "handler: 'app.' is none"),
    (lambda: Function(".handler"), "handler: '.handler' is none"),
    (lambda: Function("a..b"), "handler: 'a..b' is none"),
    (lambda: Function("/src/app.handler"), "handler: '/src/app.handler' is none"),
    (lambda: Function("./app.handler"), "handler: './app.handler' is none"),
    (lambda: Function("../app.handler"), "handler: '../app.handler' is none"),
    (lambda: Function("src//app.handler"), "handler: 'src//app.handler' is none"),
    (lambda: Function("src/app"), "handler: 'src/app' is none"),
    (lambda: Function("app.src/handler"), "handler: 'app.src/handler' is none"),
    (lambda: Function("app.lambda"), "handler: 'app.lambda' is none"),
    (lambda: Function("app.py:handler"), "handler: 'app.py:handler' is none"),
    (lambda: Function("a b.c"), "handler: 'a b.c' is none"),
    (lambda: Function("a\0.c"), "handler: .*NUL"),
    (lambda: Function(3), "handler: must be text, got 3"),  # type: ignore[arg-type]
    (lambda: Function(command=[]), r"argv: a command is needed, got \[\]"),
    (lambda: Function(command="cat"), r"argv: give a list of arguments, not the string 'cat'"),
    (
        lambda: Function("a.b", code="/no/such"),
        "code '/no/such': no such file or directory; give a",
    ),
    (lambda: Function("a.b", code=""), "code: a path is needed, got ''"),
    (lambda: Function("a.b", code=7), "code: must be text, got 7"),  # type: ignore[arg-type]
    (lambda: Layer("/no/such"), "layer '/no/such': no such file"),
    (lambda: make(layers="/usr"), "layers: give a list of directories or zip files, got '/usr'"),
    (lambda: make(layers=Layer("/usr")), "layers: give a list"),
    (lambda: make(layers=["/usr"] * 6), "layers: at most 5, got 6; merge some"),
    (lambda: make(layers=[3]), "layer: must be text, got 3"),
    (lambda: make(env={"A": 1}), r"env\['A'\]: must be text, got 1"),
    (lambda: make(env={"A=B": "1"}), "env: 'A=B' is no variable name"),
    (lambda: make(env=5), "env: give a mapping"),
    (lambda: make(env={"A": "\udc80\ud800"}), "stands for no bytes"),
    (lambda: make(env={"A": "x" * ENV_MAX}), f"env: {ENV_MAX + 3} bytes of variables, more than"),
    (lambda: make(timeout=0), "timeout: must be above zero and finite, got 0"),
    (lambda: make(timeout=901), "timeout: at most 900 seconds, got 901"),
    (lambda: make(timeout=float("nan")), "timeout: must be above zero and finite, got nan"),
    (lambda: make(timeout=None), "timeout: must be a number of seconds, got None"),
    (lambda: make(init_timeout=-1), "init_timeout: must be above zero and finite, got -1"),
    (lambda: make(init_timeout=1e6), "init_timeout: at most 900 seconds"),
    (lambda: make(preload="numpy"), "preload: give a list of module names, got 'numpy'"),
    (lambda: make(preload=["a-b"]), "preload: 'a-b' is no module name, such as 'numpy'"),
    (lambda: make(preload=[""]), "preload: '' is no module name"),
    (lambda: make(tenant=""), "tenant: '' is none; give 1 to 256"),
    (lambda: make(tenant="a\nb"), r"tenant: 'a\\nb' is none"),
    (lambda: make(tenant="x" * 257), "tenant: 'x+' is none"),
    (lambda: make(tenant=5), "tenant: must be text, got 5"),
    (lambda: make(name="a b"), "name: 'a b' is none; give 1 to 64"),
    (lambda: make(name=""), "name: '' is none"),
    (lambda: make(start="fork"), "start: must be one of clone, exec, got 'fork'"),
    (lambda: make(reuse="always"), "reuse: must be one of keep, reset, never, got 'always'"),
    (lambda: make(reuse=None), "reuse: must be one of keep, reset, never, got None"),
    (lambda: make(network="all"), "network: must be 'none' or 'host', got 'all'"),
    (lambda: make(limits=5), "limits: must be a Limits value, got 5"),
    (lambda: make(seccomp="none"), "'none'"),
    (lambda: make(tmp_size="x"), "tmp_size: 'x' is no size"),
    (lambda: make(allow_missing={"all"}), "allow_missing: 'all' is none of"),
    (lambda: make(mounts=[Mount.bind("/usr", "/opt")]), "mounts: '/opt' is the place of code or"),
    (
        lambda: make(mounts=[Mount.tmpfs("/var/task/x")]),
        r"mounts: '/var/task/x' is the place of code or layers \(/var/task\)",
    ),
    (lambda: make().replace(handlr="a.b"), "unknown option 'handlr' of Function"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_value_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_all_but_the_handler_are_keywords() -> None:
    with pytest.raises(TypeError):
        Function("app.handler", "/usr")  # type: ignore[call-arg]


def test_values_are_frozen_hashable_and_equal(code: Path) -> None:
    one = Function(
        "app.handler", code=code, layers=["/usr", Layer("/usr")], env={"B": "2", "A": "1"}
    )
    two = Function(
        "app.handler", code=str(code), layers=(Layer("/usr"), "/usr"), env=[("A", "1"), ("B", "2")]
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one.layers == (Layer("/usr"), Layer("/usr"))
    assert one.env == (("A", "1"), ("B", "2"))
    assert one.replace(timeout=5).timeout == 5
    assert one.replace() == one
    assert copy.deepcopy(one) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.timeout = 5  # type: ignore[misc]


def test_defaults_are_those_of_lambda() -> None:
    function = make()
    assert (function.timeout, function.init_timeout) == (3, 10)
    assert (function.start, function.reuse, function.network) == ("clone", "keep", "none")
    assert function.limits == Limits()
    assert function.seccomp == SeccompPolicy.default()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda: Function("app.handler"), "app-handler"),
        (lambda: Function("src/my-app.handler"), "src-my-app-handler"),
        (lambda: Function("pkg.mod.f"), "pkg-mod-f"),
        (lambda: Function(command=["/bin/cat", "-"]), "cat"),
        (lambda: Function(command=["./+/++"]), "function"),
        (lambda: Function("app.handler", name="mine"), "mine"),
        (lambda: Function(f"{'a' * 100}.handler"), "a" * 64),
    ],
)
def test_name(function: Callable[[], Function], name: str) -> None:
    assert function().name == name


def test_values_of_variables_are_not_shown(code: Path, store: Store) -> None:
    version = Function("app.handler", code=code, env={"TOKEN": "s3cret"}).publish()
    assert "s3cret" not in repr(version)
    assert "s3cret" not in repr(version.function)
    assert "s3cret" not in repr(version.config)
    assert version.env == (("TOKEN", "s3cret"),)


def test_making_a_function_touches_no_file(code: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(tmp_path))
    Function("app.handler", code=code)
    assert sorted(os.listdir(tmp_path)) == before


# -- versions ------------------------------------------------------------------------------------


def test_version_has_code_and_layers(code: Path, tmp_path: Path, store: Store) -> None:
    layer = tmp_path / "layer/python"
    layer.mkdir(parents=True)
    (layer / "lib.py").write_text("x = 1\n")
    data = tmp_path / "data"
    data.mkdir()
    version = Function(
        "app.handler",
        code=code,
        layers=[layer.parent],
        env={"A": "1"},
        mounts=[Mount.bind(data, "/data")],
        limits=Limits(memory_max="256M"),
        seccomp="strict",
        tmp_size="1M",
        tenant="t",
    ).publish()
    assert version.code_path is not None
    assert version.opt_path is not None
    assert (Path(version.code_path) / "app.py").read_bytes() == (code / "app.py").read_bytes()
    assert (Path(version.opt_path) / "python/lib.py").read_text() == "x = 1\n"
    assert [(m.source, m.destination, m.options) for m in version.config.mounts] == [
        (str(data), "/data", ("ro",)),
        (version.code_path, "/var/task", ("ro",)),
        (version.opt_path, "/opt", ("ro",)),
    ]
    assert version.config == Config(
        mounts=version.config.mounts,
        limits=Limits(memory_max="256M"),
        seccomp=SeccompPolicy.strict(),
        tmp_size="1M",
        cwd="/var/task",
    )
    assert version.config.env == (), "the launcher sees the config; variables are not in it"
    assert len(version.digest) == 64
    assert version.id == version.digest[:16]
    assert version.key == (version.digest, "t")
    assert version.name == "app-handler"
    version.verify()


def test_command_needs_no_code(store: Store) -> None:
    version = Function(command=["/bin/cat"]).publish()
    assert (version.code_path, version.opt_path, version.config.mounts) == (None, None, ())
    assert version.config.cwd == "/tmp"
    version.verify()


def test_directory_and_zip_file_are_the_same_version(
    code: Path, tmp_path: Path, store: Store
) -> None:
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", code)
    one = Function("app.handler", code=code).publish()
    two = Function("app.handler", code=packed).publish()
    assert one == two
    assert hash(one) == hash(two)
    assert one.code_path == two.code_path
    assert len({one, two}) == 1


def test_one_byte_makes_another_version(code: Path, store: Store) -> None:
    function = Function("app.handler", code=code)
    one = function.publish()
    assert one.code_path is not None
    content = (code / "app.py").read_bytes()
    (code / "app.py").write_bytes(content.replace(b"event, c", b"event, d"))
    two = function.publish()
    assert one.digest != two.digest
    assert one != two
    assert one.code_path != two.code_path
    assert (Path(one.code_path) / "app.py").read_bytes() == content, "the first stays as it was"
    (code / "app.py").chmod(0o755)
    assert function.publish().digest != two.digest


@pytest.mark.parametrize(
    "change",
    [
        {"env": {"A": "1"}},
        {"env": {"A": "2"}},
        {"limits": Limits(memory_max="256M")},
        {"limits": Limits(memory_max="512M")},  # the default, but named: enforced or refused
        {"limits": Limits(io_max=(IoMax(device="1:1", rbps=5),))},
        {"network": "host"},
        {"seccomp": "strict"},
        {"timeout": 4},
        {"init_timeout": 11},
        {"preload": ["json"]},
        {"preload": ["json", "csv"]},
        {"name": "other"},
        {"start": "exec"},
        {"reuse": "reset"},
        {"mounts": [Mount.bind("/usr", "/data")]},
        {"mounts": [Mount.bind("/usr", "/other")]},
        {"tmp_size": "1M"},
        {"rootfs": "/usr"},
        {"allow_missing": {"cgroup.memory"}},
        {"handler": "app.other"},
        {"layers": ["LAYER"]},
        {"layers": ["LAYER", "CODE"]},
        {"layers": ["CODE", "LAYER"]},
        {"code": "LAYER"},
        {"handler": None, "command": ["/bin/cat"]},
    ],
    ids=str,
)
def test_every_field_makes_another_version(
    change: dict[str, Any], code: Path, tmp_path: Path, store: Store
) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "lib.py").write_text("x = 1\n")
    places = {"LAYER": str(layer), "CODE": str(code)}
    change = {
        key: [places.get(item, item) for item in value]
        if key == "layers"
        else places.get(value, value)
        if key == "code"
        else value
        for key, value in change.items()
    }
    base = Function("app.handler", code=code)
    changed = base.replace(**changes) if (changes := change) else base
    one, two = base.publish(), changed.publish()
    assert one.digest != two.digest
    assert one != two
    assert changed.publish() == two, "the same again is the same version"


def test_tenant_is_in_the_key_and_not_in_the_digest(code: Path, store: Store) -> None:
    one, two = (Function("app.handler", code=code, tenant=t).publish() for t in ("a", "b"))
    assert one.digest == two.digest
    assert one.key != two.key
    assert one != two


def test_tenants_of_a_function_have_one_config(code: Path, store: Store) -> None:
    version = Function("app.handler", code=code).publish()
    for other in (version, *map(version.for_tenant, "ab")):
        assert deployment_of(other).config is version.birth_config, "so that one plan is made"


def test_digest_does_not_depend_on_places_or_the_hash_seed(code: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(code, elsewhere)
    (elsewhere / "app.py").touch()
    program = textwrap.dedent("""
        import sys, nsbox
        f = nsbox.Function("app.handler", code=sys.argv[1], env={"B": "2", "A": "1"},
                           limits=nsbox.Limits(pids_max=9, open_files=99), allow_missing={"seccomp",
                           "cgroup.cpu", "cgroup.io"})
        print(f.publish(sys.argv[2]).digest)
    """)
    found = {
        subprocess.run(
            [sys.executable, "-c", program, str(source), str(tmp_path / f"store{n}")],
            env={"PYTHONPATH": SOURCE, "PYTHONHASHSEED": str(n), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for n, source in enumerate((code, elsewhere))
    }
    assert len(found) == 1


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", exclude_characters="=\0"), min_size=1, max_size=9),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40),
        max_size=6,
    )
)
def test_variables_are_kept_as_they_are(env: dict[str, str]) -> None:
    function = Function(command=["/bin/cat"], env=env)
    assert dict(function.env) == env
    assert function == Function(command=["/bin/cat"], env=dict(reversed(list(env.items()))))


# -- layers --------------------------------------------------------------------------------------


def test_later_layers_win(tmp_path: Path, store: Store) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for layer in (first, second):
        (layer / "python").mkdir(parents=True)
        (layer / "python/both.py").write_text(layer.name)
        (layer / f"only{layer.name}").write_text(layer.name)
    (first / "shape").mkdir()
    (first / "shape/inner").write_text("1")
    (second / "shape").write_text("now a file")
    (first / "other").write_text("a file")
    (second / "other").mkdir()
    version = Function(command=["/bin/cat"], layers=[first, second]).publish()
    opt = Path(version.opt_path or "")
    assert (opt / "python/both.py").read_text() == "2"
    assert sorted(os.listdir(opt)) == ["only1", "only2", "other", "python", "shape"]
    assert (opt / "shape").read_text() == "now a file"
    assert (opt / "other").is_dir()
    back = Function(command=["/bin/cat"], layers=[second, first]).publish()
    assert (Path(back.opt_path or "") / "python/both.py").read_text() == "1"
    assert (Path(back.opt_path or "") / "shape/inner").read_text() == "1"
    assert back.digest != version.digest
    version.verify()


def test_layers_that_are_one_tree_are_kept_once(tmp_path: Path, store: Store) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    (layer / "x").write_text("x")
    one = Function(command=["/bin/cat"], layers=[layer]).publish()
    two = Function(command=["/bin/cat"], layers=[layer, layer]).publish()
    assert one.opt_path == two.opt_path
    assert one.digest != two.digest


@pytest.mark.parametrize("part", ["code", "layers"])
def test_a_store_in_what_is_published_is_refused(part: str, code: Path, tmp_path: Path) -> None:
    inside = code / "store"
    (tmp_path / "link").symlink_to(inside)
    sources = {"code": code} if part == "code" else {"layers": [code]}
    function = Function(
        handler="app.handler" if part == "code" else None,
        command=None if part == "code" else ["/bin/cat"],
        **sources,
    )
    for place in (inside, inside / "deeper", tmp_path / "link"):
        with pytest.raises(ConfigError, match=r"the store .* is in it; keep it elsewhere"):
            function.publish(place)
    assert not inside.exists()


def test_links_that_only_the_union_leads_out_are_refused(tmp_path: Path, store: Store) -> None:
    # Each layer is sound: in the first, a/b/up is a directory; in the second, a link to the top.
    first, second = tmp_path / "1", tmp_path / "2"
    (first / "a/b/up").mkdir(parents=True)
    (first / "a/b/x").write_text("x")
    (first / "a/b/evil").symlink_to("up/../x")
    (second / "a/b").mkdir(parents=True)
    (second / "a/b/up").symlink_to("../..")
    function = Function(command=["/bin/cat"], layers=[first, second])
    for layer in (first, second):
        Function(command=["/bin/cat"], layers=[layer]).publish()
    with pytest.raises(ConfigError, match=r"layers: the link 'a/b/evil' .* leads out of the tree"):
        function.publish()


def test_code_and_layers_together_are_limited(tmp_path: Path, store: Store) -> None:
    names = []
    for n in (1, 2):
        directory = tmp_path / str(n)
        directory.mkdir()
        with (directory / "big").open("wb") as file:
            file.truncate(UNPACKED_MAX // 2 + 1)
        names.append(directory)
    with pytest.raises(ConfigError, match=f"code and layers: .* more than {UNPACKED_MAX} together"):
        Function(command=["/bin/cat"], code=names[0], layers=[names[1]]).publish()


# -- importable modules --------------------------------------------------------------------------


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in sys.path."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    return directory


BOMB = "raise SystemExit('the module was imported by the host')\n"


def test_module_is_found_and_not_imported(importable: Path, store: Store) -> None:
    (importable / "nsbox_test_module.py").write_text(BOMB)
    (importable / "beside.py").write_text("")
    version = Function("nsbox_test_module.handler").publish()
    assert os.listdir(version.code_path) == ["nsbox_test_module.py"]
    assert "nsbox_test_module" not in sys.modules


def test_package_is_taken_whole_and_not_imported(importable: Path, store: Store) -> None:
    package = importable / "nsbox_test_package"
    (package / "sub").mkdir(parents=True)
    for path in ("__init__.py", "mod.py", "sub/__init__.py"):
        (package / path).write_text(BOMB)
    version = Function("nsbox_test_package.mod.handler").publish()
    tree = Path(version.code_path or "")
    found = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.py"))
    assert found == [
        f"nsbox_test_package/{p}" for p in ("__init__.py", "mod.py", "sub/__init__.py")
    ]
    assert not [name for name in sys.modules if name.startswith("nsbox_test_package")]


def test_namespace_package_of_one_directory_is_taken(importable: Path, store: Store) -> None:
    (importable / "nsbox_test_space").mkdir()
    (importable / "nsbox_test_space/mod.py").write_text(BOMB)
    version = Function("nsbox_test_space.mod.handler").publish()
    assert (Path(version.code_path or "") / "nsbox_test_space/mod.py").is_file()


def test_namespace_package_of_two_directories_is_refused(
    importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    (importable / "nsbox_test_spaces").mkdir()
    (tmp_path / "more/nsbox_test_spaces").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "more"))
    with pytest.raises(ConfigError, match="a package in 2 directories; give its directory or zip"):
        Function("nsbox_test_spaces.mod.handler").publish()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("nsbox_no_such_module", "module 'nsbox_no_such_module': no such module in sys.path; give"),
        ("sys", r"module 'sys': it is no file \(built-in\); give its directory"),
        ("__main__", "module '__main__': it is the running program, under no name; give its"),
    ],
)
def test_module_without_a_file_is_refused(module: str, message: str, store: Store) -> None:
    with pytest.raises(ConfigError, match=message):
        Function(f"{module}.handler").publish()


def test_module_in_a_zip_file_of_the_path_is_refused(
    importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    (importable / "nsbox_test_zipped.py").write_text(BOMB)
    packed = shutil.make_archive(str(tmp_path / "packed"), "zip", importable)
    (importable / "nsbox_test_zipped.py").unlink()
    monkeypatch.syspath_prepend(packed)
    with pytest.raises(
        ConfigError, match=r"it is no file .*packed.zip.*; give its directory or zip"
    ):
        Function("nsbox_test_zipped.handler").publish()


# -- in an environment ---------------------------------------------------------------------------


@pytest.mark.needs("userns")
def test_closed_environment_lets_go_of_its_code_without_the_collector(
    code: Path, store: Store
) -> None:
    version = Function("app.handler", code=code).publish()
    gone = weakref.ref(version)
    gc.disable()
    try:
        with ExecutionEnvironment(version) as env:
            env.invoke(7)
        del version, env
        assert gone() is None
        assert len(store.collect(max_age=0)) == 1
    finally:
        gc.enable()


@pytest.mark.needs("userns")
def test_environment_sees_code_and_layers_read_only(
    code: Path, tmp_path: Path, store: Store
) -> None:
    layer = tmp_path / "layer/python"
    layer.mkdir(parents=True)
    (layer / "lib.py").write_text("x = 42\n")
    (code / "tool").write_text("#!/bin/sh\necho tool\n")
    (code / "tool").chmod(0o4700)
    version = Function("app.handler", code=code, layers=[layer.parent], env={"A": "1"}).publish()
    attempts = [
        "import os, sys",
        "sys.path[:0] = ['/var/task', '/opt/python']",
        "import app, lib",
        "print(app.handler(7, None), lib.x, os.getcwd(), 'A' in os.environ)",
        "for path in ('/var/task/app.py', '/var/task/new', '/opt/new', '/opt/python/lib.py'):",
        "    try: open(path, 'w'); print('WRITTEN', path)",
        "    except OSError as error: print(error.errno)",
        "for place in ('/var/task', '/opt'):",
        "    print(bool(os.statvfs(place).f_flag & os.ST_NOSUID), oct(os.stat(place).st_mode))",
        "sys.stdout.flush()",
        "os.execv('/var/task/tool', ['tool'])",
    ]
    result = run(["python3", "-c", "\n".join(attempts)], config=version.config, timeout=60)
    lines = result.check().text().split("\n")
    assert lines[0] == "7 42 /var/task False"
    assert set(lines[1:5]) <= {"30", "13"}, "EROFS, or EACCES by the mode"
    assert lines[5:] == ["True 0o40555", "True 0o40555", "tool", ""]
    version.verify()


# -- the store behind it -------------------------------------------------------------------------


def test_version_keeps_its_files_while_it_lives(code: Path, store: Store) -> None:
    version: FunctionVersion | None = Function("app.handler", code=code).publish()
    assert version is not None
    path = Path(version.code_path or "")
    assert store.collect(max_age=0, max_bytes=0) == []
    assert (path / "app.py").exists()
    del version
    assert store.collect(max_bytes=0) == [str(path.parent)]
    assert not path.exists()


def test_changed_code_is_not_run_and_is_made_again(code: Path, store: Store) -> None:
    function = Function("app.handler", code=code)
    version = function.publish()
    file = Path(version.code_path or "") / "app.py"
    content = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(content.replace(b"event", b"other"))
    file.chmod(0o444)
    with pytest.raises(StoreError, match=r"was changed: .*; publish the code again"):
        version.verify()
    again = function.publish()
    assert again == version
    assert file.read_bytes() == content
    again.verify()
