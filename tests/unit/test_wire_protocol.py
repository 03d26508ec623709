# SPDX-License-Identifier: Apache-2.0
"""Frames between the processes: whatever comes, a typed error or an answer; no hang, no lost fd."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsbox.errors import LauncherError
from nsbox.guest import files, init
from nsbox.guest import protocol as p
from nsbox.launcher import messages, protocol
from nsbox.linux.descriptors import MOST_FDS_FROM_INSIDE, close_all, receive_bytes, send_bytes
from nsbox.supervisor import channel
from nsbox.supervisor.channel import Channel

pytestmark = pytest.mark.static

KINDS = (p.STARTED, p.EXITED, p.FAILED, p.OK)
NUMBERS = st.integers(-(1 << 63), (1 << 63) - 1)


def datagrams() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "ANSWER_DEADLINE", 0.2)


class FakeInit:
    """PID 1's ends of the sockets, in the hands of an attacker."""

    def __init__(self) -> None:
        self.host, self._control = datagrams()
        self.channel = Channel(self.host, p.RUN, b"request", [])
        message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
        assert message == p.RUN + p.HERE + b"request"
        self.socket = socket.socket(fileno=fds[0])

    def close(self) -> None:
        for item in (self.host, self._control, self.channel.socket, self.socket):
            item.close()


@pytest.fixture
def fake() -> Iterator[FakeInit]:
    made = FakeInit()
    yield made
    made.close()


# -- what PID 1 may send: not trusted ------------------------------------------------------------


def is_legal(data: bytes) -> bool:
    if len(data) < p.ANSWER.size:
        return False
    kind, first, second, _ = p.ANSWER.unpack(data[: p.ANSWER.size])
    return bool(kind != p.FAILED or (0 <= second < len(p.STAGES) and 0 < first < 4096))


@given(st.binary(max_size=80))
@example(b"")
@example(p.ANSWER.pack(p.FAILED, 0, 0, 0))
@example(p.ANSWER.pack(p.FAILED, 4096, 0, 0))
@example(p.ANSWER.pack(p.FAILED, -2, 0, 0))
@example(p.ANSWER.pack(p.FAILED, 2, -1, 0))
@example(p.ANSWER.pack(p.FAILED, 2, len(p.STAGES), 0))
@example(p.ANSWER.pack(p.OK, 1, 2, 3)[:-1])
@example(p.ANSWER.pack(p.OK, 1, 2, 3) + b"more")
def test_any_bytes_are_an_answer_or_a_connection_error(data: bytes) -> None:
    fake = FakeInit()
    try:
        if data:
            fake.socket.sendall(data)
        fake.socket.close()
        if is_legal(data):
            kind, first, second, third, fds = fake.channel.receive_answer()
            assert p.ANSWER.pack(kind, first, second, third) == data[: p.ANSWER.size]
            assert fds == []
        else:
            with pytest.raises(ConnectionError):
                fake.channel.receive_answer()
    finally:
        fake.close()


@given(st.sampled_from(KINDS), NUMBERS, NUMBERS, NUMBERS)
def test_any_numbers_are_kept_or_refused(kind: bytes, one: int, two: int, three: int) -> None:
    fake = FakeInit()
    try:
        fake.socket.sendall(p.ANSWER.pack(kind, one, two, three))
        if not is_legal(p.ANSWER.pack(kind, one, two, three)):
            with pytest.raises(ConnectionError, match="malformed"):
                fake.channel.receive_answer()
        else:
            assert fake.channel.receive_answer() == (kind, one, two, three, [])
    finally:
        fake.close()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 24), max_size=6))
def test_answer_in_pieces_is_put_together(cuts: list[int]) -> None:
    data = p.ANSWER.pack(p.EXITED, 256, 5, 6)
    fake = FakeInit()
    try:
        edges = sorted({0, *cuts, len(data)})
        for low, high in itertools.pairwise(edges):
            fake.socket.sendall(data[low:high])
        assert fake.channel.receive_answer() == (p.EXITED, 256, 5, 6, [])
    finally:
        fake.close()


def test_silence_ends_at_the_deadline(fake: FakeInit) -> None:
    with pytest.raises(TimeoutError):
        fake.channel.receive_answer()


