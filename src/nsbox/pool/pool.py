# SPDX-License-Identifier: Apache-2.0
"""`WarmPool`: environments kept warm for functions or a `Config`, one call each at a time.

The pool decides who gets which environment and when one is closed (`nsbox.pool.scheduler` has that
state); everything else is the environment's.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Final, Literal, Self, Unpack, overload

from nsbox.errors import ConfigError, NsboxError
from nsbox.functions.credentials import Provider
from nsbox.functions.function import Function, FunctionVersion, ReuseChoice
from nsbox.pool.accounts import Resolve
from nsbox.pool.events import PoolEvent, PoolSnapshot, PoolStats
from nsbox.pool.executor import CallExecutor
from nsbox.pool.function import (
    PoolFunction,
    PoolServed,
    config_resolver,
    version_of,
    version_resolver,
)
from nsbox.pool.maintenance import Source
from nsbox.pool.manager import RETURN_DEADLINE, PoolManager
from nsbox.pool.settings import PoolSettings, check_count, check_settings
from nsbox.supervisor.launcher import begin_exit
from nsbox.values.config import Config, make_config

EXIT_DEADLINE: Final = 1.0
"""Seconds the interpreter waits at its end for calls that it has killed. Threads return at once;
a task of an event loop that nobody runs any more never does. The launcher ends its environment."""


class WarmPool(PoolFunction[PoolServed]):
    """Keeps environments warm and gives each of them to one call at a time.

    Use it as a context manager, from any number of threads; not from a forked child. The with
    statement waits for running calls at its end, and kills them when it ends by an exception.

    An environment belongs to one function version and one tenant. A call gets an idle one of its
    own, the last used first; else one is born, up to `max_environments`; else the one that has
    been idle longest makes room; else the call waits for its turn.

    It is no `concurrent.futures.Executor`, whose `submit` takes what is to be called: here that is
    the function. `submit` and `map` take events, and otherwise do as an executor's; so does
    `shutdown`.

    To type checkers a pool of a function is a ``WarmPool[Function]``, which has no `acquire`, and
    that of a `Config` a ``WarmPool[Config]``, which has no `invoke`, `submit`, `map` and
    `publish`. A plain ``WarmPool`` in an annotation is either.

    Attributes:
        max_environments: The most at a time.
    """

    @overload
    def __init__(
        self: WarmPool[Function],
        source: Function | FunctionVersion,
        *,
        reuse: Literal["keep"] = "keep",
        **settings: Unpack[PoolSettings],
    ) -> None: ...

    @overload
    def __init__(
        self: WarmPool[Config],
        source: Config | None = None,
        *,
        reuse: ReuseChoice = "keep",
        **settings: Unpack[PoolSettings],
    ) -> None: ...

    def __init__(
        self,
        source: Function | FunctionVersion | Config | None = None,
        *,
        provisioned: int = 0,
        max_environments: int = 8,
        standby: int = 0,
        memory_budget: int | str | None = None,
        acquire_timeout: float | None = 10.0,
        max_waiting: int = 1000,
        idle_timeout: float = 600.0,
        freeze_after: float | None = 1.0,
        max_lifetime: float = 14 * 3600.0,
        max_invocations: int | None = None,
        shutdown_grace: float = 0.5,
        min_available: float | None = 0.05,
        reuse: ReuseChoice = "keep",
        credentials: Provider | None = None,
        on_event: Callable[[PoolEvent], object] | None = None,
        blank: int | None = None,
    ) -> None:
        """Make the pool, and wait until `provisioned` environments are ready.

        Args:
            source: A function, which is published, or a version; for `invoke` and `submit`. Or a
                `Config` (None: the default one), for `acquire`.
            provisioned: Environments kept ready, initialised; a lost one is replaced.
            max_environments: The most at a time, births under way counted.
            standby: Standby environments of each kind of the pool kept ready, from which a birth
                takes only the rest (`nsbox.set_standby`).
            memory_budget: Bytes, or such as "4G", that the memory limits of all may sum up to.
            acquire_timeout: Seconds a call waits for its turn; None waits as long as it takes.
            max_waiting: Calls of each function that may wait; 0: none does.
            idle_timeout: Seconds after which one that nobody uses is closed.
            freeze_after: Seconds after which one that nobody uses is frozen; None: never.
            max_lifetime: Seconds after which one gets no other call.
            max_invocations: Calls after which one is replaced.
            shutdown_grace: Seconds a healthy one has to end after SIGTERM; 0: none.
            min_available: Share of the memory; when less is available, or less than twice that and
                the kernel tells of pressure, idle ones are closed. None: do not look.
            reuse: For a `Config`: ``"keep"``, ``"reset"`` (`ExecutionEnvironment.reset` after each
                lease) or ``"never"``. A function has its own.
            credentials: Called with the name of a role, in the thread of the call that needs them
                first; returns `Credentials`, or a mapping with the names of AWS STS. They are
                asked for anew five minutes before they expire; a `CredentialCache` has others.
            on_event: Called with a `PoolEvent`, from whichever thread it happens in; it is to
                return soon, to wait for no call, and not to close the pool. What it raises is
                logged.
            blank: The old name of `standby`, for one release.

        Raises:
            ConfigError: A value is wrong.
            NsboxError: A provisioned environment cannot be made, or its function does not start.
        """
        if blank is not None:
            what = "blank= is standby= now; the old name goes with the next release"
            warnings.warn(what, DeprecationWarning, stacklevel=2)
            standby = blank
        settings = check_settings(
            max_environments=max_environments,
            standby=standby,
            memory_budget=memory_budget,
            acquire_timeout=acquire_timeout,
            max_waiting=max_waiting,
            idle_timeout=idle_timeout,
            freeze_after=freeze_after,
            max_lifetime=max_lifetime,
            max_invocations=max_invocations,
            shutdown_grace=shutdown_grace,
            min_available=min_available,
            reuse=reuse,
            credentials=credentials,
            on_event=on_event,
        )
        provisioned = check_count(provisioned, "provisioned", 0)
        if provisioned > max_environments:
            raise ConfigError("provisioned: more than max_environments")
        resolve: Resolve[Source]
        if isinstance(source, Function | FunctionVersion):
            if reuse != "keep":
                raise ConfigError("reuse: give it to the Function")
            resolve = version_resolver(version_of(source, "source"))
        else:
            resolve = config_resolver(make_config(source, {}))
        manager = PoolManager(settings)
        queue = manager.add(
            resolve, reserved=None, provisioned=provisioned, optional=source is None
        )
        executor = CallExecutor(max_environments)
        super().__init__(manager, queue, executor)
        self.max_environments = max_environments
        self._executors = [executor]  # one for each function
        self._added: weakref.WeakKeyDictionary[PoolFunction[Any], Resolve[Source]]
        self._added = weakref.WeakKeyDictionary()
        self._close_lock = threading.Lock()
        self._is_closed = False
        try:
            manager.open(queue)
            _pools.add(self)
        except BaseException:
            self.close(drain=False)
            raise

    def function(
        self,
        source: Function | FunctionVersion,
        *,
        reserved: int | None = None,
        provisioned: int = 0,
    ) -> PoolFunction[Function]:
        """Have the pool serve another function, and return what it is called by.

        All have their environments in this one pool. Those without reserved places share what is
        left: what becomes free goes to the function whose calls wait and that has the fewest.

        Args:
            source: A function, which is published, or a version.
            reserved: So many places are this function's, and no others: as reserved concurrency of
                AWS Lambda it is a guarantee and a limit. With 0 every call is `Throttled`.
            provisioned: Environments of it that are kept ready.

        Raises:
            ConfigError: There are not as many places, or not that much memory.
            PoolClosed: The pool is closed.
            NsboxError: A provisioned environment cannot be made, or the function does not start.
        """
        version = version_of(source, "function")
        if reserved is not None:
            reserved = check_count(reserved, "reserved", 0)
        provisioned = check_count(provisioned, "provisioned", 0)
        self._check_usable(is_function=self._is_function)
        resolve = version_resolver(version)
        most = self._manager.settings.max_environments if reserved is None else max(1, reserved)
        executor = CallExecutor(most)
        try:
            queue = self._manager.add(resolve, reserved=reserved, provisioned=provisioned)
            self._manager.open(queue)
            function: PoolFunction[Function] = PoolFunction(self._manager, queue, executor, self)
            with self._close_lock:
                self._executors.append(executor)
            self._added[function] = resolve
        except BaseException:
            self._manager.withdraw(resolve)
            raise
        return function

    def stats(self) -> PoolStats:
        """Return the numbers of all functions of the pool; see `PoolFunction.stats`."""
        return self._scheduler.stats()

    def snapshot(self) -> PoolSnapshot:
        """Return what there is at this moment: environments by function, and calls that wait."""
        return self._manager.snapshot()

    # -- the end -------------------------------------------------------------------------------

    def close(self, *, drain: bool = True) -> None:
        """End the pool and every environment. May be called again.

        Args:
            drain: Let running and waiting calls end first; new ones are refused. Otherwise
                running ones are killed, and they and the waiting ones raise `PoolClosed`.

        Raises:
            CleanupError: Something of an environment could not be removed.
        """
        self._close(RETURN_DEADLINE, drain=drain)

    def _close(self, patience: float, *, drain: bool) -> None:
        """Do as `close`; calls that were killed have `patience` seconds to return."""
        if self._manager.owner != os.getpid():
            return
        try:
            _let_go_of_leases()
            # Before the lock, which another thread may have that lets calls end.
            failure = None if drain else self._refuse(drain=False)
            with self._close_lock:
                if not self._is_closed:
                    if drain:
                        failure = self._refuse(drain=True)
                    self._scheduler.await_empty(patience)
                    for executor in self._executors:
                        executor.join()
                    self._manager.stop()
                    _pools.discard(self)
                    self._is_closed = True
        except BaseException:
            # Interrupted: whoever waits for nothing any more leaves nothing behind all the same.
            with contextlib.suppress(RuntimeError):  # no thread is started any more
                self._close_aside(drain=False)
            raise
        if failure is not None:
            raise failure

    def _close_aside(self, *, drain: bool) -> None:
        threading.Thread(
            target=self.close, kwargs={"drain": drain}, name="nsbox-pool-close", daemon=True
        ).start()

    def _refuse(self, *, drain: bool) -> Exception | None:
        """Take no more calls, and end those that wait and run, unless they may end by themselves.

        Returns what could not be removed of idle environments, if anything.
        """
        for executor in list(self._executors):
            executor.close(drain=drain)
        return self._manager.begin_close(drain=drain)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the pool as `concurrent.futures.Executor.shutdown` does: `close` with its words.

        Args:
            wait: Return when every call has ended. Otherwise that happens in a thread: from now on
                `submit` refuses, and so does the rest when those submitted are over.
            cancel_futures: Cancel the futures whose calls have not started.

        Raises:
            CleanupError: As `close`; not with ``wait=False``.
        """
        for executor in self._executors:
            executor.refuse(cancel=cancel_futures)
        if wait:
            self.close()
        else:
            self._close_aside(drain=True)

    @staticmethod
    @atexit.register
    def _close_all() -> None:
        begin_exit()
        for pool in list(_pools):
            with contextlib.suppress(NsboxError):
                pool._close(EXIT_DEADLINE, drain=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(drain=kind is None)

    def __del__(self) -> None:
        # Whoever had it was interrupted, or has forgotten it.
        if not getattr(self, "_is_closed", True) and self._manager.owner == os.getpid():
            try:
                warnings.warn(f"{self!r} was not closed", ResourceWarning, 2, source=self)
            finally:  # where warnings are errors, too
                with contextlib.suppress(RuntimeError):  # no thread is started any more
                    self._close_aside(drain=False)


def withdraw(pool: WarmPool[Any], function: PoolFunction[Any]) -> None:
    """Take out a function again that nobody has called, nor will."""
    pool._manager.withdraw(pool._added.pop(function))


_pools: weakref.WeakSet[WarmPool[Any]] = weakref.WeakSet()
_HERE: Final = os.path.dirname(__file__)


def _let_go_of_leases() -> None:
    """Have no traceback of an interrupt hold on to what the interrupted call had.

    That is of the exception under which a pool is closed, or that has ended the program.
    """
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.startswith(_HERE):
                with contextlib.suppress(RuntimeError):  # it is still at work
                    frame.clear()
        error = error.__context__
