# SPDX-License-Identifier: Apache-2.0
"""Attacks on the boundary of privilege: root's id, set-id programs, mounts, /proc, capabilities."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import IS_ROOT, NUMBERS, attack, x86_64_only

import nsbox
from nsbox.host import features

pytestmark = pytest.mark.needs("userns")

KERNEL_SETTINGS = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sysrq-trigger",
    "/proc/sys/kernel/modprobe",
    "/proc/sys/vm/drop_caches",
    "/proc/sys/kernel/hostname",
    "/proc/sys/kernel/domainname",
    "/proc/sys/fs/binfmt_misc/register",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/irq/0/smp_affinity",
]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_root_does_not_mean_root_outside(env: nsbox.ExecutionEnvironment) -> None:
    inside, outside, count = map(int, Path(f"/proc/{env.pid}/uid_map").read_text().split())
    assert (inside, count) == (1000, 1)
    assert outside != 0
    for name in ("Uid", "Gid"):
        assert "0" not in status_of(env.pid)[name].split(), (
            "real, effective, saved or fs id is root"
        )
    assert attack(env, "answer = os.getresuid() + os.getresgid()") == [1000] * 6
    assert attack(env, "answer = [syscall(n, 0) for n in (105, 106)]") in (
        ["EPERM", "EPERM"],
        ["EINVAL", "EINVAL"],  # "0 is not mapped", where the filter lets it come so far
    )


def test_two_environments_never_share_a_host_id(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    """As root, and with subordinate ids; without those a user has one id to give, his own."""
    ids = [status_of(make_env().pid)["Uid"].split()[0] for _ in range(3)]
    if IS_ROOT or features.probe("newuidmap")[0]:
        assert len({*ids, str(os.geteuid())}) == 4
    else:
        assert set(ids) == {str(os.geteuid())}


def test_kernel_settings_cannot_be_written(env: nsbox.ExecutionEnvironment) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    found = attack(
        env,
        """
        answer = {}
        for path in paths:
            answer[path] = attempt(os.open, path, os.O_WRONLY)
        """,
        paths=KERNEL_SETTINGS,
    )
    assert set(found.values()) <= {"EACCES", "EROFS", "ENOENT", "EPERM"}, found
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


def test_nothing_of_the_kernel_is_readable_that_is_masked(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        answer = {}
        for name in ('kcore', 'keys', 'timer_list', 'sched_debug', 'latency_stats', 'kmsg',
                     'kallsyms', 'acpi', 'scsi', 'asound'):
            path = '/proc/' + name
            if not os.path.exists(path):
                continue
            if os.path.isdir(path):
                answer[name] = os.listdir(path)
            else:
                text = attempt(read, path)
                answer[name] = 'zeros' if set(text.split(' ')[0]) <= set('0') else text[:200]
        """,
    )
    harmless: tuple[object, ...] = ("", "zeros", "EACCES", "EPERM", [])
    assert {name: text for name, text in found.items() if text not in harmless} == {}


def test_launchers_program_is_out_of_reach(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        answer = [attempt(os.readlink, '/proc/1/exe'), attempt(os.open, '/proc/1/exe', os.O_RDONLY),
                  attempt(os.open, '/proc/1/exe', os.O_WRONLY),
                  attempt(os.open, '/proc/self/exe', os.O_WRONLY)]
        """,
    )
    assert set(found[:3]) <= {"EACCES", "EPERM"}, found
    assert found[3] in ("EACCES", "EROFS", "ETXTBSY")


def test_no_capability_in_any_set(env: nsbox.ExecutionEnvironment) -> None:
    text = attack(env, "answer = read('/proc/self/status')")
    values = dict(line.split(":\t", 1) for line in text.splitlines())
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert values[name] == "0" * 16
    assert values["NoNewPrivs"] == "1"
    assert values["Seccomp"] == "2"
    outside = status_of(env.pid)
    assert outside["CapEff"] == outside["CapBnd"] == "0" * 16
    # PR_GET_SECUREBITS: NOROOT, NO_SETUID_FIXUP, no ambient raise, all locked and KEEP_CAPS locked
    bits = attack(env, "answer = libc.prctl(27, 0, 0, 0, 0)")
    assert bits & 0b11101111 == 0b11101111, bin(bits)


def test_set_id_programs_give_nothing(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        import stat, subprocess
        answer = {'suid': [], 'mounts': []}
        for directory in ('/usr/bin', '/usr/sbin'):
            for name in os.listdir(directory):
                path = os.path.join(directory, name)
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode) and status.st_mode & 0o6000:
                    if not os.statvfs(path).f_flag & os.ST_NOSUID:
                        answer['suid'].append(path)
        for line in read('/proc/self/mounts').splitlines():
            if 'nosuid' not in line.split()[3].split(','):
                answer['mounts'].append(line)
        done = subprocess.run(['su', '-c', 'id -u'], stdin=subprocess.DEVNULL, capture_output=True)
        answer['su'] = done.returncode
        with open('/tmp/id', 'wb') as file:
            file.write(open('/usr/bin/id', 'rb').read())
        os.chmod('/tmp/id', 0o6755)
        answer['id'] = subprocess.run(['/tmp/id', '-u'], capture_output=True, text=True).stdout
        """,
    )
    assert found["suid"] == []
    assert found["mounts"] == []
    assert found["su"] != 0
    assert found["id"].strip() == "1000"