def test_half_an_answer_ends_at_the_deadline(fake: FakeInit) -> None:
    fake.socket.sendall(p.ANSWER.pack(p.OK, 1, 2, 3)[:10])
    with pytest.raises(TimeoutError):
        fake.channel.receive_answer()


def test_reader_that_never_reads_ends_at_the_deadline(fake: FakeInit) -> None:
    before = open_descriptors()
    with pytest.raises(TimeoutError):
        Channel(fake.host, p.RUN, b"x" * (8 << 20), [])
    assert open_descriptors() == before


@pytest.mark.parametrize("legal", [True, False])
def test_descriptors_from_inside_are_handed_on_or_closed(fake: FakeInit, legal: bool) -> None:
    before = open_descriptors()
    numbers = (5, 0, 0) if legal else (0, 99, 0)
    data = p.ANSWER.pack(p.STARTED if legal else p.FAILED, *numbers)
    null = os.open("/dev/null", os.O_RDONLY)
    send_bytes(fake.socket, data, [null])
    os.close(null)
    if legal:
        *_, fds = fake.channel.receive_answer()
        assert len(fds) == 1
        assert not any(os.get_inheritable(end.number) for end in fds)
        fds[0].close()
    else:
        with pytest.raises(ConnectionError):
            fake.channel.receive_answer()
    assert open_descriptors() == before


def test_a_flood_of_descriptors_is_refused_and_none_kept(fake: FakeInit) -> None:
    before = open_descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    send_bytes(fake.socket, p.ANSWER.pack(p.OK, 0, 0, 0), [null] * (MOST_FDS_FROM_INSIDE + 20))
    os.close(null)
    with pytest.raises(ConnectionError, match="cut off"):
        fake.channel.receive_answer()
    assert open_descriptors() == before


def test_more_descriptors_than_an_answer_has_are_refused(fake: FakeInit) -> None:
    """However many parts of an answer they come with."""
    before = open_descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    for byte in p.ANSWER.pack(p.STARTED, 1, 2, 3):
        send_bytes(fake.socket, bytes([byte]), [null])
    os.close(null)
    with pytest.raises(ConnectionError, match="malformed"):
        fake.channel.receive_answer()
    assert open_descriptors() == before


def test_drops_of_an_answer_end_at_the_deadline(fake: FakeInit) -> None:
    """Each of them comes in time; all of it must."""
    is_over = threading.Event()

    def drip() -> None:
        for byte in p.ANSWER.pack(p.OK, 1, 2, 3):
            fake.socket.sendall(bytes([byte]))
            if is_over.wait(0.05):
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(TimeoutError):
        fake.channel.receive_answer()
    is_over.set()
    dripping.join()


def test_descriptors_with_half_an_answer_are_closed(fake: FakeInit) -> None:
    before = len(open_descriptors())
    null = os.open("/dev/null", os.O_RDONLY)
    send_bytes(fake.socket, b"O", [null])
    os.close(null)
    fake.socket.close()
    with pytest.raises(ConnectionError):
        fake.channel.receive_answer()
    assert len(open_descriptors()) == before - 1  # the attacker's own socket


def test_descriptors_with_the_second_half_of_an_answer_are_seen_or_dropped(fake: FakeInit) -> None:
    before = open_descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    data = p.ANSWER.pack(p.OK, 1, 2, 3)
    fake.socket.sendall(data[:10])
    # Sent when the first half has been read: later ones are read without room for descriptors.
    late = threading.Timer(0.05, send_bytes, (fake.socket, data[10:], [null]))
    late.start()
    kind, *_, fds = fake.channel.receive_answer()
    late.join()
    os.close(null)
    assert kind == p.OK
    fds[0].close()
    assert open_descriptors() == before


def test_no_descriptor_is_left_when_pid_1_is_gone() -> None:
    ours, theirs = datagrams()
    theirs.close()
    before = open_descriptors()
    with pytest.raises(OSError, match=r"pipe|reset"):
        Channel(ours, p.RUN, b"", [])
    assert open_descriptors() == before
    ours.close()


