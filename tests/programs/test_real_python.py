# SPDX-License-Identifier: Apache-2.0
"""What Python programs ask of a kernel: threads, processes, shared memory, sockets, terminals."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest
from tests.support import PATIENCE

from nsbox import ExecutionEnvironment


def run_python(env: ExecutionEnvironment, code: str, timeout: float = 40) -> str:
    """Run a program from a file, as multiprocessing's children need it, and return its output."""
    env.write_file("/tmp/program.py", textwrap.dedent(code).encode())
    result = env.run([sys.executable, "-W", "error", "/tmp/program.py"], timeout=timeout * PATIENCE)
    assert result.ok, (result.evidence, result.stderr_text())
    assert result.stderr == b""
    return result.text().strip()


def test_threads_locks_and_conditions(env: ExecutionEnvironment) -> None:
    code = """
        import queue, threading
        work, done = queue.Queue(), []
        lock = threading.Lock()
        def serve():
            while (item := work.get()) is not None:
                with lock:
                    done.append(item * item)
        threads = [threading.Thread(target=serve) for _ in range(32)]
        for thread in threads: thread.start()
        for n in range(1000): work.put(n)
        for _ in threads: work.put(None)
        for thread in threads: thread.join()
        print(sum(done), len(done))
    """
    assert run_python(env, code) == "332833500 1000"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_with_pool_shared_memory_and_semaphores(
    env: ExecutionEnvironment, method: str
) -> None:
    # POSIX semaphores and shared memory live in /dev/shm.
    code = f"""
        import multiprocessing as mp
        from multiprocessing import shared_memory
        def fill(name, start, gate, total):
            gate.acquire()
            memory = shared_memory.SharedMemory(name)
            for i in range(start, start + 10):
                memory.buf[i] = i
            memory.close()
            with total.get_lock():
                total.value += 10
            gate.release()
        def square(n):
            return n * n
        if __name__ == "__main__":
            context = mp.get_context({method!r})
            memory = shared_memory.SharedMemory(create=True, size=40)
            gate, total = context.Semaphore(2), context.Value("i", 0)
            argument_lists = [(memory.name, i * 10, gate, total) for i in range(4)]
            workers = [context.Process(target=fill, args=a) for a in argument_lists]
            for worker in workers: worker.start()
            for worker in workers: worker.join()
            print(list(memory.buf[:40]) == list(range(40)), total.value)
            print([w.exitcode for w in workers])
            memory.close()
            memory.unlink()
            with context.Pool(2) as pool:
                print(pool.map(square, range(5)))
    """
    assert run_python(env, code).splitlines() == ["True 40", "[0, 0, 0, 0]", "[0, 1, 4, 9, 16]"]


def test_asyncio_with_subprocesses_signals_and_servers(env: ExecutionEnvironment) -> None:
    code = """
        import asyncio, os, signal
        async def echo(reader, writer):
            writer.write((await reader.readline()).upper())
            await writer.drain()
            writer.close()
        async def main():
            got = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, got.set)
            child = await asyncio.create_subprocess_exec(
                "sh", "-c", "cat; kill -USR1 $PPID; exit 5",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
            out, _ = await child.communicate(b"through")
            await got.wait()
            server = await asyncio.start_server(echo, "localhost")
            replies = []
            for address in {s.getsockname()[:2] for s in server.sockets}:
                reader, writer = await asyncio.open_connection(*address)
                writer.write(b"hello\\n")
                replies.append(await reader.readline())
                writer.close()
                await writer.wait_closed()
            server.close()
            unix = await asyncio.start_unix_server(echo, "/tmp/socket")
            reader, writer = await asyncio.open_unix_connection("/tmp/socket")
            writer.write(b"unix\\n")
            replies.append(await reader.readline())
            writer.close()
            unix.close()
            print(out, child.returncode, sorted(set(replies)))
        asyncio.run(main())
    """
    assert run_python(env, code) == "b'through' 5 [b'HELLO\\n', b'UNIX\\n']"


