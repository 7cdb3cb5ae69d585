"""Registered memory, completion queues and reliable connected queue pairs: what a `verbs.Device` makes.

Nothing blocks, because pyverbs never releases the interpreter lock: descriptors are non-blocking, and are to be read
only when a poll says so. All errors are `VerbsError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from adaptra_plugin.transport.proxy.rails.rdma.verbs_library import Gid, VerbsError, event_descriptors, load, told

MTUS = {1: 256, 2: 512, 3: 1024, 4: 2048, 5: 4096}
"""ibv_mtu -> bytes."""
MAX_RETRIES = 6
"""7 means for ever on some devices."""


def _require(open_: bool) -> None:
    """pyverbs would follow a null pointer."""
    if not open_:
        raise VerbsError("this queue has been closed")


class Region:
    """Registered memory. `address`, `lkey` and `rkey` are what work requests name; `address` is that of its first byte."""

    def __init__(self, domain: Any, memory: memoryview, remote_write: bool) -> None:
        modules = load()
        enums = modules.enums
        self.nbytes = memory.nbytes
        if memory.readonly or not memory.nbytes or not memory.contiguous:
            raise VerbsError(f"cannot register {memory.nbytes} bytes: writable, contiguous memory is needed")
        self._anchor: Any = (ctypes.c_char * memory.nbytes).from_buffer(memory)  # keeps the memory mapped
        self.address = ctypes.addressof(self._anchor)
        access = enums.IBV_ACCESS_LOCAL_WRITE | (enums.IBV_ACCESS_REMOTE_WRITE if remote_write else 0)
        remedy = "; pinned memory may be limited: allow more with `ulimit -l unlimited`"
        with told(f"register {self.nbytes} bytes with the RDMA device", remedy):
            self._region = modules.mr.MR(domain, self.nbytes, access, address=self.address)
        self.lkey = int(self._region.lkey)
        self.rkey = int(self._region.rkey)

    def close(self) -> None:
        if self._anchor is not None:
            with contextlib.suppress(load().pyverbs_error.PyverbsError):
                self._region.close()
            self._anchor = None


class Completion(NamedTuple):
    """A work request that is done with. `status` 0: success; `received`: it was a receive, of `nbytes` bytes; `immediate`:
    the number that came with it, if one did."""

    request: int
    status: int
    received: bool
    nbytes: int
    immediate: int | None
    pair: int
    vendor: int


class Completions:
    """A completion queue with a descriptor, `fd`, that is readable when something is in it: then `drain`."""

    _BATCH = 32

    def __init__(self, context: Any, depth: int) -> None:
        modules = load()
        before = event_descriptors()
        with told("create a completion channel"):
            self._channel = modules.cq.CompChannel(context)
        appeared = event_descriptors() - before
        # newer versions tell it themselves
        fd = getattr(self._channel, "fd", None) or (appeared.pop() if len(appeared) == 1 else None)
        if fd is None:
            raise VerbsError(
                "cannot find the descriptor of a completion channel; is another version of pyverbs needed?"
            )
        self.fd = int(fd)
        os.set_blocking(self.fd, False)
        with told(f"create a completion queue for {depth} requests"):
            self._queue = modules.cq.CQ(context, depth, None, self._channel, 0)
            self._queue.req_notify()
        self.depth = depth
        self._with_immediate = int(modules.enums.IBV_WC_WITH_IMM)
        self._receive = int(modules.enums.IBV_WC_RECV)  # bit of the opcodes of all receives
        self._error = modules.pyverbs_error.PyverbsError
        self._closed = False

    def fileno(self) -> int:
        return self.fd

    def drain(self) -> list[Completion]:
        """All that is there now; never blocks. Whatever comes later makes `fd` readable again. Raises VerbsError."""
        _require(not self._closed)
        try:
            while True:
                self._channel.get_cq_event(self._queue)
                self._queue.ack_events(1)
        except self._error:
            pass  # no more events: the descriptor does not block
        found: list[Completion] = []
        with told("read a completion queue"):
            self._queue.req_notify()  # before the look: what comes in between is either seen now or announced
            while True:
                count, batch = self._queue.poll(self._BATCH)
                found.extend(map(self._convert, batch))
                if count < self._BATCH:
                    return found

    def _convert(self, wc: Any) -> Completion:
        # fields other than the request, status and pair mean nothing after an error
        good = wc.status == 0
        return Completion(
            request=wc.wr_id,
            status=wc.status,
            received=good and bool(wc.opcode & self._receive),
            nbytes=wc.byte_len if good else 0,
            immediate=socket.ntohl(wc.imm_data) if good and wc.wc_flags & self._with_immediate else None,
            pair=wc.qp_num,
            vendor=wc.vendor_err,
        )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for thing in (self._queue, self._channel):
                with contextlib.suppress(self._error):
                    thing.close()


class Work(NamedTuple):
    """A request to send `nbytes` from `offset` of `region`. With `remote` (address, key): an RDMA WRITE to there, else a
    SEND into the oldest receive that is posted at the other end. A write with `immediate` uses one up too.
    `signaled` False: heard of only if it fails. `more`: (region, offset, nbytes) of what follows in the same message."""

    request: int
    region: Region
    offset: int
    nbytes: int
    remote: tuple[int, int] | None = None
    immediate: int | None = None
    signaled: bool = True
    more: tuple[tuple[Region, int, int], ...] = ()


class _Device(Protocol):
    @property
    def name(self) -> str: ...


class QueuePair:
    """A reliable connected queue pair: INIT -> `connect` -> RTS -> (`fail`, or any error) ERR. Never comes back from ERR:
    a new pair is needed. Requests posted in ERR, and those under way, complete as flushed."""

    def __init__(
        self,
        device: _Device,
        domain: Any,
        completions: Completions,
        sends: int,
        receives: int,
        port_number: int,
        gather: int,
    ) -> None:
        modules = load()
        self._enums = enums = modules.enums
        self._error = modules.pyverbs_error.PyverbsError
        self._wr = modules.wr
        self.device = device
        self.port_number = port_number
        self.psn = random.SystemRandom().getrandbits(24)
        """Of its first packet."""
        limits = modules.qp.QPCap(max_send_wr=sends, max_recv_wr=receives, max_send_sge=gather, max_recv_sge=1)
        queue = completions._queue
        with told(f"create a queue pair on {device.name} for {sends} sends and {receives} receives"):
            wanted = modules.qp.QPInitAttr(qp_type=enums.IBV_QPT_RC, scq=queue, rcq=queue, cap=limits, sq_sig_all=0)
            self._pair = modules.qp.QP(domain, wanted)
            attributes = modules.qp.QPAttr(port_num=port_number)
            attributes.qp_access_flags = enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            self._pair.to_init(attributes)
        self.number = int(self._pair.qp_num)
        self._receives: dict[int, tuple[tuple[int, ...], Any]] = {}
        self._closed = False

    def connect(
        self,
        own: Gid | None,
        number: int,
        psn: int,
        gid: str | None,
        lid: int,
        mtu: int,
        timeout_exponent: int = 16,
        retries: int = 4,
    ) -> None:
        """Joins this pair with one of another process, which has to do the same. Receives may be posted before.

        Args:
            own: entry of this port's table to send from; None only on InfiniBand.
            number, psn, gid, lid: of the other pair; `gid` as in `Gid.raw`.
            mtu: bytes a packet; the smaller one of the two ports.
            timeout_exponent: an acknowledgement may take 4.096 us times two to this power (16: 0.27 s), by the letter up to
                four times that, until it is asked for again. It should be above the round trip of a slow link.
            retries: that often; at most 6.

        Raises:
            VerbsError: also for numbers out of range.
        """
        _require(not self._closed)
        codes = {nbytes: code for code, nbytes in MTUS.items()}
        if mtu not in codes:
            raise VerbsError(f"an RDMA packet cannot have {mtu} bytes; possible are {sorted(codes)}")
        if not (0 <= retries <= MAX_RETRIES and 1 <= timeout_exponent <= 31):
            raise VerbsError(
                f"retries {retries} (0 to {MAX_RETRIES}) or timeout exponent {timeout_exponent} (1 to 31) is out of range"
            )
        modules = load()
        with told(f"connect a queue pair of {self.device.name} with pair {number} of {gid or f'lid {lid}'}"):
            attributes = modules.qp.QPAttr(port_num=self.port_number)
            attributes.dest_qp_num = number
            attributes.rq_psn = psn
            attributes.path_mtu = codes[mtu]
            attributes.max_dest_rd_atomic = 1
            attributes.min_rnr_timer = 12
            if own is not None and gid is not None:
                route = modules.addr.GlobalRoute(dgid=modules.addr.GID(gid), sgid_index=own.index, hop_limit=64)
                address = modules.addr.AHAttr(gr=route, is_global=1, port_num=self.port_number, dlid=lid)
            else:
                address = modules.addr.AHAttr(is_global=0, port_num=self.port_number, dlid=lid)
            attributes.ah_attr = address
            self._pair.to_rtr(attributes)
            attributes.sq_psn = self.psn
            attributes.max_rd_atomic = 1
            attributes.timeout = timeout_exponent
            attributes.retry_cnt = retries
            attributes.rnr_retry = MAX_RETRIES
            self._pair.to_rts(attributes)

    @property
    def state(self) -> str:
        """RESET, INIT, RTR, RTS, SQD, SQE or ERR; asks the kernel. Raises VerbsError."""
        _require(not self._closed)
        with told(f"query a queue pair of {self.device.name}"):
            attributes, _ = self._pair.query(self._enums.IBV_QP_STATE)
        states = ("RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR")
        return states[attributes.qp_state] if attributes.qp_state < len(states) else "UNKNOWN"

    def fail(self) -> None:
        """Into ERR: nothing more is sent or accepted; what is posted completes as flushed. Raises VerbsError."""
        _require(not self._closed)
        attributes = load().qp.QPAttr(qp_state=self._enums.IBV_QPS_ERR)
        with told(f"take a queue pair of {self.device.name} out of service"):
            self._pair.modify(attributes, self._enums.IBV_QP_STATE)

    def post_receive(self, request: int, region: Region, offset: int, nbytes: int) -> None:
        """Where the next SEND goes; a write with an immediate uses it up without touching it. Raises VerbsError."""
        _require(not self._closed)
        key = (request, region.address + offset, nbytes, region.lkey)
        known = self._receives.get(request)
        if known is None or known[0] != key:  # making one costs more than posting it
            known = self._receives[request] = (key, self._wr.RecvWR(request, 1, [self._wr.SGE(*key[1:])]))
        try:
            self._pair.post_recv(known[1])
        except self._error as error:
            raise self._refused("receive", error) from None

    def post(self, works: Sequence[Work]) -> None:
        """Posts the requests together; they are carried out in order: at the other end, what a SEND announces after a write
        is seen after its bytes. Raises VerbsError."""
        _require(not self._closed)
        enums = self._enums
        chain: list[Any] = []
        for work in works:
            parts = ((work.region, work.offset, work.nbytes), *work.more)
            pieces = [self._wr.SGE(region.address + offset, nbytes, region.lkey) for region, offset, nbytes in parts]
            if work.remote is None:
                kind = enums.IBV_WR_SEND if work.immediate is None else enums.IBV_WR_SEND_WITH_IMM
            else:
                kind = enums.IBV_WR_RDMA_WRITE if work.immediate is None else enums.IBV_WR_RDMA_WRITE_WITH_IMM
            request = self._wr.SendWR(
                wr_id=work.request,
                opcode=kind,
                num_sge=len(pieces),
                sg=pieces,
                imm_data=socket.htonl(work.immediate or 0),
                send_flags=enums.IBV_SEND_SIGNALED if work.signaled else 0,
            )
            if work.remote is not None:
                request.set_wr_rdma(work.remote[1], work.remote[0])
            if chain:
                chain[-1].next_wr = request
            chain.append(request)
        try:
            self._pair.post_send(chain[0])
        except self._error as error:
            raise self._refused("send", error) from None

    def _refused(self, what: str, error: Exception) -> VerbsError:
        code = getattr(error, "error_code", 0) or 0
        return VerbsError(
            f"queue pair {self.number} of {self.device.name} does not take a {what}: {error}", max(code, 0)
        )

    def close(self) -> None:
        """Destroys the pair: what arrives for it is dropped from now on. Idempotent; never raises."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(self._error):
                self._pair.close()
