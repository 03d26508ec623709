# SPDX-License-Identifier: Apache-2.0
"""linux/: the calls against this kernel, in processes of their own; the parsers on any text.

`run_alone` sends a function's source to a fresh single-threaded interpreter, as the launcher is
one: what it does to its namespaces and privileges ends with it.
"""

from __future__ import annotations

import errno
import inspect
import os
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import PATIENCE

import nsbox
from nsbox.errors import SyscallError, UnsupportedHostError
from nsbox.linux import binding, calls, interfaces, proc
from nsbox.linux import constants as c
from nsbox.linux.prepared import Program, run

PRELUDE = """
import errno, os, signal, struct, sys
sys.path.insert(0, {path!r})
from nsbox.errors import SyscallError
from nsbox.linux import binding, calls, constants as c, interfaces, proc
"""


def enter_namespaces(flags: int) -> None:
    """Become root in a new user namespace that owns the other new ones."""
    uid, gid = os.geteuid(), os.getegid()
    calls.unshare(c.CLONE_NEWUSER | flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def refuse(number: int, error: int, first_argument: int | None = None) -> None:
    """Load a filter that answers `error` to one system call, for one first argument or for any."""
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET
    program = [(load, 0, 0, 0), (equal, 0, 1 if first_argument is None else 3, number)]
    if first_argument is not None:
        program += [(load, 0, 0, 16), (equal, 0, 1, first_argument)]
    program += [(answer, 0, 0, c.SECCOMP_RET_ERRNO | error), (answer, 0, 0, c.SECCOMP_RET_ALLOW)]
    calls.prctl(38, 1)  # PR_SET_NO_NEW_PRIVS
    calls.seccomp_set_filter(b"".join(struct.pack("HBBI", *step) for step in program))


def expect(error: int, function: Callable[..., object], *arguments: object) -> SyscallError:
    """Call a function that has to fail with this error number."""
    try:
        function(*arguments)
    except SyscallError as err:
        if err.errno == error:
            return err
        raise
    raise AssertionError("no error")


def run_alone(function: Callable[[], None]) -> str:
    """Run the function in a fresh interpreter; return what it printed."""
    parts = [PRELUDE.format(path=os.path.dirname(os.path.dirname(nsbox.__file__)))]
    parts.insert(0, "from __future__ import annotations")
    for part in (enter_namespaces, refuse, expect, function):
        parts.append(textwrap.dedent(inspect.getsource(part)))
    parts.append(f"{function.__name__}()")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "\n".join(parts)],
        capture_output=True,
        text=True,
        timeout=30 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- clone3 ---------------------------------------------------------------------------------------


@pytest.mark.needs("userns")
def test_clone3_makes_a_whole_python_process() -> None:
    def program() -> None:
        import ctypes
        import random
        import threading

        seen: list[str] = []
        os.register_at_fork(
            before=lambda: seen.append("before"),
            after_in_parent=lambda: seen.append("parent"),
            after_in_child=lambda: seen.append("child"),
        )
        state = random.getstate()
        pid, pidfd = calls.clone3(c.CLONE_NEWUSER | c.CLONE_NEWPID)
        if pid == 0:
            code = 1
            try:
                assert pidfd == -1
                assert os.getpid() == 1
                assert threading.get_native_id() == 1
                # glibc's own copy of the thread id, at the address the kernel was told
                address = ctypes.c_void_p()
                if ctypes.CDLL(None).prctl(c.PR_GET_TID_ADDRESS, ctypes.byref(address)) == 0:
                    assert ctypes.c_int.from_address(address.value or 0).value == 1
                assert seen == ["before", "child"]
                assert random.getstate() != state, "random was not seeded again"

                thread = threading.Thread(target=__import__, args=("json.tool",))
                thread.start()
                thread.join(10)
                assert "json.tool" in sys.modules

                caught: list[int] = []
                signal.signal(signal.SIGUSR1, lambda number, _: caught.append(number))
                os.kill(1, signal.SIGUSR1)
                signal.raise_signal(signal.SIGUSR1)
                assert caught == [signal.SIGUSR1] * 2

                spawned = os.posix_spawn("/bin/true", ["true"], {})
                assert os.waitpid(spawned, 0) == (spawned, 0)
                forked = os.fork()
                if forked == 0:
                    os._exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 7
                code = 42
            except BaseException:  # noqa: BLE001 - a clone must not go on as its parent
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        assert seen == ["before", "parent"]
        assert not os.get_inheritable(pidfd)
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert result is not None
        assert (result.si_pid, result.si_status) == (pid, 42)
        # A clone of a clone: the thread id is right there too.
        pid, pidfd = calls.clone3(0)
        if pid == 0:
            second, _ = calls.clone3(0)
            if second == 0:
                os._exit(3 if threading.get_native_id() == os.getpid() else 4)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3

    run_alone(program)


