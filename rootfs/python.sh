#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# rootfs/python.sh DIRECTORY: Debian's Python 3 with the whole standard library, dash and coreutils.
# Then: nsbox run --rootfs DIRECTORY -- python3 -c 'print("hello")'
set -eu
# shellcheck source-path=SCRIPTDIR
. "$(dirname -- "$0")/lib.sh"

begin python "$@"
# Everything those three depend on, but for what only package management and maintainer scripts need.
packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances python3 dash coreutils |
    grep '^[a-z0-9]' | sort -u |
    grep -v -E -x 'perl.*|libperl.*|libgdbm.*|dpkg|tar|debianutils|install-info|mailcap|media-types|mime-support|readline-common|debconf.*')
[ -n "$packages" ] || die "apt knows no python3; as root run: apt-get update"
# shellcheck disable=SC2086 # a list of package names
unpack $packages
# dash's maintainer script would have made this link.
[ -e "$TREE/bin/sh" ] || ln -s dash "$TREE/usr/bin/sh"

# Byte code, since the tree is read-only inside: by the tree's own Python, which runs on the host through
# its own loader (the host's Python may be another version).
loader=$(find "$TREE/usr/lib64" "$TREE/usr/lib" -name 'ld-linux*.so.*' | head -n 1)
library=$(find "$TREE/usr/lib" -maxdepth 2 -name 'libc.so.6' -exec dirname {} \;)
python=$(readlink -f "$TREE/usr/bin/python3")
[ -x "$loader" ] || die "no dynamic loader in the unpacked packages"
PYTHONHOME=$TREE/usr "$loader" --library-path "$library" "$python" -S -m compileall -q \
    -s "$TREE" -p / "$TREE/usr/lib/${python##*/}" || die "compiling the standard library failed"
finish
