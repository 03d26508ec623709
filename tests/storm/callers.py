# SPDX-License-Identifier: Apache-2.0
"""The callers of a storm: threads that call, lease or submit, loops with tasks, the main thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.storm.interrupts import Window
from tests.storm.ledger import Call, Plan
from tests.storm.pools import NAMES, TENANTS, WEIGHTS, AskedError, Subject

import nsbox

TASKS = 3
"""Of each thread that runs a loop."""
KINDS = {
    "echo": 86.0, "raise": 5.0, "exit": 1.5, "hang": 1.5, "large": 1.0, "wrong": 1.0, "hog": 1.0,
}  # fmt: skip
CANCELLED = 0.03
"""Part of awaited calls."""
THINK = 0.02
"""Mean seconds between two calls of a caller: other programs want to run, too."""
LONGEST = 60.0
"""Seconds, times the plan's patience, in which every call ends that a pause or the end waits for:
more than any deadline, so that one that is missed is told of by its call."""


class Callers:
    """The callers, each with random choices of its own."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        """Nothing is started yet."""
        self._plan = plan
        self._subject = subject
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._is_paused = False
        self._under_way = 0
        self.windows: list[Window] = []
        """Of those that may be interrupted: the main thread's is the first."""
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"storm-{number}")
            for number in range(plan.threads)
        ]
        self._kinds, self._weights = list(KINDS), list(KINDS.values())

    def run_main(self) -> None:
        """Let them begin, and call with the main thread, too, until `stop`."""
        window = Window()
        self.windows.append(window)
        for thread in self._threads:
            thread.start()
        before = signal.signal(signal.SIGINT, window.handle)
        try:
            self._calls("main", random.Random(f"{self._plan.seed}/main"), window)
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No call is under way in the body."""
        with self._changed:
            self._is_paused = True
            longest = LONGEST * self._plan.patience
            if not self._changed.wait_for(lambda: not self._under_way, longest):
                text = f"{self._under_way} calls did not end within {longest:.0f} seconds"
                self._subject.ledger.wrong("deadline", text)
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def _enter(self) -> bool:
        """Begin a call, unless there is a pause."""
        with self._changed:
            self._under_way += not self._is_paused
            return not self._is_paused

    def _leave(self) -> None:
        with self._changed:
            self._under_way -= 1
            if self._is_paused:
                self._changed.notify_all()

    def stop(self) -> None:
        """Have every caller end with its call."""
        self._over.set()

    def join(self) -> None:
        """Wait until every call is over; one that is not within its deadline is told."""
        end = time.monotonic() + LONGEST * self._plan.patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        late = [thread.name for thread in self._threads if thread.is_alive()]
        if late:
            self._subject.ledger.wrong("deadline", f"calls of {late} never ended")

    def _run(self, number: int) -> None:
        choices = random.Random(f"{self._plan.seed}/{number}")
        try:
            if number % 4 == 3:
                asyncio.run(self._tasks(number, choices))
            elif number % 8 == 2:
                # A future that is interrupted within `threading` may keep its lock.
                self._calls(f"submitter {number}", choices, None)
            else:
                window = Window()
                self.windows.append(window)
                self._calls(f"thread {number}", choices, window)
        except BaseException as error:
            self._subject.ledger.wrong("storm", f"caller {number} failed itself: {error!r}")
            raise

    def _call(self, caller: str, number: int, choices: random.Random, way: str) -> Call:
        do = choices.choices(self._kinds, self._weights)[0]
        pool = choices.choices(NAMES, WEIGHTS)[0]
        if pool == "commands":
            way = "lease"
            do = do if do in ("echo", "hang", "raise") else "echo"
        if do == "hog" and not self._subject.can_hog:
            do = "echo"
        timeout = 5.0
        if do == "hang":
            timeout = choices.uniform(0.05, 0.3)
        event: dict[str, Any] = {
            "do": do,
            "caller": caller,
            "nonce": f"{caller}:{number}:{choices.getrandbits(64):x}",
            "seconds": 0.0,
            "pad": "",
        }
        if do == "hang":
            event["seconds"] = 600.0
        elif choices.random() < 0.2:
            event["seconds"] = choices.expovariate(1 / 0.01)
        if choices.random() < 0.1:
            event["pad"] = "." * choices.randrange(200_000)
        if do == "wrong":
            event["pad"] = "." * (6 << 20)  # larger than an event may be
        tenant = choices.choice(TENANTS) if pool == "keep" else None
        call = Call(pool, way, do, event, timeout * self._plan.patience, tenant)
        call.version = self._subject.completed
        call.begin = time.monotonic()
        self._subject.ledger.begin(call)
        return call

    # -- threads ----------------------------------------------------------------------------------

    def _calls(self, caller: str, choices: random.Random, window: Window | None) -> None:
        count = 0
        while not self._over.is_set():
            if not self._enter():
                self._over.wait(THINK)
                continue
            way = "invoke" if choices.random() < 0.8 else "invoke_bytes"
            call = self._call(caller, count, choices, "submit" if window is None else way)
            answer: Any = None
            error: BaseException | None = None
            if window is None:
                try:
                    answer = self._make(call)
                except Exception as found:  # noqa: BLE001 - judged
                    error = found
            else:
                # Not a default of the lambda: what it refers to is this turn's.
                answer, error = window.call(lambda: self._make(call))  # noqa: B023
            self._subject.judge(call, answer, error)
            del call, answer, error
            self._leave()
            count += 1
            self._over.wait(choices.expovariate(1 / THINK))

    def _make(self, call: Call) -> Any:
        pool = self._subject.pools[call.pool]
        if call.way == "lease":
            return self._lease(pool, call)
        if call.way == "submit":
            return self._submit(pool, call)
        if call.way == "invoke":
            return pool.invoke(call.event, timeout=call.timeout, tenant=call.tenant)
        payload = json.dumps(call.event).encode()
        return pool.invoke_bytes(payload, timeout=call.timeout, tenant=call.tenant).json()

    def _lease(self, pool: nsbox.WarmPool[nsbox.Config], call: Call) -> nsbox.Result:
        with pool.acquire() as env:
            if call.do == "raise":
                raise AskedError(call.event["nonce"])
            seconds = 600 if call.do == "hang" else 0
            words = ["sh", "-c", 'printf %s "$1"; exec sleep "$2"', "sh"]
            return env.run([*words, call.event["nonce"], str(seconds)], timeout=call.timeout)

    def _submit(self, pool: Any, call: Call) -> Any:
        future = pool.submit(call.event, timeout=call.timeout, tenant=call.tenant)
        concurrent.futures.wait([future], self._subject.deadline(call) + self._plan.slack)
        if not future.done():
            raise AssertionError("the future of submit is never done")
        return future.result()

    # -- loops ------------------------------------------------------------------------------------

    async def _tasks(self, number: int, choices: random.Random) -> None:
        seeds = [choices.getrandbits(64) for _ in range(TASKS)]
        async with asyncio.TaskGroup() as group:
            for task, seed in enumerate(seeds):
                group.create_task(self._awaited(f"task {number}.{task}", random.Random(seed)))

    async def _awaited(self, caller: str, choices: random.Random) -> None:
        count = 0
        while not self._over.is_set():
            if not self._enter():
                await asyncio.sleep(THINK)
                continue
            call = self._call(caller, count, choices, "invoke_async")
            patience = None
            if choices.random() < CANCELLED:
                patience = choices.uniform(0.0, 0.05)
            task = asyncio.ensure_future(self._await(call))
            await asyncio.wait([task], timeout=patience)
            is_cancelled = task.cancel()
            answer, error = None, None
            try:
                answer = await task
            except (Exception, asyncio.CancelledError) as found:  # noqa: BLE001 - judged
                error = found
            self._subject.judge(call, answer, error, cancelled=is_cancelled)
            del call, task, answer, error
            self._leave()
            count += 1
            await asyncio.sleep(choices.expovariate(1 / THINK))

    async def _await(self, call: Call) -> Any:
        pool = self._subject.pools[call.pool]
        if call.way == "lease":
            async with pool.acquire_async() as env:
                if call.do == "raise":
                    raise AskedError(call.event["nonce"])
                seconds = "600" if call.do == "hang" else "0"
                words = ["sh", "-c", 'printf %s "$1"; exec sleep "$2"', "sh"]
                argv = [*words, call.event["nonce"], seconds]
                return await asyncio.to_thread(env.run, argv, timeout=call.timeout)
        return await pool.invoke_async(call.event, timeout=call.timeout, tenant=call.tenant)
