"""One per rank and engine: wires measuring, planning, agreement, transport and reports, and owns their threads."""

from __future__ import annotations

import atexit
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from adaptra_plugin import _activation
from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.errors import ConfigError
from adaptra_plugin.report import Reporter, StragglerEvent
from adaptra_plugin.report.console import show_log
from adaptra_plugin.report.reporter import new_run
from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.dispatch import forward_only
from adaptra_plugin.runtime.iteration import Iteration, Links
from adaptra_plugin.runtime.losses import Losses
from adaptra_plugin.runtime.messages import (
    Abort,
    Commit,
    Departed,
    Lost,
    Prepare,
    Rail,
    Refused,
    Report,
    Show,
    Vote,
)
from adaptra_plugin.runtime.rails import RailWatch, event_from
from adaptra_plugin.runtime.rendezvous import Rendezvous, patience_s
from adaptra_plugin.runtime.routing import Router
from adaptra_plugin.runtime.split import Split, SplitReport
from adaptra_plugin.runtime.stopwatch import stopwatch_for
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.runtime.topology import COORDINATOR, Topology
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore
from adaptra_plugin.schedule.names import ADAPTIVE
from adaptra_plugin.schedule.plan import Plan
from adaptra_plugin.schedule.prepare import prepare
from adaptra_plugin.schedule.profile import Profile, StageProfile
from adaptra_plugin.transport import Endpoint, PeerInfo

logger = logging.getLogger("adaptra")
_numbers = itertools.count()


