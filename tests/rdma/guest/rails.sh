#!/bin/bash
# rails.sh [N]: in the guest, N wires between two "hosts" a and b that share this kernel, each with a software RDMA device
# at both ends: rail i is a<i> (198.18.<i>.1, device rxa<i>) to b<i> (198.18.<i>.2, device rxb<i>).
# rxe works in the first network namespace only, so both ends live there; addresses of the own machine would never leave
# it, hence a routing table of its own that sends them over the wire, where netem and cut links count.
set -euo pipefail
count=${1:-2}
for where in all default; do
    echo 0 >/proc/sys/net/ipv4/conf/$where/rp_filter
    echo 1 >/proc/sys/net/ipv4/conf/$where/accept_local
done
for ((i = 0; i < count; i++)); do
    cat <<COMMANDS
link add a$i mtu 9000 type veth peer name b$i mtu 9000
addr add 198.18.$i.1/24 dev a$i
addr add 198.18.$i.2/24 dev b$i
link set a$i up
link set b$i up
route add 198.18.$i.2/32 dev a$i src 198.18.$i.1 table 99
route add 198.18.$i.1/32 dev b$i src 198.18.$i.2 table 99
COMMANDS
done | ip -batch -
# What this machine sends asks table 99 first; what comes in from a wire goes to the local table as ever.
ip -batch - <<COMMANDS
rule add pref 5 iif lo lookup 99
rule add pref 10 lookup local
rule del pref 0
COMMANDS
for ((i = 0; i < count; i++)); do
    rdma link add rxa$i type rxe netdev a$i
    rdma link add rxb$i type rxe netdev b$i
done
