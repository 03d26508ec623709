# SPDX-License-Identifier: Apache-2.0
"""The worker: imports a function's module and calls its handler, once for each event.

It runs in two ways: in a clone of the template, which has imported this module, or executed as
``python3 -I -S -c PROGRAM`` (``start="exec"``, `nsbox.guest.executed`), where there is no nsbox:
it imports nothing of it but the modules whose sources go along. It is inside: the host believes
nothing it says about itself, and its answers are the function's.

Frames on its socket (a stream), each `HEADER` and as many bytes as that says:

1. host -> worker  ``START``    JSON: see `Worker._start`; with the function's environment
                            variables. May be said again before the next
2. host -> worker  ``LOAD``     its code is there. Empty, or `MOMENT` and the first event, as in 4
3. worker -> host  ``READY``    the module is imported. Empty, or `GOES_ON`, when it goes on to the
   event that came with ``LOAD``; or ``BROKEN``, an error, and it ends
4. host -> worker  ``INVOKE``   `INVOCATION`, request id, NUL, client context, NUL, variables for
                            this one in JSON; then the event
5. worker -> host  ``ANSWER``   JSON of the answer; or ``ERROR``: errorType, errorMessage and
   stackTrace of what the handler raised

Where each event is served by a fork (``reuse="reset"``), 4 and 5 go over a socket of that event's
own, whose end comes with ``FORK``, which is empty, or with ``LOAD``; and with it the pipes that are
the fork's stdout and stderr. The fork closes the worker's socket first of all, and the worker never
reads an event. On the worker's socket comes ``ENDED``: the status of a fork that gave no whole
answer, empty where the function's own code keeps the worker from knowing it.

The number of an event that comes in 4 is random: nobody answers before it was asked.

What the import writes to the log is told from what the first event writes: the host reads nothing
of the log before the moment, and the worker goes on by itself only if the import was over before it
and has written nothing. Otherwise the event is dropped, and sent again as in 4.
"""

from __future__ import annotations

import gc
import os
import struct
import sys
import time

# The C half of `socket`, whose Python half takes 10 ms to import.
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_NOSIGNAL,
    SHUT_WR,
    SO_RCVTIMEO,
    SOCK_STREAM,
    SOL_SOCKET,
)
from _socket import socket as _Socket
from importlib import import_module

from nsbox.guest.failures import flush, tell_failure, tell_raised
from nsbox.guest.log_setup import LogSetup
from nsbox.guest.standard import (
    identity,
    is_null,
    may_be_unread,
    open_stream,
    places_of,
    renew_stdin,
)
from nsbox.linux.visibility import hide, show
from nsbox.values.json_text import decode, decode_event, encode_answer, quick_decoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

HEADER = struct.Struct("!cIQ")
"""Kind, bytes that follow, and the number of the invocation."""
INVOCATION = struct.Struct("!dI")
"""Seconds left, and bytes of request id, client context and variables."""
EVENT = struct.Struct("!cIQdI")
"""`HEADER` and `INVOCATION` in one."""
START, LOAD, READY, BROKEN = b"S", b"L", b"Y", b"B"
INVOKE, ANSWER, ERROR, ENDED, FORK = b"I", b"A", b"E", b"X", b"F"
MOMENT = struct.Struct("!d")
"""Seconds of CLOCK_MONOTONIC, which is the same inside."""
GOES_ON = b"e"
PAYLOAD_MAX = 6 << 20
"""Bytes of an event, and of an answer (AWS Lambda's quota)."""
ANSWER_MAX = PAYLOAD_MAX + 100
"""Bytes of an answer that are let through; Lambda's real limit is that much over its quota."""
TOO_LARGE = f"Response payload size exceeded maximum allowed payload size ({ANSWER_MAX} bytes)."
_FIRST_READ = 1 << 16
_REST, _LATER, _EVER = (struct.pack("ll", seconds, 0) for seconds in (1, 30, 0))
"""struct timeval: how long there must be no event before memory is given back, the first time and
later, and what stands for no end (socket(7), SO_RCVTIMEO)."""
_RIGHTS = struct.Struct("3i")  # socket, stdout and stderr of an event
_OWN = 4  # descriptors that a worker has besides: 0 to 2, and its socket
EXECUTED_FILE = "<nsbox>"
"""Stands for this file in tracebacks where it is executed."""
_OWN_FILE = __file__ if "__file__" in globals() else EXECUTED_FILE


