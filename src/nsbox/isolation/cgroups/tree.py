# SPDX-License-Identifier: Apache-2.0
"""The launcher's own directory in every usable hierarchy, and what it makes below."""

from __future__ import annotations

import errno
import os

from nsbox.errors import SyscallError, UnsupportedHostError
from nsbox.isolation.cgroups import sweep, v1, v2
from nsbox.isolation.cgroups.files import read_text, write_text
from nsbox.isolation.cgroups.group import EnvironmentCgroup
from nsbox.isolation.cgroups.locate import (
    CONTROLLERS,
    HINT_DELEGATE,
    HINT_KERNEL,
    HINT_READ_ONLY,
    HINT_V1_USER,
    Hierarchies,
)
from nsbox.isolation.cgroups.owner import Owner
from nsbox.linux.binding import is_unknown
from nsbox.linux.questions import exists, may

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

LIMITS = {
    "memory_max": "memory",
    "pids_max": "pids",
    "cpu_max": "cpu",
    "cpuset_cpus": "cpuset",
    "io_max": "io",
}
"""Limit -> controller that enforces it."""

FEATURES = (*v2.FEATURE_FILES, "cgroup.cpu_accounting")


class Tree:
    """The directory ``nsbox.<owner>`` below the own cgroup, in each hierarchy that can be used.

    Attributes:
        owner: Who it belongs to; `owner.name` is the directory's name.
        hierarchies: Where it is made. A place that turns out unusable is replaced by the reason.
        paths: {hierarchy: directory}: "unified" and v1 controller names; empty before `create`,
            and where nothing can be used.
    """

    def __init__(self, owner: Owner | None = None, hierarchies: Hierarchies | None = None) -> None:
        self.owner = Owner.current() if owner is None else owner
        self.hierarchies = Hierarchies.detect() if hierarchies is None else hierarchies
        self.paths: dict[str, str] = {}
        self._created = False
        self._freezes_on_v1 = False

    @classmethod
    def for_process(cls, pid: int | None = None) -> Tree:
        """Return the tree of a process of this pid namespace, below the *calling* one's cgroup."""
        return cls(Owner.current() if pid is None else Owner.of(pid))

    @property
    def name(self) -> str:
        """The name of the directory."""
        return self.owner.name

    @property
    def candidates(self) -> list[str]:
        """Every directory that `create` may make, known before it does."""
        return [f"{base}/{self.name}" for base in self.hierarchies.bases]

    def create(self) -> None:
        """Make the directories; again after the first time does nothing.

        For a hierarchy that cannot be used `capabilities` has the reason. On v2 this may move the
        processes of the own cgroup to its leaf ``nsbox.host``.

        Raises:
            OSError: Whether one can be used is not known (`binding.is_unknown`).
        """
        if self._created:
            return
        self._make_directories()
        self._created = True
        unified = self.paths.get("unified")
        self._freezes_on_v1 = "freezer" in self.paths and not (
            unified is not None and exists(f"{unified}/cgroup.freeze")
        )

    def _make_directories(self) -> None:
        places = self.hierarchies
        for name in ("unified", *CONTROLLERS):  # unified first: enabling may take places out
            place = places[name]
            if place.version == 2 and name == "unified":
                self._create_unified(place.directory)
            elif place.version == 1:
                self._create_v1(name, place.directory)
        if not places["unified"].version:
            why = places["unified"]
            for name in CONTROLLERS:
                if places[name].version == 2:
                    places.miss(name, why.reason, why.hint)

    def _create_unified(self, base: str) -> None:
        places = self.hierarchies
        directory = f"{base}/{self.name}"
        try:
            # Before anything is enabled: a janitor gives the leaf of a dead launcher back only
            # where no launcher has a directory (`v2.release_leaf`).
            _make_directory(directory)
            self._enable(base, directory)
        except SyscallError as error:
            sweep.remove_subtree(directory)
            _expect_known(error)
            places.miss("unified", str(error), _hint(error, 2))
            return
        self.paths["unified"] = directory

    def _enable(self, base: str, directory: str) -> None:
        """Hand the controllers that v2 has down to the launcher's directory, and from there on."""
        places = self.hierarchies
        for attempts_left in (2, 1, 0):
            wanted = [name for name in v2.CONTROLLERS if places[name].version == 2]
            for name, (reason, hint) in v2.enable_controllers(base, wanted).items():
                places.miss(name, reason, hint)
            words = " ".join(f"+{name}" for name in wanted if places[name].version == 2)
            try:
                if words:
                    write_text(f"{directory}/cgroup.subtree_control", words)
                return
            except SyscallError as error:
                # ENOENT: a janitor had looked before our directory was there, and disabled them.
                if error.errno != errno.ENOENT or not attempts_left:
                    raise

    def _create_v1(self, name: str, base: str) -> None:
        directory = f"{base}/{self.name}"
        try:
            _make_directory(directory)
            v1.prepare_directory(name, base, directory)
        except SyscallError as error:
            if directory not in self.paths.values():
                sweep.remove_subtree(directory)
            _expect_known(error)
            self.hierarchies.miss(name, str(error), _hint(error, 1))
            return
        self.paths[name] = directory

    def capabilities(self) -> dict[str, dict[str, Any]]:
        """Return {feature: {"version": 1 or 2} or {"missing": reason, "hint": remedy}}.

        Found out by making the directories and looking for the files in them.
        """
        self.create()
        found = {feature: self._capability(feature) for feature in v2.FEATURE_FILES}
        found["cgroup.cpu_accounting"] = self._cpu_accounting()
        return found

    def _capability(self, feature: str) -> dict[str, Any]:
        place_name, file = v2.FEATURE_FILES[feature]
        unified = self.paths.get("unified")
        place = self.hierarchies[place_name]
        if place.version == 2:
            if unified is not None and may(f"{unified}/{file}", os.W_OK):
                return {"version": 2}
            if feature == "cgroup.memory.swap" and not exists("/proc/swaps"):
                return {"version": 2}  # a kernel without swap keeps everything out of it
        if feature in v1.FEATURE_FILES:
            v1_name, files = v1.FEATURE_FILES[feature]
            directory = self.paths.get(v1_name)
            if directory is not None:
                if any(may(f"{directory}/{name}", os.W_OK) for name in files):
                    return {"version": 1}
                return {"missing": f"{directory} has no writable {files[0]}", "hint": HINT_KERNEL}
        if not place.version:
            return {"missing": place.reason, "hint": place.hint}
        return {
            "missing": f"{unified} has no writable {file}",
            "hint": _FILE_HINTS.get(file, HINT_KERNEL),
        }

    def _cpu_accounting(self) -> dict[str, Any]:
        unified = self.paths.get("unified")
        if unified is not None and _has_cpu_stat(unified):
            return {"version": 2}
        if "cpuacct" in self.paths:
            return {"version": 1}
        place = self.hierarchies["cpuacct"]
        if not place.version:
            return {"missing": place.reason, "hint": place.hint}
        return {"missing": f"{unified}/cpu.stat has no usage_usec", "hint": HINT_KERNEL}

    def make(self, env_id: str, limits: Mapping[str, Any] | None = None) -> EnvironmentCgroup:
        """Make the cgroup of one environment and write its limits.

        Args:
            env_id: Letters, digits, ``-`` and ``_``; the directory's name.
            limits: `memory_max` (bytes), `pids_max`, `cpu_max` (CPUs), `cpuset_cpus` ("0-1,3"),
                `io_max` (list of {"device": "MAJ:MIN", "rbps", "wbps", "riops", "wiops"}); None or
                absent is no limit. Memory limits keep everything out of swap.

        Raises:
            UnsupportedHostError: A limit was given that no usable hierarchy can enforce.
            SyscallError: The kernel refused; names the file. What was made is removed.
        """
        if not sweep.is_environment_name(env_id):
            raise ValueError(f"{env_id!r} cannot name a cgroup")
        self.create()
        asked = {key: value for key, value in (limits or {}).items() if value is not None}
        names = self._needed(asked)
        made: dict[str, str] = {}
        try:
            for name in names:
                directory = f"{self.paths[name]}/{env_id}"
                if directory not in made.values():
                    self._make_below(name, directory)
                made[name] = directory
            self._write_limits(made, asked)
            return EnvironmentCgroup(env_id, made, frozenset(self.paths.values()))
        except BaseException:
            for directory in made.values():
                sweep.remove_subtree(directory)
            raise

    def _needed(self, asked: Mapping[str, Any]) -> list[str]:
        """Return the hierarchies to make directories in: v2 and v1 names."""
        directories = self.paths
        names: list[str] = [name for name in ("unified", "memory", "pids") if name in directories]
        for key in asked:
            controller = LIMITS[key]
            place = self.hierarchies[controller]
            if not place.version:
                raise UnsupportedHostError(f"cgroup.{controller}", place.reason, place.hint)
            if place.version == 1 and controller not in names:
                names.append(controller)
        if "unified" not in directories:
            # Pure v1: accounting and freezing have hierarchies of their own there.
            names += [name for name in ("cpuacct", "freezer") if name in directories]
        elif self._freezes_on_v1:
            names.append("freezer")  # a hybrid host before 5.2
        return names

    def _make_below(self, name: str, directory: str) -> None:
        try:
            os.mkdir(directory, 0o755)
        except FileNotFoundError:
            # Somebody removed our empty directory (a sweep from another time namespace, an
            # administrator): once more from the start.
            self._created = False
            self.create()
            try:
                os.mkdir(directory, 0o755)
            except OSError as error:
                raise SyscallError("mkdir", error.errno or 0, directory) from None
        except OSError as error:
            raise SyscallError("mkdir", error.errno or 0, directory) from None

    def _write_limits(self, made: Mapping[str, str], asked: Mapping[str, Any]) -> None:
        unified = made.get("unified", "")
        memory = asked.get("memory_max")
        if "memory" in made:
            if memory is not None:
                v1.write_memory(made["memory"], memory)
        elif self.hierarchies["memory"].version == 2:
            v2.write_memory(unified, memory)
        for key, value in asked.items():
            name = LIMITS[key]
            directory = made.get(name)
            if key == "pids_max":
                if directory is not None:
                    v1.write_pids(directory, value)
                else:
                    v2.Unified(unified).pids_max = value
            elif key == "cpu_max":
                if directory is not None:
                    v1.write_cpu(directory, value)
                else:
                    v2.Unified(unified).cpu_max = value
            elif key == "cpuset_cpus":
                if directory is not None:
                    v1.write_cpuset(directory, value, self.paths["cpuset"])
                else:
                    v2.write_cpuset(unified, value)
            elif key == "io_max":
                if directory is not None:
                    v1.write_io(directory, value)
                else:
                    v2.write_io(unified, value)

    def remove(self, timeout: float = 0.0) -> list[str]:
        """Remove the launcher's directories and give the leaf back; return what remains.

        Waits up to `timeout` seconds for environments that are ending. Kills nothing.
        """
        paths = list(dict.fromkeys(self.paths.values()))
        for path in paths:
            sweep.check_tree_path(path)
        remaining = sweep.remove_retrying(paths, timeout)
        unified = self.paths.get("unified")
        if unified is not None and unified not in remaining:
            v2.release_leaf(os.path.dirname(unified))
        if not remaining:
            self.paths = {}
            self._created = False
        return remaining


_FILE_HINTS = {
    "cgroup.kill": "use kernel 5.14 or later; until then environments are killed through PID 1",
    "cgroup.freeze": "use kernel 5.2 or later",
    "memory.swap.max": "boot with swapaccount=1, or turn swap off",
}


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        # Ours: controllers mounted together share it, and the name is this process's alone.
        pass
    except OSError as error:
        raise SyscallError("mkdir", error.errno or 0, path) from None


def _has_cpu_stat(directory: str) -> bool:
    try:
        return "usage_usec" in read_text(f"{directory}/cpu.stat")
    except SyscallError as error:
        _expect_known(error)
        return False


def _expect_known(error: SyscallError) -> None:
    """Raise an error that does not say that a hierarchy cannot be used."""
    if is_unknown(error) and error.errno != errno.EAGAIN:  # that is a limit of cgroups (`_hint`)
        raise error


def _hint(error: SyscallError, version: int) -> str:
    if error.errno == errno.EROFS:
        return HINT_READ_ONLY
    if error.errno == errno.EAGAIN:
        return "raise cgroup.max.descendants of the parent cgroup, or run `nsbox gc`"
    return HINT_DELEGATE if version == 2 else HINT_V1_USER
