"""The coordinator without processes or sockets: reports and votes in, plans and events out."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from adaptra_plugin.config import AdaptraConfig, parse_config
from adaptra_plugin.detect import IterationReport, LinkDelay, StageTimes
from adaptra_plugin.runtime import deciding
from adaptra_plugin.runtime.coordinator import Coordinator
from adaptra_plugin.runtime.merging import merge_profiles
from adaptra_plugin.runtime.messages import Message, Refused, Report, read
from adaptra_plugin.runtime.switching import PlanBook
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.schedule import planner
from adaptra_plugin.schedule.profile import LinkProfile, Profile, StageProfile

CONFIG = {"detector": {"warmup_iterations": 1, "min_history": 2, "confirm": 2, "heal": 2}}


class World:
    """All ranks of a job with their plan books; messages are delivered at once unless a rank is deaf."""

    def __init__(self, stages: int = 4, replicas: int = 1, config: dict[str, Any] = CONFIG) -> None:
        pipelines = [[replica + replicas * stage for stage in range(stages)] for replica in range(replicas)]
        self.topology = Topology.of(0, pipelines)
        self.now = 0.0
        self.deaf: set[int] = set()
        self.events: list[Any] = []
        self.plans: list[Any] = []
        self.overviews: list[Any] = []
        self.sent: list[tuple[int, Message]] = []
        start = Profile(1, (StageProfile(1.0, 1.0, 1.0),) * stages)
        self.books = [PlanBook(start, "slack-adaptive", 0.0) for _ in range(self.topology.world_size)]
        self.queue: list[tuple[int, Message | Refused]] = []
        self.coordinator = self.made(
            parse_config(config),
            hosts={rank: f"n{rank}" for rank in range(self.topology.world_size)},
            send=self.send,
            on_event=self.events.append,
            on_plan=lambda *args: self.plans.append(args),
            on_overview=self.overviews.append,
            book=self.books[0],
        )

    def made(self, config: AdaptraConfig, **more: Any) -> Any:
        return Coordinator(self.topology, config, limits=[None] * self.topology.stages, clock=lambda: self.now, **more)

    def send(self, rank: int, message: Message) -> None:
        self.sent.append((rank, message))
        if rank in self.deaf:
            return
        book = self.books[rank]
        message = read(message.to_json())
        if message.type == "prepare":
            self.queue.append((rank, book.vote(message, self.topology)))
        elif message.type == "commit":
            book.commit(message.version)
        elif message.type == "abort":
            book.abort(message.version)

    def iteration(
        self, index: int, delays: dict[tuple[int, int, int], float] | None = None, work: Sequence[float] = ()
    ) -> list[int]:
        """Runs one iteration on all ranks; `delays` by (replica, low, high) stage, `work`: ratio of each stage's times to the
        usual ones. Versions that ran."""
        versions = []
        for rank, book in enumerate(self.books):
            replica, stage = self.topology.place(rank)
            version, _ = book.begin(index, 8)
            versions.append(version)
            links = []
            for other in (stage - 1, stage + 1):
                if 0 <= other < self.topology.stages:
                    pair = (replica, min(stage, other), max(stage, other))
                    links.append(LinkDelay(other, stage, (delays or {}).get(pair, 0.5), 8))
            ratio = work[stage] if work else 1.0
            report = IterationReport(
                replica=replica,
                pp_rank=stage,
                rank=rank,
                host=f"n{rank}",
                iteration=index,
                microbatches=8,
                iteration_ms=300.0,
                plan_version=version,
                chunks=(StageTimes(10.0 * ratio, 10.0 * ratio, 6.0 * ratio),),
                links=tuple(links),
            )
            self.queue.append((rank, read(Report.of(report).to_json())))
        self.deliver()
        return versions

    def deliver(self) -> None:
        while self.queue:
            self.coordinator.handle(*self.queue.pop(0))
        self.coordinator.tick()


def test_a_slow_link_leads_to_a_plan_that_all_ranks_begin_together_and_back():
    world = World()
    ran = [world.iteration(i) for i in range(8)]
    first = ran[-1][0]
    assert world.events == []
    for i in range(8, 14):
        ran.append(world.iteration(i, {(0, 1, 2): 30.0}))
    (event,) = world.events
    assert (event.kind, event.state, event.link, event.ranks, event.hosts) == (
        "link",
        "slow",
        "1-2",
        (1, 2),
        ("n1", "n2"),
    )
    assert (event.since_iteration, event.found_iteration) == (8, 9)
    assert event.delay_before_ms == pytest.approx(0.5) and event.delay_after_ms == pytest.approx(30.0)
    assert event.predicted_gain > 1.1
    assert f"replan v{event.plan_version} from iteration" in event.action
    for i in range(14, 22):
        ran.append(world.iteration(i))
    assert [e.state for e in world.events] == ["slow", "healed"]
    assert all(len(set(versions)) == 1 for versions in ran)
    assert ran[13][0] > first and ran[-1][0] > ran[13][0]
    plans = {version: plan for version, _, plan, _, _ in world.plans}
    assert sum(plans[ran[13][0]].warmup) > sum(plans[ran[-1][0]].warmup), "the warm-ups go back"
    assert len(world.overviews) == 22


def test_the_end_waits_for_the_reports_of_the_last_iteration_that_are_still_on_their_way():
    world = World()
    for i in range(3):
        world.iteration(i)
    report = dict(replica=0, host="n", iteration=3, microbatches=8, iteration_ms=300.0, plan_version=0)
    times = StageTimes(10.0, 10.0, 6.0)

    def last(rank: int) -> None:
        mine = IterationReport(pp_rank=rank, rank=rank, chunks=(times,), links=(), **report)
        world.coordinator.post(rank, Report.of(mine))

    world.coordinator.start()
    for rank in range(3):
        last(rank)
    late = threading.Timer(0.2, last, (3,))
    late.start()
    world.coordinator.close(last=3, patience_s=20.0)
    assert len(world.overviews) == 4
    begun = time.monotonic()
    world.coordinator.close(last=3, patience_s=20.0)
    assert time.monotonic() - begun < 10.0, "nothing is missing: no wait"


def test_a_link_of_one_replica_is_found_in_that_replica_and_all_switch():
    world = World(stages=3, replicas=2)
    for i in range(8):
        world.iteration(i)
    ran = [world.iteration(i, {(1, 0, 1): 40.0}) for i in range(8, 14)]
    (event,) = world.events
    assert (event.replica, event.link, event.ranks) == (1, "0-1", (1, 3))
    assert all(len(set(versions)) == 1 for versions in ran) and ran[-1][0] >= 1


def test_a_rank_that_is_ahead_postpones_the_switch():
    world = World()
    for i in range(2):
        world.iteration(i)
    world.books[2].begin(9, 8)  # far ahead of the others when the plan comes
    world.iteration(2)
    prepared = [m for rank, m in world.sent if rank == 2 and m.type == "prepare"]
    ends = [m.type for rank, m in world.sent if rank == 2 and m.type in ("commit", "abort")]
    assert len(prepared) >= 2 and prepared[-1].first_iteration > 9
    assert ends == ["abort"] * (len(ends) - 1) + ["commit"]


def test_a_rank_that_does_not_answer_blocks_nobody():
    world = World()
    world.deaf = {3}
    for i in range(6):
        assert len(set(world.iteration(i))) == 1
        if any(message.type == "prepare" for _, message in world.sent):
            break
    world.now += 1e6
    world.deliver()
    ends = [m.type for rank, m in world.sent if rank == 0 and m.type in ("commit", "abort")]
    assert ends and ends[-1] == "abort"
    assert world.iteration(6) == [0, 0, 0, 0]


@pytest.mark.parametrize("stages", [2, 4])
def test_sequences_that_grow_raise_no_event_and_change_no_plan(stages):
    """From 64 to 256 tokens; the last stage grows less. What is really slow afterwards is found."""
    world = World(stages=stages)
    for i in range(8):
        world.iteration(i)
    plans = len(world.plans)
    for i in range(8, 60):
        ratio = 1 + 3 * min(1.0, (i - 8) / 30)
        ran = world.iteration(i, work=[ratio * (1 + ratio / 10)] * (stages - 1) + [ratio])
    assert world.events == [] and len(world.plans) == plans and len(set(ran)) == 1
    grown = [4 * 1.4] * (stages - 1) + [4.0]
    for i in range(60, 64):
        world.iteration(i, work=[2 * grown[0], *grown[1:]])
    assert [(event.subject, event.state, event.since_iteration) for event in world.events] == [("stage 0", "slow", 60)]
    assert world.events[0].delay_before_ms == pytest.approx(26 * 5.6)


def test_the_plan_follows_the_profile_without_any_finding(monkeypatch):
    monkeypatch.setattr(deciding, "REFRESH", 3)
    world = World()
    for i in range(5):
        world.iteration(i)
    before = len(world.plans)
    assert before == 1
    # estimates that were far off: the running plan is not the best for what is known now
    better = world.coordinator._measurements._estimator.profile(8, [None] * 4)
    slow = Profile(8, better.stages, (LinkProfile(1, 2, 25.0), LinkProfile(2, 1, 25.0)))
    monkeypatch.setattr(world.coordinator._measurements._estimator, "profile", lambda *args, **kwargs: slow)
    for i in range(5, 9):
        world.iteration(i)
    assert len(world.plans) == before + 1 and world.plans[-1][-1] == "newer profile"
    assert world.events == []


def test_garbage_reports_are_refused(caplog):
    world = World()
    world.coordinator.handle(1, read({"type": "report", "packed": "AAAA"}))
    assert "a report of rank 1 is refused" in caplog.text


def test_other_schedules_report_but_do_not_adapt():
    world = World(config={**CONFIG, "schedule": "zb-h1"})
    for i in range(5):
        world.iteration(i)
    for i in range(5, 9):
        world.iteration(i, {(0, 1, 2): 30.0})
    assert [e.action for e in world.events] == ["none: schedule zb-h1 does not adapt"]
    assert world.plans == []


def test_merged_profiles_take_the_slowest():
    a = Profile(
        4, (StageProfile(1, 2, 3, 5), StageProfile(4, 5, 6, 5)), (LinkProfile(0, 1, 1.0), LinkProfile(1, 0, 9.0))
    )
    b = Profile(
        4, (StageProfile(2, 1, 4, 5), StageProfile(1, 9, 1, 5)), (LinkProfile(0, 1, 3.0), LinkProfile(1, 0, 2.0))
    )
    merged = merge_profiles([a, b])
    assert merged.stages == (StageProfile(2, 2, 4, 5), StageProfile(4, 9, 6, 5))
    assert [link.latency_ms for link in merged.links] == [3.0, 9.0]


def test_the_exact_solver_improves_the_running_plan_in_the_background(monkeypatch):
    """The real solver; the heuristic is made to answer with GPipe, so that there is something to find."""
    slow = {(0, 1, 2): 25.0}
    monkeypatch.setattr(deciding, "plan", lambda profile, **_: planner.plan(profile, schedule="gpipe"))
    world = World(config={**CONFIG, "refine_s": 300.0})
    ran = [world.iteration(i, slow) for i in range(5)]
    until = time.monotonic() + 100  # the solver runs at the lowest priority
    while len(world.plans) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        world.deliver()
    world.coordinator.close()
    (_, _, heuristic, _, _), (version, first, best, _, reason) = world.plans
    assert reason == "refined, proven optimal" and best.optimal and best.makespan_ms < heuristic.makespan_ms
    ran += [world.iteration(i, slow) for i in range(5, first + 1)]
    assert ran[-1] == [version] * 4


def test_no_refinement_is_left_behind():
    world = World(config={**CONFIG, "refine_s": 0.0})
    assert world.coordinator._refining._refiner is None
    for i in range(5):
        world.iteration(i)
    assert world.coordinator._refining._running is None and len(world.plans) == 1
