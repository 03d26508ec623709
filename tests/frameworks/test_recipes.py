# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/frameworks.md, in the real servers and workers: killed, reloaded, ended."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.frameworks.recipes import Place, environments_of, kill_busy, place_of, workers_of
from tests.support import PATIENCE, wait_until

pytestmark = [pytest.mark.needs("userns"), pytest.mark.timeout(300 * PATIENCE)]
frameworks = pytest.mark.frameworks

EVENT = ["pear", "fig"]


def check_printed(place: Place, printed: str, name: str = "main.py") -> None:
    """Compare with what the recipe says is printed."""
    told = re.findall(r"^\s*print\(.*\)  # (.*)$", place.files[name], re.M)
    assert told
    assert [line for line in printed.splitlines() if line in told] == told, printed


def test_process_pool_executor(tmp_path: Path) -> None:
    with place_of(tmp_path, "concurrent.futures and multiprocessing") as place:
        check_printed(place, place.run("-W", "error", "main.py"))


# -- servers -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def post(port: int, event: object = EVENT) -> object:
    data = json.dumps(event).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", data, headers)
    with urllib.request.urlopen(request, timeout=30 * PATIENCE) as answer:  # noqa: S310
        return json.loads(answer.read())


def await_answer(port: int) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError):
            return post(port) == ["fig", "pear"]
        return False

    wait_until(answers, "the server answers", 30)


def await_workers(server: int) -> None:
    def are_ready() -> bool:
        workers = workers_of(server)
        return len(workers) == 2 and all(environments_of(worker) for worker in workers)

    wait_until(are_ready, "two workers, each with an environment", 30)


def hang(port: int) -> threading.Thread:
    """Make a call that does not end, whose worker will be killed."""

    def call() -> None:
        with contextlib.suppress(OSError):
            post(port, ["hang"])

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def check_server(place: Place, module: str, *options: str) -> None:
    """A server that starts killed workers again, reloads at SIGHUP and ends at SIGTERM."""
    port = free_port()
    address = ["--bind", f"127.0.0.1:{port}"] if module == "gunicorn" else ["--port", str(port)]
    with place.start("-m", module, *place.words, *address, *options) as server:
        await_workers(server.pid)
        await_answer(port)
        caller = hang(port)
        kill_busy(server.pid)
        caller.join()
        await_workers(server.pid)
        await_answer(port)
        assert [post(port) for _ in range(8)] == [["fig", "pear"]] * 8

        old = workers_of(server.pid)
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: not old & workers_of(server.pid), "the old ones have ended", 30)
        await_workers(server.pid)
        await_answer(port)
        assert [post(port) for _ in range(8)] == [["fig", "pear"]] * 8
        server.send_signal(signal.SIGTERM)
        assert server.wait(30 * PATIENCE) == 0
    assert "Traceback" not in place.log.read_text()


@frameworks
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--preload",),
        ("--worker-class", "gthread", "--threads", "4"),
        ("--worker-class", "gthread", "--threads", "4", "--preload"),
        ("--worker-class", "gevent"),
        ("--worker-class", "gevent", "--preload"),
    ],
    ids=" ".join,
)
def test_gunicorn(options: tuple[str, ...], tmp_path: Path) -> None:
    with place_of(tmp_path, "gunicorn") as place:
        check_server(place, "gunicorn", "--no-control-socket", *options)


@frameworks
def test_gunicorn_pool_before_the_fork(tmp_path: Path) -> None:
    """It is refused by name in the workers; the master goes on with it, and is killed."""
    with place_of(tmp_path, "gunicorn") as place:
        (tmp_path / "gunicorn.conf.py").write_text("")
        service = tmp_path / "service.py"
        service.write_text(f"{service.read_text()}\n\nopen_pool()\npool.invoke([])\n")
        port = free_port()
        words = [*place.words, "--bind", f"127.0.0.1:{port}", "--no-control-socket"]
        with place.start("-m", "gunicorn", *words, "--preload") as server:
            for _ in range(4):
                wait_until(lambda: _status(port) == 500, "it answers", 30)
            server.kill()
            server.wait()
        told = f"PoolError: this pool belongs to process {server.pid}, and this is "
        assert told in place.log.read_text()