def test_clone3_refused_leaves_the_caller_whole() -> None:
    def program() -> None:
        seen: list[str] = []
        os.register_at_fork(
            before=lambda: seen.append("before"), after_in_parent=lambda: seen.append("parent")
        )
        descriptors = os.listdir("/proc/self/fd")
        # CLONE_SIGHAND without CLONE_VM
        assert expect(errno.EINVAL, calls.clone3, 0x800).syscall == "clone3"
        assert seen == ["before", "parent"]
        assert os.listdir("/proc/self/fd") == descriptors
        pid, pidfd = calls.clone3(0)
        if pid == 0:
            os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5
        os.close(pidfd)

    run_alone(program)


@pytest.mark.parametrize("flag", [c.CLONE_VM, c.CLONE_VFORK])
def test_clone3_shares_no_memory(flag: int) -> None:
    with pytest.raises(ValueError, match="own memory"):
        calls.clone3(flag)


@pytest.mark.needs("userns")
def test_clone3_without_checkpoint_restore() -> None:
    def program() -> None:
        prctl = {"x86_64": 157, "aarch64": 167}[os.uname().machine]
        refuse(prctl, errno.EINVAL, c.PR_GET_TID_ADDRESS)
        expect(errno.EINVAL, calls.prctl, c.PR_GET_TID_ADDRESS)
        pid, _ = calls.clone3(c.CLONE_NEWUSER | c.CLONE_NEWPID)
        if pid == 0:
            os._exit(6 if os.getpid() == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6

    run_alone(program)


@pytest.mark.needs("root")
def test_clone3_into_cgroup() -> None:
    own = [path for number, _, path in proc.read_cgroup() if number == 0]
    places = [
        mount.mount_point + own[0]
        for mount in proc.read_mountinfo()
        if mount.fstype == "cgroup2" and mount.root == "/" and own
    ]
    if not places or not os.access(places[0], os.W_OK):
        pytest.skip("the own cgroup v2 directory cannot be written to")
    directory = Path(places[0]) / f"nsbox-test-linux-{os.getpid()}"

    def program() -> None:
        directory = sys.stdin.read()
        fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        pid, _ = calls.clone3(0, cgroup=fd)
        if pid == 0:
            [path] = [path for number, _, path in proc.read_cgroup() if number == 0]
            os._exit(0 if path.endswith("/" + os.path.basename(directory)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    directory.mkdir()
    try:
        with_input = inspect.getsource(program).replace("sys.stdin.read()", repr(str(directory)))
        source = PRELUDE.format(path=os.path.dirname(os.path.dirname(nsbox.__file__)))
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"{source}{textwrap.dedent(with_input)}program()"],
            capture_output=True,
            text=True,
            timeout=30 * PATIENCE,
        )
        assert done.returncode == 0, done.stderr
    finally:
        directory.rmdir()


# -- namespaces and mounts ------------------------------------------------------------------------


@pytest.mark.needs("userns")
def test_unshare_and_setns() -> None:
    def program() -> None:
        import socket

        enter_namespaces(c.CLONE_NEWUTS)
        socket.sethostname("first")
        fd = os.open("/proc/self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
        calls.unshare(c.CLONE_NEWUTS)
        socket.sethostname("second")
        calls.setns(fd, c.CLONE_NEWUTS)
        assert os.uname().nodename == "first"
        expect(errno.EINVAL, calls.setns, fd, c.CLONE_NEWNET)
        assert expect(errno.EINVAL, calls.unshare, 0x1).syscall == "unshare"

    run_alone(program)


@pytest.mark.needs("userns")
def test_classic_mounts_and_pivot_root() -> None:
    def program() -> None:
        enter_namespaces(c.CLONE_NEWNS)
        calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)
        calls.mount("tmpfs", "/mnt", "tmpfs", c.MS_NOSUID | c.MS_NODEV, "size=64k,mode=755")
        # Names that /proc/self/mountinfo has to escape, and those that splitlines() would cut at.
        name = b"/mnt/a b\tc\nd\\040#\xc3\xa9\xff\x0b\xe2\x80\xa8"
        os.mkdir(name)
        calls.mount("/usr", name, None, c.MS_BIND | c.MS_REC)
        calls.mount(None, name, None, c.MS_BIND | c.MS_REMOUNT | c.MS_RDONLY)
        [entry] = [m for m in proc.read_mountinfo() if m.mount_point == os.fsdecode(name)]
        assert "ro" in entry.options
        assert "rw" not in entry.options
        [parent] = [m for m in proc.read_mountinfo() if m.id == entry.parent]
        assert (parent.fstype, parent.source, parent.mount_point) == ("tmpfs", "tmpfs", "/mnt")
        assert parent.optional == ()
        assert {"rw", "size=64k", "mode=755"} <= set(parent.super_options)
        calls.umount2(name, c.MNT_DETACH)
        assert os.listdir(name) == []

        error = expect(errno.ENOENT, calls.mount, "tmpfs", "/mnt/missing", "tmpfs", 0)
        assert (error.syscall, error.filename) == ("mount", "/mnt/missing")
        assert str(error) == "mount on /mnt/missing: No such file or directory (ENOENT)"
        error = expect(errno.EINVAL, calls.umount2, name, 0)
        assert error.filename == os.fsdecode(name)

        os.mkdir("/mnt/only")
        os.chdir("/mnt")
        expect(errno.EINVAL, calls.pivot_root, "only", "only")  # not a mount point
        calls.pivot_root(".", ".")
        calls.umount2(".", c.MNT_DETACH)
        os.chdir("/")
        assert "only" in os.listdir("/")
        assert not os.path.exists("/usr")

    run_alone(program)


@pytest.mark.needs("userns")
def test_mounts_by_descriptor() -> None:
    def program() -> None:
        enter_namespaces(c.CLONE_NEWNS)
        calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)
        context = calls.fsopen("tmpfs", 0)
        calls.fsconfig_set_string(context, "source", "named")
        calls.fsconfig_set_string(context, "size", "64k")
        error = expect(errno.EINVAL, calls.fsconfig_set_string, context, "no-such-key", "")
        assert (error.syscall, error.filename) == ("fsconfig", "no-such-key")
        expect(errno.ENODEV, calls.fsopen, "no-such-type", 0)
        calls.fsconfig_create(context)
        fd = calls.fsmount(context, 0, c.MOUNT_ATTR_NODEV)
        assert not os.get_inheritable(context)
        assert not os.get_inheritable(fd)
        calls.move_mount(fd, "", c.AT_FDCWD, "/mnt", c.MOVE_MOUNT_F_EMPTY_PATH)
        os.mkdir("/mnt/copy")
        [entry] = [m for m in proc.read_mountinfo() if m.mount_point == "/mnt"]
        assert (entry.source, entry.fstype) == ("named", "tmpfs")
        assert "nodev" in entry.options

        flags = c.OPEN_TREE_CLONE | c.AT_RECURSIVE
        tree = calls.open_tree(c.AT_FDCWD, b"/mnt", flags)
        assert not os.get_inheritable(tree)
        calls.mount_setattr(tree, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_RDONLY)
        calls.move_mount(tree, "", c.AT_FDCWD, "/mnt/copy", c.MOVE_MOUNT_F_EMPTY_PATH)
        assert os.statvfs("/mnt/copy").f_flag & os.ST_RDONLY
        assert not os.statvfs("/mnt").f_flag & os.ST_RDONLY
        calls.mount_setattr(
            c.AT_FDCWD, "/mnt/copy", 0, attr_clr=c.MOUNT_ATTR_RDONLY, propagation=c.MS_SHARED
        )
        os.mkdir("/mnt/copy/new")
        [entry] = [m for m in proc.read_mountinfo() if m.mount_point == "/mnt/copy"]
        assert entry.optional[0].startswith("shared:")
        error = expect(errno.ENOENT, calls.open_tree, c.AT_FDCWD, "/mnt/missing", flags)
        assert error.filename == "/mnt/missing"
        try:
            calls.mount_setattr(c.AT_FDCWD, "/mnt/copy/new", 0, attr_set=c.MOUNT_ATTR_RDONLY)
        except SyscallError as err:
            error = err
        assert (error.syscall, error.errno) == ("mount_setattr", errno.EINVAL)  # no mount point
        expect(errno.ENOENT, calls.move_mount, tree, "", c.AT_FDCWD, "/mnt/missing", 4)

    run_alone(program)


