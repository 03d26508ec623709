# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=sh
# Shared by scripts/* and tests/uml/run-uml (sourced): finding or making the virtual environment.
#
# nsbox is installed as a user gets it, from a copy of the files that make the package: the clone is
# never written to (it may belong to somebody else) and a packaging mistake shows in the tests. Stamps
# inside the environment hold a hash of what was installed, so that a second run costs no pip call and
# a run after an edit installs again.

# The caller sets REPOSITORY.
: "${REPOSITORY:?}"

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    say "$@"
    exit 1
}

# have_header FILE: can the C preprocessor find FILE?
have_header() {
    printf '#include <%s>\n' "$1" | gcc -E - >/dev/null 2>&1
}

is_usable_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Sets BASE_PYTHON to a Python >= 3.11, or to nothing. /usr/bin/python3 comes first because every user can
# execute it: one below /root/.pyenv would make an environment that only root can use.
find_python() {
    BASE_PYTHON=
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.11 or later"
        BASE_PYTHON=$(command -v "$PYTHON")
        return
    fi
    for candidate in /usr/bin/python3 /usr/bin/python3.14 /usr/bin/python3.13 /usr/bin/python3.12 \
        /usr/bin/python3.11 python3 python3.14 python3.13 python3.12 python3.11; do
        if is_usable_python "$candidate"; then
            BASE_PYTHON=$(command -v "$candidate")
            return
        fi
    done
}

# Prints the Debian packages that are still missing for making the environment. Asked by effect, not by
# package name, so that any distribution and any Python will do.
missing_for_venv() {
    find_python
    if [ -z "$BASE_PYTHON" ]; then
        printf ' python3 python3-venv python3-dev'
    else
        "$BASE_PYTHON" -c 'import ensurepip, venv' 2>/dev/null || printf ' python3-venv'
        # python-prctl is a C extension: it needs Python.h, a compiler and libcap's header.
        "$BASE_PYTHON" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || printf ' python3-dev'
        # pyseccomp loads the library when it is imported.
        "$BASE_PYTHON" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null || printf ' libseccomp2'
    fi
    command -v gcc >/dev/null || printf ' gcc'
    have_header stdlib.h || printf ' libc6-dev'
    have_header sys/capability.h || printf ' libcap-dev'
}

# install_packages NAME...: with apt as root; as anybody else, name the one line to run and stop.
install_packages() {
    if [ "$(id -u)" -ne 0 ]; then
        die "missing on this machine; as root run:  apt-get install --no-install-recommends $*"
    fi
    command -v apt-get >/dev/null || die "no apt-get here; install what Debian calls: $*"
    say "installing with apt: $*"
    apt_install "$@" && return
    # A new machine has no package lists yet, or old ones that name files no longer served.
    apt-get -q update >&2 </dev/null || die "apt-get update failed"
    apt_install "$@" || die "apt-get install failed: $*"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null </dev/null
}

# hash_of FILE...: one hash over names and contents.
hash_of() { sha256sum "$@" | sha256sum | cut -c1-32; }

source_hash() {
    # Names with blanks do not occur below src/.
    # shellcheck disable=SC2046
    (cd "$REPOSITORY" && hash_of setup.cfg setup.py pyproject.toml $(find src -type f ! -name '*.pyc' ! -name '*.so' | LC_ALL=C sort))
}

requirements_hash() { (cd "$REPOSITORY" && hash_of setup.cfg); }

stamp_is() { [ "$(cat "$VENV/.nsbox/$1" 2>/dev/null)" = "$2" ]; }

# is_ready EXTRA...: is $VENV complete for these extras and this source?
is_ready() {
    "$VENV/bin/python" -c '' 2>/dev/null || return 1
    stamp_is source "$SOURCE_HASH" || return 1
    for extra in base "$@"; do
        stamp_is "$extra" "$REQUIREMENTS_HASH" || return 1
    done
}

can_write() { [ -w "$1" ] && [ -x "$1" ]; }

