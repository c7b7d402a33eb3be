"""States written and read beside the compute are those that were put, and errors come to whoever waits."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.store_threads import StatesAhead, WriteBehind

BATCHES = [{f"{b}{i}": torch.full((3, 4), 10.0 * b + i) for i in range(2)} for b in range(3)]


@pytest.fixture(params=[0, 1 << 20], ids=["in threads", "at once"])
def small(request):
    return request.param


def test_everything_put_is_on_the_disk_when_finish_returns(tmp_path, small):
    writer = WriteBehind(HiddenStore(tmp_path), small)
    for batch in BATCHES:
        writer.put(batch, "math")
    writer.finish()
    assert len(HiddenStore(tmp_path)) == 6 and HiddenStore(tmp_path).origins == {"math": 6}


def test_a_batch_that_cannot_be_written_is_an_error_of_the_next_put_or_of_finish(tmp_path):
    writer = WriteBehind(HiddenStore(tmp_path, budget_bytes=BATCHES[0]["00"].nbytes * 2), 0)
    writer.put(BATCHES[0])
    writer.put(BATCHES[1])
    with pytest.raises(EngineError, match="do not fit"):
        writer.put(BATCHES[2])
    writer.finish()
    assert len(HiddenStore(tmp_path)) == 2


def test_segments_are_given_in_their_order_and_use_their_reservations_up(tmp_path, small):
    store = HiddenStore(tmp_path)
    for batch in BATCHES:
        store.put(batch)
    segments = [["20"], ["00", "11"], [], ["01"]]
    store.reserve(key for keys in segments for key in keys)
    ahead = StatesAhead(store, segments, small)
    for keys in segments:
        found = ahead.take()
        assert [float(state[0, 0]) for state in found] == [float(int(key)) for key in keys]
    store.free_taken()
    assert len(store) == 0


def test_states_that_are_not_there_are_an_error_where_they_are_taken(tmp_path, small):
    store = HiddenStore(tmp_path)
    store.put(BATCHES[0] | BATCHES[1])
    store.reserve(["00", "gone", "10"])
    ahead = StatesAhead(store, [["00"], ["gone", "10"]], small)
    assert torch.equal(ahead.take()[0], BATCHES[0]["00"])
    with pytest.raises(EngineError, match="not stored"):
        ahead.take()
