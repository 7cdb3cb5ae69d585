#!/bin/bash
# Prints the path of a guest kernel (User-Mode Linux with software RDMA, netem and network namespaces), the first of:
#   1. $ADAPTRA_GUEST_KERNEL, a binary or an .xz of one, if it can run on this processor;
#   2. the cached build of exactly this script and kernel.config;
#   3. a new build from Debian's kernel source, cached.
# The cache is ${XDG_CACHE_HOME:-~/.cache}/adaptra/. Everything but the path goes to standard error.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/packages.sh"
SOURCE=linux-source-6.12
cache=${XDG_CACHE_HOME:-$HOME/.cache}/adaptra
mkdir -p "$cache"

hash_of() { cat "$@" | sha256sum | cut -c1-16; }

unpack() { # .xz -> cached binary
    local out
    out=$cache/guest-kernel-given-$(hash_of "$1")
    if [ ! -x "$out" ]; then
        need_packages "unpacking the guest kernel" xz-utils
        xz -dc "$1" >"$out.$$"
        chmod +x "$out.$$"
        mv "$out.$$" "$out"
    fi
    echo "$out"
}

# Linux 6.12 keeps 2696 bytes of a process's floating point state; where the processor has more (AMX: 11 kB) the host refuses to
# restore it, and no process of the guest ever runs.
STATE_BYTES=12288
runs_here() { # KERNEL: whether its first process starts; that it ends at once is a panic as well, but another one
    local folder=$(mktemp -d) told
    told=$(TMPDIR=$folder timeout -k 1 20 "$1" mem=64M root=/dev/root rootfstype=hostfs rootflags=/ ro quiet con=null con0=null,fd:2 "uml_dir=$folder/" \
        init=/bin/true </dev/null 2>&1)
    rm -rf "$folder"
    ! grep -q "fp regs failed" <<<"$told"
}

compile() { # FOLDER OUT; every step with its own "or return", because `set -e` does not reach into an `if`
    tar -C "$1" --strip-components=1 -xf "/usr/src/$SOURCE.tar.xz" || return
    sed -i "s/DEFINE_LONGS(HOST_FP_SIZE, 2696)/DEFINE_LONGS(HOST_FP_SIZE, $STATE_BYTES)/" "$1/arch/x86/um/user-offsets.c" || return
    grep -q "$STATE_BYTES" "$1/arch/x86/um/user-offsets.c" || { echo "the kernel source keeps floating point state otherwise"; return 1; }
    KCONFIG_ALLCONFIG=$here/kernel.config timeout 300 make -s -C "$1" ARCH=um allnoconfig || return
    # what this source does not know is dropped without a word, so look for what the tests rest on
    if grep '^CONFIG.*=' "$here/kernel.config" | grep -vxF -f "$1/.config"; then
        echo "the kernel source refused these lines of kernel.config"
        return 1
    fi
    timeout 3600 make -s -C "$1" ARCH=um -j"$(nproc)" linux || return
    strip -o "$2" "$1/linux"
}

build() { # OUT
    local out=$1 work began=$SECONDS
    need_packages "building the guest kernel" "$SOURCE" flex bison bc make gcc libc6-dev binutils xz-utils
    echo "building the guest kernel from $SOURCE with $(nproc) jobs (4 minutes on 2 cores, 1.5 GB of disk meanwhile) ..." >&2
    work=$(mktemp -d -p "$cache" build.XXXXXX)
    trap "rm -rf '$work'" EXIT
    if ! compile "$work" "$out.$$" >"$cache/build.log" 2>&1 </dev/null; then
        tail -n 20 "$cache/build.log" >&2
        echo "building the guest kernel failed; all its output is in $cache/build.log" >&2
        return 1
    fi
    mv "$out.$$" "$out"
    echo "built $out in $((SECONDS - began)) s" >&2
}

if [ -n "${ADAPTRA_GUEST_KERNEL:-}" ]; then
    [ -f "$ADAPTRA_GUEST_KERNEL" ] || {
        echo "ADAPTRA_GUEST_KERNEL=$ADAPTRA_GUEST_KERNEL is no file; unset it to have a kernel built" >&2
        exit 1
    }
    case $ADAPTRA_GUEST_KERNEL in
    *.xz) given=$(unpack "$ADAPTRA_GUEST_KERNEL") ;;
    *) given=$(realpath "$ADAPTRA_GUEST_KERNEL") ;;
    esac
    if runs_here "$given"; then
        echo "$given"
        exit
    fi
    echo "$ADAPTRA_GUEST_KERNEL cannot run on this processor, whose floating point state (AMX) it has no room for: another one is needed" >&2
fi
kernel=$cache/guest-kernel-$(hash_of "$here/kernel.sh" "$here/kernel.config")
if [ ! -x "$kernel" ]; then
    exec 9>"$cache/build.lock"
    flock -w 3600 9 # somebody else may be building the same
    [ -x "$kernel" ] || build "$kernel"
fi
echo "$kernel"