class Context:
    """The second argument of a handler, with the attributes of AWS Lambda's.

    Attributes:
        aws_request_id: The invocation's request id.
        function_name, function_version, invoked_function_arn: The function's.
        memory_limit_in_mb: MiB, in digits.
        log_group_name, log_stream_name: The names that AWS Lambda would use.
        tenant_id: On whose behalf it runs, or None.
        identity: None: there is no Cognito.
        client_context: The caller's, as JSON gives it, or None.
    """

    def __init__(
        self, function: dict[str, Any], deadline: float, request_id: str, client_context: str
    ) -> None:
        self.aws_request_id = request_id
        self.function_name: str = function["name"]
        self.function_version: str = function["version"]
        self.invoked_function_arn: str = function["arn"]
        self.memory_limit_in_mb: str = function["memory"]
        self.log_group_name: str = function["log_group"]
        self.log_stream_name: str = function["log_stream"]
        self.tenant_id: str | None = function["tenant"]
        self.identity = None
        self.client_context = decode(client_context) if client_context else None
        self._deadline = deadline

    def get_remaining_time_in_millis(self) -> int:
        """Return how many milliseconds are left before the invocation times out."""
        return max(0, int((self._deadline - time.monotonic()) * 1000))

    def log(self, message: object) -> None:
        """Write to the function's log."""
        sys.stdout.write(str(message))

    def __repr__(self) -> str:
        return f"Context(aws_request_id={self.aws_request_id!r})"