@x86_64_only
def test_root_and_namespaces_cannot_be_changed(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        root, tmp, nothing = b'/\\0', b'/tmp\\0', 0
        answer = {
            'mount tmpfs': syscall(nr['mount'], b'x\\0', tmp, b'tmpfs\\0', 0, 0),
            'bind': syscall(nr['mount'], b'/proc\\0', tmp, 0, 4096, 0),
            'remount': syscall(nr['mount'], 0, root, 0, 32 | 4096, 0),
            'umount': syscall(nr['umount2'], b'/proc/sys\\0', 2),
            'umount proc': syscall(nr['umount2'], b'/proc\\0', 2),
            'chroot': syscall(nr['chroot'], tmp),
            'pivot_root': syscall(nr['pivot_root'], tmp, tmp),
            'fsopen': syscall(nr['fsopen'], b'tmpfs\\0', 0),
            'open_tree': syscall(nr['open_tree'], -100, root, 1),
            'move_mount': syscall(nr['move_mount'], -100, tmp, -100, root, 0),
            'fspick': syscall(nr['fspick'], -100, root, 0),
            'mount_setattr': syscall(nr['mount_setattr'], -100, root, 0, 0, 0),
            'clone3': syscall(nr['clone3'], 0, 0),
            'sethostname': syscall(nr['sethostname'], b'evil', 4),
        }
        for name, flag in (('user', 0x10000000), ('mnt', 0x20000), ('pid', 0x20000000),
                           ('net', 0x40000000), ('ipc', 0x08000000), ('uts', 0x04000000),
                           ('cgroup', 0x02000000), ('time', 0x80)):
            answer['unshare ' + name] = syscall(nr['unshare'], flag)
            answer['unshare high ' + name] = syscall(nr['unshare'], flag | 1 << 32)
            if flag != 0x80:
                answer['clone ' + name] = syscall(56, flag | 17, 0, 0, 0, 0)
            fd = os.open('/proc/self/ns/' + name, os.O_RDONLY) if os.path.exists(
                '/proc/self/ns/' + name) else -1
            if fd >= 0:
                answer['setns ' + name] = syscall(nr['setns'], fd, 0)
        """,
        nr=NUMBERS,
    )
    allowed = {name: result for name, result in found.items() if result not in ("EPERM", "ENOSYS")}
    assert allowed == {}


@x86_64_only
def test_kernel_surface_is_closed(env: nsbox.ExecutionEnvironment) -> None:
    names = ["bpf", "perf_event_open", "userfaultfd", "kexec_load", "init_module", "finit_module",
             "io_uring_setup", "io_uring_enter", "io_uring_register", "add_key", "request_key",
             "keyctl", "open_by_handle_at", "fanotify_init", "reboot", "swapon", "acct", "syslog",
             "quotactl", "iopl", "clock_adjtime", "ptrace", "process_vm_readv",
             "process_vm_writev", "kcmp", "pidfd_getfd"]  # fmt: skip
    found = attack(
        env, "answer = {name: syscall(nr[name], 0, 0, 0, 0, 0) for name in names}",
        names=names, nr=NUMBERS,
    )  # fmt: skip
    assert {n: result for n, result in found.items() if result not in ("EPERM", "ENOSYS")} == {}
    # Numbers no kernel has yet: ENOSYS, or programs would think that a call is there.
    assert attack(env, "answer = [syscall(n) for n in (600, 1000, 0x3fffffff)]") == ["ENOSYS"] * 3


def test_root_file_system_is_read_only(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        answer = {}
        for path in ('/x', '/usr/x', '/usr/bin/x', '/etc/x', '/bin/x', '/lib/x', '/dev/x',
                     '/proc/x', '/dev/pts/x', '/home/x'):
            answer[path] = attempt(os.open, path, os.O_CREAT | os.O_WRONLY)
        answer['mknod'] = attempt(os.mknod, '/tmp/null', 0o20666, os.makedev(1, 3))
        answer['mkdir'] = attempt(os.mkdir, '/x')
        answer['etc'] = attempt(os.open, '/etc/passwd', os.O_WRONLY)
        answer['rename'] = attempt(os.rename, '/etc/passwd', '/tmp/passwd')
        answer['usr'] = attempt(os.chmod, '/usr/bin/env', 0o777)
        """,
    )
    assert set(found.values()) <= {"EROFS", "EACCES", "EPERM", "ENOENT", "EXDEV"}, found


def test_only_harmless_devices(env: nsbox.ExecutionEnvironment) -> None:
    found = attack(
        env,
        """
        import stat
        answer = {}
        for directory, _, names in os.walk('/dev'):
            for name in names:
                path = os.path.join(directory, name)
                status = os.stat(path) if os.path.exists(path) else os.lstat(path)
                if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                    answer[path] = [os.major(status.st_rdev), os.minor(status.st_rdev)]
        """,
    )
    memory_devices = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}
    assert {p: n for p, n in found.items() if tuple(n) not in memory_devices} == {}
    size = attack(env, "s = os.statvfs('/dev'); answer = attempt(os.open, '/dev/flood', 65)")
    assert size in ("EROFS", "EACCES", "EPERM")


def test_host_name_stays_the_hosts(make_env: Callable[..., nsbox.ExecutionEnvironment]) -> None:
    before = socket.gethostname()
    env = make_env(hostname="guest-name")
    assert env.run(["uname", "-n"]).text() == "guest-name\n"
    assert attack(env, "import socket; answer = attempt(socket.sethostname, 'x')") == "EPERM"
    assert socket.gethostname() == before


@pytest.mark.needs("root")
def test_no_environment_reaches_what_root_only_may(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("only root's")
    secret.chmod(0o600)
    tmp_path.chmod(0o755)
    with nsbox.ExecutionEnvironment(mounts=[nsbox.Mount.bind(tmp_path, "/data")]) as other:
        answer = attack(other, "answer = [os.stat('/data/secret').st_mode, "
                               "attempt(os.open, '/data/secret', 0)]")  # fmt: skip
    assert stat.S_IMODE(answer[0]) == 0o600
    assert answer[1] == "EACCES"
    assert os.path.exists(secret)
