"""The memory of a pack: one row per slot, views of it per layer, growth that loses nothing."""

import pytest
import torch

from trainers.store import EXP_AVG, EXP_AVG_SQ, GRAD, WEIGHT, AdapterStore, LayerSize

KINDS = (WEIGHT, GRAD, EXP_AVG, EXP_AVG_SQ)
FEATURES = {"up": LayerSize(3, 5), "down": LayerSize(5, 3)}


def store(num_slots=2, max_rank=2, features=FEATURES) -> AdapterStore:
    made = AdapterStore(torch.float64, torch.device("cpu"))
    made.reserve(num_slots, max_rank, features)
    return made


def fill(one: AdapterStore) -> dict[str, torch.Tensor]:
    """Puts a different number everywhere and returns copies of all A and B."""
    with torch.no_grad():
        one.memory_4SP.copy_(torch.arange(1.0, 1 + one.memory_4SP.numel()).view_as(one.memory_4SP))
    views = {f"A {n}": v for n, v in one.A_4SRI.items()}
    views |= {f"B {n}": v for n, v in one.B_4SRO.items()}
    return {name: view.clone() for name, view in views.items()}


@pytest.mark.parametrize(
    ("num_slots", "max_rank", "features"),
    [
        (5, 2, {}),
        (2, 7, {}),
        (2, 2, {"again": LayerSize(4, 4)}),
        (3, 3, {"a first in order": LayerSize(2, 9), "up": LayerSize(3, 5)}),
    ],
    ids=["slots", "rank", "layer", "everything"],
)
def test_reserve_more_keeps_weights_gradients_and_moments(num_slots, max_rank, features):
    one = store()
    before = fill(one)
    assert one.reserve(num_slots, max_rank, features)
    for name, old in before.items():
        new = (one.A_4SRI if name[0] == "A" else one.B_4SRO)[name[2:]]
        assert new.shape[:3] == (4, num_slots, max_rank)
        assert torch.equal(new[:, :2, :2], old)
    # Whatever is new is zero: the sum of the memory is that of 1..256.
    assert one.memory_4SP.sum() == 256 * 257 / 2


@pytest.mark.parametrize("wanted", [(2, 2, FEATURES), (1, 1, {}), (0, 0, {"up": LayerSize(3, 5)})])
def test_reserve_what_is_there_moves_nothing(wanted):
    one = store()
    fill(one)
    memory = one.memory_4SP.data_ptr()
    assert not one.reserve(*wanted)
    assert one.memory_4SP.data_ptr() == memory
    assert (one.num_slots, one.max_rank) == (2, 2)


def test_reserve_never_shrinks_one_side_while_another_grows():
    one = store(num_slots=4, max_rank=2)
    one.reserve(1, 8, {"up": LayerSize(3, 5)})
    assert (one.num_slots, one.max_rank, set(one.features)) == (4, 8, {"up", "down"})


@pytest.mark.parametrize("kind", KINDS)
def test_row_and_views_are_the_same_memory(kind):
    one = store()
    one.row(kind, 1).fill_(7.0)
    for view in (*one.A_4SRI.values(), *one.B_4SRO.values()):
        assert (view[kind, 1] == 7).all()
        assert view[kind, 0].eq(0).all()
        view[kind, 1].zero_()
    # The views cover the row: nothing of it is left.
    assert one.memory_4SP.eq(0).all()


def test_row_is_contiguous_and_as_long_as_all_matrices():
    row = store(num_slots=3, max_rank=4).row(GRAD, 2)
    assert row.is_contiguous()
    assert row.shape == (4 * (3 + 5 + 5 + 3),)


def test_views_do_not_overlap():
    one = store()
    for number, view in enumerate((*one.A_4SRI.values(), *one.B_4SRO.values()), start=1):
        view.fill_(number)
    for number, view in enumerate((*one.A_4SRI.values(), *one.B_4SRO.values()), start=1):
        assert (view == number).all()


def test_clear_zeroes_a_slot_and_no_other_even_of_nan():
    one = store(num_slots=3)
    fill(one)
    before = one.memory_4SP.clone()
    one.memory_4SP[:, 1, ::2] = float("nan")
    one.clear(1)
    assert one.memory_4SP[:, 1].eq(0).all()
    assert torch.equal(one.memory_4SP[:, [0, 2]], before[:, [0, 2]])


def test_bytes_per_slot_are_those_of_the_memory():
    one = store(num_slots=3, max_rank=4)
    memory = one.memory_4SP.numel() * one.memory_4SP.element_size()
    assert 3 * AdapterStore.bytes_per_slot(4, FEATURES, 8) == memory
