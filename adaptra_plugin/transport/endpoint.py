"""The transport of one rank: an endpoint with channels to its neighbours, served by one proxy."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from adaptra_plugin import errors
from adaptra_plugin.backoff import Backoff
from adaptra_plugin.config import SimulateConfig, TransportConfig
from adaptra_plugin.errors import HandshakeError, TransportError
from adaptra_plugin.shortage import told
from adaptra_plugin.transport.bind import choose_bind, is_loopback, is_wildcard
from adaptra_plugin.transport.bridge import MAX_CONTROL_BACKLOG, RECORD, Op
from adaptra_plugin.transport.channel import Channel, Link
from adaptra_plugin.transport.control import ControlStream, encode_control
from adaptra_plugin.transport.event_pump import EventPump
from adaptra_plugin.transport.log import log
from adaptra_plugin.transport.memfd import growth_limit
from adaptra_plugin.transport.placement import proxy_cpus, spin_s
from adaptra_plugin.transport.ring import WINDOW_BYTES
from adaptra_plugin.transport.shared import BackpressureDrainer, Fate, Loss, Shared
from adaptra_plugin.transport.slabs import Slabs
from adaptra_plugin.transport.spawn import SPAWNS, Spawn
from adaptra_plugin.transport.staging import Copier, Device
from adaptra_plugin.transport.types import PROTOCOL, Address, EndpointInfo, PeerInfo

MIN_SECRET_BYTES = 16
REMIND_S = 10.0
"""Until it is said that something is waited for at the start; again after pauses that double."""
STATS_DEADLINE_S = 2.0
_MARGIN_S = 10.0  # for the proxy to notice its own deadline
_LAST_RECORDS_S = 1.0  # for the last records of a peer to come, once its end is announced
_LAST_WORDS_S = 5.0  # for a proxy that has closed its sockets to be gone

_ENDED = Loss(TransportError, "the endpoint has ended", "The reason is in the first error of this rank.")
_CLOSING = Loss(TransportError, "this endpoint is closing", "Send before `close`.")
_live: weakref.WeakSet[Endpoint] = weakref.WeakSet()


class Endpoint:
    """One per rank; create it after any fork. Listens from construction on; `connect` brings the links up."""

    endpoint_info: EndpointInfo
    """How peers reach this endpoint; publish it through the launcher's store."""
    on_control: Callable[[int, dict[str, Any]], None]
    """`(rank, message)` of every control message. Called on the control thread: be quick, never wait in it."""
    on_peer_lost: Callable[[PeerInfo, str], None]
    """`(peer, reason)`, once a peer, not for a goodbye. Called on the control thread: be quick, never wait in it."""
    on_rail: Callable[[PeerInfo, str, str, str], None]
    """`(peer, rail, state, why)`: a rail is `suspect`, `paused`, or `healthy` again. On the control thread, as above."""

    def __init__(
        self,
        me: PeerInfo,
        config: TransportConfig,
        secret: bytes,
        *,
        simulate: SimulateConfig | None = None,
        bind_host: str | None = None,
        clock_offset_s: float = 0.0,
        spawn: Spawn | None = None,
        device: Device | None = None,
        wraparound: bool = False,
    ) -> None:
        """`secret`: the same random bytes on all ranks of the job (at least 16). `bind_host`: where to listen while
        `config.bind` is "auto", and what to tell peers while it is a wildcard; without it the address that routes to
        `MASTER_ADDR`. `clock_offset_s`: this rank's clock
        in front of the host's (s), for tests. `spawn`: starts the proxy, instead of what `config.proxy` says.
        `device`: the accelerator whose tensors are copied beside its computation, instead of CUDA. `wraparound`: ranks run several
        model chunks each, so the last one sends to the first one too, see `Channel.send`.

        Raises:
            TransportError: the secret is too short, the address cannot be bound, or the proxy does not start.
        """
        if len(secret) < MIN_SECRET_BYTES:
            raise TransportError(
                f"the job's secret has {len(secret)} bytes: give at least {MIN_SECRET_BYTES} random ones"
            )
        self.me = me
        self.on_control = lambda rank, message: None
        self.on_peer_lost = lambda peer, reason: None
        self.on_rail = lambda peer, rail, state, why: None
        self._config = config
        self._fate = Fate()
        self._peers: dict[int, PeerInfo] = {}
        self._links: dict[int, Link] = {}
        self._channels: dict[int, Channel] = {}
        self._lost: set[int] = set()
        self._controlled: set[int] = set()
        self._backlog: dict[int, int] = {}
        self._has_faults = simulate is not None and bool(simulate.links or simulate.faults)
        self._connect_called = False
        self._gate = threading.Event()  # the proxy has answered `start` or `connect`
        self._refusal: TransportError | None = None
        self._stats: dict[str, Any] = {}
        self._stats_answers: dict[int, threading.Event] = {}
        self._stats_ids = itertools.count(1)
        self._close_lock = threading.Lock()
        self._closed = False
        self._said_closed = False
        self._last_words = ""
        host = choose_bind(config.bind, bind_host)
        cpus = proxy_cpus(config.cpus)
        self._proxy = (spawn or SPAWNS[config.proxy])(me.rank)
        spin = spin_s(config.spin_us)
        slabs = Slabs(
            WINDOW_BYTES if config.ring_grows else config.ring_bytes
        )  # a ring full of messages may be on its way to be used
        self._copier = Copier(me.rank, self._copy_failed, config.segment_kib << 10, device)
        with ExitStack() as undo, told(f"the endpoint of rank {me.rank} cannot be started", TransportError):
            undo.callback(self._proxy.discard)
            self._pump = EventPump(self._proxy.data, self._records, spin)
            undo.callback(self._pump.close)
            self._shared = Shared(
                config,
                self._fate,
                self._pump,
                slabs,
                self._copier,
                lambda: time.monotonic() + clock_offset_s,
                BackpressureDrainer() if wraparound else None,
            )
            self._control = ControlStream(self._proxy.control, self._event, self._over, f"adaptra-control-{me.rank}")
            undo.callback(self._control.close)
            self._thread = self._control.thread
            self._control.start()
            undo.pop_all()
        _live.add(self)
        self._tell(
            "start",
            me={"rank": me.rank, "pp_rank": me.pp_rank, "host": me.host},
            config=config.model_dump(mode="json") | {"cpus": cpus, "spin_us": spin * 1e6},
            secret=secret.hex(),
            bind=host,
            shown=choose_bind("auto", bind_host) if is_wildcard(host) else None,
            simulate={} if simulate is None else simulate.model_dump(mode="json", include={"links", "faults"}),
            clock_offset_s=clock_offset_s,
        )
        try:
            self._await_answer(config.connect_s)
        except BaseException:
            self.close(linger_s=0.0)
            raise

    @property
    def address(self) -> Address:
        """The main address of the card."""
        return self.endpoint_info.addresses[0]

    def _tell(self, op: str, descriptors: Sequence[int] = (), **fields: Any) -> None:
        self._control.send({"op": op, **fields}, descriptors)

    def _await_answer(self, deadline_s: float) -> None:
        started, pauses = time.monotonic(), Backoff(REMIND_S)
        while not self._gate.wait(min(pauses.pause_s, max(0.0, started + deadline_s - time.monotonic()))):
            waited = time.monotonic() - started
            if waited < deadline_s:
                pauses.next()
                log.warning("the proxy of rank %d has not answered for %.0f s", self.me.rank, waited)
                continue
            raise TransportError(
                f"the proxy of rank {self.me.rank} has not answered within {deadline_s:g} s: its host is starved of CPU"
            )
        self._fate.check()
        if self._refusal is not None:
            raise self._refusal

    # --- life

    def connect(
        self,
        peers: Mapping[int, tuple[PeerInfo, EndpointInfo]],
        *,
        neighbours: Collection[int],
        coordinator: int,
    ) -> None:
        """Blocks until all links with the neighbours and the control link with the coordinator stand (the coordinator:
        with everybody), at most `connect_s` of the configuration. `peers` may contain this rank itself.

        Raises:
            HandshakeError: a peer refused, with its reason (another secret), or has other settings.
            PeerLostError: a peer ended meanwhile.
            TransportError: names who is missing, why, and what to check.
        """
        if self._connect_called:
            raise TransportError("connect was called twice on one endpoint: create a new endpoint")
        self._connect_called = True
        self._fate.check()
        others = {rank: peer for rank, peer in peers.items() if rank != self.me.rank}
        unknown = [rank for rank in (*neighbours, coordinator) if rank != self.me.rank and rank not in others]
        if unknown:
            raise TransportError(f"no address is known for ranks {sorted(set(unknown))}: publish one for every rank")
        self._controlled = set(others) if coordinator == self.me.rank else {coordinator}
        near = sorted(set(neighbours) - {self.me.rank})
        wanted = {rank: others[rank] for rank in sorted({*near, *self._controlled})}
        for info, endpoint_info in wanted.values():
            self._check_endpoint_info(info, endpoint_info)
            self._peers[info.rank] = info
        config = self._config
        own_ring = growth_limit(config.ring_bytes) if config.ring_grows else config.ring_bytes
        for rank in near:
            info, endpoint_info = wanted[rank]
            self._links[rank] = link = Link(
                info, min(own_ring, endpoint_info.ring_bytes), self._shared, self._malformed
            )
            self._channels[rank] = Channel(link)
        self._gate.clear()
        self._fate.check()
        deadline_s = self._config.connect_s
        self._tell(
            "connect",
            [fd for rank in near for fd in self._links[rank].descriptors()],
            peers=[
                {
                    "rank": rank,
                    "pp_rank": info.pp_rank,
                    "host": info.host,
                    "endpoint_info": endpoint_info.to_text(),
                    "neighbour": rank in self._links,
                }
                for rank, (info, endpoint_info) in wanted.items()
            ],
            coordinator=coordinator,
            deadline_s=deadline_s,
            remind_s=REMIND_S,
        )
        self._await_answer(deadline_s + _MARGIN_S)

    def _check_endpoint_info(self, info: PeerInfo, endpoint_info: EndpointInfo) -> None:
        if endpoint_info.protocol != PROTOCOL:
            raise HandshakeError(
                f"{info} speaks protocol version {endpoint_info.protocol}, this rank {PROTOCOL}: install the same release of "
                "adaptra_plugin on all ranks"
            )
        if endpoint_info.connections != self._config.connections_per_direction:
            raise HandshakeError(
                f"{info} at {endpoint_info} has adaptra.transport.connections_per_direction {endpoint_info.connections}, this rank "
                f"{self._config.connections_per_direction}: use the same configuration on all ranks"
            )
        if info.host != self.me.host and all(is_loopback(address.host) for address in endpoint_info.addresses):
            log.warning(
                "%s listens on %s, which only its own host reaches: set adaptra.transport.bind there",
                info,
                endpoint_info,
            )

    def close(self, linger_s: float = 5.0) -> None:
        """Sends what waits (at most `linger_s` seconds), says goodbye, so that peers do not take it for a loss, and
        ends the proxy. Idempotent. Every later wait raises TransportError."""
        with self._close_lock:
            first, self._closed = not self._closed, True
        if first:
            for link in list(self._links.values()):
                for lane in link.send_lanes():
                    lane.refuse(_CLOSING)
            self._pump.wake()
            self._copier.finish(linger_s)
            for link in list(self._links.values()):
                link.shut_path()
            self._tell("close", linger_s=linger_s)
        if threading.current_thread() is not self._thread:
            self._thread.join(linger_s + _MARGIN_S)
            if self._thread.is_alive() and first:
                log.error("the proxy of rank %d does not end and is killed", self.me.rank)
                self._proxy.kill()
                self._thread.join(_LAST_WORDS_S)
        _live.discard(self)

    def fail(self, error: Exception) -> None:
        """Makes every present and future wait and send on this endpoint raise `error`; the first call counts."""
        if self._fate.error is None:
            self._fate.error = error
        self._abort_lanes()

    def _copy_failed(self, reason: str) -> None:
        """On the copier's thread."""
        log.error("%s", reason)
        self.fail(TransportError(f"rank {self.me.rank}: {reason}"))

    def _abort_lanes(self) -> None:
        for link in list(self._links.values()):
            link.abort(_ENDED)
        self._pump.wake()
        self._gate.set()

    # --- use

    def channel(self, rank: int) -> Channel:
        """The channel to a neighbour; the same object each time. Raises TransportError for any other rank."""
        try:
            return self._channels[rank]
        except KeyError:
            raise TransportError(
                f"rank {rank} is no neighbour of rank {self.me.rank}: {sorted(self._channels)} are"
            ) from None

    def send_control(self, rank: int, message: dict[str, Any]) -> None:
        """Queues a JSON object for the coordinator, or from it for any rank; never blocks. Dropped if the peer is gone.

        Raises:
            TransportError: no JSON, longer than 4 MiB, no control connection with `rank`, 64 MiB wait for it already,
                or the endpoint has failed.
        """
        self._fate.check()
        if rank not in self._controlled:
            raise TransportError(
                f"rank {self.me.rank} has no control connection with rank {rank}: control messages go to and from the "
                f"coordinator only ({sorted(self._controlled)} are possible)"
            )
        waiting = self._backlog.get(rank, 0)
        if waiting > MAX_CONTROL_BACKLOG:
            raise TransportError(
                f"{waiting} bytes of control messages wait for rank {rank}: it has stopped reading them, see its log"
            )
        self._tell("control", rank=rank, message=encode_control(message))

    def set_iteration(self, iteration: int) -> None:
        """Which injected faults apply from now on to what this rank sends."""
        if self._has_faults:
            self._pump.post(Op.ITERATION, -1, 0, 0, iteration)

    def stats(self) -> dict[str, Any]:
        """Counters since the start, per peer and direction: bytes (with headers), messages, ms blocked by a full ring, how
        often it was full, messages that blocked sends drained early; per peer what the proxy knows: its rails, offset of its
        clock and round trip (ms); and refused connections. The proxy's part is the last known one if it is busy."""
        self._pump.drain()
        if not self._closed and self._fate.error is None and threading.current_thread() is not self._thread:
            number = next(self._stats_ids)
            self._stats_answers[number] = answer = threading.Event()
            self._tell("stats", id=number)
            answer.wait(STATS_DEADLINE_S)
            self._stats_answers.pop(number, None)
        known = self._stats
        return {
            "refused_connections": known.get("refused_connections", 0),
            "peers": {
                rank: {**known.get("peers", {}).get(str(rank), {}), **link.stats()}
                for rank, link in list(self._links.items())
            },
        }

    # --- what the proxy says

    def _records(self, packet: bytes) -> None:
        """On whichever thread reads the data socket."""
        for op, direction, lane, flags, rank, position, total, value, after in RECORD.iter_unpack(packet):
            # of this rank's own proxy, what it says is about all links
            for link in self._links.values() if rank < 0 else filter(None, [self._links.get(rank)]):
                link.record(op, direction, lane, flags, position, total, value, after)

    def _event(self, event: dict[str, Any], descriptors: list[int]) -> None:
        """On the control thread."""
        kind = event["event"]
        if kind == "control":
            for rank, message in event["messages"]:
                self.on_control(rank, message)
        elif kind in ("lost", "left"):
            self._gone(kind, event)
        elif kind == "memfds":
            self._memfds(event["rank"], descriptors, with_path=event["direct"])
        elif kind == "ready":
            self.endpoint_info = EndpointInfo.parse(event["endpoint_info"])
            self._gate.set()
        elif kind == "connected":
            for rank, link in sorted(event["links"].items(), key=lambda item: int(item[0])):
                why = f" ({link['why']})" if link["why"] else ""
                if link["direct"]:
                    self._links[int(rank)].go_direct()
                    why += "; messages pass the proxies by"
                log.info("connected: %s by %s%s", self._peers[int(rank)], ", ".join(link["rails"]), why)
            self._gate.set()
        elif kind in ("start_failed", "connect_failed"):
            self._refusal = _error_class(event.get("error"))(event["text"])
            self._refusal.why = str(event.get("why", ""))
            self._gate.set()
        elif kind == "stats":
            self._stats = event["data"]
            answer = self._stats_answers.get(event["id"])
            if answer is not None:
                answer.set()
        elif kind == "backlog":
            self._backlog[event["rank"]] = event["waiting"]
        elif kind == "log":
            log.log(int(event["level"]), "%s", event["text"])
        elif kind == "rail":  # the proxy has written a line
            self.on_rail(self._peers[event["rank"]], event["rail"], event["state"], event["why"])
        elif kind == "failed":
            self._last_words = f" ({event['text']})"
        elif kind == "closed":
            self._said_closed = True
            self._control.stop()
        else:
            log.warning("event %r of the proxy is unknown", kind)

    def _memfds(self, rank: int, descriptors: list[int], *, with_path: bool) -> None:
        link = self._links.get(rank)
        if link is None:
            for fd in descriptors:
                os.close(fd)
            return
        path: socket.socket | None = None
        end = descriptors.pop() if with_path and descriptors else None
        try:
            if end is not None:
                path = socket.socket(fileno=end)
            link.map_remote(descriptors)
        except (ValueError, OSError) as error:
            why = str(error) if descriptors else "this process has no room for more descriptors (ulimit -n)"
            log.warning("the rings of %s cannot be mapped (%s): shared memory is not used", link.info, why)
            if path is not None:
                path.close()
            self._tell("unmapped", rank=rank, why=why)
            return
        if path is not None:
            link.adopt(path, self.me.rank)
        self._tell("mapped", rank=rank)

    def _gone(self, kind: str, event: dict[str, Any]) -> None:
        info = self._peers[event["rank"]]
        loss = Loss(_error_class(event["error"]), event["reason"], event["remedy"])
        link = self._links.get(info.rank)
        if link is not None:
            # what has arrived lies in the data socket in front of the record that nothing follows
            def severed() -> bool:
                return (link.severed and link.path_ended) or self._fate.error is not None

            self._pump.wait(severed, time.monotonic() + _LAST_RECORDS_S)
            link.abort(loss)
            self._pump.wake()
        if kind == "lost":
            self._tell_lost(info, loss.reason)

    def _malformed(self, info: PeerInfo, loss: Loss) -> None:
        """On whichever thread has read nonsense."""
        self._pump.wake()
        self._control.call(lambda: self._tell_lost(info, loss.reason))

    def _tell_lost(self, info: PeerInfo, reason: str) -> None:
        if info.rank not in self._lost:
            self._lost.add(info.rank)
            self.on_peer_lost(info, reason)

    def _over(self, error: BaseException | None) -> None:
        """The control stream has ended; on its thread, the last thing."""
        if error is not None:
            log.error("the control thread of rank %d failed", self.me.rank, exc_info=error)
            failure = TransportError(
                f"the control thread of rank {self.me.rank} failed: {type(error).__name__}: {error}. This is a defect, "
                "or a callback (on_control, on_peer_lost) that raised; the log has the traceback"
            )
            failure.__cause__ = error
            self.fail(failure)
            self._tell("close", linger_s=0.0)
        elif not self._said_closed:
            self._proxy.join(_LAST_WORDS_S)
            end = self._proxy.obituary() + self._last_words
            if not self._closed:
                log.error("%s", end)
            self.fail(TransportError(f"{end}: look at the log of rank {self.me.rank}"))
        self.fail(TransportError(f"the endpoint of rank {self.me.rank} is closed"))
        self._pump.close()
        self._control.close()
        if not self._proxy.join(_LAST_WORDS_S):
            self._proxy.kill()
            if not self._proxy.join(_LAST_WORDS_S):
                log.error("the proxy of rank %d does not end", self.me.rank)
        for answer in list(self._stats_answers.values()):
            answer.set()
        self._copier.close()
        for link in self._links.values():
            link.close()

    # --- forked children (of a data loader, say)

    def abandon(self) -> None:
        """In a forked child: closes the inherited descriptors, or the proxy would not notice the parent's death."""
        self._closed = True
        self._fate.error = TransportError("this endpoint belongs to the parent process: create one after the fork")
        with contextlib.suppress(OSError):
            self._pump.abandon()
        with contextlib.suppress(OSError):
            self._control.abandon()
        self._proxy.abandon()
        for link in self._links.values():
            link.close()


def _error_class(name: str | None) -> type[TransportError]:
    found = getattr(errors, name or "", None)
    return found if isinstance(found, type) and issubclass(found, TransportError) else TransportError


def _abandon_all() -> None:
    for endpoint in list(_live):
        endpoint.abandon()
    _live.clear()


os.register_at_fork(after_in_child=_abandon_all)