class Worker:
    """One worker process and its socket to the host."""

    def __init__(self, channel: _Socket, give_back: Callable[[], object] | None = None) -> None:
        """`run` serves.

        Args:
            channel: This process's end of the socket to the host.
            give_back: Returns memory to the kernel; called after a time without events.
        """
        self._channel = channel
        self._give_back = give_back
        self.request_id = ""  # of the latest invocation
        self._handler: Callable[[Any, Context], Any] | None = None
        self._name = ""  # of the handler, once that is known
        self._cwd = "/"
        self._function: dict[str, Any] = {}
        self._forks = False
        self._buffer = b""
        self._pipes = identity(1), identity(2)
        # Socket, stdout and stderr of the next event, where each has some of its own.
        self._own: tuple[int, ...] = ()
        self._streams: list[tuple[int, int, bool]] = []  # where each event has its own, and which
        self._is_forking = False
        self._read: Callable[[int], bytes] = self._read_rights

    def run(self) -> NoReturn:
        """Serve frames until the host closes the socket."""
        while True:
            self.serve_one()

    def serve_one(self) -> None:
        """Wait for one frame and handle it; one that is out of order ends this process."""
        kind, number, data = self._receive()
        if kind == INVOKE and self._handler is not None and not self._forks:
            self._invoke(number, data)
        elif kind == FORK and self._own and self._handler is not None:
            self._invoke_in_fork(number)
        elif kind == LOAD and self._name and self._handler is None:
            self._load(number)
            self._begin(number, data)
            if self._give_back is not None:
                self._channel.setsockopt(SOL_SOCKET, SO_RCVTIMEO, _REST)
        elif kind == START and self._handler is None:
            self._start(decode_event(data))
        else:
            os._exit(1)

    def _start(self, request: dict[str, Any]) -> None:
        """Apply START: variables, sys.path, handler's name; `nsbox.functions.session` sends it."""
        os.environ.clear()
        os.environ.update(request["own"])
        os.environ.update(request["env"])
        sys.path[:] = request["path"] + (sys.path if request["keeps_path"] else [])
        sys.dont_write_bytecode = True  # its code is read-only
        gc.enable()  # the template has switched it off
        sys.argv = [""]
        quick_decoder(may_import=False)  # not a module of the function's, which is not there yet
        self._function = request["function"]
        self._function["log_stream"] = request["own"]["AWS_LAMBDA_LOG_STREAM_NAME"]
        self._forks = request["forks"]
        if not self._forks:
            self._read = self._channel.recv
        self._name = request["handler"]
        self._cwd = request["cwd"]
        # While code is being attached: what its first answer is encoded by is its own copy then.
        encode_answer(self._cwd)
        self._set_visible(is_visible=request["visible"])

    def _set_visible(self, *, is_visible: bool) -> None:
        """Make this process dumpable, or not: then its files in /proc are closed to its uid.

        A fork could otherwise write to its memory, and so to that of all later forks. PID 1 and its
        forks are not dumpable; an executed program is, until it is set.
        """
        if _OWN_FILE != EXECUTED_FILE:
            if is_visible:
                show()
        elif not is_visible:
            try:
                hide()
            except (ImportError, OSError) as error:
                what = f"{error}: with reuse='reset' the worker hides from what it forks"
                raise SystemExit(what) from None

    def _load(self, number: int) -> None:
        """Import the handler's module."""
        try:
            os.chdir(self._cwd)
            self._handler = _find_handler(self._name)
        except _HandlerError as error:
            self._break(number, tell_failure(error.kind, str(error), ""))
        except SystemExit as error:
            _exit_as(error)
        except BaseException as error:  # noqa: BLE001 - module code may raise anything
            self._break(number, tell_raised(error, _OWN_FILE, ""))
        flush()

    def _begin(self, number: int, data: bytes | memoryview) -> None:
        """Answer READY, and serve the event that came with LOAD, if there is one."""
        is_silent = bool(data) and not any(map(may_be_unread, (1, 2), self._pipes))
        if self._forks:
            self._leave_pipes()
        if is_silent and time.monotonic() < MOMENT.unpack_from(data)[0]:
            self._send(READY, number, GOES_ON)
            if self._forks:
                self._invoke_in_fork(number + 1)
            else:
                self._invoke(number + 1, data[MOMENT.size :])
            return
        self._close_own()
        self._send(READY, number, b"")

    def _break(self, number: int, error: bytes) -> NoReturn:
        self._send(BROKEN, number, error)
        os._exit(1)

    def _invoke(self, number: int, data: bytes | memoryview) -> None:
        kind, answer = self._call(data)
        flush()
        self._send(kind, number, answer)

    def _call(self, data: bytes | memoryview) -> tuple[bytes, bytes]:
        left, size = INVOCATION.unpack_from(data)
        deadline = time.monotonic() + left
        begin = INVOCATION.size + size
        words = str(data[INVOCATION.size : begin], "utf-8")
        name, _, words = words.partition("\0")
        self.request_id = name
        client_context, _, variables = words.partition("\0")
        try:
            value = decode_event(data[begin:])
        except (ValueError, RecursionError) as error:
            what = f"Unable to unmarshal input: {error}"
            return ERROR, tell_failure("Runtime.UnmarshalError", what, name)
        before = _put_variables(decode(variables)) if variables else None
        try:
            context = Context(self._function, deadline, name, client_context)
            answer = self._handler(value, context)  # type: ignore[misc]
        except BaseException as error:  # noqa: BLE001 - handlers may raise anything
            if isinstance(error, SystemExit):
                flush()
                _exit_as(error)
            return ERROR, tell_raised(error, _OWN_FILE, name)
        finally:
            if before is not None:
                _put_variables(before)
        try:
            data = encode_answer(answer)
        except (TypeError, ValueError, RecursionError) as error:
            what = f"Unable to marshal response: {error}"
            return ERROR, tell_failure("Runtime.MarshalError", what, name)
        if len(data) > ANSWER_MAX:
            return ERROR, tell_failure("Function.ResponseSizeTooLarge", TOO_LARGE, name)
        return ANSWER, data

    def _invoke_in_fork(self, number: int) -> None:
        """Fork this process, as it is after the import, to serve one event; wait for its end."""
        (fd, *streams), self._own = self._own, ()
        own = _Socket(AF_UNIX, SOCK_STREAM, 0, fd)
        # What forks before have made its children (clone(2), CLONE_PARENT) counts until it is
        # waited for. The kernel, or a thread of the function's, may do that in its place.
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        self._is_forking = True
        try:
            pid = os.fork()
        except OSError:
            self._put_streams(streams)  # why it ends is in the event's log
            raise
        self._is_forking = False
        if pid == 0:
            try:
                # In the place of the worker's, which is closed with that.
                os.dup2(own.fileno(), self._channel.fileno(), inheritable=False)
                own.close()
                self._put_streams(streams)
                self._read, self._buffer = self._channel.recv, b""
                show()
                kind, number, data = self._receive()
                if kind == INVOKE:
                    self._invoke(number, data)
                    self._channel.shutdown(SHUT_WR)  # nothing else is said, and `_has_answered`
            finally:
                os._exit(0)
        for fd in streams:
            os.close(fd)
        try:
            status = str(os.waitpid(pid, 0)[1]).encode()
        except ChildProcessError:
            status = b""
        # Its status says nothing when it has answered: it may be killed before it ends by itself.
        if not _has_answered(own):
            self._send(ENDED, number, status)
        own.close()
        # It shared this open file, and so its flags, with all forks to come (fcntl(2)).
        if is_null(0):  # the import may have closed it, or put another there
            renew_stdin()

    def _leave_pipes(self) -> None:
        """Replace all descriptors of the worker's own pipes, duplicates included, by /dev/null."""
        self._streams = places_of(self._pipes, _OWN + len(self._own))
        null = os.open("/dev/null", os.O_WRONLY)
        for fd, _, is_inheritable in self._streams:
            os.dup2(null, fd, is_inheritable)
        os.close(null)

    def _put_streams(self, streams: list[int]) -> None:
        """Put an event's own pipes where the worker's were."""
        for fd, which, is_inheritable in self._streams:
            os.dup2(streams[which], fd, is_inheritable)
        for fd in streams:
            os.close(fd)

    def _close_own(self) -> None:
        for fd in self._own:
            os.close(fd)
        self._own = ()

    def let_go(self) -> None:
        """Close the sockets in a fork that the function's own code has made.

        It would read events, and answer, in the place of the process that it is a fork of.
        """
        if not self._is_forking:
            self._channel.close()
            self._close_own()

    def _receive(self) -> tuple[bytes, int, bytes | memoryview]:
        data = self._buffer
        while len(data) < HEADER.size:
            try:
                more = self._read(_FIRST_READ)
            except BlockingIOError:
                more = self._rest()
            if not more:
                _await_end()
            data = data + more if data else more
        kind, size, number = HEADER.unpack_from(data)
        end = HEADER.size + size
        if len(data) >= end:
            self._buffer = data[end:]
            return kind, number, data[HEADER.size : end]
        body = bytearray(size)
        filled = len(data) - HEADER.size
        body[:filled] = data[HEADER.size :]
        view = memoryview(body)
        while filled < size:
            try:
                count = self._channel.recv_into(view[filled:])
            except BlockingIOError:
                self._block()  # a pause in the middle
                continue
            if not count:
                _await_end()
            filled += count
        self._buffer = b""
        return kind, number, view

    def _rest(self) -> bytes:
        """Give memory back after a time without events; return the first bytes after that.

        Not before the first event: what has been made ready for that is to stay so.
        """
        was_called = self._forks or self.request_id != ""
        if was_called and self._give_back is not None:
            self._give_back()
        self._channel.setsockopt(SOL_SOCKET, SO_RCVTIMEO, _EVER)
        while True:
            try:
                data = self._read(_FIRST_READ)
                break
            except BlockingIOError:
                self._block()
        self._channel.setsockopt(SOL_SOCKET, SO_RCVTIMEO, _LATER if was_called else _REST)
        return data

    def _block(self) -> None:
        """Clear O_NONBLOCK, which another process with this socket may have set."""
        os.set_blocking(self._channel.fileno(), True)

    def _read_rights(self, size: int) -> bytes:
        """Read from the worker's socket, where descriptors may come along."""
        data, rights, _, _ = self._channel.recvmsg(size, CMSG_SPACE(_RIGHTS.size), MSG_CMSG_CLOEXEC)
        for _, _, content in rights:
            self._own = _RIGHTS.unpack(content)
        return data

    def _send(self, kind: bytes, number: int, data: bytes) -> None:
        try:
            header = HEADER.pack(kind, len(data), number)
            if len(data) < _FIRST_READ:
                self._channel.sendall(header + data)
            else:
                self._block()
                self._channel.sendall(header)
                self._channel.sendall(data)
        except OSError:
            os._exit(0)