# Sets VENV: $NSBOX_VENV, else .venv (or $VENV_NAME) of the clone, else (clone of another user) one below ~/.cache, else
# (no writable home either) a new temporary one.
choose_venv() {
    if [ -n "${NSBOX_VENV:-}" ]; then
        VENV=$NSBOX_VENV
        return
    fi
    VENV=$REPOSITORY/${VENV_NAME:=.venv}
    if is_ready "$@" || can_write "$VENV" || { [ ! -e "$VENV" ] && can_write "$REPOSITORY"; }; then
        return
    fi
    cache=${XDG_CACHE_HOME:-${HOME:-/dev/null}/.cache}/nsbox # without HOME nothing can be made there
    if mkdir -p "$cache" 2>/dev/null && can_write "$cache"; then
        VENV=$cache/venv-$(printf %s "$REPOSITORY${VENV_NAME#.venv}" | sha256sum | cut -c1-12)
        return
    fi
    VENV=$(mktemp -d "${TMPDIR:-/tmp}/nsbox-venv-XXXXXXXX") || die "no place for a virtual environment; set NSBOX_VENV"
    say "neither $REPOSITORY nor a home directory is writable: installing into $VENV"
    say "to use it again: export NSBOX_VENV=$VENV (and remove it when done)"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@" </dev/null; }

# prepare_venv EXTRA...: make $VENV ready with the extras ("test", "dev") of setup.cfg.
prepare_venv() {
    SOURCE_HASH=$(source_hash)
    REQUIREMENTS_HASH=$(requirements_hash)
    choose_venv "$@"
    is_ready "$@" && return

    mkdir -p "$VENV" || die "cannot make $VENV; set NSBOX_VENV to a directory of yours"
    # Two runs at once must not install over each other. The lock is gone with this shell's descriptor.
    exec 9>"$VENV/.lock" || die "cannot write in $VENV; set NSBOX_VENV to a directory of yours"
    flock 9
    is_ready "$@" || install_into_venv "$@"
    exec 9>&-
}

install_into_venv() {
    # shellcheck disable=SC2046 # a list of package names
    set -- $(missing_for_venv) -- "$@"
    packages=
    while [ "$1" != -- ]; do
        packages="$packages $1"
        shift
    done
    shift
    # shellcheck disable=SC2086 # a list of package names
    [ -z "$packages" ] || install_packages $packages
    find_python
    [ -n "$BASE_PYTHON" ] || die "no Python 3.11 or later found; set PYTHON to one"

    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        say "making $VENV with $BASE_PYTHON"
        # Not by "venv --clear": it removes the lock as well, and the next run makes and takes another.
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
        "$BASE_PYTHON" -m venv "$VENV" || die "$BASE_PYTHON -m venv $VENV failed"
    fi
    mkdir -p "$VENV/.nsbox"

    copy=$(mktemp -d) || die "mktemp -d failed"
    trap 'rm -rf "$copy"' EXIT
    (cd "$REPOSITORY" && for file in setup.cfg setup.py pyproject.toml README.md LICENSE src; do
        [ ! -e "$file" ] || cp -R "$file" "$copy/"
    done)
    rm -rf "$copy"/src/*.egg-info "$copy"/src/nsbox/*/*.so

    wanted=
    for extra in base "$@"; do
        stamp_is "$extra" "$REQUIREMENTS_HASH" || wanted="$wanted,$extra"
    done
    if [ -n "$wanted" ]; then
        # "base" is no extra of setup.cfg; it stands for the plain dependencies.
        extras=$(printf %s "$wanted" | sed 's/^,//; s/^base,*//')
        say "installing the dependencies${extras:+ and those for $extras}"
        pip install 'setuptools >= 77' "$copy${extras:+[$extras]}" || die "pip install failed"
        for extra in base "$@"; do
            printf '%s\n' "$REQUIREMENTS_HASH" >"$VENV/.nsbox/$extra"
        done
    fi
    # --force-reinstall: the version stays the same while the source changes.
    pip install --no-deps --no-build-isolation --force-reinstall "$copy" || die "pip install of nsbox failed"
    printf '%s\n' "$SOURCE_HASH" >"$VENV/.nsbox/source"
    rm -rf "$copy"
    trap - EXIT
}
