# SPDX-License-Identifier: Apache-2.0
"""A request to a function: an event, with the variables, files and context of one invocation."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Final, TypedDict

from nsbox.errors import ConfigError
from nsbox.functions.credentials import Credentials, Provider
from nsbox.functions.exchange import OnLog, PendingCall
from nsbox.guest import runtime
from nsbox.values import json_text
from nsbox.values.config import check_environment, check_text, parse_seconds
from nsbox.values.json_text import encode_plain

ENV_MAX: Final = 4096
"""Bytes of one invocation's own variables, each counted as ``NAME=value`` and a NUL."""
FILES_MAX: Final = 64 << 20
"""Bytes of one invocation's files."""
FILES_COUNT: Final = 256
"""Files of one invocation."""

_REQUEST_ID_MAX: Final = 256
_CLIENT_CONTEXT_MAX: Final = 32 << 10  # bytes; AWS Lambda has 3583 in base64
_NAME_MAX: Final = 255  # bytes of a component (NAME_MAX, linux/limits.h)
_PATH_MAX: Final = 1024
_DEPTH_MAX: Final = 16
# What AWS Lambda reserves for itself, and what nsbox sets besides.
_RESERVED: Final = re.compile(
    r"_HANDLER|_X_AMZN_TRACE_ID|AWS_(DEFAULT_)?REGION|AWS_EXECUTION_ENV|AWS_LAMBDA_\w+"
    r"|AWS_ACCESS_KEY(_ID)?|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|AWS_REQUEST_ID"
    r"|LAMBDA_(TASK_ROOT|RUNTIME_DIR)"
)
_CREDENTIALS: Final = re.compile(r"AWS_(ACCESS_KEY(_ID)?|SECRET_ACCESS_KEY|SESSION_TOKEN)")


_HEAD_SIZE: Final = runtime.INVOCATION.size
_pack_event: Final = runtime.EVENT.pack


class PoolOptions(TypedDict, total=False):
    """Keywords of the pools' methods that reach the environment; see `WarmPool.invoke`."""

    timeout: float | None
    env: Mapping[str, str] | None
    files: Mapping[str, bytes] | None


class CallOptions(TypedDict, total=False):
    """Keywords of `WarmPool.invoke` but the handler's `timeout`."""

    tenant: str | None
    env: Mapping[str, str] | None
    files: Mapping[str, bytes] | None
    credentials: Credentials | Provider | None
    role: str | None


class TimedCallOptions(CallOptions, total=False):
    """Keywords of `WarmPool.invoke`."""

    timeout: float | None


class Options(PoolOptions, total=False):
    """Keywords of `ExecutionEnvironment.invoke` and its kin, apart from credentials."""

    request_id: str | None
    client_context: Mapping[str, Any] | None
    on_log: OnLog | None


class InvocationRequest:
    """One invocation's event and options, checked.

    Attributes:
        payload: The event, JSON in bytes.
        timeout: Seconds, or None for the function's.
        request_id: The caller's, or None for one that is made.
        client_context: JSON, or "".
        on_log: Called with the log as it comes, or None.
        env: Variables of this invocation alone, credentials among them.
        files: Contents by path below /tmp.
    """

    __slots__ = ("client_context", "env", "files", "on_log", "payload", "request_id", "timeout")

    def __init__(
        self,
        payload: bytes,
        credentials: Credentials | None = None,
        *,
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        files: Mapping[str, bytes] | None = None,
        request_id: str | None = None,
        client_context: Mapping[str, Any] | None = None,
        on_log: OnLog | None = None,
    ) -> None:
        """Take what `ExecutionEnvironment.invoke_bytes` takes, with credentials that are there.

        Raises:
            ConfigError: A value is wrong.
        """
        is_plain = type(payload) is bytes and len(payload) <= runtime.PAYLOAD_MAX
        self.payload = payload if is_plain else check_payload(payload)
        self.timeout = None if timeout is None else parse_seconds(timeout, "timeout")
        self.request_id = None if request_id is None else _check_request_id(request_id)
        self.client_context = _encode_context(client_context) if client_context else ""
        self.on_log = on_log
        self.env: dict[str, str] = _check_env(env) if env else {}
        if credentials is not None:
            self.env |= credentials.variables()
        self.files = _check_files(files) if files else {}

    def words(self, call: PendingCall) -> bytes:
        """Return what comes between the numbers of its frame and the payload."""
        if not self.env:
            return f"{call.request_id}\0{self.client_context}\0".encode()
        return f"{call.request_id}\0{self.client_context}\0{json.dumps(self.env)}".encode()

    def frame(self, call: PendingCall) -> bytes:
        """Return its frame (`nsbox.guest.runtime`) without the payload, which is next."""
        if self.env or self.client_context:
            words = self.words(call)
        else:
            words = call.request_id.encode() + b"\0\0"
        size = _HEAD_SIZE + len(words) + len(self.payload)
        return _pack_event(runtime.INVOKE, size, call.number, call.timeout, len(words)) + words