@pytest.mark.needs("root", "userns")
def test_mount_with_mapped_ids() -> None:
    def program() -> None:
        calls.unshare(c.CLONE_NEWNS)
        calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)
        read_end, write_end = os.pipe()
        pid, pidfd = calls.clone3(c.CLONE_NEWUSER)
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write("0 12345 1")
        userns = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        context = calls.fsopen("tmpfs")
        calls.fsconfig_create(context)
        fd = calls.fsmount(context)
        try:
            calls.mount_setattr(
                fd, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_IDMAP, userns_fd=userns
            )
        except SyscallError as error:
            outcome = error.errno or 0
        else:
            outcome = os.fstat(fd).st_uid
        assert outcome in (errno.EINVAL, 12345)  # before Linux 6.3 a tmpfs cannot be idmapped
        os.close(write_end)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)

    run_alone(program)


# -- files ----------------------------------------------------------------------------------------


def test_openat2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "out").symlink_to("/etc/passwd")
    directory = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    try:
        fd = calls.openat2(directory, "file", os.O_RDONLY, 0, c.RESOLVE_BENEATH)
        try:
            assert os.read(fd, 2) == b"x"
            assert not os.get_inheritable(fd)
        finally:
            os.close(fd)
        for path, resolve, error in (
            ("../x", c.RESOLVE_BENEATH, errno.EXDEV),
            ("out", c.RESOLVE_BENEATH, errno.EXDEV),
            ("out", c.RESOLVE_NO_SYMLINKS, errno.ELOOP),
            ("out", c.RESOLVE_IN_ROOT, errno.ENOENT),
        ):
            failure = expect(error, calls.openat2, directory, path, os.O_RDONLY, 0, resolve)
            assert (failure.syscall, failure.filename) == ("openat2", path)
        new = calls.openat2(directory, b"new", os.O_WRONLY | os.O_CREAT, 0o600, c.RESOLVE_BENEATH)
        os.close(new)
        assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    finally:
        os.close(directory)


