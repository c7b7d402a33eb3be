"""What ranks say to each other arrives whole, and is the same on all of them."""

import time

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model import ranks as ranks_module
from consilience.model.ranks import ALONE, Ranks, open_ranks
from tests.rank_processes import on_ranks

pytestmark = pytest.mark.row("what ranks say to each other", "-")


def talk(ranks):
    ranks_module.BUCKET_BYTES = 64
    given = [torch.full((3, 5), float(ranks.rank + 1)), torch.arange(4) * (ranks.rank + 1), torch.ones(())]
    strided = torch.zeros(4, 6).t()[1:]
    strided.fill_(ranks.rank)
    ranks.sum_([*given, strided])
    return {
        "summed": [*given, strided],
        "sums": ranks.sums({"loss": 0.5 * ranks.rank, f"own_{ranks.rank}": 1.0}),
        "gathered": ranks.gather({"rank": ranks.rank}),
        "broadcast": ranks.broadcast("from the first" if ranks.is_first else None),
        "part": ranks.part(range(7)),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_sums_and_values_and_its_own_part(size, tmp_path):
    found = on_ranks(size, talk, folder=tmp_path, is_apart=True)
    total = size * (size + 1) // 2
    for rank, said in enumerate(found):
        first, second, third, strided = said["summed"]
        torch.testing.assert_close(first, torch.full((3, 5), float(total)), rtol=0, atol=0)
        torch.testing.assert_close(second, torch.arange(4) * total, rtol=0, atol=0)
        assert third == size and (strided == total - size).all()
        names = {f"own_{i}": 1.0 for i in range(size)}
        assert said["sums"] == {"loss": 0.5 * (total - size)} | names
        assert said["gathered"] == [{"rank": i} for i in range(size)]
        assert said["broadcast"] == "from the first"
        assert said["part"] == list(range(7))[rank::size]


def test_one_process_needs_no_group():
    value = torch.ones(3)
    ALONE.sum_([value])
    ALONE.barrier()
    ALONE.close()
    assert value.tolist() == [1, 1, 1] and ALONE.sums({"a": 2.0}) == {"a": 2.0}
    assert ALONE.gather(5) == [5] and ALONE.broadcast("x") == "x" and ALONE.part([1, 2]) == [1, 2]
    assert open_ranks("file:///nowhere", 0, 1) is ALONE
    there = torch.zeros(3)
    ALONE.start_exchange(there, value, [3], [3])()
    ALONE.spread_(there, 0)
    assert there.tolist() == [1, 1, 1] and ALONE.stack(value).tolist() == [[1, 1, 1]]
    assert ALONE.split(1) == (ALONE, ALONE)


def travel(ranks):
    """Rank r sends r + 1 rows to itself and one to each other, all marked 10 r + where they go."""
    sizes = [
        [1 + (source == target) * source for target in range(ranks.size)] for source in range(ranks.size)
    ]
    marks = [10 * ranks.rank + target for target in range(ranks.size)]
    given = torch.tensor(marks).repeat_interleave(torch.tensor(sizes[ranks.rank]))[:, None].expand(-1, 3)
    coming = [row[ranks.rank] for row in sizes]
    found = torch.empty(sum(coming), 3, dtype=torch.int64)
    ranks.start_exchange(found, given.contiguous(), coming, sizes[ranks.rank])()
    spread = torch.full((2,), ranks.rank)
    ranks.spread_(spread, ranks.size - 1)
    said = {"found": found[:, 0].tolist(), "spread": spread.tolist()}
    said["stack"] = ranks.stack(torch.tensor([ranks.rank, 5])).tolist()
    for size in [n for n in (1, 2, 4) if ranks.size % n == 0]:
        within, across = ranks.split(size)
        said[size] = [(part.rank, part.gather(ranks.rank)) for part in (within, across)]
        said[size].append([part.stack(torch.tensor(ranks.rank)).tolist() for part in (within, across)])
    with pytest.raises(EngineError, match="into groups of 3; choose a divisor of"):
        ranks.split(3)
    if ranks.size == 4:
        with pytest.raises(EngineError, match="only the whole of the ranks"):
            Ranks(0, 4, ranks.split(2)[0].group).split(2)
    return said


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_reach_their_rank_in_order_and_ranks_split_into_parts(size, tmp_path):
    for rank, said in enumerate(on_ranks(size, travel, folder=tmp_path)):
        times = {source: 1 + (source == rank) * rank for source in range(size)}
        assert said["found"] == [10 * source + rank for source in times for _ in range(times[source])]
        assert said["spread"] == [size - 1] * 2 and said["stack"] == [[i, 5] for i in range(size)]
        for part in [n for n in (1, 2, 4) if size % n == 0]:
            neighbours = [*range(rank // part * part, rank // part * part + part)]
            lane = [*range(rank % part, size, part)]
            assert said[part][0] == (rank % part, neighbours) and said[part][1] == (rank // part, lane)
            assert said[part][2] == [neighbours, lane]


def absent(ranks):
    """Rank 1 never reaches the barrier, and lives on."""
    if ranks.rank == 1:
        time.sleep(9)
        return None
    with pytest.raises(EngineError) as found:
        ranks.barrier()
    return str(found.value)


def test_a_barrier_names_the_rank_that_is_missing(tmp_path):
    said = on_ranks(2, absent, folder=tmp_path, limit_s=16)
    assert "rank 0 of 2 waited in vain" in said[0] and "1" in said[0]


def test_a_rank_outside_of_the_group_or_alone_at_the_meeting_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="ranks count from 0 to 1"):
        open_ranks(f"file://{tmp_path}/m", 2, 2)
    with pytest.raises(EngineError, match=r"rank 0 of 2 found no others .* within 1 s"):
        open_ranks(f"file://{tmp_path}/m", 0, 2, timeout_s=1)


def first_alone_then_together(ranks, folder):
    """The first rank waits in vain once; then both meet."""
    ranks.close()
    if ranks.is_first:
        with pytest.raises(EngineError, match="found no others"):
            open_ranks(f"file://{folder}/alone", 0, 2, timeout_s=1)
    again = open_ranks(f"file://{folder}/together", ranks.rank, 2, timeout_s=8)
    return again.sums({"ranks": 1.0})


def test_a_process_that_waited_in_vain_finds_the_others_the_next_time(tmp_path):
    found = on_ranks(2, first_alone_then_together, tmp_path, folder=tmp_path, limit_s=30)
    assert found == [{"ranks": 2.0}] * 2
