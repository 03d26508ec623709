#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# rootfs/busybox.sh DIRECTORY: a root of one static program and a link for each of its commands to it, about 2 MB.
# Then: nsbox run --rootfs DIRECTORY -- sh -c 'echo hello'
set -eu
# shellcheck source-path=SCRIPTDIR
. "$(dirname -- "$0")/lib.sh"

begin busybox "$@"
unpack busybox-static
# Relative links, so that they also hold where the tree is looked at from outside.
for applet in $("$TREE/bin/busybox" --list-full); do
    case $applet in
    bin/busybox | linuxrc) continue ;;
    usr/bin/* | usr/sbin/*) ;;
    *) applet=usr/$applet ;;
    esac
    [ -e "$TREE/$applet" ] || ln -s ../bin/busybox "$TREE/$applet"
done
finish
