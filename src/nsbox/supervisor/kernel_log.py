# SPDX-License-Identifier: Apache-2.0
"""What the kernel's log says about system call filters that killed (audit record 1326).

A process that the filter killed and one that sent itself SIGSYS have the same wait status; only
the kernel's log tells them apart. It can be read by root, and where no audit daemon takes the
records (seccomp(2), actions_logged; Documentation/ABI/testing/dev-kmsg). A record names the process
by its number in the first pid namespace: where nsbox runs in another, nothing can be told by it.
"""

from __future__ import annotations

import os
import time

from nsbox.linux.descriptors import as_file

_DEADLINE = 0.05  # seconds; the records are printed by a kernel thread
_RECORD_MOST = 8192
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # inode (linux/proc_ns.h, PROC_PID_INIT_INO)
_CLOCK_SLACK = 0.01  # seconds; the record's time is the kernel's coarse clock


def filter_kill(pid: int, age: float) -> str:
    """Return the record of a kill of the process `pid` in the last `age` seconds, or ""."""
    # The record carries the wall clock, and nothing else to tell an old one by.
    since = time.clock_gettime(time.CLOCK_REALTIME) - age - _CLOCK_SLACK
    mark = f" pid={pid} "
    deadline = time.monotonic() + _DEADLINE
    try:
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
            return ""
        log = as_file(os.open, "/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        while True:
            try:
                record = os.read(log.fileno(), _RECORD_MOST).decode(errors="replace")
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return ""
                time.sleep(0.005)
                continue
            except BrokenPipeError:
                continue  # records were overwritten while we read: go on with what is there
            if ";audit: type=1326 " in record and mark in record and " sig=31 " in record:
                stamp = record.partition("audit(")[2].partition(":")[0]
                if float(stamp) >= since:
                    return record.partition(";")[2].splitlines()[0]
    except (OSError, ValueError):
        return ""
    finally:
        log.close()
