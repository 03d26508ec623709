# SPDX-License-Identifier: Apache-2.0
"""What events leave in a function's environment, which PID 1 takes away: files, processes, or all.

Steps are taken as those of the session are; after anything doubtful the environment is killed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Final

from nsbox.errors import NsboxError
from nsbox.functions.deployment import Deployment
from nsbox.functions.exchange import PendingCall, Steps, Wait
from nsbox.functions.function import FunctionVersion
from nsbox.guest import protocol as p
from nsbox.supervisor import files
from nsbox.supervisor.channel import ANSWER_DEADLINE, Channel
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.values.invocation import NOTHING, LeftRunning
from nsbox.values.result import EnvironmentDied

_PID_1_AND_WORKER: Final = b"2\n"  # pids.current when there is no other thread


class Leftovers:
    """Of one session.

    Attributes:
        cleanup: Where PID 1 answers what the next event waits for, or None.
        are_killed: Whether processes that an event leaves running are killed.
        on_kill: Called when there were some.
    """

    def __init__(
        self, connection: EnvironmentConnection, version: FunctionVersion, deployment: Deployment
    ) -> None:
        self._connection = connection
        self._config = version.config
        self.cleanup: Channel | None = None
        self.are_killed = deployment.kills_left
        self.on_kill: Callable[[], object] | None = None
        # Beside a worker that was executed there is one that waits since the birth, or has ended.
        is_plain = version.function.start == "clone"
        self._is_counted = is_plain and version.function.reuse == "keep" and not self.are_killed
        # Opened once: that costs ten times a look.
        reader = connection.reader if is_plain and self.are_killed else None
        self._counter = None if reader is None else reader.open_counter()

    def close(self) -> None:
        """Close what is open."""
        if self.cleanup is not None:
            self.cleanup.close()
        if self._counter is not None:
            self._counter.close()

    # -- what is taken away --------------------------------------------------------------------

    def begin_reset(self, worker: int) -> Steps[None]:
        """Send RESET to PID 1, which spares `worker`; the next event waits for its answer."""
        try:
            self.cleanup = yield from self._ask(p.RESET, files.reset_request(self._config, worker))
        except OSError as error:
            # The answer has come; the next call raises.
            self._connection.kill(f"its reset could not be asked for ({error})")

    def remove(self, names: Iterable[str]) -> Steps[None]:
        """Have the files of an event removed; the next one waits for the answer."""
        # Whatever PID 1 is asked next comes after it.
        request = p.names_request([name.encode() for name in names])
        try:
            self.cleanup = yield from self._ask(p.REMOVE, request)
        except (OSError, NsboxError):
            # The next event is not to find them.
            self._connection.kill("an invocation's files could not be removed")

    def await_cleanup(self) -> Steps[None]:
        """Wait until all is gone that was to be; raises EnvironmentDied, EnvironmentStateError."""
        if self.cleanup is not None:
            channel, self.cleanup = self.cleanup, None
            files.check_reset(self._connection, *(yield from self._answer(channel)))

    # -- what is left running ------------------------------------------------------------------

    def kill(self, call: PendingCall, worker: int) -> Steps[None]:
        """Kill what `call`, which has been answered, has left running; return when it is gone.

        If PID 1 does not say that all is gone the environment is killed: `call` is over and has all
        it wanted, and there is no other.
        """
        with suppress(OSError, ValueError):  # it is closed meanwhile
            counter = self._counter
            if counter is not None and os.pread(counter.fileno(), 8, 0) == _PID_1_AND_WORKER:
                call.left_running = NOTHING
                return
        call.answered = time.monotonic()
        try:
            left = call.left_running = yield from self._ask_for_left(worker, kill=True)
        except EnvironmentDied:
            pass
        except (OSError, NsboxError):
            self._connection.kill("what an invocation has left running could not be killed")
        else:
            if left is not None and left.processes and self.on_kill is not None:
                self.on_kill()

    def count(self, worker: int) -> Steps[LeftRunning]:
        """Count what runs besides the worker; see `ExecutionEnvironment.left_running`."""
        try:
            return (yield from self._ask_for_left(worker, kill=False)) or NOTHING
        except OSError as error:
            raise self._connection.failed(error) from error

    def of_call(self, call: PendingCall) -> LeftRunning | None:
        """Return what `call` has left running, as far as no process need be asked for that."""
        if call.left_running is not None:
            return call.left_running
        is_counted = self._is_counted and not self._connection.is_killed
        return files.look_at_left(self._connection) if is_counted else None

    def _ask_for_left(self, worker: int, *, kill: bool) -> Steps[LeftRunning | None]:
        """Ask PID 1 what runs besides `worker`, and kill it.

        What other commands of the environment have started is not meant.
        """
        channel = yield from self._ask(p.LEFT, p.left_request(worker, kill=kill))
        return files.check_left(self._connection, *(yield from self._answer(channel)))

    # -- PID 1 ---------------------------------------------------------------------------------

    def _ask(self, operation: bytes, request: bytes) -> Steps[Channel]:
        """Ask PID 1; raises OSError when it is gone."""
        if len(request) + 2 <= p.LARGEST_MESSAGE and self._connection.has_control:
            return self._connection.begin(operation, request)
        return (yield partial(self._connection.begin, operation, request))  # type: ignore[no-any-return]

    def _answer(self, channel: Channel) -> Steps[tuple[bytes, int, int]]:
        """Wait for PID 1's answer and return its kind and two numbers.

        Raises:
            EnvironmentDied: It is gone, has broken the rules, or does not answer in its time.
        """
        try:
            wait = Wait((channel.socket.fileno(),), time.monotonic() + ANSWER_DEADLINE)
            answer = None
            while answer is None:
                if not (yield wait):
                    raise TimeoutError
                answer = channel.feed_numbers()
        except OSError as error:
            raise (yield partial(self._connection.died, error)) from error
        finally:
            channel.close()
        return answer
