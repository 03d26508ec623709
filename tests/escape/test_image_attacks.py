# SPDX-License-Identifier: Apache-2.0
"""Attacks on the image of the template's memory that environments of functions share."""

from __future__ import annotations

import gc
import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support import IS_ROOT, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns", "memory_image")

HANDLER = '''
import ctypes, hashlib, os

libc = ctypes.CDLL(None, use_errno=True)

def mappings(mode):
    """Of the image: where, how large, and where in the file."""
    found = []
    for line in open("/proc/self/maps"):
        span, modes, offset, _, inode, *name = line.split()
        if modes == mode and name[:1] == ["/memfd:nsbox-image"]:
            begin, end = (int(word, 16) for word in span.split("-"))
            found.append((begin, end - begin, int(offset, 16), int(inode)))
    return found

def view():
    """What this environment sees of the image."""
    ((begin, size, offset, _),) = mappings("r--p")
    return hashlib.sha256(ctypes.string_at(begin, size)).hexdigest()

def drop():
    from nsbox.linux import _image
    return _image.drop(mappings("r--p")[0][3], -1)

def has(half, other):
    """Whether two halves of a word are in this process's memory, the one after the other."""
    with open("/proc/self/mem", "rb", 0) as memory:
        for line in open("/proc/self/maps"):
            span, modes = line.split()[:2]
            if modes[0] == "r" and "[v" not in line:
                begin, end = (int(at, 16) for at in span.split("-"))
                memory.seek(begin)
                data = attempt(memory.read, end - begin)
                at = -1
                while isinstance(data, bytes) and (at := data.find(half, at + 1)) >= 0:
                    if data.startswith(other, at + len(half)):
                        return True
    return False

def call(function, *arguments):
    result = function(*arguments)
    return "done" if result >= 0 else os.strerror(ctypes.get_errno())

def attempt(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return error.strerror

def handler(event, context):
    names = globals()
    exec(event, names)
    return names["answer"]
'''

Make = Callable[[], nsbox.ExecutionEnvironment]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make environments that share an image, which there is from a template's third birth on."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text(HANDLER)
    versions = [nsbox.Function("app.handler", code=code, timeout=30).publish()]
    made: list[nsbox.ExecutionEnvironment] = []

    def environment() -> nsbox.ExecutionEnvironment:
        made.append(nsbox.ExecutionEnvironment(versions[0]))
        return made[-1]

    for _ in range(3):
        with environment():
            made.pop()
    yield environment
    while made:
        made.pop().close()
    versions.clear()  # which hold a lock in the store each
    gc.collect()


def ask(env: nsbox.ExecutionEnvironment, code: str) -> Any:
    return env.invoke(textwrap.dedent(code))


def test_no_word_of_one_environment_is_in_another(make: Make) -> None:
    attacker, other = make(), make()
    before = ask(other, "answer = view()")
    assert ask(attacker, "answer = view()") == before
    found = ask(
        attacker,
        """
        import sys
        word = b"the attacker's" + b" own word"
        found = {}
        ((at, size, _, _),) = mappings("r--p")
        place = f"/proc/self/map_files/{at:x}-{at + size:x}"
        found["file"] = [attempt(os.open, place, mode) for mode in (os.O_RDWR, os.O_RDONLY)]
        links = [str(attempt(os.readlink, f"/proc/self/fd/{fd}")) for fd in range(1024)]
        found["descriptors"] = [link for link in links if "memfd" in link]
        pointer = lambda number: ctypes.c_void_p(number)
        found["remove"] = [call(libc.madvise, pointer(at), ctypes.c_size_t(size), 9)
                           for at, size, _, _ in mappings("rw-p") + mappings("r--p")]
        found["remap"] = call(libc.remap_file_pages, pointer(at), ctypes.c_size_t(4096), 0,
                              ctypes.c_size_t(1), 0)
        # One's own copy of it can be written to, in all ways that there are.
        with open("/proc/self/mem", "r+b", 0) as memory:
            memory.seek(at + 4096)
            memory.write(word)
        found["protect"] = call(libc.mprotect, pointer(at), ctypes.c_size_t(size), 3)
        for page in range(0, size - 4096, 4096):
            ctypes.memmove(at + page + 2048, word, len(word))
        found["sync"] = call(libc.msync, pointer(at), ctypes.c_size_t(size), 4)
        call(libc.mprotect, pointer(at), ctypes.c_size_t(size), 1)
        found["changed"] = view()
        kept = [word * n for n in range(1, 2000, 11)]
        sys.modules["json"].word = word
        os.environ["WORD"] = "word"
        drop()
        found["kept"] = all(each == word * n for n, each in zip(range(1, 2000, 11), kept))
        found["kept"] = found["kept"] and sys.modules["json"].word == word
        found["has"] = has(b"the attacker's", b" own word")
        answer = found
        """,
    )
    assert isinstance(found["file"][0], str)
    assert isinstance(found["file"][1], str)
    assert found["descriptors"] == []
    assert "done" not in [*found["remove"], found["remap"]]
    assert found["protect"] == "done"
    assert found["changed"] != before, "its own view is its own"
    assert found["kept"]
    assert found["has"], "who looks for the word finds it"
    look = """answer = [has(b"the attacker's", b" own word"), drop() >= 0, view()]"""
    for env in (other, make()):
        assert ask(env, look) == [False, True, before]
        assert ask(env, look) == [False, True, before]


def test_what_is_idle_gives_memory_back_and_keeps_what_it_has_made(make: Make) -> None:
    env = make()
    assert ask(env, "kept = {n: [str(n)] for n in range(3000)}; answer = 1") == 1
    worker = psutil.Process(env.pid).children()[0].pid
    processes = (env.pid, worker) if IS_ROOT else (worker,)
    before = [copied(pid) for pid in processes]
    wait_until(
        lambda: all(copied(pid) < size for pid, size in zip(processes, before, strict=True)),
        "memory is given back",
    )
    assert ask(env, "answer = all(kept[n] == [str(n)] for n in range(3000))") is True
    if IS_ROOT:
        links = [os.readlink(link) for link in Path(f"/proc/{worker}/fd").iterdir()]
        assert not any("pagemap" in link for link in links)


def copied(pid: int) -> int:
    """KiB of a process's own."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if "Anonymous" in line)
