# SPDX-License-Identifier: Apache-2.0
"""What environments see of the host's /etc, and of what programs of /usr have elsewhere.

A distribution's programs read their configuration in /etc, and no list of such programs is ever
complete. So all of /etc is there but what is named here, what not everybody on the host may read,
and what is no file, directory or link. A read-only overlay with white-outs does it: one mount,
in which what is left out has not even a name.
"""

from __future__ import annotations

import os
import stat

from nsbox.linux import calls, proc
from nsbox.linux import constants as c
from nsbox.linux.binding import is_unknown
from nsbox.linux.questions import is_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ETC = "/etc"
_NAMES = ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf")
_ACCOUNTS = (b"passwd", b"group", b"shadow", b"gshadow", b"initgroups", b"netgroup", b"sudoers")

# Names directly in /etc: accounts and keys; what says who this host is, how it is reached and
# which services it runs; where tools and services keep passwords in files that all may read.
# What begins with one of them and "-", "." or "~" is left out as well: passwd-, hosts.allow.
HIDDEN = frozenset(
    """
    passwd group shadow gshadow subuid subgid sudoers sudo doas opasswd
    ssh krb5 ipsec strongswan swanctl wireguard openvpn ppp chatscripts vpnc letsencrypt acme
    crypttab cryptsetup luks tor
    hostname hosts machine machine-id adjtime resolv resolvconf fstab exports network netplan
    NetworkManager dhcp dhcpcd wpa_supplicant iwd netctl connman
    systemd init rc rc0 rc1 rc2 rc3 rc4 rc5 rc6 rcS inittab default sysconfig conf
    udev modprobe modules sysctl grub kernel initramfs-tools dracut mdadm lvm multipath iscsi nfs
    idmapd auto autofs drbd ceph gluster
    docker containerd containers crio cni kubernetes rancher k3s libvirt lxc lxd xen vmware-tools
    cloud waagent boto aws amazon google azure oci
    ldap libnss-ldap pam_ldap nslcd nss sssd samba ipa freeradius yp bind rndc unbound dnsmasq avahi
    cron crontab anacrontab at aliases mail mailname exim4 postfix dovecot msmtprc ssmtp nullmailer
    sendmail opendkim
    apache2 httpd nginx lighttpd caddy haproxy traefik squid privoxy stunnel varnish
    mysql mariadb my postgresql postgresql-common mongod redis memcached rabbitmq elasticsearch
    kibana logstash odbc cassandra couchdb
    grafana influxdb telegraf prometheus alertmanager zabbix munin nagios nrpe icinga2 collectd snmp
    datadog-agent newrelic-infra filebeat fluent fluentd td-agent rsyslog syslog-ng syslog
    ansible puppet puppetlabs chef salt cfengine consul vault nomad etcd
    rsyncd rclone davfs2 cifs smbcredentials vsftpd proftpd pure-ftpd cups
    fail2ban iptables nftables ufw firewalld shorewall ethers audit
    environment netrc wgetrc curlrc pip npmrc yarnrc gitconfig apt dnf yum zypp pacman
    git-credentials subversion mercurial issue motd
    """.split()  # noqa: SIM905 - a table
)
# The same of directories that are not left out as a whole.
HIDDEN_BELOW = {
    "ssl": ("private",),
    "pki": ("private", "consumer", "entitlement"),
    "pki/tls": ("private",),
    "security": ("opasswd",),
}
_RELATIVE = str.maketrans("-~", "..")

# Directories of /var/lib that packages, not services, fill, and that links of /usr and programs'
# built-in paths lead to: compilers' package databases, TeX's formats and file lists, dictionaries,
# catalogues. A mount each, so no more than needed.
STATE = (
    "/var/lib/aspell", "/var/lib/gems", "/var/lib/ghc", "/var/lib/ghostscript", "/var/lib/ispell",
    "/var/lib/mecab", "/var/lib/sgml-base", "/var/lib/texmf",
)  # fmt: skip
_PROGRAMS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/etc/alternatives")
OPT = "/opt"

_FOR_ALL = stat.S_IROTH | stat.S_IXOTH
_LARGEST_COPY = 4 << 20


class HostFiles:
    """What there is, read through once for a layout.

    Attributes:
        hidden: Paths relative to /etc that are left out.
        state: Directories outside /usr and /etc that programs of /usr need.
    """

    def __init__(self) -> None:
        """Takes 2 us for each entry of /etc."""
        hidden = set(_hidden())
        self.hidden = sorted(path for path in hidden if hidden.isdisjoint(_parents(path)))
        self.state = _state()

    def place_etc(self, base: str, target: str, top: str) -> None:
        """Mount /etc, read-only, at `target`.

        Args:
            base: A directory of a tmpfs of which environments see nothing.
            target: An empty directory on a tmpfs.
            top: A directory whose files lie over those of the host.

        Raises:
            OSError: The kernel refused.
        """
        veil = f"{base}/veil"
        os.mkdir(veil, 0o755)
        _veil(veil, self.hidden)
        try:
            # Nothing can be written without an upper layer, and what lies on /etc by mounts, such
            # as an orchestrator's secrets, is not in it (fs/namespace.c, clone_private_mount).
            options = f"lowerdir={top}:{veil}:{ETC}"
            flags = c.MS_RDONLY | c.MS_NOSUID | c.MS_NODEV
            calls.mount("overlay", target, "overlay", flags, options)
        except OSError:
            # No overlayfs; or /etc is on two of them already; or without root a more privileged
            # user's mounts lie on /etc, which may not be looked under.
            hidden = {f"{ETC}/{path}" for path in self.hidden}
            _copy(ETC, target, hidden | {mount.mount_point for mount in proc.read_mountinfo()})
            _copy(top, target, set())