class Session:
    """Everything Adaptra does on one rank.

    Args:
        config: the effective configuration.
        topology: the pipelines of the job.
        store: the launcher's c10d store.
        split: makes the linear layers of this rank's part of the model able to run a split backward, whose weight gradients
            go to the given queue; called if the configuration asks for it.
        device: on which it computes.
        microbatches: of an iteration, to check early that the limits can be kept.
        wandb_rank: world rank that owns the host's W&B run.

    Raises:
        PlanError: `max_activations` is too small for the schedule.
        ConfigError: `max_activations` or an injected link does not fit the number of stages.
        TransportError: a peer cannot be reached.
    """

    def __init__(
        self,
        config: AdaptraConfig,
        topology: Topology,
        store: Any,
        split: Callable[[WeightGradStore], Split],
        device: torch.device,
        microbatches: int,
        *,
        wandb_rank: int = COORDINATOR,
    ) -> None:
        show_log(topology.rank)
        self.config = config
        self.topology = topology
        self.device = device
        self.queue = WeightGradStore()
        self._wandb_rank = wandb_rank
        self._shown = -1  # newest iteration of which this rank's W&B run has the overview, if rank 0 sends it
        self._me = PeerInfo(rank=topology.rank, stage=topology.position, host=socket.gethostname())
        self._losses = Losses(
            self._me,
            topology,
            config.peer_exit_grace_s,
            send=lambda rank, message: self._router.send_last(rank, message),
            fail=self._fail,
            report=self._report_loss,
            last_words=lambda: self._reporter.close(2.0),
        )
        self._closed = False
        self._close_lock = threading.Lock()
        self._iteration = 0
        self._step_id = 0
        self._router = self._make_router()
        self._stopwatch = stopwatch_for(device)
        self._throttle = ComputeThrottle(config.simulate.compute)
        self._limits = _limits(config, topology.stages)
        _check_links(config, topology)
        if config.schedule in ADAPTIVE:
            prepare()
        stages = tuple(StageProfile(1.0, 1.0, 1.0, limit) for limit in self._limits)
        unknown = Profile(microbatches=1, stages=stages, virtual_stages=topology.chunks)
        self._book = PlanBook(unknown, config.schedule, config.transport.deadline_s)
        self._book.plan_for(microbatches)
        with ExitStack() as undo:
            try:
                self._start(store, split, undo)
            except BaseException:
                self._closed = True  # what has not started is not to be ended, and what is heard now is no news
                self._losses.abandon()
                _activation.remove_session(self)
                raise
            undo.pop_all()

    def _start(self, store: Any, split: Callable[[WeightGradStore], Split], undo: ExitStack) -> None:
        """Makes all that has to be given back; what `undo` holds does so if a step fails."""
        config, topology = self.config, self.topology
        patience = patience_s(config.transport.connect_deadline_s)
        rendezvous = self._rendezvous = Rendezvous(store, str(next(_numbers)), topology.rank, patience)
        undo.push(rendezvous.tell_failure)
        secret = rendezvous.secret(topology)
        self.run = new_run(secret)
        self._reporter = Reporter(
            config.report,
            topology.rank,
            wandb_here=topology.rank == self._wandb_rank,
            run=self.run,
            at_exit=self.close,
        )
        undo.callback(self._reporter.close, 1.0)
        host = self._me.host
        self._rails = RailWatch(topology, host)
        self._endpoint = Endpoint(
            self._me,
            config.transport,
            secret,
            simulate=config.simulate,
            bind_host=rendezvous.bind_host(topology, config.transport.bind),
            wraparound=topology.chunks > 1,
        )
        undo.callback(self._endpoint.close, linger_s=0.0)
        self._endpoint.on_control = self._router.receive
        self._endpoint.on_peer_lost = self._losses.lost
        self._endpoint.on_rail = self._rail
        peers = rendezvous.exchange(topology, host, self._endpoint.endpoint_info)
        self._hosts = {rank: info.host for rank, (info, _) in peers.items()}
        self._coordinator = self._make_coordinator() if topology.rank == COORDINATOR else None
        if self._coordinator is not None:
            undo.callback(self._coordinator.close)
        self._endpoint.connect(peers, neighbours=topology.neighbours, coordinator=COORDINATOR)
        self._links = Links(
            previous=None if topology.previous is None else self._endpoint.channel(topology.previous),
            next=None if topology.next is None else self._endpoint.channel(topology.next),
        )
        self._split = split(self.queue) if config.split_backward else None
        if self._split is not None:
            undo.callback(self._split.remove)
            if self._split.report.split == 0:
                logger.warning("rank %d: no linear layer can run a split backward; all run fused", topology.rank)
        if self._coordinator is not None:
            self._coordinator.start()
            logger.info("effective configuration of run %s: %s", self.run, config.model_dump_json())
        self._reporter.message("session", **self.status())
        _activation.add_session(self)
        atexit.register(self.close)

    def _make_coordinator(self) -> Coordinator:
        return Coordinator(
            self.topology,
            self.config,
            self._hosts,
            send=self._router.send,
            on_event=self._event,
            on_plan=self._plan_committed,
            on_overview=self._overview,
            book=self._book,
            limits=self._limits,
        )

    # --- iterations

    def begin(self, microbatches: int) -> Iteration:
        """A training iteration begins: decides on the plan, posts all receives.

        Raises:
            PlanError: the limits cannot be kept with this number of microbatches.
        """
        self._enter()
        self._endpoint.set_iteration(self._iteration)
        if self._split is not None:
            self._split.begin()
        with self._losses.presence.waiting():  # for commit or abort
            version, plan = self._book.begin(self._iteration, microbatches)
        return self._begin(version, plan.schedule.ranks[self.topology.position], microbatches, training=True)

    def begin_evaluation(self, microbatches: int) -> Iteration:
        """A forward-only schedule begins."""
        self._enter()
        actions = forward_only(self.topology.own_stages, microbatches, self.topology.length)
        return self._begin(0, actions, microbatches, training=False)

    def _enter(self) -> None:
        # counted before anything can fail, which would fail on all ranks: they have to count alike
        self._step_id += 1
        self._losses.presence.enter(self._step_id)

    def _begin(self, version: int, actions: Sequence[Any], microbatches: int, *, training: bool) -> Iteration:
        self._losses.check()
        return Iteration(
            index=self._iteration,
            step_id=self._step_id,
            version=version,
            actions=tuple(actions),
            microbatches=microbatches,
            topology=self.topology,
            links=self._links,
            stopwatch=self._stopwatch,
            throttle=self._throttle,
            training=training,
            device=self.device,
            presence=self._losses.presence,
        )

    def end(self, iteration: Iteration) -> None:
        """The iteration has been executed: measures are sent to the coordinator and reported."""
        if not iteration.training:
            return
        iteration.finish()
        if self._split is not None:
            self._split.finalize()
        self._iteration += 1
        report = iteration.report(self._me.host)
        if self.config.detector.enabled:
            self._router.send(COORDINATOR, Report(report=report))
        # W&B gets the coordinator's overview of all stages, if there is one
        metrics = report.metrics()
        if self.config.report.spans:
            metrics["started_unix_ms"] = round(iteration.started_unix_ms, 3)
            metrics["spans"] = iteration.spans()
        self._reporter.iteration(metrics, to_wandb=not self.config.detector.enabled)

    # --- the backward in two parts

    def recording(self, iteration: Iteration) -> AbstractContextManager[None]:
        """Forwards inside run so that their backward can be split, if that is configured and the plan does it."""
        if self._split is None or not iteration.splits():
            return nullcontext()
        return self._split.recording()

    @contextmanager
    def backward_input(self, iteration: Iteration, microbatch: Hashable) -> Iterator[None]:
        """The backward pass inside is action I: what it can leave to W, it leaves. Without a split backward that is nothing."""
        # recording again: activation checkpointing runs forwards inside the backward
        with self.recording(iteration), self.queue.collect(microbatch):
            yield

    @property
    def splits(self) -> bool:
        """Whether the backward of layers is split, as configured."""
        return self._split is not None

    # --- agreement

    def agrees(self, reasons: Sequence[str]) -> bool:
        """Before the first schedule, on every rank: whether plans run at all. If a rank has a reason why not, all run as in stock,
        and this session ends.

        Raises:
            TransportError: a rank did not come to its first schedule.
        """
        told = self._rendezvous.gather("reasons", list(reasons), self.topology.world_size)
        found = told_by_all(told, self.topology.rank)
        if found:
            self._reporter.message("stock", reasons=found, ranks=[rank for rank in sorted(told) if told[rank]])
            self.close()
        return not found

    def _make_router(self) -> Router:
        return Router(
            self.topology.rank,
            transmit=lambda rank, data: self._endpoint.send_control(rank, data),
            silent=lambda: self.failure is not None or self._closed,
            handlers={
                Report: self._post,
                Vote: self._post,
                Rail: lambda _, message: self._event(message.event),
                Show: lambda _, message: self._show(message),
                Lost: self._losses.heard,
                Departed: self._losses.heard,
                Prepare: self._vote,
                Commit: lambda _, message: self._book.commit(message.version),
                Abort: lambda _, message: self._book.abort(message.version),
            },
            refused={
                Report: self._post,
                Vote: self._post,
                Lost: self._losses.heard,
                Departed: self._losses.heard,
                Prepare: self._vote,
            },
        )

    def _post(self, sender: int, message: Report | Vote | Refused) -> None:
        if self._coordinator is not None:
            self._coordinator.post(sender, message)

    def _vote(self, sender: int, message: Prepare | Refused) -> None:
        self._router.send(COORDINATOR, self._book.vote(message, self.topology))

    def _event(self, event: StragglerEvent) -> None:
        """An event that this rank, the coordinator, tells everybody of."""
        self._reporter.event(event)
        if self._wandb_rank != self.topology.rank:
            self._router.send(self._wandb_rank, Show(event=event))

    def _overview(self, metrics: dict[str, Any]) -> None:
        self._reporter.pipeline(metrics)
        if self._wandb_rank != self.topology.rank:
            self._router.send(self._wandb_rank, Show(pipeline=metrics))

    def _show(self, message: Show) -> None:
        """What the coordinator reports, for the W&B run that this rank owns."""
        if message.event is not None:
            self._reporter.show_event(message.event)
        if message.pipeline is not None:
            self._reporter.show_pipeline(message.pipeline)
            self._shown = message.pipeline["iteration"]

    def _await_overview(self, patience_s: float = 5.0) -> None:
        """The coordinator's view of the last iteration is on its way to the W&B run of this rank."""
        until = time.monotonic() + patience_s
        while self._shown < self._iteration - 1 and time.monotonic() < until and self.failure is None:
            time.sleep(0.01)

    def _plan_committed(self, version: int, first_iteration: int, plan: Plan, profile: Profile, reason: str) -> None:
        warmups = " ".join(map(str, plan.warmup))
        self._reporter.message(
            "plan",
            f"plan v{version} runs from iteration {first_iteration} on ({reason}): warm-ups {warmups}, "
            f"predicted {plan.makespan_ms:.1f} ms an iteration",
            version=version,
            first_iteration=first_iteration,
            reason=reason,
            plan=plan.to_json(),
            profile=profile.to_json(),
        )

    # --- failures

    def _rail(self, peer: PeerInfo, rail: str, state: str, why: str) -> None:
        """A step in the life of a rail (on the control thread, which does not end because it cannot be reported). After the
        loss of a peer there are no rails to speak of."""
        if self.failure is not None:
            return
        try:
            self._reporter.message("rail", peer=peer.rank, rail=rail, state=state, why=why, iteration=self._iteration)
            event = self._rails.step(peer, rail, state, why, iteration=self._iteration, version=self._book.version)
        except Exception:
            logger.exception("rail %s of %s is %s (%s), which cannot be reported", rail, peer, state, why)
            return
        if event is not None:
            self._router.send(COORDINATOR, Rail(event=event_from(event)))

    def _report_loss(self, peer: PeerInfo, why: str) -> None:
        self._reporter.event(
            StragglerEvent(
                time_unix=time.time(),
                kind="peer",
                state="lost",
                replica=self.topology.place(peer.rank)[0],
                link=None,
                stages=(peer.stage,),
                ranks=(peer.rank,),
                hosts=(peer.host,),
                since_iteration=self._iteration,
                found_iteration=self._iteration,
                delay_before_ms=0.0,
                delay_after_ms=0.0,
                action=f"this rank ends: {why}",
                predicted_iteration_ms_before=None,
                predicted_iteration_ms_after=None,
                predicted_gain=None,
                plan_version=self._book.version,
            )
        )

    def _fail(self, error: Exception) -> None:
        self._endpoint.fail(error)
        self._book.fail(error)

    @property
    def failure(self) -> Exception | None:
        """What every iteration raises from now on."""
        return self._losses.failure

    def inside(self) -> AbstractContextManager[None]:
        """Brackets a host's call that runs a schedule and its collectives, see `Losses.inside`."""
        return self._losses.inside()

    # --- end

    def close(self) -> None:
        """Ends all threads, restores the model's layers. Idempotent; also run at the exit of the process."""
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        self._losses.close(self._step_id + 1)
        atexit.unregister(self.close)
        _activation.remove_session(self)
        whole = self.failure is None and not self._losses.broken and self.config.detector.enabled
        if self._coordinator is not None:
            self._coordinator.close(last=self._iteration - 1 if whole else -1)
        elif whole and self.topology.rank == self._wandb_rank:
            self._await_overview()
        if self._split is not None:
            self._split.remove()
        self._endpoint.close(linger_s=0.0 if self.failure is not None else 5.0)
        self._reporter.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def status(self) -> dict[str, Any]:
        """Plan version, split layers, transport counters, files: plain values."""
        split = self._split.report if self._split is not None else SplitReport(0, {})
        return {
            "rank": self.topology.rank,
            "run": self.run,
            "stage": self.topology.position,
            "stages": self.topology.stages,
            "iteration": self._iteration,
            "plan_version": self._book.version,
            "split_layers": split.split,
            "fused_layers": split.fused,
            "transport": self._endpoint.stats(),
            "files": self._reporter.files(),
            "failure": None if self.failure is None else str(self.failure),
        }


