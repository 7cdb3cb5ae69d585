"""The books of a receiver's memory: who may send how much, and how it is returned."""

from __future__ import annotations

import random

import pytest

from adaptra_plugin.transport.proxy.rails.rdma.nics import pairs
from adaptra_plugin.transport.proxy.rails.rdma.slots import (
    IMMEDIATES,
    PREFIX_BYTES,
    Budget,
    Debt,
    Prefix,
    SlotKind,
    parse_prefix,
)
from adaptra_plugin.transport.proxy.wire import MalformedFrame


def _slot(prefix: Prefix) -> memoryview:
    return memoryview(prefix.pack() + bytes(prefix.length))


def test_a_prefix_survives_the_way():
    prefix = Prefix(SlotKind.SEGMENT, 96, 7, 1 << 40, 1 << 50, 1 << 60, True)
    assert parse_prefix(_slot(prefix), 7) == prefix
    assert parse_prefix(_slot(Prefix(SlotKind.CREDIT, 0, 1 << 32, 0, 0)), 1 << 32).sequence == 0


@pytest.mark.parametrize(
    ("slot", "said"),
    [
        (memoryview(b"x" * (PREFIX_BYTES - 1)), "a slot of"),
        (_slot(Prefix(SlotKind.FRAME, 4, 3, 0, 0)), "slot 3 came where 0 was due"),
        (_slot(Prefix(SlotKind.FRAME, 4, 0, 0, 0))[:-1], "announces 4 bytes and has 3"),
        (memoryview(b"\x09" + bytes(PREFIX_BYTES - 1)), "kind 9"),
    ],
)
def test_nonsense_is_refused(slot, said):
    with pytest.raises(MalformedFrame, match=said):
        parse_prefix(slot, 0)


def test_nothing_is_returned_that_was_not_sent():
    budget = Budget(8, 1000)
    budget.sent = 3
    assert budget.place(400) == 0
    budget.returned(Prefix(SlotKind.CREDIT, 0, 0, 3, 400))
    for emptied, landed in ((4, 400), (3, 401), (2, 400), (3, 399)):
        with pytest.raises(MalformedFrame, match="are returned"):
            budget.returned(Prefix(SlotKind.CREDIT, 0, 0, emptied, landed))


def test_bodies_lie_in_one_piece_and_never_over_one_another():
    random.seed(1)
    budget, debt = Budget(1 << 20, 1000), Debt(8, 1000)
    lying: list[tuple[int, int, int]] = []
    for _ in range(5000):
        nbytes = random.randint(1, 1000)
        at = budget.place(nbytes)
        if at is None:
            # the receiver empties the oldest one
            position, start, stop = lying.pop(0)
            debt.landed = position + stop - start
            emptied, landed = debt.told()
            budget.returned(Prefix(SlotKind.CREDIT, 0, 0, emptied, landed))
            continue
        start, stop = debt.window(at, nbytes)
        assert stop - start == nbytes and 0 <= start < stop <= 1000
        assert all(stop <= other or start >= other_stop for _, other, other_stop in lying)
        lying.append((at, start, stop))


def test_bodies_elsewhere_are_refused():
    debt = Debt(8, 1000)
    debt.landed = 5000
    for at, nbytes in ((4999, 1), (6001, 1), (5900, 101), (5000, 0)):
        with pytest.raises(MalformedFrame, match="the landing has 1000"):
            debt.window(at, nbytes)


def test_a_debt_is_due_at_a_quarter():
    debt = Debt(8, 1000)
    debt.emptied = 1
    assert not debt.due
    debt.emptied = 2
    assert debt.due
    debt.told()
    assert not debt.due
    debt.landed = 250
    assert debt.due


@pytest.mark.parametrize("slots", [4, 5, 8, 64])
def test_two_ends_never_wait_for_each_other(slots):
    """Whatever the order in which slots travel: as long as one is under way or may be sent, everything arrives."""
    for seed in range(50):
        chance = random.Random(seed)
        ends = [(Budget(slots, 1), Debt(slots, 1)) for _ in range(2)]
        wanted, under_way = [300, 300], [[], []]
        while any(wanted) or any(under_way):
            moves = []
            for me in (0, 1):
                budget, debt = ends[me]
                if wanted[me] and budget.free_slots > 1:
                    moves.append(("send", me))
                elif debt.due and budget.free_slots:
                    moves.append(("credit", me))
                if under_way[1 - me]:
                    moves.append(("take", me))
            assert moves, (seed, wanted)
            move, me = chance.choice(moves)
            budget, debt = ends[me]
            if move == "take":
                emptied, landed = under_way[1 - me].pop(0)
                debt.emptied += 1
                budget.returned(Prefix(SlotKind.CREDIT, 0, 0, emptied, landed))
                continue
            wanted[me] -= move == "send"
            budget.sent += 1
            under_way[me].append(debt.told())
            assert len(under_way[me]) <= slots


def test_ports_are_joined_alike_from_both_ends():
    def eth(address):
        return {"layer": "ethernet", "kind": "roce2", "address": address}

    mine = [eth("10.0.1.5"), eth("10.0.2.5"), {"layer": "infiniband", "kind": "ib", "address": "fe80::1"}]
    theirs = [{"layer": "infiniband", "kind": "ib", "address": "fe80::2"}, eth("10.0.2.6"), eth("10.0.1.6")]
    assert pairs(mine, theirs) == [(0, 2), (1, 1), (2, 0)]
    assert sorted((i, j) for j, i in pairs(theirs, mine)) == pairs(mine, theirs)
    assert pairs(mine[:2], theirs[2:]) == [(0, 0)]
    assert pairs([], theirs) == [] and pairs([eth("nonsense")], [eth("")]) == [(0, 0)]


def test_a_position_is_known_by_its_last_32_bits():
    debt = Debt(8, 1 << 20)
    for landed in (0, 5000, (1 << 32) - 10, (1 << 40) + 7):
        debt.landed = landed
        for at in (landed, landed + 100, landed + (1 << 20)):
            assert debt.position(at % IMMEDIATES) == at