def test_close_range() -> None:
    def program() -> None:
        for number in (10, 11, 12):
            os.dup2(1, number)
        calls.close_range(10, 10)
        calls.close_range(12, c.CLOSE_RANGE_MAX)
        assert [n for n in (10, 11, 12) if os.path.exists(f"/proc/self/fd/{n}")] == [11]
        assert os.get_inheritable(11)
        calls.close_range(11, c.CLOSE_RANGE_MAX, c.CLOSE_RANGE_CLOEXEC)
        assert not os.get_inheritable(11)
        expect(errno.EINVAL, calls.close_range, 12, 11)

    run_alone(program)


@pytest.mark.parametrize("path", ["/tmp\0/x", b"/tmp\0/x"])
def test_a_path_is_not_cut_at_nul(path: str | bytes) -> None:
    for call in (
        lambda: calls.umount2(path, 0),
        lambda: calls.mount(path, "/", None, 0),
        lambda: calls.mount("tmpfs", "/proc/missing", "tmpfs", 0, path),
        lambda: calls.openat2(c.AT_FDCWD, path, os.O_RDONLY),
        lambda: calls.pivot_root("/proc/missing", path),
        lambda: calls.open_tree(c.AT_FDCWD, path, 0),
    ):
        with pytest.raises(ValueError, match="embedded null byte"):
            call()