def _status(port: int) -> int:
    try:
        post(port)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
    return 200


@frameworks
def test_uvicorn(tmp_path: Path) -> None:
    with place_of(tmp_path, "uvicorn and uvloop") as place:
        # On a busy machine a start may take longer than the 5 s that a reload waits for it.
        patient = ("--timeout-worker-healthcheck", "60")
        check_server(place, "uvicorn", "--loop", "uvloop", *patient)


# -- loops -------------------------------------------------------------------------------------


@frameworks
def test_uvloop(tmp_path: Path) -> None:
    """Answers, timeouts, cancelled calls, large events, and both kinds of reuse."""
    with place_of(tmp_path, "uvicorn and uvloop") as place:
        printed = place.run_code(
            """
            import asyncio, nsbox, uvloop

            async def main():
                for reuse in ("keep", "reset", "never"):
                    function = nsbox.Function(
                        "app.handler", code="handlers", reuse=reuse, timeout=20
                    )
                    async with nsbox.AsyncWarmPool(function, max_environments=3) as pool:
                        answers = await asyncio.gather(*[pool.invoke([n, 0]) for n in range(20)])
                        assert answers == [[0, n] for n in range(20)]
                        assert len(await pool.invoke(["x" * 100_000] * 10)) == 10
                        try:
                            await pool.invoke(["hang"], timeout=0.2)
                        except nsbox.InvokeTimeout:
                            pass
                        task = asyncio.ensure_future(pool.invoke(["hang"]))
                        await asyncio.sleep(0.1)
                        task.cancel()
                        assert isinstance(
                            (await asyncio.gather(task, return_exceptions=True))[0],
                            asyncio.CancelledError,
                        )
                        assert await pool.invoke([2, 1]) == [1, 2]
                async with nsbox.AsyncWarmPool(max_environments=1) as pool:
                    async with pool.acquire() as env:
                        assert (await asyncio.to_thread(env.run, ["true"])).ok
                print("good")

            uvloop.run(main())
            """
        )
        assert printed == "good\n"


@frameworks
def test_gevent(tmp_path: Path) -> None:
    with place_of(tmp_path, "gevent") as place:
        check_printed(place, place.run("-W", "error", "main.py"))
        printed = place.run_code(
            """
            from gevent import monkey; monkey.patch_all()
            import gevent, nsbox, time

            turns = 0
            def others():
                global turns
                while True:
                    turns += 1
                    gevent.sleep(0.01)
            def refused(call, error):
                try:
                    call()
                except error:
                    return
                raise AssertionError("not refused")
            gevent.spawn(others)
            assert nsbox.run(["sleep", "0.3"]).ok
            assert turns > 5, turns
            assert nsbox.run(["sleep", "60"], timeout=0.2).outcome is nsbox.Outcome.TIMED_OUT
            for reuse in ("keep", "reset", "never"):
                function = nsbox.Function("app.handler", code="handlers", reuse=reuse, timeout=20)
                with nsbox.WarmPool(function, max_environments=2) as pool:
                    calls = [gevent.spawn(pool.invoke, [n, 0]) for n in range(20)]
                    gevent.joinall(calls, raise_error=True)
                    assert [call.value for call in calls] == [[0, n] for n in range(20)]
                    assert list(pool.map([[2, 1]] * 4)) == [[1, 2]] * 4
                    assert len(pool.invoke(["x" * 100_000] * 10)) == 10
                    before = turns
                    refused(lambda: pool.invoke(["hang"], timeout=0.3), nsbox.InvokeTimeout)
                    assert turns > before + 5, turns - before
                    call = gevent.spawn(pool.invoke, ["hang"])
                    gevent.sleep(0.2)
                    call.kill()
                    assert isinstance(call.value, gevent.GreenletExit)
                    assert pool.invoke([2, 1]) == [1, 2]
                    # A death is seen by the pool's own greenlet.
                    births = pool.stats()["Births"]
                    if reuse != "never":
                        with nsbox.WarmPool(provisioned=1) as other:
                            with other.acquire() as env:
                                import os, signal
                                os.kill(env.pid, signal.SIGKILL)
                            while other.stats()["Births"] < 2:
                                gevent.sleep(0.01)
            print("good")
            """
        )
        assert printed == "good\n"


