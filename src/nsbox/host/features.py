# SPDX-License-Identifier: Apache-2.0
"""Features of this host, probed by use; and the remedy for each that does not work.

Every probe does the real thing in a process of its own (`nsbox.host.probes`), so that neither a
failure nor a success leaves anything in the calling one. Shared by `nsbox doctor` and the test
marker ``needs(...)``.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import nsbox
from nsbox.host.probes import NOT_KNOWN
from nsbox.linux import proc

PROBED: Final = {
    "userns": "a user namespace",
    "id_maps": "its id maps, written by the parent",
    "newuidmap": "a range of subordinate ids, by newuidmap and newgidmap",
    "namespaces": "mount, pid, network, ipc, uts and cgroup namespaces",
    "time_namespace": "a time namespace",
    "mount_api": "open_tree, mount_setattr, fsopen (Linux 5.12)",
    "tmpfs": "a tmpfs with a size, which is kept",
    "proc": "a whole /proc of a new pid namespace",
    "proc_pid": "a /proc with subset=pid",
    "overlay": "an overlay",
    "idmapped_mounts": "an idmapped mount (root)",
    "pivot_root": "pivot_root, and the old root detached",
    "loopback": "the loopback interface up, and a connection over it",
    "seccomp": "the default filter compiled, loaded, and seen to refuse",
    "landlock": "Landlock scopes, seen to refuse an abstract Unix socket",
    "environment": "a default environment, and /bin/true in it",
    "cgroup.memory": "memory_max, exceeded and killed",
    "cgroup.pids": "pids_max, reached",
    "cgroup.cpu": "cpu_max, throttled",
    "cgroup.cpuset": "cpuset_cpus, obeyed",
    "cgroup.io": "io_max, slowed down",
    "cgroup.freeze": "a frozen environment stands still, and goes on",
    "cgroup.kill": "cgroup.kill ends an environment",
    "cgroup.cpu_accounting": "CPU time counted, and cpu_time enforced",
    "tmp_size": "a full /tmp",
    "rlimits": "open_files, file_size and core_size reached",
    "timeout": "a command killed at its timeout",
    "network_none": "no way out of the network namespace",
    "memory_image": "memory that a clone has copied for nothing, given back",
    "json": "events and answers as the standard library has them, encoded by compiled code",
}
"""Feature -> what its probe does, for people."""
HOST_FACTS: Final = ("root", "cgroup2", "gcc", "node", "git", "strace")
NAMES: Final = (*PROBED, *HOST_FACTS)
"""Every name `probe` takes."""
NEEDED: Final = frozenset(
    {"userns", "id_maps", "namespaces", "mount_api", "tmpfs", "pivot_root", "environment"}
)
"""Features without which there is no environment at all."""

_DEADLINE: Final = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of a probe.

    Attributes:
        name: The feature.
        works: Whether the operation succeeded and had its effect.
        detail: What was seen, or why not.
        remedy: What to do on the host at hand; "" when it works, or nothing is known.
    """

    name: str
    works: bool
    detail: str
    remedy: str = ""


_known: Final[dict[str, Finding]] = {}


def probe(name: str) -> tuple[bool, str]:
    """Return whether a feature works on this host, and what was seen; found out once.

    Raises:
        ValueError: `name` is none of `NAMES`.
    """
    finding = _known.get(name) or find([name])[0]
    if not finding.detail.startswith(NOT_KNOWN):
        _known[name] = finding
    return finding.works, finding.detail