# -- privileges -----------------------------------------------------------------------------------


@pytest.mark.needs("userns")
def test_capabilities_are_gone() -> None:
    def program() -> None:
        enter_namespaces(0)
        effective, permitted, _ = calls.capget()
        assert effective == permitted
        assert effective >> 21 & 1, "CAP_SYS_ADMIN"
        assert effective >> 38 & 1, "CAP_PERFMON, in the upper word"
        assert int(proc.read_status()["CapEff"], 16) == effective
        calls.capset_empty()
        assert calls.capget() == (0, 0, 0)
        status = proc.read_status()
        for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            assert int(status[name], 16) == 0
        expect(errno.EPERM, calls.unshare, c.CLONE_NEWNS)

    run_alone(program)


def test_seccomp_filter_bites() -> None:
    def program() -> None:
        assert proc.read_status()["Seccomp"] == str(c.SECCOMP_MODE_DISABLED)
        refuse(binding.SYSCALL["fsopen"], errno.EXDEV)
        expect(errno.EXDEV, calls.fsopen, "tmpfs")
        status = proc.read_status()
        assert (status["Seccomp"], status["NoNewPrivs"]) == (str(c.SECCOMP_MODE_FILTER), "1")
        # A program the kernel refuses: its jump leaves it.
        jump = struct.pack("HBBI", 0x05, 0, 0, 9)
        assert expect(errno.EINVAL, calls.seccomp_set_filter, jump).syscall == "seccomp"

    run_alone(program)


@pytest.mark.parametrize("size", [0, 7, 9, 8 * 4097, 8 * (65536 + 1)])
def test_seccomp_program_is_never_cut(size: int) -> None:
    with pytest.raises(ValueError, match="not a BPF program"):
        calls.seccomp_set_filter(bytes(size))


def test_session_keyring() -> None:
    def program() -> None:
        if not os.path.exists("/proc/keys"):  # a kernel without CONFIG_KEYS
            with pytest.raises(SyscallError) as caught:
                calls.keyctl_join_session_keyring()
            assert caught.value.errno == errno.ENOSYS
            return
        serials = {calls.keyctl_join_session_keyring() for _ in range(2)}
        assert len(serials) == 2
        assert min(serials) > 0

    run_alone(program)


def test_prctl() -> None:
    def program() -> None:
        calls.prctl(c.PR_SET_PDEATHSIG, signal.SIGKILL)
        assert calls.prctl(c.PR_CAP_AMBIENT, c.PR_CAP_AMBIENT_IS_SET, 21) == 0
        assert expect(errno.EINVAL, calls.prctl, 12345678).syscall == "prctl"

    run_alone(program)


# -- prepared calls -------------------------------------------------------------------------------


def test_only_the_root_is_taken_for_it() -> None:
    prepared = Program()
    prepared.expect_root()
    here = os.getcwd()
    try:
        os.chdir("/")
        run(prepared.entries, [""])
        os.chdir("/proc")
        assert expect(errno.ERANGE, run, prepared.entries, [""]).syscall == "getcwd"
    finally:
        os.chdir(here)


