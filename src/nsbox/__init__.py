# SPDX-License-Identifier: Apache-2.0
"""nsbox runs untrusted programs on Linux in complete, reusable execution environments.

::

    import nsbox

    result = nsbox.run(["python3", "-c", "print(6 * 7)"], timeout=5)
    print(result.stdout, result.outcome, result.protections)

    with nsbox.ExecutionEnvironment() as env:
        env.write_file("/tmp/a.c", b"int main() { return 3; }")
        env.run(["gcc", "-o", "/tmp/a", "/tmp/a.c"]).check()
        print(env.run(["/tmp/a"]).exit_code)

Names are loaded on first use (PEP 562), so that the launcher and PID 1, which import parts of this
package, do not pay for the rest.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.environment.environment import ExecutionEnvironment as ExecutionEnvironment
    from nsbox.environment.managed import State as State
    from nsbox.environment.process import Process as Process
    from nsbox.environment.run import run as run
    from nsbox.errors import CleanupError as CleanupError
    from nsbox.errors import CommandStartError as CommandStartError
    from nsbox.errors import ConfigError as ConfigError
    from nsbox.errors import CredentialsError as CredentialsError
    from nsbox.errors import DescriptorsExhausted as DescriptorsExhausted
    from nsbox.errors import EnvironmentStateError as EnvironmentStateError
    from nsbox.errors import InvokeError as InvokeError
    from nsbox.errors import LauncherError as LauncherError
    from nsbox.errors import NsboxError as NsboxError
    from nsbox.errors import PoolClosed as PoolClosed
    from nsbox.errors import PoolError as PoolError
    from nsbox.errors import PoolTimeout as PoolTimeout
    from nsbox.errors import SetupError as SetupError
    from nsbox.errors import StoreError as StoreError
    from nsbox.errors import SyscallError as SyscallError
    from nsbox.errors import Throttled as Throttled
    from nsbox.errors import UnsupportedHostError as UnsupportedHostError
    from nsbox.functions.credentials import CredentialCache as CredentialCache
    from nsbox.functions.credentials import Credentials as Credentials
    from nsbox.functions.function import Function as Function
    from nsbox.functions.function import FunctionVersion as FunctionVersion
    from nsbox.functions.function import Layer as Layer
    from nsbox.pool.aio import AsyncWarmPool as AsyncWarmPool
    from nsbox.pool.events import PoolEvent as PoolEvent
    from nsbox.pool.events import PoolStats as PoolStats
    from nsbox.pool.events import Retirement as Retirement
    from nsbox.pool.function import PoolFunction as PoolFunction
    from nsbox.pool.pool import WarmPool as WarmPool
    from nsbox.seccomp.policy import SeccompPolicy as SeccompPolicy
    from nsbox.store.store import Store as Store
    from nsbox.supervisor.launcher import shutdown as shutdown
    from nsbox.supervisor.process import DEVNULL as DEVNULL
    from nsbox.supervisor.process import PIPE as PIPE
    from nsbox.supervisor.standby import set_standby as set_standby
    from nsbox.values.config import Config as Config
    from nsbox.values.config import IoMax as IoMax
    from nsbox.values.config import Limits as Limits
    from nsbox.values.config import Mount as Mount
    from nsbox.values.invocation import FunctionError as FunctionError
    from nsbox.values.invocation import Invocation as Invocation
    from nsbox.values.invocation import InvokeTimeout as InvokeTimeout
    from nsbox.values.invocation import LeftRunning as LeftRunning
    from nsbox.values.result import CommandFailed as CommandFailed
    from nsbox.values.result import EnvironmentDied as EnvironmentDied
    from nsbox.values.result import Outcome as Outcome
    from nsbox.values.result import Protection as Protection
    from nsbox.values.result import Protections as Protections
    from nsbox.values.result import Result as Result
    from nsbox.values.result import Usage as Usage

_HOMES = {
    "nsbox.supervisor.standby": ("set_standby",),
    "nsbox.supervisor.process": ("DEVNULL", "PIPE"),
    "nsbox.values.config": ("Config", "IoMax", "Limits", "Mount"),
    "nsbox.functions.credentials": ("CredentialCache", "Credentials"),
    "nsbox.environment.environment": ("ExecutionEnvironment",),
    "nsbox.environment.managed": ("State",),
    "nsbox.environment.process": ("Process",),
    "nsbox.environment.run": ("run",),
    "nsbox.errors": (
        "CleanupError", "CommandStartError", "ConfigError", "CredentialsError",
        "DescriptorsExhausted", "EnvironmentStateError", "InvokeError", "LauncherError",
        "NsboxError", "PoolClosed", "PoolError", "PoolTimeout", "SetupError", "StoreError",
        "SyscallError", "Throttled", "UnsupportedHostError",
    ),
    "nsbox.functions.function": ("Function", "FunctionVersion", "Layer"),
    "nsbox.values.invocation": ("FunctionError", "Invocation", "InvokeTimeout", "LeftRunning"),
    "nsbox.supervisor.launcher": ("shutdown",),
    "nsbox.seccomp.policy": ("SeccompPolicy",),
    "nsbox.pool.function": ("PoolFunction",),
    "nsbox.pool.pool": ("WarmPool",),
    "nsbox.pool.aio": ("AsyncWarmPool",),
    "nsbox.pool.events": ("PoolEvent", "PoolStats", "Retirement"),
    "nsbox.values.result": (
        "CommandFailed", "EnvironmentDied", "Outcome", "Protection", "Protections", "Result",
        "Usage",
    ),
    "nsbox.store.store": ("Store",),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> object:
    if name == "set_blanks":
        import warnings

        what = "nsbox.set_blanks is nsbox.set_standby now; the old name goes with the next release"
        warnings.warn(what, DeprecationWarning, stacklevel=2)
        name = "set_standby"
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'nsbox' has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return __all__
