"""Where ranks of several machines meet: a store that says where it is, or why it cannot be had."""

import pytest

from consilience.cli.rank_meeting import StoreMeeting, open_store
from consilience.conf.errors import EngineError
from consilience.model.ranks import HAS, WAITS, WAITS_FOR_WORK, WORKS


def test_the_board_in_the_store_says_who_is_late_to_whoever_connects():
    store = open_store(None)
    meeting = StoreMeeting("127.0.0.1", store.port, 3)
    boards = [meeting.board() for _ in range(4)]
    assert boards[3].late() is None, "nobody has begun a call"
    notes = [board.writer(rank) for rank, board in enumerate(boards[:3])]
    notes[0](WAITS)
    notes[2](WAITS)
    assert boards[3].late() == (1, [1])
    notes[1](WAITS)
    assert boards[3].late() == (1, []), "all are in the call"
    for note in notes:
        note(HAS)
    assert boards[3].late() is None
    notes[1](WORKS)
    assert boards[0].late() == (2, [0, 2]) and boards[3].row(1).state == WORKS


def test_nobody_is_late_behind_work_of_which_ranks_have_unequal_shares():
    store = open_store(None)
    board = StoreMeeting("127.0.0.1", store.port, 3).board()
    notes = [board.writer(rank) for rank in range(3)]
    notes[0](WAITS_FOR_WORK)
    notes[2](WAITS_FOR_WORK)
    assert board.late() is None and board.row(0).state == WAITS_FOR_WORK
    notes[1](WAITS_FOR_WORK)
    assert board.late() == (1, []), "all are in the call"


def test_a_port_in_use_and_a_store_that_is_not_there_are_one_clear_error_each():
    store = open_store(None)
    with pytest.raises(EngineError, match=rf"^cluster.port is {store.port}, .*most likely it is in use"):
        open_store(store.port)
    port = store.port
    del store
    silent = StoreMeeting("127.0.0.1", port, 2, connect_s=1.0)
    with pytest.raises(EngineError, match=rf"cannot reach rank 0 at tcp://127.0.0.1:{port} within 1 s"):
        silent.board()
