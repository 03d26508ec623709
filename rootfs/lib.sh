# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# Shared by the recipes (sourced). They take one argument, the directory to fill, and need no root: Debian
# packages are fetched with `apt-get download` and unpacked, no maintainer script is run.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# begin RECIPE ARGUMENT...: sets TARGET and, for a new tree, TREE (built beside TARGET, moved there when
# complete, so that a broken run leaves nothing that looks finished) and SCRATCH.
begin() {
    RECIPE=$1
    shift
    if [ $# -ne 1 ] || [ -z "$1" ]; then
        die "usage: ${0##*/} DIRECTORY"
    fi
    case $1 in -*) die "usage: ${0##*/} DIRECTORY" ;; esac
    TARGET=$1
    for program in apt-get apt-cache dpkg-deb; do
        command -v "$program" >/dev/null || die "needs Debian's $program"
    done
    if [ -e "$TARGET" ] || [ -L "$TARGET" ]; then
        [ -d "$TARGET" ] || die "$TARGET exists and is no directory"
        if [ "$(cat "$TARGET/.nsbox-rootfs" 2>/dev/null)" = "$RECIPE" ]; then
            say "$TARGET is already a $RECIPE root (remove it to build it anew)"
            exit 0
        fi
        [ -z "$(ls -A "$TARGET")" ] || die "$TARGET is not empty and was not made by this recipe; name another directory"
    fi
    parent=$(dirname -- "$TARGET")
    mkdir -p "$parent" || die "cannot make $parent"
    parent=$(CDPATH='' cd -- "$parent" && pwd -P)
    TARGET=$parent/$(basename -- "$TARGET")
    umask 022
    SCRATCH=$(mktemp -d "$parent/.nsbox-rootfs-XXXXXXXX") || die "cannot write in $parent"
    trap 'rm -rf "$SCRATCH"' EXIT
    trap 'exit 130' HUP INT TERM
    TREE=$SCRATCH/tree
    mkdir "$TREE"
    # Debian's merged /usr: packages still ship files under /bin and /lib.
    for name in bin sbin lib lib64; do
        mkdir -p "$TREE/usr/$name"
        ln -s "usr/$name" "$TREE/$name"
    done
    mkdir -p "$TREE/etc" "$TREE/dev" "$TREE/proc" "$TREE/tmp" "$TREE/run" "$TREE/var/tmp" "$TREE/home" "$TREE/root"
}

# unpack PACKAGE...: into TREE.
unpack() {
    (
        cd "$SCRATCH"
        # apt drops to the user _apt for downloads when root and warns when that one cannot write here.
        set -- -qq -o APT::Sandbox::User=root download "$@"
        apt-get "$@" 2>"$SCRATCH/apt.log" </dev/null ||
            { [ "$(id -u)" -eq 0 ] && apt-get -qq update >&2 </dev/null && apt-get "$@" </dev/null; } ||
            { cat "$SCRATCH/apt.log" >&2; die "apt-get download failed; as root run: apt-get update"; }
    ) || exit 1
    for package in "$SCRATCH"/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink --no-same-owner -C "$TREE"
        rm "$package"
    done
}

# finish: the files that nsbox binds its own over, no documentation, no set-id bits, into place.
finish() {
    for name in passwd group hosts resolv.conf hostname nsswitch.conf; do
        [ -e "$TREE/etc/$name" ] || : >"$TREE/etc/$name"
    done
    rm -rf "$TREE/usr/share/doc" "$TREE/usr/share/man" "$TREE/usr/share/info" "$TREE/usr/share/lintian" \
        "$TREE/usr/share/locale" "$TREE/usr/share/doc-base" "$TREE/usr/share/bash-completion"
    find "$TREE" -type f \( -perm -4000 -o -perm -2000 \) -exec chmod ug-s {} +
    printf '%s\n' "$RECIPE" >"$TREE/.nsbox-rootfs"
    chmod 755 "$TREE"
    [ ! -d "$TARGET" ] || rmdir "$TARGET"
    mv "$TREE" "$TARGET"
    say "$TARGET: $RECIPE root, $(du -sm "$TARGET" | cut -f1) MB"
}