def test_servers_and_clients_on_loopback(env: ExecutionEnvironment) -> None:
    code = """
        import http.server, socket, threading, urllib.request
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200); self.end_headers(); self.wfile.write(self.path.encode())
            def log_message(self, *words): pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with urllib.request.urlopen(f"http://localhost:{server.server_port}/page") as page:
            print(page.read())
        server.shutdown(); server.server_close()
        one, two = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        with one, two:
            one.bind(("127.0.0.1", 0)); two.sendto(b"datagram", one.getsockname())
            print(one.recv(99))
        with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
            a.bind("\\0abstract"); a.listen(); b.connect("\\0abstract"); print(b.getpeername())
    """
    expected = ["b'/page'", "b'datagram'", "b'\\x00abstract'"]
    assert run_python(env, code).splitlines() == expected


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this kernel has no IPv6")
def test_loopback_of_ipv6(env: ExecutionEnvironment) -> None:
    code = """
        import socket
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
        with listener, socket.create_connection(listener.getsockname()[:2]) as client:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(b"six"); print(client.recv(9))
    """
    assert run_python(env, code) == "b'six'"


def test_terminal_made_by_the_program(env: ExecutionEnvironment) -> None:
    code = """
        import os, pty, termios
        pid, fd = pty.fork()
        if pid == 0:
            os.execvp("sh", ["sh", "-c", "stty size; tty; read line; echo got $line"])
        termios.tcsetwinsize(fd, (11, 22))
        os.write(fd, b"typed\\n")
        seen = b""
        while True:
            try:
                data = os.read(fd, 1000)
            except OSError:
                break
            if not data: break
            seen += data
        os.close(fd)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode().split())
    """
    output = run_python(env, code)
    assert output.startswith("0 ")
    for word in ("'/dev/pts/0'", "'got'", "'typed'"):
        assert word in output


def test_sqlite_module_with_threads(env: ExecutionEnvironment) -> None:
    code = """
        import sqlite3, threading
        def add(n):
            base = sqlite3.connect("/tmp/a.db", timeout=30)
            with base:
                base.executemany("insert into t values (?)", [(n,)] * 50)
            base.close()
        base = sqlite3.connect("/tmp/a.db")
        base.execute("create table t(a)"); base.commit()
        threads = [threading.Thread(target=add, args=(n,)) for n in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        print(base.execute("select count(*), sum(a) from t").fetchone())
        base.close()
    """
    assert run_python(env, code) == "(400, 1400)"


def test_files_maps_locks_and_events(env: ExecutionEnvironment) -> None:
    code = """
        import fcntl, mmap, os, select, signal, tempfile, time
        with tempfile.TemporaryFile() as f:
            f.truncate(1 << 20)
            with mmap.mmap(f.fileno(), 0) as m:
                m[5:9] = b"data"; m.flush()
            fcntl.lockf(f, fcntl.LOCK_EX); fcntl.flock(f, fcntl.LOCK_SH)
            f.seek(5); print(f.read(4))
        fd = os.memfd_create("x"); os.write(fd, b"mem"); print(os.pread(fd, 3, 0)); os.close(fd)
        event = os.eventfd(3); print(os.eventfd_read(event)); os.close(event)
        a, b = os.pipe(); os.write(b, b"12345")
        c, d = os.pipe(); print(os.splice(a, d, 3)) if hasattr(os, "splice") else print(3)
        poll = select.epoll(); poll.register(a, select.EPOLLIN)
        print(len(poll.poll(1))); poll.close()
        signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause()
        os.symlink("/etc/passwd", "/tmp/l"); print(os.readlink("/tmp/l"))
        print(os.sched_getaffinity(0) != set(), os.getloadavg() is not None)
        print(os.urandom(4) != os.urandom(4))
        print(time.clock_gettime(time.CLOCK_BOOTTIME) > 0)
    """
    assert run_python(env, code).splitlines() == [
        "b'data'", "b'mem'", "3", "3", "1", "alarm", "/etc/passwd", "True True", "True", "True",
    ]  # fmt: skip


def test_names_of_users_services_and_hosts_resolve(env: ExecutionEnvironment) -> None:
    code = """
        import getpass, grp, os, pwd, socket
        user = pwd.getpwuid(os.getuid())
        print(user.pw_name, user.pw_dir, getpass.getuser(), grp.getgrgid(os.getgid()).gr_name)
        print(socket.gethostbyname("localhost"), socket.gethostbyname(socket.gethostname()))
        print(os.path.expanduser("~"), os.access(os.path.expanduser("~"), os.W_OK))
        try:
            socket.getaddrinfo("example.org", 80)
        except socket.gaierror as error:
            print("no network")
    """
    assert run_python(env, code).splitlines() == [
        "sandbox /tmp sandbox sandbox", "127.0.0.1 127.0.0.1", "/tmp True", "no network",
    ]  # fmt: skip
