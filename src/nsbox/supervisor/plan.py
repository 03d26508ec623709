# SPDX-License-Identifier: Apache-2.0
"""The plan of an environment: the spec for the launcher, from a `Config` and the features here.

Here it is decided what is enforced, by what, and what is refused: before anything is created.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shlex
import stat
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from nsbox.errors import ConfigError, SyscallError, UnsupportedHostError
from nsbox.isolation import landlock, namespaces
from nsbox.isolation.layout import Layout, LayoutMount
from nsbox.launcher.messages import Hello, Spec
from nsbox.linux.binding import is_unknown
from nsbox.seccomp import filters
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.values.config import LEAST_OPEN_FILES, Config, Limits, Mount
from nsbox.values.result import Protection

_LIMIT_FEATURES: Final = (
    ("memory_max", "cgroup.memory"),
    ("pids_max", "cgroup.pids"),
    ("cpu_max", "cgroup.cpu"),
    ("cpuset_cpus", "cgroup.cpuset"),
    ("io_max", "cgroup.io"),
)
# A time namespace hides no resource of the host; it is there so that offsets stay inside. Where the
# kernel has none (CONFIG_TIME_NS) environments do without it and say so.
_FEWEST_PROCESSES: Final = 4  # PID 1, a worker, its fork, and one that either starts
_BEST_EFFORT_NAMESPACES: Final = frozenset({"time"})
_BLOCK_DEVICES: Final = "/sys/dev/block"
_STANDARD_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def interpreter_prefixes() -> dict[str, str]:
    """Return the directories outside /usr that the running interpreter needs, with their sources.

    The keys are what programs know them by: without "..", because nothing else of the way is there.
    """
    found: dict[str, str] = {}
    # A virtual environment's own directory first: its bin comes first in PATH too.
    candidates = (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    for path in dict.fromkeys(candidates):
        prefix, resolved = os.path.abspath(path), os.path.realpath(path)
        # A prefix that holds homes is no interpreter's own (PYTHONHOME=/ and the like).
        too_much = resolved in ("/", "/home", "/root", os.path.expanduser("~"))
        covered = any(prefix == other or prefix.startswith(other + "/") for other in found)
        if not (too_much or covered or (resolved + "/").startswith("/usr/")):
            found[prefix] = resolved
    return found


def interpreter() -> str:
    """Return the path by which the running interpreter is found inside."""
    path = sys.executable
    if path.startswith(("/usr/", "/bin/", f"{sys.prefix}/")) and "/../" not in path:
        return path
    path = os.path.abspath(path)
    prefixes = (f"{prefix}/" for prefix in interpreter_prefixes())
    # A link from elsewhere: what it leads to is of a prefix.
    return path if path.startswith(("/usr/", *prefixes)) else os.path.realpath(sys.executable)


def base_environment(config: Config) -> dict[str, str]:
    """Return the environment variables of every command; nothing of the host's is in it."""
    path = _STANDARD_PATH
    if config.rootfs is None:
        own = [f"{prefix}/bin" for prefix in interpreter_prefixes()]
        path = ":".join([*own, path])
    return {
        "PATH": path,
        "HOME": "/tmp",  # noqa: S108 - the environment's own
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "LANG": "C.UTF-8",
        **dict(config.env),
    }


def make_layout(config: Config, *, idmap: bool) -> Layout:
    """Return the part of the spec that many environments share."""
    mounts = [_describe_mount(mount, idmap=idmap) for mount in config.mounts]
    if config.rootfs is None:
        taken = {mount.destination for mount in config.mounts}
        for prefix, source in interpreter_prefixes().items():
            if prefix not in taken:
                # A link inside; what lies below /tmp has a mount point in each environment.
                place = re.sub("^/var/tmp/", "/tmp/", prefix)  # noqa: S108
                mount = Mount(source=source, destination=place)
                is_mapped = idmap and _is_private(source)
                # Nobody asked for what is on the way to it, such as /home and a user's name.
                mounts.append(_describe_mount(mount, idmap=is_mapped, is_way_listed=False))
    return Layout(
        rootfs=config.rootfs,
        userland=config.userland,
        mounts=sorted(mounts, key=lambda mount: mount.destination.count("/")),
        user_id=config.user_id,
        hostname=config.hostname,
        network=config.network,
    )


