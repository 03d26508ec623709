# SPDX-License-Identifier: Apache-2.0
"""Every exception nsbox raises, but for four that carry a value, which are defined beside it.

::

    NsboxError
    ├─ ConfigError (ValueError)        a bad value; nothing was touched
    ├─ UnsupportedHostError            .feature .reason .hint; before anything is created
    ├─ SetupError                      .step .errno .hint; what was made is removed again
    │  └─ DescriptorsExhausted         .count .limit: no room for another environment
    ├─ LauncherError                   the launcher could not be started, died, or was silent
    ├─ StoreError                      .path: the code store, or an entry of it, is not usable
    ├─ CredentialsError                .role: a provider gave none
    ├─ SyscallError (OSError)          .syscall .errno .filename
    ├─ EnvironmentStateError           closed, frozen, or owned by another process
    ├─ CommandStartError               .argv0 .errno .exit_code (126 or 127)
    ├─ InvokeError
    │  ├─ FunctionError                .error_type .message .stack_trace .invocation
    │  ├─ InvokeTimeout (TimeoutError) .invocation: the environment was killed
    │  └─ EnvironmentDied              .outcome: PID 1 or the launcher went away under a command
    ├─ PoolError                       a pool cannot do this; it is another process's
    │  ├─ Throttled                    .reason .retry_after: too many wait, or starts fail
    │  ├─ PoolTimeout (TimeoutError)   no environment was free in time
    │  └─ PoolClosed                   the pool is closed, or was meanwhile
    ├─ CleanupError                    .leaked: what is still there
    └─ CommandFailed                   .result; only from Result.check()

What the command does is a `Result`; what nsbox fails to do is an exception. All of them can be
pickled and copied, with their attributes, so that they cross a process pool.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Literal, NoReturn

    ThrottleReason = Literal["full", "start failures", "reserved"]


class NsboxError(Exception):
    """Base of every nsbox exception."""

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's would call the class with `args`, which is the message: what most classes
        # here take is something else.
        kind, args, *state = tuple(super().__reduce__())
        return (_remake, (kind, args), *state)


def _remake(kind: type[NsboxError], args: tuple[object, ...]) -> NsboxError:
    """Return an exception with these `args`, whose attributes are set by who unpickles it."""
    error = kind.__new__(kind, *args)
    # Of an OSError one of both sets errno, strerror and filename: which one is for CPython to know.
    base = OSError if issubclass(kind, OSError) else Exception
    base.__init__(error, *args)
    return error


class ConfigError(NsboxError, ValueError):
    """A value the caller gave is wrong. Nothing was created."""


class UnsupportedHostError(NsboxError):
    """This host cannot enforce what was asked for. Nothing was created.

    Attributes:
        feature: Name of the missing protection, the word `allow_missing` takes.
        reason: What was found.
        hint: What to do about it on this host.
    """

    def __init__(self, feature: str, reason: str, hint: str) -> None:
        super().__init__(f"{feature} cannot be enforced on this host: {reason}. {hint}")
        self.feature = feature
        self.reason = reason
        self.hint = hint


class SetupError(NsboxError):
    """A step of the birth of an environment failed; what it had made is removed.

    Attributes:
        step: Name of the step, as printed by `nsbox plan`.
        errno: The kernel's error number, or 0.
        hint: What to do about it, or "".
    """

    def __init__(self, step: str, message: str, *, errno: int = 0, hint: str = "") -> None:
        text = f"step {step!r} failed: {message}"
        super().__init__(f"{text}. {hint}" if hint else text)
        self.step = step
        self.errno = errno
        self.hint = hint


class DescriptorsExhausted(SetupError):
    """Another environment would take the descriptors that those that live, and `run`, need.

    Attributes:
        count: Descriptors that are open.
        limit: The soft limit of open files (RLIMIT_NOFILE) of that process.
    """

    def __init__(self, process: str, count: int, limit: int, hint: str) -> None:
        message = (
            f"{process} has {count} descriptors open, of {limit} that its limit of open files "
            "allows (RLIMIT_NOFILE); the rest is kept for the environments that there are"
        )
        super().__init__("descriptors", message, errno=_errno.EMFILE, hint=hint)
        self.count = count
        self.limit = limit


class LauncherError(NsboxError):
    """The launcher process could not be started, died, or did not answer in time."""


class StoreError(NsboxError):
    """The code store cannot be used, or what it keeps is not what was put there.

    Attributes:
        path: The store, or the entry in it.
    """

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"code store {path!r}: {message}")
        self.path = path


class CredentialsError(NsboxError):
    """A credentials provider raised, or gave none that are good; nothing was run.

    Attributes:
        role: The role it was asked for.
    """

    def __init__(self, role: str, message: str) -> None:
        super().__init__(f"no credentials for the role {role!r}: {message}")
        self.role = role


def refuse_pickling(what: str, remedy: str) -> NoReturn:
    """Raise for an object that another process could do nothing with."""
    raise TypeError(
        f"{what} belongs to the process that made it and cannot be pickled or copied; {remedy}"
    )


class SyscallError(NsboxError, OSError):
    """A system call failed.

    Attributes:
        syscall: Its name in the manual, e.g. ``"pivot_root"``.
        errno: The error number.
        filename: The path it was about, or None.
        note: What nsbox knows besides of the reason, or "".
    """

    syscall: str
    note: str

    def __init__(
        self, syscall: str, errno: int, filename: str | None = None, note: str = ""
    ) -> None:
        # OSError.__init__ with (errno, strerror, filename) fills the usual attributes; a
        # subclass is never turned into PermissionError and friends, so match on .errno.
        super().__init__(errno, os.strerror(errno), filename)
        self.syscall = syscall
        self.note = note

    def __str__(self) -> str:
        place = f" on {self.filename}" if self.filename else ""
        name = _errno.errorcode.get(self.errno or 0, str(self.errno))
        note = f"; {self.note}" if self.note else ""
        return f"{self.syscall}{place}: {self.strerror} ({name}){note}"


class EnvironmentStateError(NsboxError):
    """The environment cannot do this now: it is closed, frozen, broken or another process's."""