def test_no_descriptor_is_left_when_there_is_no_room_for_more() -> None:
    ours, theirs = datagrams()
    before = open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, before))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        # Descriptors below the highest may be free: take them.
        taken: list[int] = []
        with pytest.raises(OSError, match="Too many open files"):
            taken.extend(os.dup(ours.fileno()) for _ in itertools.count())
        with pytest.raises(OSError, match="Too many open files"):
            Channel(ours, p.RUN, b"", [])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        close_all(taken)
    assert open_descriptors() == before
    ours.close()
    theirs.close()


# -- what the host may send to PID 1 -------------------------------------------------------------


@given(st.binary(max_size=64))
def test_requests_are_read_to_their_length_or_refused(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(0.2)
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        try:
            request = init._read_request(theirs)
        except files.Failure as failure:
            refused = failure
        except ConnectionError:
            return  # cut short
        else:
            assert data[4:].startswith(request)
            assert len(request) == int.from_bytes(data[:4], "big")
            return
    assert (refused.error, refused.stage) == (errno.E2BIG, "request")


@pytest.mark.parametrize("over", [1, 1 << 20, 0xFFFFFFFF - p.LARGEST_REQUEST])
def test_a_request_over_the_limit_is_refused_before_it_is_read(over: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(p.LENGTH.pack(p.LARGEST_REQUEST + over))
        with pytest.raises(files.Failure) as caught:
            init._read_request(theirs)
    assert caught.value.error == errno.E2BIG


WORD = st.binary(max_size=20).filter(lambda word: b"\0" not in word)
VARIABLE = st.tuples(st.binary(min_size=1, max_size=8), WORD).filter(
    lambda pair: b"\0" not in pair[0] and b"=" not in pair[0]
)


@given(
    argv=st.lists(WORD, min_size=1, max_size=5),
    environment=st.lists(VARIABLE, max_size=5).map(dict),
    cwd=WORD,
    stdio=st.lists(st.booleans(), min_size=p.STREAMS, max_size=p.STREAMS),
    flags=st.sampled_from([0, p.ANNOUNCE]),
    tty=st.none() | st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
)
def test_run_request_makes_the_round_trip(
    argv: list[bytes],
    environment: dict[bytes, bytes],
    cwd: bytes,
    stdio: list[bool],
    flags: int,
    tty: tuple[int, int] | None,
) -> None:
    variables = [name + b"=" + value for name, value in environment.items()]
    data = p.run_request(argv, variables, cwd, stdio, flags, tty)
    found, *rest = p.parse_run(data)
    assert found & p.ANNOUNCE == flags
    assert bool(found & p.TTY) == (tty is not None)
    assert rest == [tty or (0, 0), stdio, cwd, argv, environment]


@given(WORD, st.integers(0, 0o777), st.integers(0, 1 << 62))
def test_file_requests_make_the_round_trip(path: bytes, mode: int, size: int) -> None:
    assert p.parse_write(p.write_request(path, mode, size)) == (path, mode, size)
    assert p.parse_read(p.read_request(path, size)) == (path, size)


@pytest.mark.parametrize("size", [0, p.LARGEST_MESSAGE - 2, p.LARGEST_MESSAGE - 1, 100_000])
def test_request_arrives_as_it_was_sent(size: int) -> None:
    host, control = datagrams()
    with host, control:
        channel = Channel(host, p.RUN, b"x" * size, [])
        message, fds = receive_bytes(control, p.LARGEST_MESSAGE)
        with channel, socket.socket(fileno=fds[0]) as theirs:
            if message[1:2] == p.HERE:
                request = message[2:]
            else:
                assert message[1:] == p.ON_CHANNEL
                request = init._read_request(theirs)
            assert request == b"x" * size


@given(st.text(max_size=10), st.integers(0, 4095), st.text(max_size=5000))
def test_failure_of_a_birth_makes_the_round_trip(step: str, number: int, message: str) -> None:
    step = step.replace("\0", "")
    word = p.failure_word(step, number, message)
    assert len(word) <= p.LARGEST_MESSAGE
    found = p.parse_failure(word)
    assert found is not None
    assert found[:2] == (step.encode(errors="replace").decode(), number)
    assert message.encode(errors="replace").startswith(found[2].encode(errors="ignore")[:-4])


def test_a_ready_word_is_no_failure() -> None:
    for word in (b"full", b"subset=pid", b"none", b""):
        assert p.parse_failure(word) is None


def test_every_failure_stage_fits_an_answer() -> None:
    assert len(set(p.STAGES)) == len(p.STAGES)
    assert p.ANSWER.size == 25
    assert p.SIGNAL.size == 9
    assert struct.calcsize("!I") == p.LENGTH.size


def test_operations_and_answers_have_distinct_bytes() -> None:
    assert len({p.RUN, p.WRITE, p.READ}) == 3
    assert len(set(KINDS)) == 4
    assert p.SIGNAL_ALL != p.SIGNAL_MAIN


# -- wire: host and launcher, both trusted -------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=10), JSON), st.integers(0, MOST_FDS_FROM_INSIDE))
def test_message_makes_the_round_trip_with_its_descriptors(
    cgroups: dict[str, Any], count: int
) -> None:
    before = open_descriptors()
    ours, theirs = datagrams()
    null = os.open("/dev/null", os.O_RDONLY)
    message = messages.Born(pid=1, inode=2, host_id=3, cgroup=cgroups)
    protocol.send(ours, message, [null] * count)
    os.close(null)
    received = protocol.receive(theirs)
    assert received is not None
    assert isinstance(received[0], messages.Born)
    assert received[0].to_wire() == message.to_wire()
    assert len(received[1]) == count
    assert not any(os.get_inheritable(fd) for fd in received[1])
    close_all(received[1])
    ours.close()
    assert protocol.receive(theirs) is None
    theirs.close()
    assert open_descriptors() == before


BORN = {"pid": 1, "inode": 2, "host_id": 3, "cgroup": {}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "Born", **BORN, "more": 1}, r"a Born without \[\] and with \['more'\]"),
        ({"kind": "Born", "pid": 1}, r"a Born without \['cgroup', 'host_id', 'inode'\]"),
        ({"kind": "Unborn"}, "a message 'Unborn' is not known"),
        ({}, "a message '' is not known"),
    ],
)
def test_message_of_another_version_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(LauncherError, match=words):
        messages.decode(fields)


