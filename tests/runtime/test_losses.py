"""Who is blamed when a rank leaves, and that news alone end nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adaptra_plugin.errors import PeerLostError, TransferTimeout, TransportError
from adaptra_plugin.runtime import departures, losses
from adaptra_plugin.runtime.departures import ENDED, Departures, Presence, is_foreign, reason
from adaptra_plugin.runtime.losses import Losses
from adaptra_plugin.runtime.messages import Departed, read
from adaptra_plugin.runtime.topology import Topology
from adaptra_plugin.transport import PeerInfo

pytestmark = pytest.mark.timing


def info(rank):
    return PeerInfo(rank, rank, f"n{rank}")


def departed(peer, step_id, **more):
    return Departed(rank=peer.rank, pp_rank=peer.pp_rank, host=peer.host, step_id=step_id, **more)


class Job:
    """Ranks that hear each other at once, as their control connections allow."""

    def __init__(self, pipelines):
        self.waiting = {}  # rank -> set once it has failed
        self.ranks = {}
        self.mute = set()
        for rank in sorted(rank for ranks in pipelines for rank in ranks):
            self.waiting[rank] = threading.Event()
            self.ranks[rank] = Losses(
                info(rank),
                Topology.of(rank, pipelines),
                30.0,
                send=lambda to, message, rank=rank: self.send(rank, to, message),
                fail=lambda error, rank=rank: self.waiting[rank].set(),
                report=lambda peer, why: None,
                last_words=lambda: None,
            )

    def send(self, source, target, message):
        assert 0 in (source, target), "control connections are with the coordinator"
        if target not in self.mute:
            self.ranks[target].heard(source, message)

    def enter(self, step_id, *ranks):
        for rank in ranks or self.ranks:
            self.ranks[rank].presence.enter(step_id)

    def leave(self, rank, error):
        """What the rank raises."""
        mine = self.ranks[rank]
        with pytest.raises(BaseException) as caught, mine.inside():
            mine.presence.enter(mine.presence.current)
            raise error
        return caught.value

    def wait(self, rank, patience_s=10.0):
        """The rank waits for a neighbour; what it fails with, or None."""
        with self.ranks[rank].presence.waiting():
            self.waiting[rank].wait(patience_s)
        return self.ranks[rank].failure

    def close(self):
        for rank in self.ranks.values():
            rank.abandon()


@pytest.fixture
def job():
    made = []

    def make(*pipelines):
        made.append(Job(pipelines or ([0, 1, 2, 3],)))
        return made[-1]

    yield make
    for each in made:
        each.close()


OWN = [
    SystemExit(1),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(),
    ZeroDivisionError("in the user's code"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    RuntimeError("DataLoader worker (pid 4) exited unexpectedly"),
    RuntimeError("no ProcessGroup config for c10d and MPI_COMM_WORLD here"),
    OSError("the disk is gone"),
]


@pytest.mark.parametrize("error", OWN, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("who", [0, 3])
def test_what_a_rank_raises_itself_is_raised_at_once_and_told_to_everybody(job, error, who):
    ranks = job()
    ranks.enter(1)
    begun = time.monotonic()
    assert ranks.leave(who, error) is error
    assert time.monotonic() - begun < losses.PATIENCE_S / 2
    with ThreadPoolExecutor(3) as pool:
        failures = list(pool.map(ranks.wait, {0, 1, 2, 3} - {who}))
    for failure in failures:
        assert isinstance(failure, PeerLostError)
        assert str(failure).startswith(f"rank {who} (stage {who}, host n{who}) is lost: {reason(error)}.")
    assert time.monotonic() - begun < 3.0


def chained():
    try:
        try:
            raise PeerLostError("rank 1 is gone")
        except PeerLostError:
            raise SystemExit(1)  # noqa: B904  as users' code does
    except SystemExit as error:
        return error


FOREIGN = [
    PeerLostError("x"),
    TransferTimeout("x"),
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"),
    torch.distributed.DistBackendError("NCCL error"),
    chained(),
]


@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_errors_of_transfers_and_collectives_may_be_the_doing_of_others(error):
    assert is_foreign(error)
    assert not any(is_foreign(own) for own in OWN)


def test_a_collective_is_told_by_where_the_error_comes_from():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.distributed.all_gather([torch.zeros(3)], torch.zeros(2))
    finally:
        torch.distributed.destroy_process_group()
    assert is_foreign(caught.value)


def test_an_error_that_is_due_to_another_rank_names_the_one_that_left_first(job):
    """The news may come after the error: rank 2 sees that rank 3 has closed its connections before it hears why."""
    ranks = job()
    ranks.enter(1)
    ranks.mute = {1, 2}
    ranks.leave(3, SystemExit(4))
    news = departed(info(3), 1, final=False, broken=True, why=reason(SystemExit(4)))
    threading.Timer(0.3, lambda: ranks.ranks[2].heard(0, news)).start()
    gone = PeerLostError("gradient 0 cannot arrive")
    gone.peer = info(3)
    found = ranks.leave(2, gone)
    assert str(found).startswith("rank 3 (stage 3, host n3) is lost: it ended with SystemExit: 4.")


def test_without_any_news_the_rank_that_closed_its_connections_is_blamed(job, monkeypatch):
    monkeypatch.setattr(losses, "PATIENCE_S", 0.1)
    ranks = job()
    ranks.enter(1)
    gone = PeerLostError("gradient 0 cannot arrive")
    gone.peer = info(3)
    for error in (ranks.leave(2, gone), ranks.wait(1), ranks.wait(0)):
        assert str(error).startswith(f"rank 3 (stage 3, host n3) is lost: {ENDED}.")


@pytest.mark.parametrize(
    ("pipelines", "left", "broken", "blamed"),
    [([[0, 1, 2, 3]], 0, False, 0), ([[0, 1], [2, 3]], 0, True, 0), ([[0, 1], [2, 3]], 0, False, 2)],
)
def test_a_process_that_is_gone_after_another_rank_has_left_is_no_cause(job, pipelines, left, broken, blamed):
    """Those that end because of a rank that left may close their connections without a word. A rank of another pipeline that
    has left in good order is no cause."""
    ranks = job(*pipelines)
    ranks.enter(1)
    mine = ranks.ranks[3]
    mine.heard(0, departed(info(left), 1, final=False, broken=broken, why="it left"))
    mine.lost(info(2), "its connection was closed")
    why = "it left" if blamed == left else "its connection was closed"
    assert str(mine.failure).startswith(f"rank {blamed} (") and f"host n{blamed}) is lost: {why}." in str(mine.failure)


def test_an_error_that_nobody_explains_is_raised_and_told(job, monkeypatch):
    monkeypatch.setattr(losses, "PATIENCE_S", 0.1)
    ranks = job()
    ranks.enter(1)
    error = TransportError("no room")
    assert ranks.leave(1, error) is error
    assert "rank 1 (stage 1" in str(ranks.wait(3)) and "TransportError: no room" in str(ranks.ranks[3].failure)


def test_ranks_that_run_out_of_data_together_go_on_together(job):
    ranks = job([0, 1])
    for step_id in (1, 2):
        ranks.enter(step_id)
        for rank in (0, 1):
            assert isinstance(ranks.leave(rank, StopIteration()), StopIteration)
    ranks.enter(3)
    assert ranks.wait(0, 1.5) is None and ranks.wait(1, 1.5) is None


def test_a_rank_that_ends_in_good_order_is_missed_only_by_those_that_go_on(job):
    ranks = job()
    ranks.enter(7)
    for rank in (3, 0):
        ranks.ranks[rank].presence.leave()
        ranks.ranks[rank].close(8)
    assert ranks.wait(1, 1.0) is None, "it still completes what the others have completed"
    ranks.enter(8, 1, 2)
    for rank in (1, 2):
        assert str(ranks.wait(rank)).startswith(f"rank 3 (stage 3, host n3) is lost: {ENDED}.")


def test_a_session_may_end_while_the_first_news_come(job, monkeypatch):
    """The news start a thread, which the end waits for: however far that has come."""
    ranks = job([0, 1])
    mine = ranks.ranks[1]
    ended = threading.Event()
    starting = threading.Thread.start

    def start(thread):
        if thread.name == "adaptra-departures":
            threading.Thread(target=lambda: (mine.abandon(), ended.set())).start()
            assert not ended.wait(0.3), "it waits until there is a thread to wait for"
        starting(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    mine.heard(0, departed(info(0), 1, final=True, broken=False, why=ENDED))
    assert ended.wait(5)
    assert "adaptra-departures" not in [thread.name for thread in threading.enumerate()]


def test_another_pipeline_is_lost_by_an_error_only(monkeypatch):
    now = [0.0]
    presence = Presence(lambda: now[0])
    found = Departures(presence, 0, {0: 0, 1: 0, 2: 1, 3: 1}.__getitem__)
    presence.enter(5)
    assert found.add(departed(info(3), 5, final=True, broken=False, why=ENDED))
    with presence.waiting():
        now[0] = 100.0
        assert found.due() is None, "it may have fewer schedules to run"
        assert found.add(departed(info(2), 5, final=False, broken=True, why="x"))
        assert not found.add(departed(info(3), 5, final=False, broken=True, why="y")), "the first one counts"
        assert found.due() is None
        now[0] += departures.STUCK_ELSEWHERE_S
        assert found.due().peer.rank == 2
    with pytest.raises(KeyError):
        found.add(departed(info(9), 5, final=False, broken=True, why="x"))


def test_a_rank_that_gets_what_it_waits_for_is_not_stuck():
    now = [0.0]
    presence = Presence(lambda: now[0])
    found = Departures(presence, 0, lambda rank: 0)
    presence.enter(1)
    found.add(departed(info(1), 1, final=False, broken=False, why="x"))
    for _ in range(5):
        with presence.waiting():
            now[0] += 0.9 * departures.STUCK_S
            assert found.due() is None
    presence.leave()
    now[0] = 100.0
    assert found.due() is None
    presence.enter(2)
    assert found.due() is None and found.blamed(1).peer.rank == 1 and found.blamed(2) is None
    found.add(departed(info(1), 3, final=False, broken=False, why="x"))
    assert found.blamed(1) is None, "it is forgotten"


@pytest.mark.parametrize("message", [{}, {"rank": 9}, {"step_id": "x"}, {"rank": 2}])
def test_nonsense_about_ranks_that_are_gone_is_refused(job, message, caplog):
    ranks = job()
    ranks.enter(1)
    whole = departed(info(1), 1, final=False, broken=True, why="x").to_json() | message
    if not message:
        del whole["why"]
    ranks.ranks[0].heard(1, read(whole))
    assert "is not understood" in caplog.text
    assert ranks.wait(0, 0.8) is None
