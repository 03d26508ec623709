# SPDX-License-Identifier: Apache-2.0
"""The callers of a soak: threads that call, submit, or run an asyncio loop with some tasks."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.soaked import HOUSE, SECOND, TENANTS, Call, Plan, Subject

TASKS = 3
"""Of each thread that runs a loop."""
KINDS = {
    "echo": 86.0, "raise": 5.0, "exit": 1.5, "hang": 1.5, "large": 1.0, "wrong": 1.0, "hog": 1.0,
}  # fmt: skip
CANCELLED = 0.03
"""Part of awaited calls."""
THINK = 0.02
"""Mean seconds between two calls of a caller: other programs want to run, too."""


class Users:
    """The callers, each with random choices of its own."""

    def __init__(self, plan: Plan, subject: Subject) -> None:
        """Nothing is started yet."""
        self._plan = plan
        self._subject = subject
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._is_paused = False
        self._under_way = 0
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"soak-{number}")
            for number in range(plan.threads)
        ]
        kinds = {kind: weight for kind, weight in KINDS.items() if kind != "hog" or subject.can_hog}
        self._kinds, self._weights = list(kinds), list(kinds.values())

    def start(self) -> None:
        """Lets them begin."""
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No call is under way in the body."""
        with self._changed:
            self._is_paused = True
            longest = 60.0 * self._plan.patience + self._plan.slack
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
        """Waits until every call is over; one that is not within its deadline is told."""
        self._over.set()
        longest = 60.0 * self._plan.patience + self._plan.slack
        end = time.monotonic() + longest
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
                self._calls(number, choices, self._submit)
            else:
                self._calls(number, choices, self._invoke)
        except BaseException as error:
            self._subject.ledger.wrong("soak", f"caller {number} failed itself: {error!r}")
            raise

    def _call(self, caller: str, number: int, choices: random.Random) -> Call:
        do = choices.choices(self._kinds, self._weights)[0]
        pool = choices.choices([*HOUSE, SECOND], (4, 1, 2, 1))[0]
        timeout = 30.0
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
        call = Call(pool, do, event, timeout * self._plan.patience, tenant)
        call.version = self._subject.completed
        call.begin = time.monotonic()
        return call

    # -- threads ----------------------------------------------------------------------------------

    def _calls(self, number: int, choices: random.Random, make: Any) -> None:  # noqa: ANN401
        count = 0
        while not self._over.is_set():
            if not self._enter():
                self._over.wait(THINK)
                continue
            call = self._call(f"thread {number}", count, choices)
            answer, error = None, None
            try:
                answer = make(call, choices)
            except Exception as found:  # noqa: BLE001 - judged
                error = found
            self._subject.judge(call, answer, error, cancelled=False)
            del call, answer, error
            self._leave()
            count += 1
            self._over.wait(choices.expovariate(1 / THINK))

    def _invoke(self, call: Call, choices: random.Random) -> Any:  # noqa: ANN401 - any JSON value
        pool = self._subject.pools[call.pool]
        if choices.random() < 0.8:
            return pool.invoke(call.event, timeout=call.timeout, tenant=call.tenant)
        payload = json.dumps(call.event).encode()
        return pool.invoke_bytes(payload, timeout=call.timeout, tenant=call.tenant).json()

    def _submit(self, call: Call, _choices: random.Random) -> Any:  # noqa: ANN401 - any JSON value
        pool = self._subject.pools[call.pool]
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
            call = self._call(caller, count, choices)
            patience = None
            if choices.random() < CANCELLED:
                patience = choices.uniform(0.0, 0.05)
            pool = self._subject.pools[call.pool]
            task = asyncio.ensure_future(
                pool.invoke_async(call.event, timeout=call.timeout, tenant=call.tenant)
            )
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