def test_every_message_has_its_name_on_the_wire() -> None:
    def kinds(kind: type[messages.Message]) -> set[type[messages.Message]]:
        below = {kind for other in kind.__subclasses__() for kind in kinds(other)}
        return below or {kind}

    for kind in kinds(messages.Message):
        fields = dict.fromkeys(kind.FIELDS)
        assert type(messages.decode({"kind": kind.__name__, **fields})) is kind


def test_largest_message_passes_and_a_larger_one_is_refused() -> None:
    ours, theirs = datagrams()
    with ours, theirs:
        room = protocol.LARGEST - len(json.dumps(messages.encode(failed(""))))
        protocol.send(ours, failed("y" * room))
        received = protocol.receive(theirs)
        assert received is not None
        assert received[0].to_wire() == failed("y" * room).to_wire()
        with pytest.raises(ValueError, match=f"{protocol.LARGEST + 1} bytes is over the limit"):
            protocol.send(ours, failed("y" * (room + 1)))
        theirs.settimeout(0)
        with pytest.raises(BlockingIOError):
            protocol.receive(theirs)


def test_names_of_files_that_are_no_utf_8_pass() -> None:
    ours, theirs = datagrams()
    mounts = [[os.fsdecode(b"/srv/\xff"), "/data"]]
    with ours, theirs:
        protocol.send(ours, messages.Attach(mounts=mounts))
        received = protocol.receive(theirs)
    assert received is not None
    assert received[0].to_wire() == {"mounts": mounts}


def failed(message: str) -> messages.Failed:
    return messages.Failed(step="clone", errno=1, message=message)


def test_largest_message_fits_the_kernels_default_buffer() -> None:
    assert int(Path("/proc/sys/net/core/wmem_default").read_text()) > protocol.LARGEST


def test_end_with_messages_unread_is_an_end() -> None:
    ours, theirs = datagrams()
    protocol.send(ours, messages.Done())
    theirs.close()  # with an unread message, so that the kernel resets the connection
    with ours:
        assert protocol.receive(ours) is None
        with pytest.raises(OSError, match="pipe"):
            protocol.send(ours, messages.Done())


def test_cut_off_datagram_is_no_message() -> None:
    ours, theirs = datagrams()
    with ours, theirs:
        ours.send(b"x" * 100)
        with pytest.raises(ConnectionError, match="cut off"):
            receive_bytes(theirs, 10)