def _describe_mount(mount: Mount, *, idmap: bool, is_way_listed: bool = True) -> LayoutMount:
    is_bind = mount.type == "bind"
    idmapped = idmap and is_bind and _takes_on_owner(mount)
    # What lies below /tmp, and what is mapped to the environment's own id, is mounted anew for
    # each environment; the rest once for all that share the layout.
    below_tmp = mount.destination.startswith("/tmp/")  # noqa: S108
    return LayoutMount(
        source=mount.source,
        destination=mount.destination,
        type=mount.type,
        writable=mount.writable,
        is_directory=not is_bind or os.path.isdir(mount.source),
        idmapped=idmapped,
        size=mount.size,
        is_way_listed=is_way_listed,
        shared=is_bind and not idmapped and not below_tmp,
    )


def _binds_callers_own(config: Config) -> bool:
    """Return whether something is bound that belongs to the caller, who is not root.

    Subordinate ids have no rights to it, and only root makes idmapped mounts: so it is the caller's
    own id that the environment has then.
    """
    sources = [mount.source for mount in config.mounts if mount.type == "bind"]
    if config.rootfs is None:
        sources += filter(_is_private, interpreter_prefixes())
    owners = {os.stat(path).st_uid for path in sources if os.path.exists(path)}
    return os.geteuid() != 0 and os.geteuid() in owners


def _is_private(path: str) -> bool:
    try:
        return not namespaces.is_public(os.stat(path))
    except OSError as error:
        if is_unknown(error):
            raise SyscallError("stat", error.errno or 0, error.filename) from error
        return False  # told at the birth


def _takes_on_owner(mount: Mount) -> bool:
    """Return whether the environment has the rights of the source's owner in a bind made by root.

    Raises:
        ConfigError: What it makes there would be root's.
    """
    try:
        status = os.stat(mount.source)
    except OSError as error:
        if is_unknown(error):
            raise SyscallError("stat", error.errno or 0, error.filename) from error
        return False  # told at the birth
    if mount.writable and status.st_uid == 0:
        raise ConfigError(
            f"mount source {mount.source!r}: belongs to root, as would what a command makes there; "
            "give it to an ordinary user first "
            f"(chown -R nobody {shlex.quote(mount.source)}), or bind it read-only"
        )
    return namespaces.takes_on_owner(status)


def _device_number(device: str) -> str:
    major, _, minor = device.partition(":")
    number = device
    if not (major.isdigit() and minor.isdigit()):
        try:
            status = os.stat(device)
        except OSError as error:
            raise ConfigError(f"io_max device {device!r}: {error.strerror}; see lsblk") from error
        if not stat.S_ISBLK(status.st_mode):
            raise ConfigError(f"io_max device {device!r}: not a block device; see lsblk")
        number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    known = f"{_BLOCK_DEVICES}/{number}"
    if os.path.exists(_BLOCK_DEVICES) and not os.path.exists(known):
        raise ConfigError(f"io_max device {device!r}: this host has no such device; see lsblk")
    if os.path.exists(f"{known}/partition"):
        # The kernel limits whole devices only (cgroup-v2.rst, io.max).
        raise ConfigError(f"io_max device {device!r}: is a partition; name the whole disk")
    return number


def _check_cpus(cpus: str) -> None:
    count = os.sysconf("SC_NPROCESSORS_CONF")
    for part in cpus.split(","):
        first, _, last = part.partition("-")
        if not int(first) <= int(last or first) < count:
            raise ConfigError(
                f"cpuset_cpus: {part!r} of {cpus!r}: this host has the CPUs 0-{count - 1}"
            )


