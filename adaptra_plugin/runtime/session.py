"""The life of Adaptra on one rank: start, iterations, end. Wires the parts together, which do the rest, and ends their threads."""

from __future__ import annotations

import atexit
import itertools
import logging
import socket
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from adaptra_plugin import _activation
from adaptra_plugin.config import AdaptraConfig
from adaptra_plugin.report import Reporter, StragglerEvent
from adaptra_plugin.report.console import show_log
from adaptra_plugin.report.reporter import new_run
from adaptra_plugin.runtime.compute_throttle import ComputeThrottle
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.coordinator_process import CoordinatorProcess
from adaptra_plugin.runtime.dispatch import forward_only
from adaptra_plugin.runtime.following import Following
from adaptra_plugin.runtime.iteration import Iteration, Links
from adaptra_plugin.runtime.losses import Losses
from adaptra_plugin.runtime.messages import Abort, Commit, Departed, Lost, Prepare, Rail, Report, Show, Vote
from adaptra_plugin.runtime.rendezvous import Rendezvous, patience_s
from adaptra_plugin.runtime.routing import Router
from adaptra_plugin.runtime.split import Split, SplitReport
from adaptra_plugin.runtime.starting import check_links, first_book, has_own_process, limits_of
from adaptra_plugin.runtime.stopwatch import stopwatch_for
from adaptra_plugin.runtime.telemetry import Telemetry
from adaptra_plugin.runtime.topology import COORDINATOR, Topology
from adaptra_plugin.runtime.weight_grad_store import WeightGradStore
from adaptra_plugin.schedule.names import SCHEDULES, stock_order
from adaptra_plugin.schedule.prepare import prepare
from adaptra_plugin.support import Level, Reason
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
        self.kept: tuple[str, ...] = ()
        """Why there are no plans; empty: there are."""
        self.follows = False
        """The host's schedule runs as it is; `begin` returns a `Following`."""
        self._wandb_rank = wandb_rank
        self._me = PeerInfo(rank=topology.rank, pp_rank=topology.position, host=socket.gethostname())
        self._losses = Losses(
            self._me,
            topology,
            config.peer_exit_grace_s,
            send=lambda rank, message: self._router.send_last(rank, message),
            fail=self._fail,
            report=lambda peer, why: self._telemetry.loss(peer, why),
            last_words=lambda: self._reporter.close(2.0),
        )
        self._closed = False
        self._close_lock = threading.Lock()
        self._iteration = 0
        self._step_id = 0
        self._stopwatch = stopwatch_for(device)
        self._throttle = ComputeThrottle(config.simulate.compute)
        self._limits = limits_of(config, topology.stages)
        check_links(config, topology)
        if SCHEDULES[config.schedule].adapts:
            prepare()
        self._microbatches = microbatches
        self._book = first_book(config, topology, microbatches)
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
            run_rank=self._wandb_rank,
            overviews=config.detector.enabled,
            send=self._show,
            run=self.run,
            at_exit=self.close,
        )
        undo.callback(self._reporter.close, 1.0)
        router = self._router = Router(
            topology.rank,
            transmit=lambda rank, data: self._endpoint.send_control(rank, data),
            silent=lambda: self.failure is not None or self._closed,
        )
        telemetry = self._telemetry = Telemetry(
            self._reporter,
            self._me,
            topology,
            send=router.send,
            now=lambda: (self._iteration, self._book.version),
            failed=lambda: self.failure is not None,
        )
        router.route(lambda _, message: self._reporter.event(message.event), Rail)
        router.route(lambda _, message: self._reporter.show(message.event, message.pipeline), Show)
        router.route(self._losses.heard, Lost, Departed, refused=True)
        router.route(lambda _, m: router.send(COORDINATOR, self._book.vote(m, topology)), Prepare, refused=True)
        router.route(lambda _, message: self._book.commit(message.version), Commit)
        router.route(lambda _, message: self._book.abort(message.version), Abort)
        self._endpoint = Endpoint(
            self._me,
            config.transport,
            secret,
            simulate=config.simulate,
            bind_host=rendezvous.bind_host(topology, config.transport.bind),
            wraparound=topology.chunks > 1,
        )
        undo.callback(self._endpoint.close, linger_s=0.0)
        self._endpoint.on_control = router.receive
        self._endpoint.on_peer_lost = self._losses.lost
        self._endpoint.on_rail = telemetry.rail
        peers = rendezvous.exchange(topology, self._me.host, self._endpoint.endpoint_info)
        self._coordinator = None
        if topology.rank == COORDINATOR:
            self._coordinator = self._make_coordinator({rank: info.host for rank, (info, _) in peers.items()})
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

    def _make_coordinator(self, hosts: Mapping[int, str]) -> Coordinator | CoordinatorProcess:
        config, topology = self.config, self.topology
        common: dict[str, Any] = {
            "send": self._router.send,
            "on_event": self._reporter.event,
            "on_plan": self._telemetry.plan,
            "on_overview": self._reporter.pipeline,
            "book": self._book,
        }
        if has_own_process(config, topology):
            process = CoordinatorProcess(topology, config, hosts, microbatches=self._microbatches, **common)
            self._router.relay(process.relay, Report, Vote)
            return process
        coordinator = Coordinator(topology, config, hosts, limits=self._limits, **common)
        self._router.route(coordinator.post, Report, Vote, refused=True)
        return coordinator

    # --- iterations

    def begin(self, microbatches: int) -> Iteration:
        """A training iteration begins: decides on the plan, posts all receives.

        Raises:
            PlanError: the limits cannot be kept with this number of microbatches.
        """
        return self._begin(microbatches, training=True)

    def begin_evaluation(self, microbatches: int) -> Iteration:
        """A forward-only schedule begins."""
        return self._begin(microbatches, training=False)

    def _begin(self, microbatches: int, *, training: bool) -> Iteration:
        # counted before anything can fail, which would fail on all ranks: they have to count alike
        self._step_id += 1
        self._losses.presence.enter(self._step_id)
        if training:
            self._endpoint.set_iteration(self._iteration)
            if self._split is not None:
                self._split.begin()
            with self._losses.presence.waiting():  # for commit or abort
                version, plan = self._book.begin(self._iteration, microbatches)
            actions = plan.schedule.of_rank(self.topology.position)
        else:
            version, actions = 0, forward_only(self.topology.own_stages, microbatches, self.topology.length)
        self._losses.check()
        return (Following if self.follows else Iteration)(
            index=self._iteration,
            step_id=self._step_id,
            version=version,
            actions=() if self.follows else tuple(actions),
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
        config = self.config
        self._telemetry.iteration(iteration, spans=config.report.spans, judged=config.detector.enabled)

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

    # --- agreement

    def agrees(self, reasons: Sequence[str], own_order: Sequence[str] = (), in_order: Sequence[Reason] = ()) -> bool:
        """Before the first schedule, on every rank: whether Adaptra takes part in it at all. A reason of one rank is one for all.

        Args:
            reasons: why not: all run as in stock, and this session ends.
            own_order: why the host's schedule is followed as it is (`follows`).
            in_order: why the stock order has to stay, with an unsplit backward.

        Raises:
            TransportError: a rank did not come to its first schedule.
        """
        mine = {"stock": list(reasons), "own": list(own_order), "order": [str(it) for it in in_order]}
        told = self._rendezvous.gather("reasons", mine, self.topology.world_size)
        for name, text in (("stock", STOCK_TEXT), ("own", OWN_ORDER_TEXT), ("order", STOCK_ORDER_TEXT)):
            found = told_by_all({rank: said[name] for rank, said in told.items()}, self.topology.rank, text)
            if found:
                level = Level.STOCK if name == "stock" else Level.STOCK_ORDER
                ranks = [rank for rank in sorted(told) if told[rank][name]]
                self._reporter.message(level.value, reasons=found, ranks=ranks)
                if level is Level.STOCK:
                    self.close()
                    return False
                self.follows = name == "own"
                self._keep(found)
                break
        return True

    def _keep(self, reasons: Sequence[str]) -> None:
        self.kept = tuple(reasons)
        schedule = stock_order(self.topology.chunks)
        self._book.keep(schedule)
        if self._coordinator is not None:
            self._coordinator.keep(schedule)
        if self._split is not None:
            self._split.remove()
            self._split = None

    @property
    def level(self) -> Level:
        """How much of Adaptra this job has."""
        return Level.STOCK_ORDER if self.kept else Level.FULL

    def _show(self, rank: int, event: StragglerEvent | None, pipeline: Mapping[str, Any] | None) -> None:
        """For the sinks of another rank. What belongs to the last iteration comes while this session closes."""
        if self.failure is None:
            self._router.send_last(rank, Show(event=event, pipeline=None if pipeline is None else dict(pipeline)))

    # --- failures

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
        elif whole:
            self._reporter.await_overview(self._iteration - 1, lambda: self.failure is not None)
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
            "pp_rank": self.topology.position,
            "stages": self.topology.stages,
            "level": self.level.value,
            "reasons": list(self.kept),
            "iteration": self._iteration,
            "plan_version": self._book.version,
            "split_layers": split.split,
            "fused_layers": split.fused,
            "transport": self._endpoint.stats(),
            "files": self._reporter.files(),
            "failure": None if self.failure is None else str(self.failure),
        }


STOCK_TEXT = "this job runs as in stock, without Adaptra"
OWN_ORDER_TEXT = (
    "this job keeps its own schedule, without plans and split backward; transfers, detection and reports are Adaptra's"
)
STOCK_ORDER_TEXT = (
    "this job keeps the stock order of microbatches, without plans and split backward; transfers, detection and reports "
    "are Adaptra's"
)


def told_by_all(told: Mapping[int, Sequence[str]], rank: int, text: str = STOCK_TEXT) -> list[str]:
    """Every reason of any rank, each once; rank 0 says what follows from them."""
    found = list(dict.fromkeys(reason for other in sorted(told) for reason in told[other]))
    if found:
        ranks = [other for other in sorted(told) if told[other]]
        level = logging.WARNING if rank == COORDINATOR else logging.INFO
        logger.log(level, "%s (ranks %s): %s", text, ranks, "; ".join(found))
    return found