def test_a_filter_that_would_be_cut_is_not_prepared() -> None:
    with pytest.raises(ValueError, match="not a BPF program"):
        Program().set_filter(bytes(12))


# -- network --------------------------------------------------------------------------------------


@pytest.mark.needs("userns")
def test_link_is_set_up() -> None:
    def program() -> None:
        import socket

        enter_namespaces(c.CLONE_NEWNET)

        def reaches_itself() -> bool:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                return sender.connect_ex(("127.0.0.1", 9)) == 0

        assert not reaches_itself()
        interfaces.set_link_up("lo")
        assert reaches_itself()
        error = expect(errno.ENODEV, interfaces.set_link_up, "missing")
        assert (error.syscall, error.filename) == ("ioctl", "missing")

    run_alone(program)


def test_interface_name_is_not_cut() -> None:
    with pytest.raises(ValueError, match="too long"):
        interfaces.set_link_up("lo" + 14 * "x")


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "is_64_bit"), [("riscv64", True), ("x86_64", False)])
def test_unknown_architecture_is_refused(machine: str, is_64_bit: bool) -> None:
    with pytest.raises(UnsupportedHostError, match=machine) as caught:
        binding.syscall_numbers(machine, is_64_bit)
    assert caught.value.feature == "architecture"


def test_architectures_know_the_same_calls() -> None:
    x86, arm = binding.syscall_numbers("x86_64"), binding.syscall_numbers("aarch64")
    assert x86.keys() == arm.keys()
    assert (x86["clone3"], arm["clone3"]) == (435, 435)
    assert (x86["pivot_root"], arm["pivot_root"]) == (155, 41)


# -- /proc ----------------------------------------------------------------------------------------

# What a path may be: any bytes but NUL.
names = st.binary(min_size=1).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"?")))
words = st.text("abcxyz019-_.=:", min_size=1)


def mangle(text: str, characters: str = " \t\n\\#") -> str:
    """What the kernel's mangle() does."""
    return "".join(f"\\{ord(x):03o}" if x in characters else x for x in text)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**31), names, names, st.lists(words, max_size=3), st.just("") | names
        ),
        max_size=3,
    )
)
def test_mountinfo_survives_any_name(mounts: list[tuple[int, str, str, list[str], str]]) -> None:
    text = ""
    for number, root, point, optional, source in mounts:
        middle = "".join(f"x{word} " for word in optional)
        text += f"{number} 1 0:31 {mangle(root)} {mangle(point)} rw,nosuid {middle}"
        text += f"- fuse.x\\040y {mangle(source)} rw,lowerdir={mangle(point)}\n"
    parsed = proc.parse_mountinfo(text)
    assert len(parsed) == len(mounts)
    for entry, (number, root, point, optional, source) in zip(parsed, mounts, strict=True):
        assert (entry.id, entry.parent, entry.major_minor) == (number, 1, "0:31")
        assert (entry.root, entry.mount_point, entry.source) == (root, point, source)
        assert entry.options == ("rw", "nosuid")
        assert entry.optional == tuple(f"x{word}" for word in optional)
        assert entry.fstype == "fuse.x y"
        assert ",".join(entry.super_options) == f"rw,lowerdir={point}"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"/a\040b", "/a b"),
        (r"/a\134040", r"/a\040"),  # a backslash that was there: decoded once
        (r"/\303\251", "/é"),
        (r"/a\x", r"/a\x"),
        (r"/a\04", r"/a\04"),
        (r"/a\089", r"/a\089"),
        (r"/a\400", r"/a\400"),
        ("/a\\", "/a\\"),
    ],
)
def test_mountinfo_escapes(written: str, meant: str) -> None:
    [entry] = proc.parse_mountinfo(f"36 35 98:0 / {written} rw - ext4 /dev/sda1 rw\n")
    assert entry.mount_point == meant