class Plan:
    """The spec for the launcher, and the protections that will be in force.

    Attributes:
        spec: What the launcher is told.
        layers: Protections decided so far; the birth adds the rest.
        accounts_cpu: Whether CPU time of the whole environment can be read.
        environment: Variables of every command.
        program: The compiled system call filter.
        may_stand_by: Whether such ones may be born ahead of need (`nsbox.supervisor.standby`).
    """

    def __init__(self, config: Config, hello: Hello, runtime: str = "") -> None:
        """Decide; `make_plan` does so once for a config.

        `runtime` is the kind of template to be cloned (`nsbox.launcher.template.main`).

        Raises:
            UnsupportedHostError: Something asked for cannot be enforced here.
            ConfigError: A value does not fit this host.
        """
        self._config = config
        self._hello = hello
        # Not what holds on to directories of the caller's, or to what the host's network is now.
        self.may_stand_by = not config.mounts and not config.rootfs and config.network == "none"
        self._policy = config.seccomp
        if any(mount.type == "bind" and mount.writable for mount in config.mounts):
            self._policy = config.seccomp.without_set_id_bits()
        self._cgroups: Mapping[str, Mapping[str, Any]] = hello.cgroups
        self.layers: list[Protection] = []
        self._rlimits: dict[str, int] = {}
        names = self._choose_namespaces()
        self._choose_landlock()
        limits = self._choose_limits(config.limits)
        self._choose_rlimits(config.limits)
        self.accounts_cpu = self._choose_cpu_time(config.limits)
        flags = 0
        for name in names:
            if name != "network" or not hello.networks_ready:
                flags |= namespaces.FLAGS[name]
        idmap = hello.privileged and "idmapped_mounts" not in config.allow_missing
        as_caller = hello.ids == "subordinate" and _binds_callers_own(config)
        self.environment = base_environment(config)
        self.program = self._compile_filter()
        layout = make_layout(config, idmap=idmap)
        binds = [mount.source for mount in layout.mounts if mount.type == "bind"]
        fields: dict[str, Any] = {
            "as_caller": as_caller,
            "layout": layout.to_wire(),
            "sources": [config.rootfs or "/usr", *binds],
            "namespaces": flags,
            "namespace_names": names,
            "network": config.network,
            "tmp_size": config.tmp_size,
            "user_id": config.user_id,
            "cgroup_limits": limits,
            "rlimits": self._rlimits,
            "runtime": runtime,
            "landlock": hello.landlock,
            "seccomp": self.program.hex(),
            "seccomp_name": f"policy {self._policy.name!r}",
        }
        # The launcher prepares the calls of a spec once and finds them again by this.
        canonical = json.dumps(fields, sort_keys=True).encode()
        key = hashlib.sha256(canonical).hexdigest()
        self.spec = Spec(**fields | {"layout": layout, "key": key})
        self._add("tmp", True, f"private, as /dev/shm is; {config.tmp_size} bytes each")

    def _add(self, name: str, in_force: bool, detail: str) -> None:
        self.layers.append(Protection(name, in_force, detail))

    def _add_unwanted(self, name: str, detail: str) -> None:
        self.layers.append(Protection(name, in_force=False, detail=detail, wanted=False))

    def _compile_filter(self) -> bytes:
        policy, shares = self._policy, self._policy is not self._config.seccomp
        try:
            program = filters.filter_for(policy)
        except UnsupportedHostError as error:
            if "seccomp" not in self._config.allow_missing:
                raise
            self._add("seccomp", False, error.reason)
            if shares:
                self._add("set_id_bits", False, "no filter: files in writable binds can have them")
            return b""
        self._add("seccomp", True, f"policy {policy.name!r}")
        if shares:
            self._add("set_id_bits", True, "no file gets them: there are writable binds")
        return program

    def _choose_namespaces(self) -> list[str]:
        names = []
        for name in namespaces.FLAGS:
            feature = f"namespace.{name}"
            if name == "network" and self._config.network == "host":
                self._add_unwanted(feature, "the host's network was asked for")
                continue
            if name not in self._hello.namespaces:
                reason = f"this kernel has no {name} namespaces"
                if name not in _BEST_EFFORT_NAMESPACES:
                    raise UnsupportedHostError(feature, reason, "Use a kernel that has them.")
                self._add(feature, False, reason)
                continue
            names.append(name)
            self._add(feature, True, "its own")
        return names

    def _choose_landlock(self) -> None:
        if self._hello.landlock:
            self._add("landlock", True, "no abstract Unix socket and no process outside is reached")
        elif self._config.network == "host":
            self._add(
                "landlock",
                False,
                f"{landlock.MISSING}: the host's abstract Unix sockets can be reached",
            )
        else:
            self._add_unwanted("landlock", f"{landlock.MISSING}; namespaces do the same")

    def _choose_limits(self, limits: Limits) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if limits.cpuset_cpus is not None:
            _check_cpus(limits.cpuset_cpus)
        for field, feature in _LIMIT_FEATURES:
            value = getattr(limits, field)
            if value is None or value == ():
                self._add_unwanted(feature, "no limit was asked for")
                continue
            found = self._cgroups[feature]
            if "missing" not in found:
                text = f"{field}={value}"
                if field == "pids_max":
                    value, text = self._bounded(field, "nproc", value)
                chosen[field] = value
                detail = f"{text}, cgroup v{found['version']}"
                if field == "memory_max":
                    swap = self._cgroups["cgroup.memory.swap"]
                    detail += f"; swap: {swap['missing']}" if "missing" in swap else ", no swap"
                self._add(feature, True, detail)
            elif field == "pids_max" and self._can_use_nproc():
                text = self._put_rlimit(field, "nproc", value)
                self._add(feature, True, f"{text}, RLIMIT_NPROC of its user namespace")
            else:
                self._refuse_or_note(field, feature, found["missing"], found["hint"])
        if "io_max" in chosen:
            chosen["io_max"] = [
                {
                    "device": _device_number(item.device),
                    "rbps": item.rbps,
                    "wbps": item.wbps,
                    "riops": item.riops,
                    "wiops": item.wiops,
                }
                for item in chosen["io_max"]
            ]
        return chosen

    def _can_use_nproc(self) -> bool:
        # Since Linux 5.14 RLIMIT_NPROC counts per user namespace, so that it bounds the
        # environment and not all of the user's processes.
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        return release >= (5, 14)

    def _refuse_or_note(self, field: str, feature: str, reason: str, hint: str) -> None:
        named = field in self._config.limits.named
        if named and feature not in self._config.allow_missing:
            raise UnsupportedHostError(feature, f"{field} was asked for, and {reason}", hint)
        self._add(feature, False, f"{field}: {reason}")

    def _choose_rlimits(self, limits: Limits) -> None:
        for field, name in (
            ("open_files", "nofile"),
            ("file_size", "fsize"),
            ("core_size", "core"),
        ):
            value = getattr(limits, field)
            if value is not None:
                self._add(f"rlimit.{name}", True, self._put_rlimit(field, name, value))

    def _put_rlimit(self, field: str, name: str, value: int) -> str:
        self._rlimits[name], text = self._bounded(field, name, value)
        return text

    def _bounded(self, field: str, name: str, value: int) -> tuple[int, str]:
        """Return `value`, or for a default what this process may set at most, and the words."""
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        text = f"{field}={value}"
        if hard != resource.RLIM_INFINITY and value > hard:
            least = {"nofile": LEAST_OPEN_FILES, "nproc": _FEWEST_PROCESSES}.get(name, 0)
            if field in self._config.limits.named or hard < least:
                raise ConfigError(
                    f"{field}: {value} is over this process's hard limit of {hard}; "
                    "raise that first (ulimit -H, LimitNOFILE= and the like)"
                )
            return hard, f"{field}={hard}, this process's hard limit; by default {value}"
        return value, text

    def _choose_cpu_time(self, limits: Limits) -> bool:
        found = self._cgroups["cgroup.cpu_accounting"]
        accounts = "missing" not in found
        if limits.cpu_time is not None:
            if accounts:
                detail = f"cpu_time={limits.cpu_time:g} s, read from its cgroup"
                self._add("cpu_time", True, detail)
            else:
                self._refuse_or_note("cpu_time", "cpu_time", found["missing"], found["hint"])
        return accounts


