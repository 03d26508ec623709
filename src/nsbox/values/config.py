# SPDX-License-Identifier: Apache-2.0
"""What an environment is to be: frozen, hashable values. Nothing here touches the kernel.

Sizes are bytes or strings such as ``"256M"`` (binary units); times are seconds. Names of limits
are the cgroup v2 file names with ``.`` as ``_`` (kernel: Documentation/admin-guide/cgroup-v2.rst).
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict, Unpack, cast

from nsbox.errors import ConfigError
from nsbox.seccomp.policy import SeccompPolicy

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# 20 digits are more than any size has, and few enough for int() and float().
_SIZE: Final = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_LARGEST: Final = 1 << 62
_LEAST_MEMORY: Final = 2 << 20
LEAST_OPEN_FILES: Final = 16  # PID 1 has seven of its own, and one for each command
_CPUSET: Final = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
_HOSTNAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,62}[A-Za-z0-9])?")
_ENV_NAME: Final = re.compile(r"[^=\0]+")

ALLOWABLE: Final = frozenset(
    {
        "cgroup.memory",
        "cgroup.pids",
        "cgroup.cpu",
        "cgroup.cpuset",
        "cgroup.io",
        "cpu_time",
        "seccomp",
        "idmapped_mounts",
    }
)
"""The names `Config.allow_missing` takes: protections that can be done without, by name."""


class _Default:
    """Marks a limit the caller did not name; `repr` keeps signatures in help() readable."""

    def __repr__(self) -> str:
        return "DEFAULT"


DEFAULT: Final[Any] = _Default()

NetworkChoice = Literal["none", "host"]
UserlandChoice = Literal["full", "minimal"]
ProfileChoice = Literal["strict", "default", "docker"]

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A word of a command line."""


def parse_size(value: int | str, what: str = "size") -> int:
    """Return `value` in bytes.

    Args:
        value: Bytes, or a number with an optional unit K, M, G or T (powers of 1024).
        what: What the value is, for the error message.

    Raises:
        ConfigError: `value` is no size, or not above zero.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{what}: {value!r} is no size; give bytes or a string such as '256M'")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ConfigError(
                f"{what}: {value!r} is no size; give bytes or a number with K, M, G or T: '256M'"
            )
        unit = _UNITS[match[2].upper()]
        value = int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit
    if value <= 0:
        raise ConfigError(f"{what}: must be above zero, got {value}")
    if value > _LARGEST:
        raise ConfigError(f"{what}: {value} is larger than any kernel limit ({_LARGEST})")
    return value


def _count(value: object, what: str, *, least: int = 1, most: int = 1 << 22) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{what}: must be a whole number, got {value!r}")
    if not least <= value <= most:
        raise ConfigError(f"{what}: must be from {least} to {most}, got {value}")
    return value


def check_window_size(size: object) -> tuple[int, int]:
    """Return `size` when it is rows and columns of a terminal; ConfigError otherwise."""
    if not isinstance(size, tuple) or len(size) != 2:
        raise ConfigError(f"tty: must be (rows, columns), got {size!r}")
    rows, columns = (_count(number, "tty", most=0xFFFF) for number in size)
    return rows, columns


def parse_seconds(value: object, what: str, unit: str = "seconds") -> float:
    """Return `value` as a number of seconds above zero; ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{what}: must be a number of {unit}, got {value!r}")
    if not 0 < value < 1e9:  # also false for NaN
        raise ConfigError(f"{what}: must be above zero and finite, got {value}")
    return float(value)


def parse_patience(value: object, what: str = "timeout") -> float:
    """Return how many seconds to wait; more than can be waited is for ever. ConfigError: NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ConfigError(f"{what}: must be a number of seconds, got {value!r}")
    return float(max(-1, min(value, 1e9)))


def check_text(value: object, what: str) -> str:
    """Return `value` as text that a system call can carry; ConfigError otherwise.

    Bytes that are no UTF-8 are in it as `os.fsdecode` has them, by surrogateescape.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, str):
        raise ConfigError(f"{what}: must be text, got {value!r}")
    if "\0" in value:
        raise ConfigError(f"{what}: {value!r} contains a NUL byte, which no system call can carry")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what}: {value!r} stands for no bytes ({error.reason}); give the bytes themselves"
        ) from error
    return value