@pytest.mark.parametrize("line", ["x", "36 35 98:0 / /mnt rw ext4 /dev/sda1 rw", "1 2 - - - -"])
def test_mountinfo_of_no_kernel_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        proc.parse_mountinfo(line)


def test_cgroup_lines() -> None:
    text = "9:name=systemd:/\n4:cpu,cpuacct:/a:b/c\n0::/../x\n"
    assert proc.parse_cgroup(text) == [
        (9, ("name=systemd",), "/"),
        (4, ("cpu", "cpuacct"), "/a:b/c"),
        (0, (), "/../x"),
    ]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 99),
            st.lists(st.text("abcdefg_=", min_size=1)).map(tuple),
            names.map(lambda name: "/" + name.replace("\n", "?")),  # mkdir(2) refuses newlines
        )
    )
)
def test_cgroup_survives_any_path(lines: list[tuple[int, tuple[str, ...], str]]) -> None:
    text = "".join(f"{number}:{','.join(words)}:{path}\n" for number, words, path in lines)
    assert proc.parse_cgroup(text) == lines


@given(
    st.binary(max_size=15).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"?")))
    | st.sampled_from(["a b", ") S (", ")", "((", "x) Z 1 2 3", "\n"]),
    st.lists(st.integers(-1, 2**63), min_size=22, max_size=50),
)
def test_stat_survives_any_name(comm: str, numbers: list[int]) -> None:
    values = " ".join(map(str, numbers))
    stat = proc.parse_stat(f"77 ({comm}) S {values}\n")
    assert (stat.pid, stat.comm, stat.state) == (77, comm, "S")
    assert [stat.ppid, stat.pgrp, stat.session] == numbers[:3]
    assert [stat.utime, stat.stime, stat.cutime, stat.cstime] == numbers[10:14]
    assert (stat.starttime, stat.rss) == (numbers[18], numbers[20])


@pytest.mark.parametrize("text", ["", "1 x S 0", "1 (x) S 0 1"])
def test_stat_of_no_kernel_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        proc.parse_stat(text)


@given(st.dictionaries(st.text("abcABC_", min_size=1), st.text("0123456789abcdef \\n:")))
def test_status(values: dict[str, str]) -> None:
    text = "".join(f"{name}:\t{value}\n" for name, value in values.items())
    assert proc.parse_status(text) == {name: value.strip() for name, value in values.items()}


def test_status_of_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        proc.parse_status("Name:\tx\nnonsense\n")


def test_readers_on_this_process() -> None:
    stat = proc.read_stat()
    assert (stat.pid, stat.ppid) == (os.getpid(), os.getppid())
    assert (stat.pgrp, stat.session) == (os.getpgrp(), os.getsid(0))
    assert stat.starttime > 0
    assert stat.rss > 100
    assert proc.read_status()["Pid"] == str(os.getpid())
    assert "/" in [mount.mount_point for mount in proc.read_mountinfo()]
    assert all(path.startswith("/") for _, _, path in proc.read_cgroup())
    assert len(proc.boot_id()) == 36


def test_children_and_descendants() -> None:
    # A shell with a child that has a child; cat ends when this process closes its input.
    script = "sh -c 'cat; true'; true"
    parent = subprocess.Popen(
        ["/bin/sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(b"x")
        parent.stdin.flush()
        assert parent.stdout.read(1) == b"x"  # cat runs, so all three do
        found = proc.descendants(parent.pid)
        assert len(found) == 2
        assert parent.pid in proc.children(os.getpid())
        assert proc.children(parent.pid) == found[:1]
        assert proc.read_stat(found[1]).ppid == found[0]
        assert proc.read_stat(found[1]).comm == "cat"
    finally:
        parent.communicate(timeout=10 * PATIENCE)
    assert proc.children(parent.pid) == proc.descendants(parent.pid) == []
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        proc.read_stat(parent.pid)