_plans: tuple[tuple[Config, Hello, str, Plan], ...] = ()
_PLANS_KEPT: Final = 32


def make_plan(config: Config, hello: Hello, runtime: str = "") -> Plan:
    """Return the plan of `config` for the host that `hello` describes.

    The same config object gets the same plan again, of the last ones made: deciding takes longer
    than the rest of the host's part of a birth, and hashing a config a tenth of that.
    """
    global _plans  # noqa: PLW0603 - replaced as a whole: other threads read it meanwhile
    for known, host, kind, made in _plans:
        if known is config and host is hello and kind == runtime:
            return made
    made = Plan(config, hello, runtime)
    _plans = ((config, hello, runtime, made), *_plans[: _PLANS_KEPT - 1])
    return made


_MASKED_PROC: Final = (
    "something is mounted over a part of this host's /proc (findmnt -R /proc shows what), and then "
    "the kernel lets no whole one be mounted"
)


def born_layers(
    config: Config,
    hello: Hello,
    connection: EnvironmentConnection,
    decided: Sequence[Protection],
) -> list[Protection]:
    """Return what is in force: the protections verified at the end of a birth, then `decided`."""
    ids = {
        "range": f"host id {connection.host_id}, of no other environment",
        "subordinate": f"subordinate id {connection.host_id}, of no other environment",
        "own": "the caller's own id: environments share it",
    }["own" if connection.has_callers_id else hello.ids]
    groups = "no supplementary groups" if hello.drops_groups else "the caller's groups remain"
    proc_text = {
        "full": "its own, sensitive files masked, settings read-only",
        "subset=pid": f"its own, processes only: {_MASKED_PROC}",
        "none": f"none: {_MASKED_PROC}",
    }[connection.proc]
    userland = config.rootfs or "the host's /usr"
    return [
        Protection("identity", True, f"uid {config.user_id} inside; {ids}; {groups}"),
        Protection("rootfs", True, f"pivoted root, {userland} read-only, nosuid, nodev"),
        Protection("proc", True, proc_text),
        Protection("capabilities", True, "none in any set, bounding set empty, securebits locked"),
        Protection("no_new_privs", True, "set"),
        *decided,
    ]