def check_environment(
    env: Mapping[str, str] | Iterable[tuple[str, str]] | None, what: str = "env"
) -> dict[str, str]:
    """Return a checked copy of environment variables; ConfigError for a bad name or value."""
    if env is None:
        return {}
    checked: dict[str, str] = {}
    try:
        pairs = dict(env)
    except (TypeError, ValueError) as error:
        # Not its value, which may be a secret.
        raise ConfigError(
            f"{what}: must be a mapping of names to values, got {type(env).__name__}"
        ) from error
    for name, value in pairs.items():
        text = check_text(name, f"{what} name")
        if not _ENV_NAME.fullmatch(text):
            raise ConfigError(f"{what}: {name!r} is no variable name (empty, or has '=')")
        checked[text] = check_text(value, f"{what}[{name!r}]")
    return checked


def _all_of(kind: type, values: object, what: str) -> tuple[Any, ...]:
    """Return `values` as a tuple when it is an iterable of `kind`; ConfigError otherwise."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ConfigError(
            f"{what}: must be a sequence of {kind.__name__} values, got {values!r}; "
            "write one as a list of it"
        )
    checked = tuple(values)
    for item in checked:
        if not isinstance(item, kind):
            raise ConfigError(f"{what}: must hold {kind.__name__} values, got {item!r}")
    return checked


def check_argv(argv: Sequence[Word]) -> tuple[str, ...]:
    """Return a command line as a tuple; ConfigError when it is a string, empty or has a NUL."""
    if isinstance(argv, str | bytes):
        raise ConfigError(
            f"argv: give a list of arguments, not the string {argv!r}; "
            "for a shell line use ['sh', '-c', line]"
        )
    if not isinstance(argv, Iterable):
        raise ConfigError(f"argv: give a list of arguments, got {argv!r}")
    checked = tuple(check_text(word, f"argv[{index}]") for index, word in enumerate(argv))
    if not checked or not checked[0]:
        raise ConfigError(f"argv: a command is needed, got {list(argv)!r}")
    return checked


@dataclass(frozen=True, slots=True, kw_only=True)
class IoMax:
    """Limits of one block device: a line of the cgroup v2 file ``io.max``.

    `device` is the path of a block device (``/dev/sda``), or ``"MAJ:MIN"``. Rates are bytes per
    second (`rbps`, `wbps`) and operations per second (`riops`, `wiops`); None is no limit.
    """

    device: str
    rbps: int | None = None
    wbps: int | None = None
    riops: int | None = None
    wiops: int | None = None

    if TYPE_CHECKING:  # what is given may be text, what is kept is a number

        def __init__(
            self,
            device: str,
            rbps: int | str | None = None,
            wbps: int | str | None = None,
            riops: int | None = None,
            wiops: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_text(self.device, "io_max device")
        for name in ("rbps", "wbps"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_size(value, f"io_max {name}"))
        for name in ("riops", "wiops"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _count(value, f"io_max {name}", most=1 << 32))
        if (self.rbps, self.wbps, self.riops, self.wiops) == (None,) * 4:
            raise ConfigError(f"io_max {self.device!r}: name at least one of rbps wbps riops wiops")


class LimitsFields(TypedDict, total=False):
    """What `Limits` takes, by its names; type checkers read it."""

    memory_max: int | str | None
    pids_max: int | None
    cpu_max: float | None
    cpuset_cpus: str | None
    io_max: Iterable[IoMax]
    cpu_time: float | None
    open_files: int | None
    file_size: int | str | None
    core_size: int | None
    output_max: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Resource limits of an environment.

    A limit the caller names is enforced, or `UnsupportedHostError` is raised before anything is
    created. The defaults apply where the host can enforce them and are reported as not in force
    where it cannot (`Result.protections`). None means no limit, by name. Bytes are given as a
    number, or as text with K, M, G or T (powers of 1024), ``"256M"``, and kept as a number.

    Attributes:
        memory_max: Bytes of memory, page cache and /tmp included; default 512 MiB. Swap is off.
        pids_max: Live processes and threads, nsbox's own PID 1 included; default 256.
        cpu_max: CPUs' worth of time, e.g. 0.5; default no limit.
        cpuset_cpus: CPUs to run on, e.g. ``"0-1,3"``; default all.
        io_max: Bandwidth and operations per second of block devices; default none. Kept as a
            tuple.
        cpu_time: Seconds of user plus system CPU time of one command, all its processes;
            default none.
        open_files: File descriptors of one process (RLIMIT_NOFILE); default 1024, or the
            caller's hard limit.
        file_size: Bytes of the largest file a process may write (RLIMIT_FSIZE); default none. A
            file that the caller passes as stdout or stderr and nsbox relays is written by
            nsbox, and grows beyond it.
        core_size: Bytes of a core dump (RLIMIT_CORE); default 0: none is written.
        output_max: Bytes of captured output, of each stream; default 16 MiB. More ends the
            command.
        named: The limits the caller named, as opposed to the defaults.
    """

    memory_max: int | None = DEFAULT
    pids_max: int | None = DEFAULT
    cpu_max: float | None = DEFAULT
    cpuset_cpus: str | None = DEFAULT
    io_max: tuple[IoMax, ...] = DEFAULT
    cpu_time: float | None = DEFAULT
    open_files: int | None = DEFAULT
    file_size: int | None = DEFAULT
    core_size: int | None = DEFAULT
    output_max: int = DEFAULT
    named: frozenset[str] = field(init=False, default=frozenset(), repr=False)

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[LimitsFields]) -> None: ...

    def __post_init__(self) -> None:
        defaults: dict[str, Any] = {
            "memory_max": 512 << 20,
            "pids_max": 256,
            "io_max": (),
            "open_files": 1024,
            "core_size": 0,
            "output_max": 16 << 20,
        }
        named = set()
        for item in fields(self):
            if item.name == "named":
                continue
            if getattr(self, item.name) is DEFAULT:
                object.__setattr__(self, item.name, defaults.get(item.name))
            else:
                named.add(item.name)
        object.__setattr__(self, "named", frozenset(named))
        self._check()

    def _check(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("memory_max", "file_size", "output_max"):
            value = getattr(self, name)
            if value is not None:
                put(name, parse_size(value, name))
        if self.memory_max is not None and self.memory_max < _LEAST_MEMORY:
            raise ConfigError(
                f"memory_max: must be at least {_LEAST_MEMORY}, got {self.memory_max}; "
                "PID 1 itself needs half of that"
            )
        if self.output_max is None:
            raise ConfigError("output_max: captured output must have a limit; give a size")
        if self.pids_max is not None:
            put("pids_max", _count(self.pids_max, "pids_max", least=2))
        if self.open_files is not None:
            put(
                "open_files",
                _count(self.open_files, "open_files", least=LEAST_OPEN_FILES, most=1 << 20),
            )
        if self.core_size is not None:
            put("core_size", _count(self.core_size, "core_size", least=0, most=_LARGEST))
        if self.cpu_max is not None:
            cpus = parse_seconds(self.cpu_max, "cpu_max", "CPUs") if self.cpu_max else 0.0
            if not 0.01 <= cpus <= 4096:
                # 1 ms in a period of 100 ms is the kernel's smallest quota (cpu.max).
                raise ConfigError(f"cpu_max: must be from 0.01 to 4096 CPUs, got {self.cpu_max}")
            put("cpu_max", cpus)
        if self.cpu_time is not None:
            put("cpu_time", parse_seconds(self.cpu_time, "cpu_time"))
        if self.cpuset_cpus is not None and not _CPUSET.fullmatch(
            check_text(self.cpuset_cpus, "cpuset_cpus")
        ):
            raise ConfigError(f"cpuset_cpus: {self.cpuset_cpus!r} is no CPU list such as '0-1,3'")
        put("io_max", _all_of(IoMax, self.io_max, "io_max"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A file tree of the host made visible inside. Make it with `Mount.bind` or `Mount.tmpfs`."""

    source: str
    destination: str
    type: str = "bind"
    options: tuple[str, ...] = ("ro",)

    @classmethod
    def bind(cls, source: str | os.PathLike[str], destination: str, *, rw: bool = False) -> Mount:
        """Bind `source` (a directory or file of the host) at `destination`, read-only by default.

        As root the owner of `source` is mapped to the environment's user by an idmapped mount
        (mount_setattr(2)), so that the command can do what the owner could. Not root: with `rw` a
        source of root's is refused at the birth, without it only a private one (0600, 0700) is
        mapped. Where anything is bound with `rw` no file gets set-id bits (`set_id_bits` of
        `protections`); what has them already must not be in it.

        Raises:
            ConfigError: `source` does not exist, or `destination` is no clean absolute path.
        """
        path = check_text(source, "mount source")
        try:
            resolved = os.path.realpath(path, strict=True)
        except OSError as error:
            raise ConfigError(
                f"mount source {path!r}: {error.strerror}; bind something that exists"
            ) from error
        return cls(
            source=resolved, destination=destination, type="bind", options=("rw" if rw else "ro",)
        )

    @classmethod
    def tmpfs(cls, destination: str, *, size: int | str = 64 << 20) -> Mount:
        """Mount an empty, writable, size-limited tmpfs at `destination`."""
        return cls(
            source="tmpfs",
            destination=destination,
            type="tmpfs",
            options=("rw", f"size={parse_size(size, 'tmpfs size')}"),
        )

    def __post_init__(self) -> None:
        if self.type not in ("bind", "tmpfs"):
            raise ConfigError(f"mount type {self.type!r}: must be 'bind' or 'tmpfs'")
        source = check_text(self.source, "mount source")
        if self.type == "bind" and not source.startswith("/"):
            raise ConfigError(f"mount source {source!r}: must be absolute; see Mount.bind")
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "options", self._check_options())
        path = check_text(self.destination, "mount destination")
        if not path.startswith("/"):
            raise ConfigError(f"mount destination {path!r}: must be absolute, e.g. '/data'")
        if ".." in path.split("/"):
            raise ConfigError(f"mount destination {path!r}: must not contain '..'")
        clean = os.path.normpath("/" + path.lstrip("/"))
        for taken in ("/proc", "/sys", "/dev"):
            if clean == taken or clean.startswith(taken + "/"):
                raise ConfigError(f"mount destination {path!r}: {taken} is nsbox's own")
        if clean in ("/", "/tmp", "/etc", "/usr"):  # noqa: S108 - a name, not a file
            raise ConfigError(f"mount destination {path!r}: choose a directory of its own")
        object.__setattr__(self, "destination", clean)

    def _check_options(self) -> tuple[str, ...]:
        options = _all_of(str, self.options, "mount options")
        sizes = [word for word in options if word.startswith("size=") and self.type == "tmpfs"]
        for word in options:
            if word in sizes:
                parse_size(word[5:], "tmpfs size")
            elif word not in ("ro", "rw"):
                raise ConfigError(
                    f"mount option {word!r}: must be 'ro' or 'rw', or for a tmpfs 'size=BYTES'; "
                    "nosuid and nodev are always set"
                )
        if len(sizes) > 1 or len(options) - len(sizes) != 1:
            raise ConfigError(f"mount options {options!r}: give one of 'ro' and 'rw'")
        if self.type == "tmpfs" and not sizes:
            raise ConfigError(f"mount options {options!r}: a tmpfs needs 'size=BYTES'")
        return options

    @property
    def writable(self) -> bool:
        """Whether the command may write to it."""
        return "rw" in self.options

    @property
    def size(self) -> int:
        """Bytes a tmpfs mount may hold; 0 for a bind."""
        return next((parse_size(word[5:]) for word in self.options if word.startswith("size=")), 0)


class RunFields(TypedDict, total=False):
    """What `nsbox.run` takes of `Config`, by its names; type checkers read it."""

    mounts: Iterable[Mount]
    rootfs: str | os.PathLike[str] | None
    userland: UserlandChoice
    tmp_size: int | str
    limits: Limits
    network: NetworkChoice
    seccomp: SeccompPolicy | ProfileChoice
    allow_missing: Collection[str]
    hostname: str
    user_id: int


class ConfigFields(RunFields, total=False):
    """What `Config` takes, by its names; type checkers read it."""

    env: Mapping[str, str] | Iterable[tuple[str, str]]
    cwd: str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that describes an environment; hashable, so that it can key a pool.

    Bytes may be given as text, as in `Limits`.

    Attributes:
        mounts: File trees added to the userland; kept as a tuple.
        rootfs: Directory that is the userland, read-only; None is the host's (`userland`).
        userland: Without `rootfs`: ``"full"``, the default, is the host's /usr with the
            configuration of its programs, all that any user of the host may read in /etc but
            accounts, keys, and what is about the host and its services. ``"minimal"`` is /usr
            with a few files of /etc that most programs need.
        tmp_size: Bytes of the private /tmp, and of /dev/shm; both are charged to
            `Limits.memory_max`; default 64 MiB.
        env: Variables of every command, over nsbox's own minimal set; kept as sorted pairs.
        limits: `Limits`; the default ones are kept where the host can.
        network: ``"none"``, the default: a namespace of its own with loopback only; ``"host"``:
            the host's network.
        seccomp: The system call filter, or the name of a profile: ``"strict"``, ``"default"``,
            ``"docker"``.
        allow_missing: Protections to do without where the host cannot enforce them, by name:
            ``cgroup.memory``, ``cgroup.pids``, ``cgroup.cpu``, ``cgroup.cpuset``, ``cgroup.io``,
            ``cpu_time``, ``seccomp``, ``idmapped_mounts``; default none.
        hostname: What uname(2) says inside; default ``"sandbox"``.
        cwd: Working directory of commands; default ``/tmp``.
        user_id: User and group id inside; never 0, default 1000.
    """

    mounts: tuple[Mount, ...] = ()
    rootfs: str | None = None
    userland: UserlandChoice = "full"
    tmp_size: int = 64 << 20
    env: tuple[tuple[str, str], ...] = ()
    limits: Limits = field(default_factory=Limits)
    network: NetworkChoice = "none"
    seccomp: SeccompPolicy = field(default_factory=SeccompPolicy.default)
    allow_missing: frozenset[str] = frozenset()
    hostname: str = "sandbox"
    cwd: str = "/tmp"  # noqa: S108 - the environment's own
    user_id: int = 1000

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[ConfigFields]) -> None: ...

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("mounts", _all_of(Mount, self.mounts, "mounts"))
        destinations = [mount.destination for mount in self.mounts]
        for destination in destinations:
            if destinations.count(destination) > 1:
                raise ConfigError(f"mounts: {destination!r} is the destination of two mounts")
        if self.rootfs is not None:
            path = check_text(self.rootfs, "rootfs")
            if not os.path.isdir(path):
                raise ConfigError(
                    f"rootfs {path!r}: not a directory; rootfs/README.md tells how to build one"
                )
            if not os.access(path, os.R_OK | os.X_OK):
                raise ConfigError(f"rootfs {path!r}: not readable by this user")
            put("rootfs", os.path.realpath(path))
        if self.userland not in ("full", "minimal"):
            raise ConfigError(f"userland: must be 'full' or 'minimal', got {self.userland!r}")
        put("tmp_size", parse_size(self.tmp_size, "tmp_size"))
        put("env", tuple(sorted(check_environment(self.env).items())))
        if not isinstance(self.limits, Limits):
            raise ConfigError(f"limits: must be a Limits value, got {self.limits!r}")
        if self.network not in ("none", "host"):
            raise ConfigError(f"network: must be 'none' or 'host', got {self.network!r}")
        if isinstance(self.seccomp, str):
            put("seccomp", SeccompPolicy.named(self.seccomp))
        elif not isinstance(self.seccomp, SeccompPolicy):
            raise ConfigError(f"seccomp: must be a SeccompPolicy or name, got {self.seccomp!r}")
        if isinstance(self.allow_missing, str):
            raise ConfigError(
                f"allow_missing: give a set of names, {{{self.allow_missing!r}}}, not one string"
            )
        put("allow_missing", frozenset(_all_of(str, self.allow_missing, "allow_missing")))
        for name in sorted(self.allow_missing - ALLOWABLE):
            raise ConfigError(f"allow_missing: {name!r} is none of {', '.join(sorted(ALLOWABLE))}")
        if not _HOSTNAME.fullmatch(check_text(self.hostname, "hostname")):
            raise ConfigError(f"hostname: {self.hostname!r} is no host name (up to 64 characters)")
        if not check_text(self.cwd, "cwd").startswith("/"):
            raise ConfigError(f"cwd: must be absolute, got {self.cwd!r}")
        put("user_id", _count(self.user_id, "user_id", least=1, most=65533))

    def replace(self, **changes: Unpack[ConfigFields]) -> Config:
        """Return a copy with some fields changed; checks apply as to a new one."""
        unknown = sorted(set(changes) - {item.name for item in fields(self)})
        if unknown:
            name = unknown[0]
            names = ", ".join(item.name for item in fields(self))
            remedy = f"there are {names}"
            if any(name == item.name for item in fields(Limits)):
                remedy = f"it is a limit: limits=nsbox.Limits({name}=...)"
            raise ConfigError(f"unknown option {name!r} of Config; {remedy}")
        values: dict[str, Any] = {**changes}  # __post_init__ takes what ConfigFields tells
        return replace(self, **values)


@functools.cache
def _default_config() -> Config:
    return Config()


def make_config(config: Config | None, changes: Mapping[str, object]) -> Config:
    """Return `config` (or the default) with `changes`, naming unknown fields."""
    base = _default_config() if config is None else config
    if not isinstance(base, Config):
        if hasattr(base, "publish"):
            raise ConfigError("config: a Function has no version; give what its publish() returns")
        raise ConfigError(f"config: must be a Config or a FunctionVersion, got {base!r}")
    return base.replace(**cast("ConfigFields", changes)) if changes else base