def told_by_all(told: Mapping[int, Sequence[str]], rank: int) -> list[str]:
    """Every reason of any rank why a job runs as without the plug-in, each once; rank 0 says so."""
    found = list(dict.fromkeys(reason for other in sorted(told) for reason in told[other]))
    if found:
        ranks = [other for other in sorted(told) if told[other]]
        level = logging.WARNING if rank == COORDINATOR else logging.INFO
        logger.log(level, "this job runs as in stock, without Adaptra (ranks %s): %s", ranks, "; ".join(found))
    return found


def _limits(config: AdaptraConfig, stages: int) -> list[int | None]:
    limits = config.max_activations
    if limits is None or isinstance(limits, int):
        return [limits] * stages
    if len(limits) != stages:
        raise ConfigError(f"adaptra.max_activations has {len(limits)} entries for {stages} stages: give one per stage")
    return list(limits)


def _check_links(config: AdaptraConfig, topology: Topology) -> None:
    known = topology.links()
    for name, links in (("links", config.simulate.links), ("faults", config.simulate.faults)):
        for link in links:
            if (min(link.src, link.dst), max(link.src, link.dst)) not in known:
                raise ConfigError(
                    f"adaptra.simulate.{name}: {link.src}-{link.dst} is not a link between neighbours of {topology.length} stages"
                )