def encode_event(event: object) -> bytes:
    """Return an event in JSON, or raise ConfigError."""
    if (data := encode_plain(event)) is not None:
        return data
    try:
        return json_text.encode_event(event)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"event: no JSON value: {error}") from error


def check_payload(payload: object) -> bytes:
    """Return an event's bytes, or raise ConfigError."""
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise ConfigError(f"event: must be bytes of JSON, got {type(payload).__name__}")
    data = payload if type(payload) is bytes else bytes(payload)
    if len(data) > runtime.PAYLOAD_MAX:
        raise ConfigError(
            f"event: {len(data)} bytes, more than {runtime.PAYLOAD_MAX}; pass large data by files="
        )
    try:
        json_text.check_depth(data)
        if b"\\" in data:
            json_text.check_characters(data.decode("utf-8", "replace"))
        # What else it is, its worker sees.
    except ValueError as error:
        raise ConfigError(f"event: {error}") from error
    return data


def _check_request_id(value: object) -> str:
    text = check_text(value, "request_id")
    if not text.isprintable() or len(text) > _REQUEST_ID_MAX:
        raise ConfigError(
            f"request_id: must be up to {_REQUEST_ID_MAX} printable characters, got {text!r}"
        )
    return text


def _encode_context(value: Mapping[str, Any]) -> str:
    try:
        words = json.dumps(value, allow_nan=False)
        json_text.check_depth(words.encode())
        json_text.check_characters(words)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"client_context: no JSON value: {error}") from error
    if len(words) > _CLIENT_CONTEXT_MAX:
        raise ConfigError(
            f"client_context: {len(words)} bytes of JSON, more than {_CLIENT_CONTEXT_MAX}"
        )
    return words


def _check_env(value: Mapping[str, str]) -> dict[str, str]:
    env = check_environment(value)
    for name in env:
        if _RESERVED.fullmatch(name):
            remedy = "give credentials=" if _CREDENTIALS.fullmatch(name) else "choose another name"
            raise ConfigError(f"env: {name!r} is reserved; {remedy}")
    try:
        size = sum(len(os.fsencode(f"{name}={text}")) + 1 for name, text in env.items())
    except UnicodeEncodeError as error:
        raise ConfigError("env: names and values must be UTF-8 text") from error
    if size > ENV_MAX:
        raise ConfigError(
            f"env: {size} bytes of variables, more than {ENV_MAX} for one invocation; "
            "put large values into the event or files="
        )
    return env


def _check_files(value: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return files by name; names have one form, so that no two are one file."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"files: give a mapping of names to bytes, got {type(value).__name__}")
    if len(value) > FILES_COUNT:
        raise ConfigError(f"files: {len(value)} files, more than {FILES_COUNT}; pack them into one")
    files: dict[str, bytes] = {}
    for name, data in value.items():
        text = check_text(name, "files")
        parts = text.split("/")
        try:
            sizes = [len(part.encode()) for part in parts]
        except UnicodeEncodeError as error:
            raise ConfigError(f"files: {name!r} is no UTF-8 text") from error
        if any(part in ("", ".", "..") for part in parts):
            raise ConfigError(
                f"files: {name!r} must be a path below /tmp, such as 'in/data.csv': relative, "
                "without '.', '..' and empty parts"
            )
        if max(sizes) > _NAME_MAX or sum(sizes) > _PATH_MAX or len(parts) > _DEPTH_MAX:
            raise ConfigError(
                f"files: {text[:40]!r}... is too long: at most {_DEPTH_MAX} parts of {_NAME_MAX} "
                f"bytes, {_PATH_MAX} bytes in all"
            )
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ConfigError(
                f"files[{name!r}]: must be bytes, got {type(data).__name__}; encode it"
            )
        files[text] = bytes(data)
    for name in files:
        for end in (at for at, letter in enumerate(name) if letter == "/"):
            if name[:end] in files:
                raise ConfigError(f"files: {name[:end]!r} is a file, and {name!r} is below it")
    size = sum(map(len, files.values()))
    if size > FILES_MAX:
        raise ConfigError(f"files: {size} bytes, more than {FILES_MAX}; bind a directory (mounts=)")
    return files
