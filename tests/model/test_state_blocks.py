"""Blocks of the decode state: who holds which, what forks share, and that rows stay exact on them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from state_rows import BLOCKS_OF_12, allocate, feed, random_ids

from consilience.conf.errors import EngineError
from consilience.model.exact import exact_mode
from consilience.model.state import BlockPool

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(smallest, rough_model):
    """fp64, so that what differs is not rounding. Blocks hold 12 tokens: 3 CSA entries or one of HCA."""
    config = replace(smallest, **BLOCKS_OF_12)
    return rough_model(config, dtype=torch.float64).requires_grad_(False)


def assert_continues(model, state, row, before, after):
    """Feeding `after` to the row gives what the full forward of `before` and `after` gives."""
    expected = model(torch.cat((before, after))[None])[0, len(before) :]
    torch.testing.assert_close(feed(model, state, row, after), expected, rtol=0, atol=1e-11)


def assert_accounts_balance(state):
    """Every block is free or held as often as its holders say, and tables name what rows own."""
    holders, free = [0] * len(state.pool.holders), state.pool.free
    for block in (block for own in state.owned for block in own):
        holders[block] += 1
    assert holders == state.pool.holders and holders[0] == 0
    assert len(set(free)) == len(free)
    assert set(free) == {b for b, n in enumerate(holders) if b and not n}
    for row, own in enumerate(state.owned):
        assert state.tables[row].tolist() == own + [0] * (state.tables.shape[1] - len(own))
        assert state.capacity(row) == 12 * len(own) >= state.position[row]
        for block in own[int(state.position[row]) // 12 :]:
            assert holders[block] == 1, "a row may write only where it is alone"


def snapshot(state):
    return [t.clone() for t in state.tensors()], [list(own) for own in state.owned], list(state.pool.holders)


def assert_unchanged(state, before):
    tensors, owned, holders = before
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), tensors))
    assert (state.owned, state.pool.holders) == (owned, holders)


def test_a_pool_hands_out_each_block_once_and_refuses_what_it_has_not():
    pool = BlockPool(5)
    first = pool.take(3)
    assert sorted(first + pool.take(2)) == [1, 2, 3, 4, 5] and pool.take(0) == []
    pool.share(first[:1])
    pool.give_back(first)
    assert sorted(pool.free) == sorted(first[1:])  # one of them has a second holder
    with pytest.raises(EngineError, match=r"needs 3 more blocks, 2 of 5 are free; run fewer"):
        pool.take(3)
    pool.give_back(first[:1])
    assert sorted(pool.free) == sorted(first)


def test_rows_get_blocks_as_they_reserve_and_give_them_back_when_freed(model):
    state = allocate(model, num_blocks=7)
    assert [state.capacity(row) for row in range(4)] == [0] * 4
    with pytest.raises(EngineError, match="holds 0 tokens, a row would reach 1"):
        feed(model, state, 0, random_ids(1))
    state.reserve(0, 13)
    state.reserve(1, 60)
    assert [len(own) for own in state.owned] == [2, 5, 0, 0] and not state.pool.free
    state.reserve(0, 24)  # has them
    before = snapshot(state)
    with pytest.raises(EngineError, match="needs 1 more blocks, 0 of 7 are free"):
        state.reserve(0, 25)
    with pytest.raises(EngineError, match="sequence of 61 tokens was asked for, the decode state holds 60"):
        state.reserve(2, 61)
    with pytest.raises(EngineError, match="holds 24 tokens, a row would reach 25"):
        feed(model, state, 0, random_ids(25))
    assert_unchanged(state, before)
    state.free(1)
    assert len(state.pool.free) == 5 and state.capacity(1) == 0
    state.reserve(0, 25)
    assert_continues(model, state, 0, random_ids(0), random_ids(36))
    assert_accounts_balance(state)


@pytest.mark.parametrize("fork_at", [1, 7, 11, 12, 13, 24, 25])
def test_a_fork_shares_what_is_complete_and_goes_its_own_way(fork_at, model):
    mine, other = random_ids(fork_at + 14), random_ids(fork_at + 14, seed=31)
    state = allocate(model, num_blocks=20)
    for row in range(4):  # stale values everywhere
        state.reserve(row, 50)
        feed(model, state, row, random_ids(50, seed=row))
        state.free(row)
    state.reserve(1, 48)
    before = mine[:fork_at]
    feed(model, state, 1, before)
    state.fork([1, 1], [0, 3])
    shared = (fork_at - 1) // 12  # the last token may be taken back
    assert 20 - len(state.pool.free) == shared + 3 * (4 - shared)
    assert state.position.tolist() == [fork_at, fork_at, 0, fork_at]
    assert_accounts_balance(state)
    assert_continues(model, state, 0, before, other[fork_at:])
    assert_continues(model, state, 1, before, mine[fork_at:])
    state.free(1)
    assert_continues(model, state, 3, before, mine[fork_at:])
    assert_continues(model, state, 0, torch.cat((before, other[fork_at:])), random_ids(9, seed=5))
    state.free(3)
    assert 20 - len(state.pool.free) == 4
    state.free(0)
    assert len(state.pool.free) == 20
    assert_accounts_balance(state)


def test_a_fork_takes_the_place_of_what_its_target_held(model):
    state = allocate(model, 3, num_blocks=5)
    for row, length in enumerate((14, 26)):
        state.reserve(row, length)
        feed(model, state, row, random_ids(length, seed=row))
    state.fork([0], [1])
    assert [len(own) for own in state.owned] == [2, 2, 0] and len(state.pool.free) == 2
    assert_continues(model, state, 1, random_ids(14, seed=0), random_ids(9, seed=2))


def test_a_fork_that_finds_too_few_blocks_leaves_its_targets_empty_and_its_source_alone(model):
    state = allocate(model, num_blocks=5)
    state.reserve(0, 36)
    feed(model, state, 0, random_ids(20))
    state.reserve(1, 12)
    with pytest.raises(EngineError, match="needs 4 more blocks, 2 of 5 are free"):
        state.fork([0, 0], [1, 2])
    assert [len(own) for own in state.owned] == [3, 0, 0, 0] and len(state.pool.free) == 2
    assert_accounts_balance(state)
    assert_continues(model, state, 0, random_ids(20), random_ids(9, seed=2))


@pytest.mark.parametrize("back", [1, 2, 3])
def test_forks_may_be_set_back_over_the_border_of_a_block(back, model):
    """Taking tokens back writes entries anew; in a shared block that would be the other row's too.

    Rows 0 … 22 have 3 … 25 tokens; their forks 23 … 45 lose `back` of them and go on with others.
    """
    lengths = torch.arange(3, 26)
    tokens, others = random_ids(23, 30), random_ids(23, 4, seed=8)
    state = allocate(model, 46, lookahead=2)
    model(tokens[:, :25], state=state.view(0, 23), lengths=lengths)
    state.fork([*range(23)], [*range(23, 46)])
    state.position[23:] -= back
    assert_accounts_balance(state)
    forked = tokens.scatter(1, (lengths - back)[:, None] + torch.arange(4), others)
    for rows, sequences, start in (
        (state.view(23, 46), forked, lengths - back),
        (state.view(0, 23), tokens, lengths),
    ):
        new = start[:, None] + torch.arange(4)
        found = model(sequences.gather(1, new), state=rows)
        expected = model(sequences).gather(1, new[..., None].expand(-1, -1, 53))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_a_move_takes_blocks_along_and_leaves_an_empty_row(model):
    state = allocate(model, num_blocks=9)
    for row, length in enumerate((30, 14, 5)):
        state.reserve(row, length + 6)
        feed(model, state, row, random_ids(length, seed=row))
    held = [list(own) for own in state.owned]
    state.move([1, 0], [2, 3])
    assert state.owned == [[], [], held[1], held[0]]
    assert state.position.tolist() == [0, 0, 14, 30] and len(state.pool.free) == 9 - 5
    assert_accounts_balance(state)
    assert_continues(model, state, 2, random_ids(14, seed=1), random_ids(6, seed=8))
    assert_continues(model, state, 3, random_ids(30, seed=0), random_ids(6, seed=9))
    state.reserve(0, 24)
    assert_continues(model, state, 0, random_ids(0), random_ids(24, seed=9))
    state.fork([], [])
    state.move([], [])


def test_a_view_shares_rows_blocks_and_pool_with_its_state(model):
    state = allocate(model, num_blocks=8)
    view = state.view(1, 3)
    view.reserve(1, 20)
    assert state.owned[2] == view.owned[1] and len(state.owned[2]) == 2 and view.pool is state.pool
    model(random_ids(1, 20), state=view.view(1, 2))
    assert state.position.tolist() == [0, 0, 20, 0] and view.num_slots == 2
    view.fork([1], [0])
    state.move([2], [3])
    assert view.owned == state.owned[1:3] and view.owned[1] == [] and len(view.owned[0]) == 2
    assert_accounts_balance(state)
    assert_continues(model, state, 1, random_ids(1, 20)[0], random_ids(4, seed=2))
    view.free(0)
    assert state.capacity(1) == 0
    assert_continues(model, state, 3, random_ids(1, 20)[0], random_ids(4, seed=2))


def test_a_row_read_from_disk_does_not_write_into_blocks_it_shared(model):
    state = allocate(model, 3, num_blocks=10)
    state.reserve(0, 36)
    feed(model, state, 0, random_ids(30))
    state.reserve(2, 30)
    feed(model, state, 2, random_ids(30, seed=4))
    state.fork([0], [1])
    state.import_row(1, state.export_row(2))
    assert_accounts_balance(state)
    assert_continues(model, state, 0, random_ids(30), random_ids(5, seed=2))
    assert_continues(model, state, 1, random_ids(30, seed=4), random_ids(5, seed=2))


def test_a_row_too_long_for_the_pool_leaves_its_place_empty(model):
    source = allocate(model, 1)
    feed(model, source, 0, random_ids(30))
    state = allocate(model, 2, num_blocks=3)
    state.reserve(0, 12)
    state.reserve(1, 12)
    with pytest.raises(EngineError, match="needs 3 more blocks, 2 of 3 are free"):
        state.import_row(1, source.export_row(0))
    assert state.capacity(1) == 0 and len(state.pool.free) == 2
    assert_accounts_balance(state)


class Sequences(RuleBasedStateMachine):
    """Random forks, moves, ends, set-backs and trips to disk of rows that grow raggedly."""

    model = None
    is_exact = False
    rows = st.integers(0, 4)

    def __init__(self):
        super().__init__()
        self.state = allocate(self.model, 5, 48, num_blocks=13, lookahead=2)
        self.tokens = [random_ids(0)] * 5
        self.longest = [0] * 5

    @rule(
        seed=st.integers(0, 9999),
        lengths=st.lists(st.sampled_from([0, 0, 1, 2, 5, 11]), min_size=5, max_size=5),
    )
    def grow(self, seed, lengths):
        for row, length in enumerate(lengths):
            grown = len(self.tokens[row]) + length
            missing = -(-grown // 12) - len(self.state.owned[row])
            if grown <= 48 and missing <= len(self.state.pool.free):
                self.state.reserve(row, grown)
                continue
            with pytest.raises(EngineError, match=r"blocks|tokens"):
                self.state.reserve(row, grown)
            lengths[row] = 0
        if not any(lengths):
            return
        new = random_ids(5, max(lengths), seed=seed)
        with exact_mode(self.is_exact):
            found = self.model(new, state=self.state, lengths=torch.tensor(lengths))
        sequences = [torch.cat((old, new[row, :n])) for row, (old, n) in enumerate(zip(self.tokens, lengths))]
        with exact_mode(self.is_exact):
            full = self.model(torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True))
        for row, length in enumerate(lengths):
            stop = len(sequences[row])
            expected = full[row, stop - length : stop]
            torch.testing.assert_close(
                found[row, :length], expected, rtol=0, atol=0 if self.is_exact else 1e-11
            )
            self.longest[row] = max(self.longest[row], stop)
        self.tokens = sequences

    def become(self, target, source):
        self.tokens[target], self.longest[target] = self.tokens[source], self.longest[source]

    def vanish(self, row):
        self.tokens[row], self.longest[row] = random_ids(0), 0

    @precondition(lambda self: sum(map(len, self.tokens)) > 0)
    @rule(source=rows, others=st.lists(rows, min_size=1, max_size=3, unique=True))
    def fork(self, source, others):
        targets = [row for row in others if row != source]
        try:
            self.state.fork([source] * len(targets), targets)
        except EngineError:
            for row in targets:
                assert self.state.owned[row] == []
                self.vanish(row)
            return
        for row in targets:
            self.become(row, source)

    @rule(source=rows, row=rows)
    def move(self, source, row):
        if source != row:
            self.state.move([source], [row])
            self.become(row, source)
            self.vanish(source)

    @rule(row=rows)
    def end(self, row):
        self.state.free(row)
        self.vanish(row)

    @precondition(lambda self: sum(map(len, self.tokens)) > 0)
    @rule(row=rows, back=st.integers(1, 3))
    def set_back(self, row, back):
        length = max(len(self.tokens[row]) - back, self.longest[row] - 3, 0)
        self.state.position[row] = length
        self.tokens[row] = self.tokens[row][:length]

    @precondition(lambda self: sum(map(len, self.tokens)) > 0)
    @rule(source=rows, row=rows)
    def save_and_load(self, source, row):
        saved = self.state.export_row(source)
        try:
            self.state.import_row(row, saved)
            self.become(row, source)
        except EngineError:
            self.vanish(row)

    @invariant()
    def accounts_balance(self):
        assert_accounts_balance(self.state)
        assert self.state.position.tolist() == [len(t) for t in self.tokens]

    def teardown(self):
        for row in range(5):
            self.state.free(row)
        assert len(self.state.pool.free) == 13


@pytest.mark.parametrize(("is_exact", "num_runs"), [(False, 10), (True, 12)])
def test_rows_stay_right_and_no_block_is_lost_whatever_happens_to_them(
    is_exact, num_runs, model, rough_model
):
    """fp64 to rounding; in exact mode fp32 to the last bit."""
    if is_exact:
        model = rough_model(model.config).requires_grad_(False)
    machine = type("SequencesOfTheModel", (Sequences,), {"model": model, "is_exact": is_exact})
    options = settings(max_examples=num_runs, stateful_step_count=16, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=options)
