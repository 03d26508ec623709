# SPDX-License-Identifier: Apache-2.0
"""What a function is, and a version of it: frozen, hashable values, named after their content.

::

    fn = nsbox.Function("app.handler", code="./src", layers=["./deps.zip"], env={"A": "1"})
    version = fn.publish()

A `Function` says where code is; a `FunctionVersion` has it, in the store, where it does not change.
"""

from __future__ import annotations

import copy
import hashlib
import json
import keyword
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, Unpack

from nsbox.errors import ConfigError
from nsbox.seccomp.policy import SeccompPolicy
from nsbox.values.config import (
    Config,
    Limits,
    Mount,
    NetworkChoice,
    ProfileChoice,
    UserlandChoice,
    check_argv,
    check_environment,
    check_text,
    parse_seconds,
)

if TYPE_CHECKING:
    from nsbox.store.store import Entry, Store

TASK_ROOT: Final = "/var/task"
"""Where a function's code is."""
LAYER_ROOT: Final = "/opt"
"""Where a function's layers are; /opt/python is importable."""
TIMEOUT_MAX: Final = 900
"""Seconds of the longest `timeout` and `init_timeout`; AWS Lambda's limit."""
LAYERS_MAX: Final = 5
"""Layers of a function; AWS Lambda's limit."""
ENV_MAX: Final = 32_768
"""Bytes of all environment variables, each counted as ``NAME=value`` and a NUL. Lambda has 4096."""

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TENANT: Final = re.compile(r"[A-Za-z0-9._:/=+@ -]{1,256}")
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Layer:
    """A directory or zip file whose content is laid into /opt, under a function's code."""

    source: str

    def __init__(self, source: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "source", _check_source(source, "layer"))


StartChoice = Literal["clone", "exec"]
ReuseChoice = Literal["keep", "reset", "never"]
LeftRunningChoice = Literal["run", "kill"]


class FunctionFields(TypedDict, total=False):
    """What `Function.replace` takes: the arguments of `Function`; type checkers read it."""

    handler: str | None
    command: Sequence[str] | None
    code: str | os.PathLike[str] | None
    layers: Iterable[Layer | str | os.PathLike[str]]
    env: Mapping[str, str] | Iterable[tuple[str, str]]
    limits: Limits
    network: NetworkChoice
    seccomp: SeccompPolicy | ProfileChoice
    timeout: float
    init_timeout: float
    preload: Iterable[str]
    tenant: str | None
    name: str
    start: StartChoice
    mounts: Iterable[Mount]
    tmp_size: int | str
    reuse: ReuseChoice
    left_running: LeftRunningChoice | None
    rootfs: str | os.PathLike[str] | None
    userland: UserlandChoice
    allow_missing: Collection[str]


