# SPDX-License-Identifier: Apache-2.0
"""A Python outside /usr: it works inside wherever it lies, and nothing else of that place shows.

A virtual environment in somebody's home, as in a clone of this repository, has a path that leads
through /home. Programs inside may know it (it is in PATH and sys.prefix), but see nothing there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import IS_ROOT, PATIENCE, SOURCE

pytestmark = pytest.mark.needs("userns")

HOME = os.path.expanduser("~")
PLACES = ["/tmp", "/var/tmp"]
if IS_ROOT:
    PLACES.append("/run")
elif os.access(HOME, os.W_OK) and not HOME.startswith("/tmp/"):
    PLACES.append(HOME)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory with a virtual environment in it, and a secret beside that."""
    path = Path(tempfile.mkdtemp(prefix="nsbox-place-", dir=request.param))
    path.chmod(0o700)  # as Debian makes homes
    (path / "inner/secret").mkdir(parents=True)
    venv.create(path / "inner/venv", symlinks=True)
    yield path
    shutil.rmtree(path)


def run_there(place: Path, code: str, python: str = "inner/venv/bin/python") -> Any:
    """Run a program outside, by the Python of that place; return what it prints as JSON."""
    search = [SOURCE, *filter(None, sys.path)]
    done = subprocess.run(
        [python, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        cwd=place,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60 * PATIENCE,
    )
    return json.loads(done.stdout)


def test_nothing_but_the_interpreter_is_seen(place: Path) -> None:
    code = f"""
        import json, sys, nsbox
        place = {str(place)!r}
        look = '''if True:
            import json, os, sys
            place = sys.argv[1]
            def attempt(call, *words):
                try:
                    return call(*words)
                except OSError as error:
                    return error.errno
            ways = ["/" + "/".join(place.split("/")[1:n]) for n in range(2, place.count("/") + 2)]
            ways += [place + "/inner"]
            print(json.dumps({{
                "prefix": sys.prefix,
                "lists": [[way, attempt(os.listdir, way)] for way in ways],
                "modes": [attempt(os.chmod, way, 0o755) for way in ways],
                "written": [attempt(os.mkdir, way + "/x") for way in ways],
                "secret": attempt(os.stat, place + "/inner/secret"),
            }}))
        '''
        with nsbox.ExecutionEnvironment() as env:
            print(env.run([sys.executable, "-c", look, place]).check().text())
    """
    found = run_there(place, code)
    assert found["prefix"] == f"{place}/inner/venv"
    assert found["secret"] == 2
    if str(place).startswith(("/tmp/", "/var/tmp/")):
        # The environment's own /tmp, in which there is nothing else.
        assert found["lists"][-2:] == [[str(place), ["inner"]], [f"{place}/inner", ["venv"]]]
    else:
        for way, names in found["lists"]:
            # /run is there anyway.
            assert names == ([place.name] if way == "/run" else 13), way
        assert set(found["modes"]) <= {1, 30}
        assert set(found["written"]) <= {13, 30}


def test_an_interpreter_started_by_a_way_back(place: Path) -> None:
    """Of what is before ".." nothing is inside; Python leaves it in sys.executable."""
    code = """
        import json, pathlib, sys, tempfile, nsbox
        assert ".." in sys.executable
        told = "import json, sys; print(json.dumps(sys.prefix))"
        answers = [json.loads(nsbox.run([sys.executable, "-c", told]).check().text())]
        with tempfile.TemporaryDirectory() as code:
            pathlib.Path(code, "app.py").write_text(
                "import sample_package as p\\ndef handler(event, context): return p.__file__")
            for start in ("clone", "exec"):
                version = nsbox.Function("app.handler", code=code, start=start).publish()
                with nsbox.ExecutionEnvironment(version) as env:
                    answers.append(env.invoke(None))
        program = nsbox.Function(command=[sys.executable, "-c", told]).publish()
        with nsbox.ExecutionEnvironment(program) as env:
            answers.append(env.invoke(None))
        print(json.dumps(answers))
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    package = place / "inner/venv/lib" / version / "site-packages/sample_package.py"
    package.write_text("")
    prefix = f"{place}/inner/venv"
    module = f"{prefix}/lib/{version}/site-packages/sample_package.py"
    answers = run_there(place / "inner/secret", code, "../venv/bin/python")
    assert answers == [prefix, module, module, prefix]
