# SPDX-License-Identifier: Apache-2.0
"""What host, launcher and template tell each other, as values with named fields.

A `Message` goes from host to launcher or back, as one JSON object (`nsbox.launcher.protocol`);
the `Spec` in one goes on to the template by `marshal`. Unknown and missing fields are refused:
after an upgrade on disk a program that runs on may start a launcher of another version.

No answer has a number, since each birth and each request brings a socket of its own: what comes
late comes where nobody reads any more, and the kernel throws it away.
"""

from __future__ import annotations

from nsbox.errors import LauncherError
from nsbox.isolation.layout import Layout, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, Self


class Spec(Record):
    """What an environment is to be, as `nsbox.supervisor.plan` has decided it.

    Attributes:
        as_caller: Whether it has the caller's own id outside.
        layout: What many environments share.
        namespaces: Flags of clone3(2).
        namespace_names: All that it has, a network namespace that is made ready before included.
        network: ``"none"`` or ``"host"``.
        tmp_size: Bytes of /tmp, and of /dev/shm.
        user_id: Uid and gid inside.
        cgroup_limits: Limits by field of `Limits`.
        rlimits: Limits by name, such as ``"nofile"``.
        runtime: Kind of the template to clone (`nsbox.launcher.template.main`).
        landlock: Whether a ruleset is to be in force.
        seccomp: The filter's program in hexadecimal digits, "" for none.
        seccomp_name: What it is called, for people.
        sources: Paths of what is bound from the host, the userland first.
        key: Digest of all that, by which launcher and template know it again.
    """

    as_caller: bool
    layout: Layout
    namespaces: int
    namespace_names: list[str]
    network: str
    tmp_size: int
    user_id: int
    cgroup_limits: dict[str, Any]
    rlimits: dict[str, int]
    runtime: str
    landlock: bool
    seccomp: str
    seccomp_name: str
    sources: list[str]
    key: str

    def to_wire(self) -> dict[str, Any]:
        """See `Record.to_wire`."""
        return {**self.__dict__, "layout": self.layout.to_wire()}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Self:
        """See `Record.from_wire`; that holds for the layout, too."""
        spec = super().from_wire(fields)
        spec.layout = Layout.from_wire(fields["layout"])
        return spec


class Message(Record):
    """A datagram between host and launcher; its class says what is said, and who says it."""


# -- the start, on the socket of births --------------------------------------------------------


class UserNamespace(Message):
    """Launcher: write the id maps of my user namespace. The host answers `Mapped`."""

    pid: int


class Mapped(Message):
    """Host: they are written."""


class Hello(Message):
    """Launcher: it is ready, and this is what the host can enforce.

    Attributes:
        pid: Its process id.
        privileged: Whether it is root of the host.
        ids: Kind of its `identity.Identity`.
        drops_groups: Whether setgroups(2) is allowed.
        networks_ready: Whether network namespaces are made ahead of need.
        namespaces: Names of those that this kernel has.
        landlock: Whether the kernel has scopes.
        cgroups: Feature -> what there is of it, or why not (`cgroups.Tree.capabilities`).
        trees: Hierarchy -> directory of the launcher's cgroup.
    """

    pid: int
    privileged: bool
    ids: str
    drops_groups: bool
    networks_ready: bool
    namespaces: list[str]
    landlock: bool
    cgroups: dict[str, dict[str, Any]]
    trees: dict[str, str]


class Fatal(Message):
    """Launcher: it ends. `step` is one of `server.STEPS`, or "run"; `text` is the traceback."""

    step: str
    errno: int
    message: str
    text: str


# -- births, on a socket of each -----------------------------------------------------------------


class GiveBirth(Message):
    """Host: an environment is wanted; with its control socket and that of this birth.

    Attributes:
        id: Its id.
        key: The key of its spec.
        spec: The spec's fields; None when the launcher knows them.
        sources: What `Spec.sources` are just now; another text when one was replaced.
        awaits: What will come on the socket of the birth: ``"taker"``, ``"attachments"`` or "".
        is_brief: It is for one command (`protocol.scarcity`).
    """

    id: str
    key: str
    spec: dict[str, Any] | None
    sources: str
    awaits: str
    is_brief: bool


class Born(Message):
    """Launcher: PID 1 is cloned; before Linux 6.9 with its pidfd.

    Attributes:
        pid: Its number.
        inode: What names it among pidfds.
        host_id: Uid and gid it has outside.
        cgroup: Hierarchy -> directory.
    """

    pid: int
    inode: int
    host_id: int
    cgroup: dict[str, str]


class UnknownSpec(Message):
    """Launcher: it has no spec of this key any more: send it along."""


class NoDescriptors(Message):
    """Launcher: it has `count` descriptors open, of `limit`, which leaves none for another."""

    count: int
    limit: int


class Attach(Message):
    """Host: bind these read-only, pairs of source outside and destination inside.

    With the host's end of the control socket, if it is to be kept here, for `Control`.
    """

    mounts: Sequence[Sequence[str]]


class Keep(Message):
    """Host: it goes on waiting for a taker."""


class Claim(Message):
    """Host: it has a taker."""


# -- requests about one environment, on a socket of all; each brings that of its answer ----------


class Request(Message):
    """Host: something is asked of the environment `id`."""

    id: str


class Freeze(Request):
    """Stop its processes."""


class Thaw(Request):
    """Let them run again."""


class Kill(Request):
    """Kill it. Not answered."""


class Close(Request):
    """End it, and answer `Gone` when it is removed. Without a socket: nobody wants to hear of it.

    Attributes:
        is_reported: Whether its last counters are wanted.
    """

    is_reported: bool


class Control(Request):
    """Give me the host's end of its control socket, which came with `Attach`.

    The answer is `Done` with a descriptor.
    """


class Done(Message):
    """Launcher: what was asked for is done."""


class Failed(Message):
    """Launcher: it could not be done. Of a birth, `step` is that of `birth.STEPS`."""

    step: str
    errno: int
    message: str


class Gone(Message):
    """Launcher: an environment has ended, and is removed.

    Attributes:
        status: Wait status of its PID 1; None for one that is not known here any more.
        usage: Its last counters, where they were asked for (`cgroups.UsageReader`).
        leaked: Directories that could not be removed.
    """

    status: int | None
    usage: dict[str, int | None]
    leaked: list[str]


_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (UserNamespace, Mapped, Hello, Fatal, GiveBirth, Born, UnknownSpec, NoDescriptors,
                 Attach, Keep, Claim, Freeze, Thaw, Kill, Close, Control, Done, Failed, Gone)
}  # fmt: skip


def encode(message: Message) -> dict[str, Any]:
    """Return the JSON object of a message."""
    return {"kind": type(message).__name__, **message.__dict__}


def decode(fields: dict[str, Any]) -> Message:
    """Return the message of a JSON object.

    Raises:
        LauncherError: There is no such message (`Record.from_wire`).
    """
    kind = str(fields.pop("kind", ""))
    if kind not in _KINDS:
        raise LauncherError(
            f"a message {kind!r} is not known: host and launcher are of different versions of "
            "nsbox; start the program anew"
        )
    return _KINDS[kind].from_wire(fields)