# -- workers -----------------------------------------------------------------------------------

CELERY = """
import os
here = os.path.dirname(os.path.abspath(__file__))
broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": f"{here}/queue", "data_folder_out": f"{here}/queue",
    "control_folder": f"{here}/control",
}
result_backend = f"file://{here}/results"
broker_connection_retry_on_startup = True
"""


@contextlib.contextmanager
def celery_place_of(directory: Path) -> Iterator[Place]:
    """A place of the recipe for Celery, with a broker of files."""
    with place_of(directory, "Celery") as place:
        (directory / "celeryconfig.py").write_text(CELERY)
        for name in ("queue", "control", "results"):
            (directory / name).mkdir()
        yield place


@frameworks
def test_celery(tmp_path: Path) -> None:
    with celery_place_of(tmp_path) as place:
        ask = "import tasks; calls = [tasks.sort.delay(['pear', 'fig']) for _ in range(8)]"
        ask += "; print(*{str(call.get(timeout=60)) for call in calls})"
        with place.start("-m", "celery", *place.words) as worker:
            await_workers(worker.pid)
            assert place.run("-c", ask).splitlines()[-1] == "['fig', 'pear']"

            lost = place.directory / "lost"
            program = "import tasks; call = tasks.sort.delay(['hang'])\n"
            program += f"open({str(lost)!r}, 'w').write(repr(call.get(propagate=False)))"
            with place.start("-c", program) as caller:
                kill_busy(worker.pid)
                assert caller.wait(60 * PATIENCE) == 0
            assert lost.read_text().startswith("WorkerLostError")
            await_workers(worker.pid)
            assert place.run("-c", ask).splitlines()[-1] == "['fig', 'pear']"
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30 * PATIENCE) == 0


@frameworks
def test_celery_whose_main_process_is_killed(tmp_path: Path) -> None:
    with celery_place_of(tmp_path) as place:
        ask = "import tasks; print(tasks.sort.delay(['pear', 'fig']).get(timeout=60))"
        with place.start("-m", "celery", *place.words) as worker:
            assert place.run("-c", ask).splitlines()[-1] == "['fig', 'pear']"
            worker.kill()


@frameworks
def test_ray(tmp_path: Path) -> None:
    with (
        place_of(tmp_path, "Ray") as place,
        # The names of sockets have 107 bytes, of which Ray's own part takes more than half.
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as short,
    ):
        variables = {"RAY_TMPDIR": short, "RAY_USAGE_STATS_ENABLED": "0"}
        check_printed(place, place.run("main.py", **variables))
        # The same actor, killed by hand in a call and by Ray; and what cannot be sent to it.
        begin, _, end = place.files["main.py"].partition("ray.init")
        place.run_code(
            f"{begin}\nray.init{end.partition('print')[0]}"
            + """
import os, signal
@ray.remote
def use(pool):
    return pool
with nsbox.WarmPool() as pool:
    try:
        ray.get(use.remote(pool))
    except TypeError as error:
        assert "belongs to the process" in str(error), error
    else:
        raise AssertionError("not refused")
pid = sandbox.__ray_call__.remote(lambda self: os.getpid())
pid = ray.get(pid)
call = sandbox.invoke.remote(["hang"])
os.kill(pid, signal.SIGKILL)
try:
    ray.get(call)
except ray.exceptions.RayActorError:
    pass
def answer():
    while True:
        try:
            return ray.get(sandbox.invoke.remote(["pear", "fig"]))
        except ray.exceptions.RayActorError:
            pass
assert answer() == ["fig", "pear"]
ray.kill(sandbox, no_restart=False)
assert answer() == ["fig", "pear"]
ray.shutdown()
""",
            **variables,
        )


