# SPDX-License-Identifier: Apache-2.0
"""`Layout`: what many environments share of their file tree, as host and launcher tell it.

`Record`, which it is, is what the messages between them are made of, too.
"""

from __future__ import annotations

from nsbox.errors import LauncherError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, ClassVar, Self, dataclass_transform

    @dataclass_transform(kw_only_default=True)
    class _Fields: ...

else:
    _Fields = object  # `typing` takes 22 ms to import, `dataclasses` 28


class Record(_Fields):
    """A value whose fields are those that its class annotates, all given by name.

    Attributes:
        FIELDS: Their names.
    """

    FIELDS: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls.FIELDS = cls.FIELDS | cls.__annotations__.keys()

    def __init__(self, **fields: Any) -> None:  # noqa: ANN401 - as the class annotates them
        self.__dict__.update(fields)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__})"

    def to_wire(self) -> dict[str, Any]:
        """Return the fields, not to be changed."""
        return self.__dict__

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Self:
        """Return the value with these fields.

        Raises:
            LauncherError: There are fields that it does not have, or not all that it has.
        """
        if fields.keys() != cls.FIELDS:
            missing, unknown = cls.FIELDS - fields.keys(), fields.keys() - cls.FIELDS
            raise LauncherError(
                f"a {cls.__name__} without {sorted(missing)} and with {sorted(unknown)}: host and "
                "launcher are of different versions of nsbox; start the program anew"
            )
        return cls(**fields)


class LayoutMount(Record):
    """A mount besides the userland.

    Attributes:
        source: Path outside; "" for a tmpfs.
        destination: Path inside.
        type: ``"bind"`` or ``"tmpfs"``.
        writable: Whether it can be written to.
        is_directory: Whether its mount point is a directory.
        idmapped: Whether the source's owner is the environment's user in it.
        size: Bytes of a tmpfs.
        is_way_listed: Whether the directories on the way to it can be listed.
        shared: Whether it is mounted once for all environments of the layout.
    """

    source: str
    destination: str
    type: str
    writable: bool
    is_directory: bool
    idmapped: bool
    size: int
    is_way_listed: bool
    shared: bool


class Layout(Record):
    """What `isolation.rootfs` builds.

    Attributes:
        rootfs: Path of a userland's root; None: the host's.
        userland: ``"full"`` or ``"minimal"``: how much of the host's /etc there is.
        mounts: Mounts besides, parents first.
        user_id: Uid and gid inside.
        hostname: Name of the host inside.
        network: ``"none"`` or ``"host"``.
    """

    rootfs: str | None
    userland: str
    mounts: list[LayoutMount]
    user_id: int
    hostname: str
    network: str

    def to_wire(self) -> dict[str, Any]:
        """See `Record.to_wire`."""
        return {**self.__dict__, "mounts": [mount.to_wire() for mount in self.mounts]}

    @classmethod
    def from_wire(cls, fields: Mapping[str, Any]) -> Self:
        """See `Record.from_wire`; that holds for the mounts, too."""
        layout = super().from_wire(fields)
        layout.mounts = [LayoutMount.from_wire(mount) for mount in fields["mounts"]]
        return layout
