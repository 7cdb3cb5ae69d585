#!/bin/bash
# Sourced. `need_packages WHY PACKAGE...`: returns once the Debian packages are installed; installs them itself when it may.

need_packages() {
    local why=$1 package missing=() log
    shift
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "$why needs Debian packages that are not installed: ${missing[*]}" >&2
        echo "install them as root: apt-get update && apt-get install --no-install-recommends ${missing[*]}" >&2
        return 1
    fi
    echo "installing Debian packages for $why: ${missing[*]}" >&2
    log=$(mktemp)
    # lists that are there may be older than the archive: refreshed only if the first try fails
    if ! apt_install "$log" "${missing[@]}"; then
        if ! timeout 300 apt-get update >>"$log" 2>&1 || ! apt_install "$log" "${missing[@]}"; then
            tail -n 20 "$log" >&2
            echo "$why: apt-get could not install ${missing[*]} (its last lines are above)" >&2
            rm -f "$log"
            return 1
        fi
    fi
    rm -f "$log"
}

apt_install() {
    local log=$1
    shift
    DEBIAN_FRONTEND=noninteractive timeout 900 apt-get install -y --no-install-recommends \
        -o DPkg::Lock::Timeout=120 "$@" >>"$log" 2>&1 </dev/null
}