def stamps() -> list[int]:
    """Return what changes when files come to /etc or go, or another program is chosen there."""
    return [_changed(path) for path in (ETC, f"{ETC}/alternatives")]


def name_stamps() -> list[int]:
    """Return what changes when names of hosts resolve otherwise."""
    return [_changed(path) for path in _NAMES]


def host_names() -> dict[str, bytes]:
    """Return the files by which the host's names resolve, for environments with its network."""
    found = {}
    for path in _NAMES:
        try:
            with open(path, "rb") as file:
                found[os.path.basename(path)] = file.read(_LARGEST_COPY)
        except OSError as error:
            if is_unknown(error):
                raise
            continue  # it does without
    # Accounts are the environment's own, whatever the host's come from.
    lines = found.pop("nsswitch.conf", b"").splitlines()
    others = [line for line in lines if not line.lstrip().startswith(_ACCOUNTS)]
    if others:
        own = b"passwd: files\ngroup: files\nshadow: files\n"
        found["nsswitch.conf"] = own + b"\n".join(others) + b"\n"
    return found


def _changed(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError as error:
        if is_unknown(error):
            raise
        return 0


def _hidden() -> Iterator[str]:
    # Whether they are there or not: they may come while environments live.
    yield from HIDDEN
    for parent, names in HIDDEN_BELOW.items():
        if is_directory(f"{ETC}/{parent}"):
            yield from (f"{parent}/{name}" for name in names)
    with os.scandir(ETC) as entries:
        for entry in entries:
            if entry.name in HIDDEN:
                continue
            if entry.name.translate(_RELATIVE).partition(".")[0] in HIDDEN:
                yield entry.name
            else:
                yield from _unreadable(entry, "")


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _unreadable(entry: os.DirEntry[str], parent: str) -> Iterator[str]:
    path = parent + entry.name
    if entry.is_symlink() or entry.name in HIDDEN_BELOW.get(parent[:-1], ()):
        return
    mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISDIR(mode):
        if mode & _FOR_ALL != _FOR_ALL:
            yield path
            return
        with os.scandir(entry.path) as entries:
            for inner in entries:
                yield from _unreadable(inner, path + "/")
    elif not stat.S_ISREG(mode) or not mode & stat.S_IROTH:
        yield path  # sockets and FIFOs, too: read-only does not stop connect(2)


def _veil(veil: str, paths: list[str]) -> None:
    """Leave out `paths`: a character device 0:0 is overlayfs's white-out (overlayfs.rst)."""
    first = f"{veil}/{paths[0]}"
    os.mknod(first, stat.S_IFCHR, 0)
    for path in paths[1:]:
        if "/" in path:
            os.makedirs(f"{veil}/{os.path.dirname(path)}", 0o755, exist_ok=True)
        os.link(first, f"{veil}/{path}")


def _copy(source: str, target: str, hidden: set[str]) -> None:
    with os.scandir(source) as entries:
        for entry in entries:
            path = f"{target}/{entry.name}"
            if entry.path in hidden:
                continue
            is_directory = entry.is_dir(follow_symlinks=False)
            if os.path.lexists(path) and not (is_directory and _is_real_directory(path)):
                os.unlink(path)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), path)
            elif is_directory:
                os.makedirs(path, 0o755, exist_ok=True)
                _copy(entry.path, path, hidden)
            elif entry.stat().st_size <= _LARGEST_COPY:
                _copy_file(entry.path, path)


def _is_real_directory(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


def _copy_file(source: str, target: str) -> None:
    with open(source, "rb") as old, open(target, "xb") as new:
        new.write(old.read(_LARGEST_COPY))
        os.fchmod(new.fileno(), os.fstat(old.fileno()).st_mode & 0o755)


def _state() -> list[str]:
    candidates = list(STATE)
    if is_directory(OPT) and os.listdir(OPT):
        candidates += sorted({"/".join(path.split("/")[:3]) for path in _links_to_opt()})
    return [path for path in candidates if _is_for_all(path)]


def _links_to_opt() -> Iterator[str]:
    for directory in _PROGRAMS:
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_symlink() and "opt/" in (target := os.readlink(entry.path)):
                        path = os.path.normpath(os.path.join(directory, target))
                        if path.startswith(OPT + "/"):
                            yield path
        except OSError as error:
            if is_unknown(error):
                raise
            continue


def _is_for_all(path: str) -> bool:
    try:
        mode = os.lstat(path).st_mode
    except OSError as error:
        if is_unknown(error):
            raise
        return False
    return stat.S_ISDIR(mode) and mode & _FOR_ALL == _FOR_ALL