def find(names: Sequence[str]) -> list[Finding]:
    """Probe features now, in their order; those that share a helper process are done together.

    Raises:
        ValueError: A name is none of `NAMES`.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"feature {name!r}: none of {', '.join(NAMES)}")
    answers = _ask_helper([name for name in names if name in PROBED])
    answers |= _ask_helper([n for n in answers if answers[n]["detail"].startswith(NOT_KNOWN)])
    findings = []
    for name in names:
        if name in PROBED:
            answer = answers[name]
            hint = "" if answer["works"] else remedy(name, answer["errno"], answer["hint"])
            findings.append(Finding(name, answer["works"], answer["detail"], hint))
        else:
            works, detail = _host_fact(name)
            findings.append(Finding(name, works, detail))
    return findings


def _ask_helper(names: list[str]) -> dict[str, dict[str, Any]]:
    """Run the probes `names` in a helper process and return its answers."""
    if not names:
        return {}
    source = os.path.dirname(os.path.dirname(os.path.abspath(nsbox.__file__)))
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "nsbox.host.probes", *names],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_DEADLINE,
            check=False,
        )
        out, err, status = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        out, err, status = error.stdout or b"", b"no answer in time", -9
    answers = {}
    for line in out.decode(errors="replace").splitlines():
        answer = json.loads(line)
        answers[answer["name"]] = answer
    last = (err.decode(errors="replace").strip().splitlines() or [""])[-1]
    lost = {"works": False, "errno": 0, "hint": "", "detail": f"the probe ended ({status}): {last}"}
    return {name: answers.get(name, lost) for name in names}


def _host_fact(name: str) -> tuple[bool, str]:
    if name == "root":
        return os.geteuid() == 0, f"the user id is {os.geteuid()}"
    if name == "cgroup2":
        with open("/proc/self/cgroup") as file:
            lines = file.read().split()
        pure = bool(lines) and all(line.startswith("0::") for line in lines)
        return pure, "cgroup v2 only" if pure else "this host has cgroup v1 hierarchies"
    found = shutil.which(name)
    return found is not None, found or f"{name} is not installed"


# -- remedies ------------------------------------------------------------------------------------


def host_facts() -> dict[str, str]:
    """Return what decides which remedy is the right one on this host; "" for no."""
    return {
        "apparmor": _read("/proc/sys/kernel/apparmor_restrict_unprivileged_userns").strip("0"),
        "userns_clone": _read("/proc/sys/kernel/unprivileged_userns_clone"),
        "max_userns": _read("/proc/sys/user/max_user_namespaces"),
        "chroot": "yes" if proc.is_in_chroot() else "",
        "container": _container(),
        "systemd": "yes" if os.path.isdir("/run/systemd/system") else "",
        "apt": shutil.which("apt-get") or "",
        "user": "" if os.geteuid() == 0 else str(os.geteuid()),
    }


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def _container() -> str:
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if os.path.exists("/.dockerenv"):
        return "docker"
    if os.path.exists("/run/.containerenv"):
        return "podman"
    return _read("/run/systemd/container")


_CONTAINER_REMEDIES: Final = {
    "kubernetes": "in the pod's securityContext set `seccompProfile: {type: Unconfined}` (or a "
    "Localhost profile that allows clone, unshare, mount and pivot_root), `appArmorProfile: "
    "{type: Unconfined}` and `procMount: Unmasked` with `hostUsers: false`",
    "docker": "start the container with `docker run --security-opt seccomp=unconfined "
    "--security-opt apparmor=unconfined --security-opt systempaths=unconfined`",
    "podman": "start the container with `podman run --security-opt seccomp=unconfined "
    "--security-opt unmask=ALL`",
}


def remedy(name: str, error: int = 0, hint: str = "", facts: dict[str, str] | None = None) -> str:
    """Return what to do about a feature that does not work, on a host of these `facts`.

    Args:
        name: The feature.
        error: The errno it failed with, or 0.
        hint: What the part of nsbox that failed suggests itself.
        facts: As from `host_facts`, which is asked by default.
    """
    known = host_facts() if facts is None else facts
    if name in ("userns", "id_maps", "namespaces", "environment"):
        found = _namespace_remedy(error, known)
        return hint or found if name == "environment" else found or hint
    if name == "newuidmap":
        return _subordinate_remedy(known) if known["user"] else hint
    if name in ("proc", "proc_pid") or (
        name in ("tmpfs", "overlay", "mount_api", "pivot_root", "loopback")
        and error in (errno.EPERM, errno.EACCES)
    ):
        container = _CONTAINER_REMEDIES.get(known["container"], "")
        return container or _namespace_remedy(error, known) or hint
    if name == "seccomp" and not hint:
        return _install("libseccomp2", known)
    if name == "overlay":
        return hint or "use Linux 5.11 or later with CONFIG_OVERLAY_FS (modprobe overlay)"
    if name == "memory_image":
        return hint or "use a Linux with memfd_create and its seals"
    if name == "time_namespace":
        return hint or "use Linux 5.6 or later with CONFIG_TIME_NS; or allow_missing it by name"
    return hint


def _namespace_remedy(error: int, facts: dict[str, str]) -> str:
    if facts["chroot"]:
        return f"{proc.CHROOT}: start it outside, or with bwrap or systemd-nspawn"
    if facts["max_userns"] == "0":
        return "as root: `sysctl -w user.max_user_namespaces=15000`, and the same in /etc/sysctl.d"
    if error == errno.ENOSPC:
        return "as root: raise `sysctl user.max_user_namespaces` (and the other user.max_* limits)"
    if facts["user"] and facts["userns_clone"] == "0":
        return "as root: `sysctl -w kernel.unprivileged_userns_clone=1`, and in /etc/sysctl.d"
    if facts["user"] and facts["apparmor"]:
        return (
            "Ubuntu's AppArmor restricts user namespaces: as root, give your Python a profile with "
            f"`userns,` (`echo 'abi <abi/4.0>, profile nsbox {sys.executable} "
            "flags=(unconfined) { userns, }' > /etc/apparmor.d/nsbox && apparmor_parser -r "
            "/etc/apparmor.d/nsbox`), or `sysctl -w "
            "kernel.apparmor_restrict_unprivileged_userns=0`"
        )
    if facts["container"] in _CONTAINER_REMEDIES:
        return _CONTAINER_REMEDIES[facts["container"]]
    if error in (errno.EINVAL, errno.ENOSYS):
        return "use a kernel with CONFIG_USER_NS and the other CONFIG_*_NS"
    if error in (errno.EPERM, errno.EACCES):
        return "something forbids it: a seccomp filter, SELinux or AppArmor around this process"
    return ""


def _subordinate_remedy(facts: dict[str, str]) -> str:
    steps = []
    if not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        steps.append(_install("uidmap", facts))
    steps.append(
        "as root, with the account's name: "
        "`usermod --add-subuids 100000-165535 --add-subgids 100000-165535 NAME`"
    )
    return "; ".join(steps)


def _install(package: str, facts: dict[str, str]) -> str:
    if facts["apt"]:
        return f"as root: `apt-get install {package}`"
    return f"install the package {package} (its name on Debian)"
