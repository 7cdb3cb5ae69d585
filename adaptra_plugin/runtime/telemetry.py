"""What a rank tells of itself and, on the coordinator, of the whole job: to its reporter and to the coordinator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from adaptra_plugin.report import Reporter, StragglerEvent
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.messages import Message, Rail, Report
from adaptra_plugin.runtime.rails import RailWatch
from adaptra_plugin.runtime.topology import COORDINATOR, Topology
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.profile import Profile
from adaptra_plugin.transport import PeerInfo

logger = logging.getLogger("adaptra")


@dataclass
class Telemetry:
    """Any thread. Only `iteration` is called on the training thread.

    Attributes:
        reporter: of this rank.
        me: this rank.
        send: `(rank, message)`; never blocks.
        now: `(iteration, plan version)` of this rank.
        failed: whether this rank has failed: then nothing more comes.
    """

    reporter: Reporter
    me: PeerInfo
    topology: Topology
    send: Callable[[int, Message], None]
    now: Callable[[], tuple[int, int]]
    failed: Callable[[], bool]

    def __post_init__(self) -> None:
        self._rails = RailWatch(self.topology, self.me.host)

    def iteration(self, iteration: Iteration, *, spans: bool, judged: bool) -> None:
        """Measures of an iteration that is over. `judged`: the coordinator gets them."""
        report = iteration.report(self.me.host)
        if judged:
            self.send(COORDINATOR, Report.of(report))
        metrics = report.metrics()
        if spans:
            metrics["started_unix_ms"] = round(iteration.started_unix_ms, 3)
            metrics["spans"] = iteration.spans()
        self.reporter.iteration(metrics)

    def rail(self, peer: PeerInfo, rail: str, state: str, why: str) -> None:
        """A step in the life of a rail (on the control thread, which does not end because it cannot be reported). After the
        loss of a peer there are no rails to speak of."""
        if self.failed():
            return
        try:
            iteration, version = self.now()
            self.reporter.message("rail", peer=peer.rank, rail=rail, state=state, why=why, iteration=iteration)
            event = self._rails.step(peer, rail, state, why, iteration=iteration, version=version)
        except Exception:
            logger.exception("rail %s of %s is %s (%s), which cannot be reported", rail, peer, state, why)
            return
        if event is not None:
            self.send(COORDINATOR, Rail(event=event))

    def loss(self, peer: PeerInfo, why: str) -> None:
        """A peer is lost, and this rank ends."""
        iteration, version = self.now()
        self.reporter.event(
            StragglerEvent.of_peer(
                peer.pp_rank,
                peer.rank,
                peer.host,
                replica=self.topology.place(peer.rank)[0],
                iteration=iteration,
                action=f"this rank ends: {why}",
                plan_version=version,
            )
        )

    def plan(self, version: int, first_iteration: int, plan: Plan, profile: Profile, reason: str) -> None:
        """A plan is committed."""
        warmups = " ".join(map(str, plan.warmup))
        self.reporter.message(
            "plan",
            f"plan v{version} runs from iteration {first_iteration} on ({reason}): warm-ups {warmups}, "
            f"predicted {plan.makespan_ms:.1f} ms an iteration",
            version=version,
            first_iteration=first_iteration,
            reason=reason,
            plan=plan.to_json(),
            profile=profile.to_json(),
        )
