# SPDX-License-Identifier: Apache-2.0
"""The parts of a birth and a start that all environments of a function version share."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
import time
import weakref
from collections.abc import Mapping
from typing import Any, Final

from nsbox.errors import ConfigError
from nsbox.functions.function import LAYER_ROOT, TASK_ROOT, Function, FunctionVersion
from nsbox.launcher.messages import Hello, Spec
from nsbox.supervisor.launcher import Launcher, get_launcher
from nsbox.supervisor.plan import interpreter_prefixes, make_plan
from nsbox.values import json_text
from nsbox.values.config import Config


class Deployment:
    """Made by `deployment_of`.

    Attributes:
        config: The `Config` that environments of the version are born with.
        attachments: Directories of the host, and where they are attached after the birth.
        runtime: The kind of template whose clones can serve it (`nsbox.launcher.template.main`).
        source: The version's own config.
        is_program: Whether a program answers, and no worker, not even at a reset.
        kills_left: Whether what an invocation leaves running is killed before the next one.
    """

    def __init__(self, version: FunctionVersion) -> None:
        """Raises ConfigError when no template can serve it."""
        self.source = version.config
        function = version.function
        self.runtime = _runtime_of(function)
        # Of one that is executed the worker's socket is made later than its death is watched.
        self._has_worker = function.handler is not None and function.start == "clone"
        self._resets = function.reuse == "reset"
        self.is_program = function.handler is None and not self._resets
        self.kills_left = version.kills_left_running
        places = ((version.code_path, TASK_ROOT), (version.opt_path, LAYER_ROOT))
        self.attachments = [(os.fspath(path), place) for path, place in places if path is not None]
        for _, place in self.attachments:
            for prefix in interpreter_prefixes():
                if f"{prefix}/".startswith(f"{place}/"):
                    what = "layers" if place == LAYER_ROOT else "code"
                    raise ConfigError(
                        f"{what}: their place is {place}, where the Python in use is ({prefix}); "
                        "use one that is elsewhere"
                    )
        self.config = version.birth_config
        self._start: tuple[Mapping[str, str], bytes] | None = None

    def lends_control(self, hello: Hello) -> bool:
        """Whether PID 1's socket is left to the launcher: no invocation as such asks anything."""
        is_asked = self._resets or (self.kills_left and "missing" in hello.cgroups["cgroup.pids"])
        return self._has_worker and not is_asked

    def start_text(
        self,
        version: FunctionVersion,
        environment: Mapping[str, str],
        env_id: str,
        initialization_type: str,
    ) -> bytes:
        """Return the JSON of START for the worker of an environment.

        `environment` has the variables besides the function's own.
        """
        known = self._start
        if known is None or known[0] != environment:
            known = self._start = (environment, json_text.encode(_details(version, environment)))
        # What is this environment's alone goes behind what is the same for all of the version.
        day = time.strftime("%Y/%m/%d", time.gmtime())
        own = {
            "AWS_LAMBDA_LOG_STREAM_NAME": f"{day}/[{version.id}]{env_id}",
            "AWS_LAMBDA_INITIALIZATION_TYPE": initialization_type,
        }
        return known[1][:-1] + b', "own": ' + json_text.encode(own) + b"}"


_deployed: Final[weakref.WeakKeyDictionary[FunctionVersion, Deployment]] = (
    weakref.WeakKeyDictionary()
)


def deployment_of(version: FunctionVersion) -> Deployment:
    """Return what follows from `version`; the same object each time.

    Raises:
        ConfigError: It cannot be served.
    """
    known = _deployed.get(version)
    # Equal versions may lie in different stores.
    if known is None or known.source is not version.config:
        known = _deployed[version] = Deployment(version)
    return known


def kind_of(source: Config | FunctionVersion) -> tuple[Launcher, Spec | None]:
    """Return the launcher, and what standby environments of `source` are made from.

    That is None where there are none: of what binds directories, or has the host's network.
    """
    launcher = get_launcher()
    if isinstance(source, FunctionVersion):
        deployment = deployment_of(source)
        plan = make_plan(deployment.config, launcher.hello, deployment.runtime)
    else:
        plan = make_plan(source, launcher.hello)
    return launcher, plan.spec if plan.may_stand_by else None


def _details(version: FunctionVersion, environment: Mapping[str, str]) -> dict[str, Any]:
    function = version.function
    limit = function.limits.memory_max
    told = {
        "name": function.name,
        "version": version.id,
        "arn": f"arn:aws:lambda:local:000000000000:function:{function.name}:{version.id}",
        "memory": str(limit >> 20 if limit is not None else 0),
        "log_group": f"/aws/lambda/{function.name}",
        "tenant": function.tenant,
    }
    variables = {
        "AWS_LAMBDA_FUNCTION_NAME": told["name"],
        "AWS_LAMBDA_FUNCTION_VERSION": told["version"],
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": told["memory"],
        "AWS_LAMBDA_LOG_GROUP_NAME": told["log_group"],
        "LAMBDA_TASK_ROOT": version.config.cwd,
        "_HANDLER": function.handler or "",
        "TZ": ":UTC",
    }
    return {
        "handler": function.handler,
        "path": _module_path(has_rootfs=function.rootfs is not None),
        "cwd": version.config.cwd,
        "env": {**environment, **variables, **dict(version.env)},
        "function": told,
        "forks": function.reuse == "reset",
        # One that was executed knows where its own standard library is.
        "keeps_path": function.start == "exec",
        "visible": function.reuse != "reset",
    }


def _runtime_of(function: Function) -> str:
    """Return the kind of template whose clones can serve `function`.

    Raises:
        ConfigError: None can.
    """
    if function.handler is None:
        # Without root attachments are for clones only of templates that were executed in the
        # launcher's user namespace, which that of commands is older than (ptrace_may_access,
        # mm->user_ns).
        has_code = function.code is not None or function.layers
        return "python" if function.reuse == "reset" or has_code else ""
    if function.limits.cpu_time is not None:
        raise ConfigError(
            "limits: cpu_time is of commands, which end; a handler has its timeout, and cpu_max "
            "for its share of the processors: leave cpu_time out"
        )
    if function.rootfs is not None and function.start == "clone":
        raise ConfigError(
            "start: 'clone' is of the host's own interpreter, which does not fit to a rootfs; "
            "give start='exec'"
        )
    return ",".join(["python", *function.preload])


@functools.cache
def _module_path(*, has_rootfs: bool) -> list[str]:
    """Return sys.path for a handler: its code, its layers, the standard library, site packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    own = [TASK_ROOT, f"{LAYER_ROOT}/python", f"{LAYER_ROOT}/python/lib/{version}/site-packages"]
    if has_rootfs:
        return own  # and what its own interpreter adds
    library = os.path.abspath(sysconfig.get_path("stdlib"))
    # What the handler's interpreter has too: below /usr, or a prefix that is bound.
    visible = ("/usr/", *(f"{prefix}/" for prefix in interpreter_prefixes()))
    packages = map(os.path.abspath, site.getsitepackages())
    return [
        *(*own, library, f"{library}/lib-dynload"),
        *(path for path in packages if path.startswith(visible)),
    ]