def _has_answered(own: _Socket) -> bool:
    """Whether the fork has shut its event's socket down, or the host has closed it."""
    try:
        own.send(b"", MSG_NOSIGNAL)
    except OSError:
        return True
    return False


def _put_variables(variables: dict[str, str | None]) -> dict[str, str | None]:
    """Set environment variables, and remove those that are None; return what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


class _HandlerError(Exception):
    """There is no such handler; `kind` is the type AWS Lambda gives it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _find_handler(handler: str) -> Callable[[Any, Context], Any]:
    """Return what AWS Lambda's runtime finds: "src/app.handler" is `handler` of `src.app`."""
    module_name, _, name = handler.rpartition(".")
    dotted = module_name.replace("/", ".")
    if dotted.partition(".")[0] in sys.builtin_module_names:
        raise _HandlerError(
            "Runtime.BuiltInModuleConflict",
            f"Cannot use built-in module {module_name} as a handler module",
        )
    try:
        module = import_module(dotted)
    except ImportError as error:
        raise _HandlerError(
            "Runtime.ImportModuleError", f"Unable to import module '{module_name}': {error}"
        ) from error
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise _HandlerError(
            "Runtime.UserCodeSyntaxError",
            f"Syntax error in module '{module_name}': {error.msg} ({place})",
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        raise _HandlerError(
            "Runtime.HandlerNotFound", f"Handler '{name}' missing on module '{module_name}'"
        )
    return found  # type: ignore[no-any-return]


def _await_end() -> NoReturn:
    """End, for the host has closed the socket; first let a pending handler of SIGTERM run.

    Python runs handlers between two bytecode instructions: that of a signal which came just before
    the wait for an event is still pending. A worker with a handler ends by it, or is killed.
    """
    from _signal import SIG_DFL, SIGTERM, getsignal

    while getsignal(SIGTERM) != SIG_DFL:
        time.sleep(0.05)
    os._exit(0)


def _exit_as(error: SystemExit) -> NoReturn:
    code = error.code
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
        code = 1
    flush()
    os._exit((code or 0) & 0xFF)


def main(channel: int, give_back: Callable[[], object] | None = None) -> NoReturn:
    """Serve on an inherited descriptor; `give_back` as for `Worker`."""
    # New ones: those of a clone were made for other files.
    sys.stdout, sys.stderr = open_stream(1), open_stream(2)
    try:
        worker = Worker(_Socket(fileno=channel), give_back)
        # Not by each one made, as those to warm up are: a fork runs all hooks there are.
        os.register_at_fork(after_in_child=worker.let_go)
        LogSetup(lambda: worker.request_id)
        worker.run()
    except SystemExit as error:  # a handler of a signal is left so
        _exit_as(error)
    except BaseException as error:  # noqa: BLE001 - the log is told, as an interpreter would
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        flush()
        os._exit(1)