class CommandStartError(NsboxError):
    """The program could not be executed inside the environment; the environment is still usable.

    Attributes:
        argv0: The program asked for.
        errno: The error number of execve(2).
        exit_code: What a shell would say: 127 not found, 126 found but not executable.
    """

    def __init__(self, argv0: str, errno: int, detail: str) -> None:
        super().__init__(f"cannot execute {argv0!r}: {detail}")
        self.argv0 = argv0
        self.errno = errno
        self.exit_code = 127 if errno in (_errno.ENOENT, _errno.ENOTDIR) else 126


class InvokeError(NsboxError):
    """Base of what can go wrong while something runs in an environment."""


class PoolError(NsboxError):
    """A pool cannot do what it was asked for."""


class Throttled(PoolError):
    """A pool does not take the call now; nothing of it was run.

    Attributes:
        reason: ``"full"``: too many calls wait; ``"start failures"``: environments do not start;
            ``"reserved"``: the function has no place, and gets none.
        retry_after: Seconds after which another try may do better; None: never, as for
            ``"reserved"``.
    """

    reason: ThrottleReason

    def __init__(self, message: str, *, reason: ThrottleReason, retry_after: float | None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class PoolTimeout(PoolError, TimeoutError):
    """No environment was free for a call within the time it may wait; nothing of it was run."""


class PoolClosed(PoolError):
    """The pool is closed, or was closed while the call waited or ran."""


class CleanupError(NsboxError):
    """Something of an environment is still there after it was closed.

    Attributes:
        leaked: The paths or process ids that remain.
    """

    def __init__(self, leaked: Sequence[str]) -> None:
        super().__init__(f"left behind: {', '.join(leaked)}")
        self.leaked = tuple(leaked)
