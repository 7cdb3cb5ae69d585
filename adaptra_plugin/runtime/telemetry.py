"""What a rank tells of itself and, on the coordinator, of the whole job: to its reporter, and to the rank with the W&B run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adaptra_plugin.report import Reporter, StragglerEvent
from adaptra_plugin.runtime.iteration import Iteration
from adaptra_plugin.runtime.messages import Message, Rail, Report, Show
from adaptra_plugin.runtime.rails import RailWatch, event_from
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
        wandb_rank: world rank that owns the host's W&B run.
        send: `(rank, message)`; never blocks.
        now: `(iteration, plan version)` of this rank.
        failed: whether this rank has failed: then nothing more comes.
    """

    reporter: Reporter
    me: PeerInfo
    topology: Topology
    wandb_rank: int
    send: Callable[[int, Message], None]
    now: Callable[[], tuple[int, int]]
    failed: Callable[[], bool]

    def __post_init__(self) -> None:
        self._rails = RailWatch(self.topology, self.me.host)
        self._shown = -1  # newest iteration of which this rank's W&B run has the overview, if rank 0 sends it

    # --- of this rank

    def iteration(self, iteration: Iteration, *, spans: bool, judged: bool) -> None:
        """Measures of an iteration that is over. `judged`: the coordinator gets them; then W&B gets its overview instead."""
        report = iteration.report(self.me.host)
        if judged:
            self.send(COORDINATOR, Report(report=report))
        metrics = report.metrics()
        if spans:
            metrics["started_unix_ms"] = round(iteration.started_unix_ms, 3)
            metrics["spans"] = iteration.spans()
        self.reporter.iteration(metrics, to_wandb=not judged)

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
            self.send(COORDINATOR, Rail(event=event_from(event)))

    def loss(self, peer: PeerInfo, why: str) -> None:
        """A peer is lost, and this rank ends."""
        iteration, version = self.now()
        self.reporter.event(
            StragglerEvent(
                time_unix=time.time(),
                kind="peer",
                state="lost",
                replica=self.topology.place(peer.rank)[0],
                link=None,
                stages=(peer.stage,),
                ranks=(peer.rank,),
                hosts=(peer.host,),
                since_iteration=iteration,
                found_iteration=iteration,
                delay_before_ms=0.0,
                delay_after_ms=0.0,
                action=f"this rank ends: {why}",
                predicted_iteration_ms_before=None,
                predicted_iteration_ms_after=None,
                predicted_gain=None,
                plan_version=version,
            )
        )

    # --- of the job, on the coordinator

    def event(self, event: StragglerEvent) -> None:
        """An event that this rank tells everybody of."""
        self.reporter.event(event)
        if self.wandb_rank != self.me.rank:
            self.send(self.wandb_rank, Show(event=event))

    def overview(self, metrics: dict[str, Any]) -> None:
        """One iteration of the whole pipeline."""
        self.reporter.pipeline(metrics)
        if self.wandb_rank != self.me.rank:
            self.send(self.wandb_rank, Show(pipeline=metrics))

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

    # --- of the job, on the rank with the W&B run

    def show(self, message: Show) -> None:
        """What the coordinator reports."""
        if message.event is not None:
            self.reporter.show_event(message.event)
        if message.pipeline is not None:
            self.reporter.show_pipeline(message.pipeline)
            self._shown = message.pipeline["iteration"]

    def await_overview(self, patience_s: float = 5.0) -> None:
        """The coordinator's view of the last iteration is on its way to the W&B run of this rank."""
        until = time.monotonic() + patience_s
        while self._shown < self.now()[0] - 1 and time.monotonic() < until and not self.failed():
            time.sleep(0.01)
