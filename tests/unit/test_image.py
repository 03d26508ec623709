# SPDX-License-Identifier: Apache-2.0
"""The image of a process's memory: a clone gives back what is as it was, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.needs("memory_image")

_BEGIN = """
    import ctypes, gc, os, random, signal, sys, threading
    from nsbox.linux.image import Image, take_when_tried

    def in_clone(action):
        pid = os.fork()
        if pid == 0:
            try:
                action()
                os._exit(0)
            except BaseException:
                import traceback
                print(traceback.format_exc(), flush=True)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0

    def copied():
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Anonymous:"))

    def mappings(mode):
        with open("/proc/self/maps") as file:
            found = [line.split() for line in file if "memfd:nsbox-image" in line]
        return [[int(word, 16) for word in line[0].split("-")] for line in found if line[1] == mode]

    def mapping_of(address):
        return next((begin, end) for begin, end in mappings("rw-p") if begin <= address < end)

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_long
"""


def run(code: str) -> None:
    """Run code in a process of its own: what is done to its memory is for good."""
    text = textwrap.dedent(_BEGIN) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-I", "-c", text], capture_output=True, text=True, check=False, timeout=60
    )
    said = done.stdout + done.stderr
    assert (done.returncode, said) == (0, ""), said


def test_what_a_clone_has_changed_stays_and_what_is_as_it_was_goes() -> None:
    run("""
        blocks = [bytearray(random.randbytes(3000)) for _ in range(400)]
        table = {f"name-{n}": [n] for n in range(1000)}
        gc.collect()
        image = Image()

        def change():
            model = [bytes(block) for block in blocks]
            for turn in range(3):
                for _ in range(60):
                    n, at = random.randrange(400), random.randrange(3000)
                    blocks[n][at] ^= 255
                    model[n] = bytes(blocks[n])
                for n in range(0, 1000, 7):
                    table[f"name-{n}"].append(turn)
                for block in blocks:  # written to, and as it was
                    block[0] ^= 1
                    block[0] ^= 1
                model = [bytes(block) for block in model]
                before = copied()
                assert image.drop() > 0
                assert copied() < before
                assert [bytes(block) for block in blocks] == model
                assert all(table[f"name-{n}"] == [n, *([0, 1, 2][:turn + 1] * (n % 7 == 0))]
                           for n in range(1000))
                exec(compile("class A:\\n def f(self): return {1: [str(self)]}", "a", "exec"), {})
                gc.collect()

        for _ in range(3):
            in_clone(change)
        change()  # and the process that the image is of
        """)


def test_all_that_a_process_does_with_its_memory_is_still_right() -> None:
    run("""
        own = bytearray([255]) * (1 << 20)
        image = take_when_tried()
        assert image is not None and image.size > 1 << 20

        def grow_and_shrink():
            for _ in range(3):
                kept = [bytes(n) for n in range(1, 3000, 17)] + [bytearray(1 << 18)]
                assert all(not any(block) for block in kept)  # calloc(3): what is to be zero is
                del kept
                libc.malloc_trim(0)
                image.drop()

        in_clone(grow_and_shrink)

        def change_mappings():
            first = (ctypes.addressof(ctypes.c_char.from_buffer(own)) + 4095) & ~4095
            page = lambda n: ctypes.c_void_p(first + n * 4096)
            assert first in range(*mapping_of(first))
            for n in range(9):
                ctypes.memset(page(n), n, 2048)  # the rest stays as it is in the image
            ctypes.memset(page(7), 255, 2048)  # and this one is as it was
            # One that is read-only now, one that is another mapping, and one that is gone.
            assert libc.mprotect(page(2), 4096, 1) == 0
            assert libc.mmap(page(4), 4096, 3, 0x32, -1, ctypes.c_long(0)) != -1
            assert libc.munmap(page(6), 4096) == 0
            for _ in range(2):
                assert image.drop() > 0
                for n, values in enumerate(((0, 255), (1, 255), (2, 255), (3, 255), (0, 0),
                                            (5, 255), None, (255, 255), (8, 255))):
                    if values is not None:
                        both = bytes([values[0]]) * 2048 + bytes([values[1]]) * 2048
                        assert ctypes.string_at(page(n), 4096) == both, n

        in_clone(change_mappings)

        def be_hidden():
            libc.prctl(4, 0, 0, 0, 0)
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            assert image.drop() > 0

        in_clone(be_hidden)

        def have_signals():
            caught = []
            signal.signal(signal.SIGALRM, lambda *_: caught.append(1))
            signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
            for _ in range(40):
                image.drop()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert len(caught) > 10

        in_clone(have_signals)

        def have_threads():
            end = threading.Event()
            thread = threading.Thread(target=end.wait)
            thread.start()
            assert image.drop() == 0
            end.set()
            thread.join()
            try:
                assert image.drop() > 0
            except AssertionError:  # the kernel has not taken it off its list yet
                pass

        in_clone(have_threads)
        """)


def test_pages_of_zeros_are_in_no_page_table_until_they_are_needed() -> None:
    run("""
        used, spare = bytearray(b"x") * (1 << 20), bytearray(1 << 20)
        image = Image()

        def present(block):
            first = ctypes.addressof(ctypes.c_char.from_buffer(block)) // 4096 + 1
            with open("/proc/self/pagemap", "rb") as file:
                file.seek(first * 8)
                return sum(byte >> 7 for byte in file.read(255 * 8)[7::8])

        assert present(spare) < 16 <= present(used)
        assert not any(spare)
        spare[5000] = 1
        image.drop()
        assert sum(spare) == spare[5000] == 1 and set(used) == {120}
        """)


def test_an_image_is_taken_of_plain_memory_alone() -> None:
    run("""
        import mmap
        SIZE = 1 << 20
        wiped = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        wiped.madvise(18)  # MADV_WIPEONFORK: generators of random numbers notice forks by it
        wiped[:] = b"x" * SIZE
        shared = mmap.mmap(-1, SIZE)
        shared[:] = b"y" * SIZE
        image = Image()
        try:
            Image()
        except OSError:
            pass  # there is hardly anything left to take

        def look():
            assert wiped[:] == bytes(SIZE)
            image.drop()
            assert shared[:] == b"y" * SIZE
            shared[0] = 0

        in_clone(look)
        assert shared[0] == 0 and wiped[:] == b"x" * SIZE
        """)


def test_an_image_that_cannot_be_taken_changes_nothing() -> None:
    run("""
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # no file of its size
        assert take_when_tried() is None
        assert mappings("rw-p") == []
        """)