@dataclass(frozen=True, slots=True, init=False)
class Function:
    """Code to be invoked, and the environment it is to have.

    Args:
        handler: ``"module.function"``, ``"package.module.function"`` or, as on AWS Lambda,
            ``"directory/module.function"``: Python code that is called with an event and a
            context. Either this or `command` is given.
        command: A program, and its arguments. Each invocation starts it, with the event on stdin
            and the answer on stdout.
        code: A directory or a zip file; its content is /var/task. None: with a handler the
            module or package that Python finds under the handler's first name, which is not
            imported for that; with a command no code.
        layers: Up to five directories or zip files, merged in order to /opt; later ones win.
        env: Environment variables, 32 KiB in all.
        limits, network, seccomp, mounts: As of a `Config`.
        tmp_size, rootfs, userland, allow_missing: As of a `Config`.
        timeout: Seconds an invocation may take, up to 900.
        init_timeout: Seconds that importing the handler's module may take, up to 900.
        preload: Modules, trusted by whoever names them, that environments have imported
            before they are born.
        tenant: On whose behalf: environments are never shared by two tenants.
        name: What the function is called in contexts, logs and lists; by default after its handler.
        start: ``"clone"``: environments are clones of a warm interpreter. ``"exec"``: each
            executes one of its own.
        reuse: What the next invocation finds of the one before: ``"keep"`` all, ``"reset"`` the
            memory as after the import and an empty /tmp, ``"never"`` an environment of its own.
        left_running: What becomes of processes that an invocation, or the import, has left running,
            with `reuse` "keep": ``"run"``, they go on; ``"kill"``, they are killed before the next
            event is sent. By default killed in the environments of a tenant.

    Raises:
        ConfigError: A value is wrong, or a source does not exist.
    """

    handler: str | None
    command: tuple[str, ...] | None
    code: str | None
    layers: tuple[Layer, ...]
    env: tuple[tuple[str, str], ...] = field(repr=False)
    limits: Limits
    network: NetworkChoice
    seccomp: SeccompPolicy = field(repr=False)
    timeout: float
    init_timeout: float
    preload: tuple[str, ...]
    tenant: str | None
    name: str
    start: StartChoice
    mounts: tuple[Mount, ...]
    tmp_size: int
    reuse: ReuseChoice
    left_running: LeftRunningChoice | None
    rootfs: str | None
    userland: UserlandChoice
    allow_missing: frozenset[str]

    def __init__(
        self,
        handler: str | None = None,
        *,
        command: Sequence[str] | None = None,
        code: str | os.PathLike[str] | None = None,
        layers: Iterable[Layer | str | os.PathLike[str]] = (),
        env: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        limits: Limits | None = None,
        network: NetworkChoice = "none",
        seccomp: SeccompPolicy | ProfileChoice | None = None,
        timeout: float = 3,
        init_timeout: float = 10,
        preload: Iterable[str] = (),
        tenant: str | None = None,
        name: str | None = None,
        start: StartChoice = "clone",
        mounts: Iterable[Mount] = (),
        tmp_size: int | str = 64 << 20,
        reuse: ReuseChoice = "keep",
        left_running: LeftRunningChoice | None = None,
        rootfs: str | os.PathLike[str] | None = None,
        userland: UserlandChoice = "full",
        allow_missing: Collection[str] = frozenset(),
    ) -> None:
        put = partial(object.__setattr__, self)
        if (handler is None) == (command is None):
            raise ConfigError(
                f"function: give one of handler and command, got {handler!r} and {command!r}"
            )
        put("handler", None if handler is None else _check_handler(handler))
        put("command", None if command is None else check_argv(command))
        put("code", None if code is None else _check_source(code, "code"))
        put("layers", _check_layers(layers))
        put("env", _check_env(env))
        # A Config checks the rest, and is what environments are made of.
        config = Config(
            mounts=mounts,
            rootfs=rootfs,
            userland=userland,
            tmp_size=tmp_size,
            limits=Limits() if limits is None else limits,
            network=network,
            seccomp=SeccompPolicy.default() if seccomp is None else seccomp,
            allow_missing=allow_missing,
        )
        for mount in config.mounts:
            for taken in (TASK_ROOT, LAYER_ROOT):
                if f"{mount.destination}/".startswith(f"{taken}/"):
                    raise ConfigError(
                        f"mounts: {mount.destination!r} is the place of code or layers ({taken})"
                    )
        for key in (
            "mounts",
            "rootfs",
            "userland",
            "tmp_size",
            "limits",
            "network",
            "seccomp",
            "allow_missing",
        ):
            put(key, getattr(config, key))
        put("timeout", _check_timeout(timeout, "timeout"))
        put("init_timeout", _check_timeout(init_timeout, "init_timeout"))
        put("preload", _check_preload(preload))
        put("tenant", _check_tenant(tenant))
        put("name", self._default_name() if name is None else _check_name(name))
        put("start", _check_choice(start, "start", ("clone", "exec")))
        put("reuse", _check_choice(reuse, "reuse", ("keep", "reset", "never")))
        if left_running is not None:
            _check_choice(left_running, "left_running", ("run", "kill"))
        if left_running == "run" and (handler is None or reuse != "keep"):
            why = "with a command" if handler is None else f"with reuse={reuse!r}"
            raise ConfigError(f"left_running: 'run' cannot be had {why}: nothing is left running")
        put("left_running", left_running)

    def replace(self, **changes: Unpack[FunctionFields]) -> Function:
        """Return a copy with some fields changed; checks apply as to a new one."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        unknown = sorted(set(changes) - set(values))
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} of Function")
        values.update(changes)
        return Function(**values)

    def publish(self, store: Store | str | os.PathLike[str] | None = None) -> FunctionVersion:
        """Put code and layers into the store and return the version that they are.

        What is there already is not written again. Later changes of the sources make other
        versions, and do not change this one.

        Args:
            store: The store or its directory; by default the user's own.

        Raises:
            ConfigError: Code or layers cannot be read, are no trees of plain files, too large, or
                have the store in them.
            StoreError: The store cannot be used.
        """
        # A value loads no I/O until it is asked to.
        from nsbox.store.sources import read_module, read_source
        from nsbox.store.store import Store, refuse_below
        from nsbox.store.tree import UNPACKED_MAX

        for source in (self.code, *(layer.source for layer in self.layers)):
            if source is not None:
                refuse_below(source, store)
        store = store if isinstance(store, Store) else Store(store)
        code = None
        if self.code is not None:
            code = store.add(partial(read_source, path=self.code), f"code {self.code!r}")
        elif self.handler is not None:
            module = self.handler.replace("/", ".").partition(".")[0]
            code = store.add(partial(read_module, name=module), f"module {module!r}")
        layers = [
            store.add(partial(read_source, path=layer.source), f"layer {layer.source!r}")
            for layer in self.layers
        ]
        size = sum(entry.size for entry in (code, *layers) if entry is not None)
        if size > UNPACKED_MAX:
            raise ConfigError(f"code and layers: {size} bytes, more than {UNPACKED_MAX} together")
        opt = layers[0] if len(layers) == 1 else store.merge(layers) if layers else None
        description = self._describe(
            code.digest if code else None, [layer.digest for layer in layers]
        )
        config = self._config(code, opt)
        return FunctionVersion(
            digest=hashlib.sha256(description.encode()).hexdigest(),
            tenant=self.tenant,
            function=self,
            config=config,
            birth_config=config.replace(mounts=self.mounts),
            code=code,
            opt=opt,
        )

    def _default_name(self) -> str:
        text = self.handler or os.path.basename((self.command or ("",))[0])
        return re.sub(r"[^A-Za-z0-9_-]+", "-", text)[:64].strip("-") or "function"

    def _describe(self, code: str | None, layers: Sequence[str]) -> str:
        """Return what makes a version, in the one form whose hash is its digest.

        All of it but the tenant, and with content in the place of paths.
        """
        told: dict[str, Any] = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in ("tenant", "code", "layers")
        }
        limits = {item.name: getattr(self.limits, item.name) for item in fields(self.limits)}
        limits["io_max"] = [
            [getattr(device, item.name) for item in fields(device)] for device in self.limits.io_max
        ]
        told |= {
            "format": _FORMAT,
            "code": code,
            "layers": layers,
            "limits": limits | {"named": sorted(self.limits.named)},
            "seccomp": self.seccomp.digest(),
            "mounts": [[m.source, m.destination, m.type, m.options] for m in self.mounts],
            "allow_missing": sorted(self.allow_missing),
        }
        return json.dumps(told, sort_keys=True, separators=(",", ":"))

    def _config(self, code: Entry | None, opt: Entry | None) -> Config:
        binds = [
            Mount.bind(entry.path, place)
            for entry, place in ((code, TASK_ROOT), (opt, LAYER_ROOT))
            if entry is not None
        ]
        return Config(
            mounts=(*self.mounts, *binds),
            rootfs=self.rootfs,
            userland=self.userland,
            tmp_size=self.tmp_size,
            limits=self.limits,
            network=self.network,
            seccomp=self.seccomp,
            allow_missing=self.allow_missing,
            cwd="/tmp" if code is None else TASK_ROOT,  # noqa: S108 - the environment's own
        )


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class FunctionVersion:
    """A function with its code as it was when it was published. Made by `Function.publish`.

    Two versions are equal when they have the same digest and tenant. While one lives, its files
    stay in the store.

    Attributes:
        digest: SHA-256, in hex, of everything that makes the version but its tenant.
        tenant: On whose behalf, or None.
        function: What was published.
        config: What its environments are: all but `env`, which the launcher is not to see.
        birth_config: The same without code and layers, which are attached after the birth; all
            tenants have one, and so one plan.
        code: The store's entry that becomes /var/task, or None.
        opt: That of the layers, which becomes /opt, or None.
    """

    digest: str
    tenant: str | None
    function: Function = field(compare=False)
    config: Config = field(compare=False, repr=False)
    birth_config: Config = field(compare=False, repr=False)
    code: Entry | None = field(compare=False, repr=False)
    opt: Entry | None = field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """The first 16 digits of the digest, for people."""
        return self.digest[:16]

    @property
    def key(self) -> tuple[str, str | None]:
        """Digest and tenant: an environment of one key serves no other."""
        return (self.digest, self.tenant)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.name

    @property
    def env(self) -> tuple[tuple[str, str], ...]:
        """The function's environment variables, for its environments' own sockets alone."""
        return self.function.env

    @property
    def kills_left_running(self) -> bool:
        """Whether what an invocation leaves running is killed before the next one.

        With other policies than ``reuse="keep"``, and with commands, nothing is left.
        """
        function = self.function
        if function.handler is None or function.reuse != "keep":
            return False
        if function.left_running is None:
            return self.tenant is not None
        return function.left_running == "kill"

    @property
    def code_path(self) -> str | None:
        """Directory of the host that is /var/task, or None."""
        return None if self.code is None else self.code.path

    @property
    def opt_path(self) -> str | None:
        """Directory of the host that is /opt, or None."""
        return None if self.opt is None else self.opt.path

    def for_tenant(self, tenant: str | None) -> FunctionVersion:
        """Return this version on behalf of `tenant`: the same code, other environments.

        Raises:
            ConfigError: It is no name of a tenant, or the version is another tenant's.
        """
        tenant = _check_tenant(tenant)
        if tenant == self.tenant:
            return self
        if self.tenant is not None:
            raise ConfigError(f"tenant: the version is of {self.tenant!r}, and not of {tenant!r}")
        # Not Function.replace, which looks for sources that may have gone since.
        function = copy.copy(self.function)
        object.__setattr__(function, "tenant", tenant)
        return replace(self, tenant=tenant, function=function)

    def verify(self) -> None:
        """Raise StoreError unless code and layers still are what was published.

        Costs a stat of each file; only what was published a moment ago is read again.
        """
        for entry in (self.code, self.opt):
            if entry is not None:
                entry.verify()


def _check_handler(value: object) -> str:
    text = check_text(value, "handler")
    module, _, name = text.rpartition(".")
    # The runtime imports by name, as AWS Lambda's does: a module's need be no identifier.
    has_module = all(module.replace("/", ".").split(".")) and not re.search(r"\s", module)
    if not (has_module and name.isidentifier()) or keyword.iskeyword(name):
        raise ConfigError(
            f"handler: {value!r} is none; give 'module.function', e.g. 'app.handler', or "
            "'directory/module.function' of a directory in the code"
        )
    return text


def _check_source(value: object, what: str) -> str:
    path = check_text(value, what)
    if not path:
        raise ConfigError(f"{what}: a path is needed, got {value!r}")
    path = os.path.abspath(path)
    if not os.path.exists(path):
        raise ConfigError(
            f"{what} {path!r}: no such file or directory; give a directory or zip file that exists"
        )
    return path


def _check_layers(value: object) -> tuple[Layer, ...]:
    if isinstance(value, str | bytes | os.PathLike | Layer) or not isinstance(value, Iterable):
        raise ConfigError(f"layers: give a list of directories or zip files, got {value!r}")
    layers = tuple(item if isinstance(item, Layer) else Layer(item) for item in value)
    if len(layers) > LAYERS_MAX:
        raise ConfigError(f"layers: at most {LAYERS_MAX}, got {len(layers)}; merge some of them")
    return layers


def _check_env(value: Mapping[str, str] | Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    try:
        env = check_environment(dict(value))
        size = sum(len(os.fsencode(f"{name}={text}")) + 1 for name, text in env.items())
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise ConfigError("env: give a mapping of names to values, both UTF-8 text") from error
    if size > ENV_MAX:
        raise ConfigError(
            f"env: {size} bytes of variables, more than {ENV_MAX}; put large values in a file"
        )
    return tuple(sorted(env.items()))


def _check_timeout(value: object, what: str) -> float:
    seconds = parse_seconds(value, what)
    if seconds > TIMEOUT_MAX:
        raise ConfigError(f"{what}: at most {TIMEOUT_MAX} seconds, got {value}")
    return seconds


def _check_preload(value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError(f"preload: give a list of module names, got {value!r}")
    names = tuple(check_text(name, "preload") for name in value)
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ConfigError(f"preload: {name!r} is no module name, such as 'numpy'")
    return names


def _check_tenant(value: object) -> str | None:
    if value is not None and not _TENANT.fullmatch(check_text(value, "tenant")):
        raise ConfigError(
            f"tenant: {value!r} is none; give 1 to 256 letters, digits, spaces or any of ._:/=+@-"
        )
    return None if value is None else str(value)


def _check_name(value: object) -> str:
    name = check_text(value, "name")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name: {value!r} is none; give 1 to 64 letters, digits, '-' or '_'")
    return name


def _check_choice(value: object, what: str, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{what}: must be one of {', '.join(choices)}, got {value!r}")
    return value
