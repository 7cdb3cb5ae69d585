"""Whom a rank has lost, what the others hear of its own end, and which error the host's call raises."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from adaptra_plugin.errors import PeerLostError
from adaptra_plugin.runtime.departures import ENDED, Departure, Departures, Presence, is_foreign, reason
from adaptra_plugin.runtime.messages import loss_from
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.shortage import begin
from adaptra_plugin.transport import PeerInfo

logger = logging.getLogger("adaptra")
COORDINATOR = 0
EXIT_PEER_LOST = 70
PATIENCE_S = 3.0
"""An error of a collective, or of a transfer, waits for so long for the news of whose doing it is."""
_NO_NEWS_S = 0.2
_WATCH_ENDS_S = 5.0


class Losses:
    """One per session.

    Args:
        me: this rank.
        topology: of the job.
        exit_grace_s: a rank that is stuck outside Adaptra is ended so long after a peer is lost.
        send: `(rank, message)`: a control message to the coordinator, or from it to any rank; never blocks, never raises.
        fail: ends everything that waits with the error.
        report: `(peer, why)` of a loss, once.
        last_words: runs before a stuck process is ended.
    """

    def __init__(
        self,
        me: PeerInfo,
        topology: Topology,
        exit_grace_s: float,
        *,
        send: Callable[[int, dict[str, Any]], None],
        fail: Callable[[Exception], None],
        report: Callable[[PeerInfo, str], None],
        last_words: Callable[[], None],
    ) -> None:
        self.failure: Exception | None = None
        """Raised by everything from now on."""
        self.broken = False
        """An iteration failed half-way on this rank."""
        self.presence = Presence()
        self._me = me
        self._topology = topology
        self._exit_grace_s = exit_grace_s
        self._send, self._fail, self._report, self._last_words = send, fail, report, last_words
        self._departures = Departures(self.presence, me.rank, lambda rank: topology.place(rank)[0])
        self._watch: threading.Thread | None = None
        self._left: Departure | None = None  # the newest one of this rank
        self._inside_since: float | None = None
        self._noticed = threading.Event()
        self._closed = False
        self._lock = threading.RLock()  # a signal handler may close the session

    def check(self) -> None:
        """Raises what this rank has failed with."""
        if self.failure is not None:
            self._noticed.set()
            raise self.failure

    # --- what others say

    def lost(self, peer: PeerInfo, why: str) -> None:
        """A peer is gone: the transport has noticed, or nothing goes on without it. Everybody hears of it. If another rank
        had left this schedule before, that is what the peer has ended of."""
        if (cause := self._departures.cause(self.presence.current)) is not None:
            peer, why = cause.peer, cause.why
        if self._me.rank != COORDINATOR and peer.rank != COORDINATOR and self.failure is None and not self._closed:
            self._send(COORDINATOR, _loss_message(peer, why))
        self._lose(peer, why)

    def heard(self, sender: int, message: Mapping[str, Any]) -> None:
        """News of a peer (on the control thread)."""
        try:
            peer, why = loss_from(message, self._topology)
            if message["type"] == "departed":
                departure = Departure.from_json(message)
                if departure.peer.rank != sender != COORDINATOR:
                    raise ValueError(f"it says that rank {departure.peer.rank} has left")
                self._add(departure)
            else:
                self._lose(peer, why)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("what rank %d says of a rank that is gone is not understood: %s", sender, error)

    def _add(self, departure: Departure) -> None:
        if self._closed or not self._departures.add(departure):
            return
        if self._me.rank == COORDINATOR:
            self._tell_all(departure.to_json(), departure.peer.rank)
        with self._lock:
            if self._watch is not None or departure.peer.rank == self._me.rank or self._closed:
                return
            arguments = (self._noticed, lambda found: self.lost(found.peer, found.why))
            watch = threading.Thread(
                target=self._departures.watch, args=arguments, name="adaptra-departures", daemon=True
            )
            started = begin(watch, f"{departure.peer} has left and is blamed at once")
            if started:
                self._watch = watch
        if not started:
            self.lost(departure.peer, departure.why)

    def _lose(self, peer: PeerInfo, why: str) -> None:
        error = PeerLostError(
            f"{peer} is lost: {why}. This rank ({self._me}) cannot go on without it: restart the job from its last checkpoint"
        )
        with self._lock:
            if self.failure is not None or self._closed:
                return
            if self._me.rank == COORDINATOR:
                # before this rank fails: the other ranks must hear of it
                self._tell_all(_loss_message(peer, why), peer.rank)
            self.failure = error
        self._fail(error)
        logger.error("%s", error)
        self._report(peer, why)
        watch = threading.Thread(target=self._end_if_stuck, name="adaptra-peer-lost", daemon=True)
        begin(watch, f"this rank is not ended after {self._exit_grace_s:g} s if it is stuck now")

    def _tell_all(self, message: dict[str, Any], about: int) -> None:
        for rank in range(self._topology.world_size):
            if rank not in (about, self._me.rank):
                self._send(rank, message)

    def _end_if_stuck(self) -> None:
        """Nobody can interrupt a rank that waits in a collective for a peer that is gone; ending it is all that is left."""
        grace = self._exit_grace_s
        lost = time.monotonic()
        while not self._noticed.wait(0.2):
            since = self._inside_since
            if since is not None and time.monotonic() - max(lost, since) > grace:
                break  # otherwise it is busy with something of its own, such as saving a checkpoint
        else:
            return
        logger.critical("%s; this rank has not noticed for %.0f s and ends now", self.failure, grace)
        self._last_words()
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_PEER_LOST)

    # --- what becomes of this rank

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Brackets a host's call that runs a schedule and its collectives. What is raised in the middle of it is told to the
        others at once; an error that is due to another rank is raised as what it is."""
        self._inside_since = time.monotonic()
        try:
            yield
        except BaseException as error:
            cause = self._explain(error)
            if cause is error or not isinstance(error, Exception):
                raise
            raise cause from error
        finally:
            self._inside_since = None
            self.presence.leave()

    def _explain(self, error: BaseException) -> BaseException:
        """The cause of an error that came up in an iteration: the loss of a peer, if that is what happened.

        A collective of the host may fail, and a neighbour may have ended because of the loss, a moment before the news of
        the loss itself arrives; hence the patience. What this rank has raised itself needs none.
        """
        self.broken |= not isinstance(error, StopIteration)  # the end of the data
        if not is_foreign(error):
            self._leave(error)
            return error
        # the coordinator brings the news
        patience_s = _NO_NEWS_S if self._departures.ended(COORDINATOR) else PATIENCE_S
        until = time.monotonic() + patience_s
        while self.failure is None and time.monotonic() < until and not self._closed:
            if (found := self._departures.blamed(self.presence.current)) is not None:
                self.lost(found.peer, found.why)
                break
            time.sleep(0.02)
        self._noticed.set()
        if self.failure is None and isinstance(error, PeerLostError) and isinstance(error.peer, PeerInfo):
            self.lost(error.peer, ENDED)
        if self.failure is None:
            self._leave(error)
            return error
        return self.failure

    def _leave(self, error: BaseException) -> None:
        """This rank leaves the iteration half-way: the others need not find out by waiting for it."""
        step_id = self.presence.step_id
        if step_id is not None and self.failure is None:
            broken = not isinstance(error, StopIteration)
            self._left = Departure(self._me, step_id, final=False, broken=broken, why=reason(error))
            self._tell(self._left)

    def _tell(self, departure: Departure) -> None:
        if self._me.rank == COORDINATOR:
            self._add(departure)
        else:
            self._send(COORDINATOR, departure.to_json())

    def close(self, next_step_id: int) -> None:
        """This rank takes part in no schedule from `next_step_id` on. Idempotent."""
        if not self._closed and self.failure is None:
            # what ends the process, if it is not a session at a keyboard, in which errors end nothing
            error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
            why = ENDED if error is None else reason(error)
            if self._left is not None and self._left.step_id == next_step_id - 1:
                why = self._left.why
            self._tell(Departure(self._me, next_step_id, final=True, broken=self.broken or error is not None, why=why))
        self.abandon()

    def abandon(self) -> None:
        """What is heard from now on is no news."""
        with self._lock:
            self._closed = True
        self._noticed.set()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join(_WATCH_ENDS_S)


def _loss_message(peer: PeerInfo, why: str) -> dict[str, Any]:
    return {"type": "lost", "rank": peer.rank, "pp_rank": peer.pp_rank, "host": peer.host, "why": why}
