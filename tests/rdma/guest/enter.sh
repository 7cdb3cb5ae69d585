#!/bin/bash
# enter.sh [-m MiB] [-t SECONDS] -- COMMAND...
#
# Runs COMMAND as root of a guest kernel (kernel.sh; one CPU, no KVM needed). The guest sees this machine's files, read-only
# under a layer in memory: what COMMAND writes is gone afterwards, except under /run/share, whose files are copied to
# $ADAPTRA_GUEST_SHARE if that names a folder. Output and exit code pass through; 124: timed out, 125: no guest or no answer.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/packages.sh"
memory=3072 patience=300
while getopts m:t: option; do
    case $option in
    m) memory=$OPTARG ;;
    t) patience=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ "${1:-}" = -- ] && shift
[ $# -gt 0 ] || { echo "usage: enter.sh [-m MiB] [-t SECONDS] -- COMMAND..." >&2; exit 2; }
kernel=$("$here/kernel.sh") || exit 125

share=$(mktemp -d)
trap 'rm -rf "$share"' EXIT

# The kernel starts this with the machine's root as its own; what follows makes the layered root and moves into it.
cat >"$share/init" <<'INIT'
#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -n -t proc proc /proc
mount -n -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -n -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root || exit 1
mount -n -t proc proc proc
mount -n -t sysfs sysfs sys
mount -n -t devtmpfs devtmpfs dev
mkdir -p dev/pts dev/shm
mount -n -t devpts devpts dev/pts
mount -n -t tmpfs tmpfs dev/shm
mount -n -t tmpfs tmpfs run
mkdir run/share
mount -n -t hostfs -o "$ADAPTRA_SHARE" share run/share
exec chroot . /bin/bash /run/share/main
INIT
chmod +x "$share/init"
{
    echo 'ip link set lo up; dmesg -n 1; chmod 1777 /dev/shm; stty -F /dev/tty1 -opost'
    printf 'export PATH=%q HOME=%q LANG=C.UTF-8 TMPDIR=/tmp ADAPTRA_IN_GUEST=1 PYTHONDONTWRITEBYTECODE=1\n' "$PATH" "$HOME"
    for name in PYTEST_ADDOPTS COLUMNS; do
        [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'cd %q\n' "$PWD"
    printf '( '
    printf '%q ' "$@"
    printf ') </dev/null 2>&1 | cat >/dev/tty1\n'
    echo 'echo ${PIPESTATUS[0]} > /run/share/exit-code; sync -f /run/share/exit-code'
    echo 'echo o > /proc/sysrq-trigger; sleep 10'
} >"$share/main"

# The guest's memory is a file that is mapped to be executed: a /dev/shm that is small or noexec (containers) will not do.
roomy() {
    [ -w "$1" ] && [ "$(df --output=avail -m "$1" | tail -n 1)" -ge "$memory" ] &&
        ! findmnt -n -o OPTIONS -T "$1" | tr , '\n' | grep -qx noexec
}
for folder in /dev/shm "${TMPDIR:-/tmp}" /var/tmp; do
    roomy "$folder" && break
    folder=
done
[ -n "$folder" ] || { echo "the guest needs $memory MiB under /dev/shm, \$TMPDIR or /var/tmp, mounted without noexec" >&2; exit 125; }

TMPDIR=$folder timeout -k 5 "$patience" "$kernel" mem="${memory}M" \
    root=/dev/root rootfstype=hostfs rootflags=/ ro quiet con=null con0=null,fd:2 con1=null,fd:1 \
    "uml_dir=$share/" "ADAPTRA_SHARE=$share" init="$share/init" </dev/null 2>"$share/kernel-messages"
status=$?
if [ -n "${ADAPTRA_GUEST_SHARE:-}" ]; then
    rm -f "$share/init" "$share/main"
    cp -r "$share/." "$ADAPTRA_GUEST_SHARE/"
fi
[ -s "$share/exit-code" ] && exit "$(cat "$share/exit-code")"
[ "$status" = 124 ] && { echo "enter.sh: not finished after $patience s" >&2; exit 124; }
echo "enter.sh: the guest ended without an exit code (kernel's status $status); its last messages:" >&2
tail -n 20 "$share/kernel-messages" >&2
exit 125
