#!/bin/bash
# pytest.sh PYTHON [ARGUMENT...]: pytest in a guest with two rails; arguments go to pytest, tests/rdma if there are none.
# Installs what is missing (Debian packages, the guest kernel) or says what that is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${ADAPTRA_IN_GUEST:-}" ]; then
    . "$here/packages.sh"
    need_packages "make test-rdma" python3-pyverbs ibverbs-providers iproute2
    exec "$here/enter.sh" -t 600 -- "$here/pytest.sh" "$@"
fi
python=$1
shift
"$here/rails.sh" 2
[ $# -gt 0 ] || set -- tests/rdma
exec "$python" -m pytest -p no:cacheprovider "$@"