@frameworks
def test_dask(tmp_path: Path) -> None:
    with place_of(tmp_path, "Dask") as place:
        check_printed(place, place.run("main.py"))
        begin, _, _ = place.files["main.py"].partition("        futures = ")
        place.run_code(
            begin
            + """
        import os, signal
        try:
            client.submit(len, nsbox.WarmPool()).result()
        except TypeError as error:
            assert "belongs to the process" in str(error.__cause__ or error), error
        pids = client.run(os.getpid)
        calls = client.map(sort, [["pear", "fig"]] * 8, pure=False)
        assert client.gather(calls) == [["fig", "pear"]] * 8
        os.kill(list(pids.values())[0], signal.SIGKILL)
        client.wait_for_workers(2)
        calls = client.map(sort, [["pear", "fig"]] * 8, pure=False)
        assert client.gather(calls) == [["fig", "pear"]] * 8
        client.restart()
        calls = client.map(sort, [["pear", "fig"]] * 8, pure=False)
        assert client.gather(calls) == [["fig", "pear"]] * 8
"""
        )


@frameworks
def test_xdist(tmp_path: Path) -> None:
    with place_of(tmp_path, "pytest-xdist") as place:
        words = ["-m", "pytest", *place.words, "-p", "no:cacheprovider"]
        assert "8 passed" in place.run(*words)
        (tmp_path / "test_kill.py").write_text(
            "import os, signal\n"
            "def test_kill(pool):\n"
            "    pool.submit(['hang'])\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        with place.start(*words) as process:
            assert process.wait(60 * PATIENCE) == 1
        assert "1 failed, 8 passed" in place.log.read_text()


@frameworks
def test_jupyter(tmp_path: Path) -> None:
    variables = {f"JUPYTER_{name}_DIR": str(tmp_path) for name in ("CONFIG", "DATA", "RUNTIME")}
    with place_of(tmp_path, "Jupyter") as place:
        printed = place.run_code(
            """
            import nbclient, nbformat
            text = open("notebook").read()
            book = nbformat.v4.new_notebook()
            book.cells = [nbformat.v4.new_code_cell(text)]
            nbclient.NotebookClient(book).execute()
            print(*[output["text"] for output in book.cells[0]["outputs"]])
            """,
            **variables,
        )
        check_printed(place, printed, "notebook")
        place.run_code(
            """
            import os, signal, time
            from jupyter_client.manager import start_new_kernel

            def ask(client, code):
                answer = client.execute(code, reply=True, timeout=60)["content"]
                assert answer["status"] == "ok", answer
            def hang(client, code):
                begun = time.time()
                wanted = client.execute(f"open('begun', 'w').close()\\n{code}")
                while not os.path.exists("begun"):
                    time.sleep(0.01)
                time.sleep(0.2)
                os.unlink("begun")
                return wanted
            manager, client = start_new_kernel()
            before, after = open("notebook").read().split("print", 1)
            ask(client, before)
            for code in ("nsbox.run(['sleep', '60'])", "pool.invoke(['hang'], timeout=60)"):
                number = hang(client, code)
                manager.interrupt_kernel()
                while True:
                    answer = client.get_shell_msg(timeout=30)
                    if answer["parent_header"]["msg_id"] == number:
                        break
                assert answer["content"].get("ename") == "KeyboardInterrupt", answer["content"]
                ask(client, "assert pool.invoke(['pear', 'fig']) == ['fig', 'pear']")
            manager.restart_kernel()
            client.wait_for_ready(timeout=30)
            ask(client, before)
            ask(client, "assert pool.invoke(['pear', 'fig']) == ['fig', 'pear']")
            hang(client, "pool.invoke(['hang'])")
            manager.restart_kernel(now=True)
            client.wait_for_ready(timeout=30)
            ask(client, before)
            ask(client, "assert pool.invoke(['pear', 'fig']) == ['fig', 'pear']")
            manager.shutdown_kernel()
            """,
            **variables,
        )
