"""How a global batch is divided (field case D04: micro x accumulation x workers == global)."""

import pytest

from cluster.placement import split_global_batch


@pytest.mark.parametrize(
    ("global_batch_size", "num_workers", "max_micro", "micro", "accumulation"),
    [
        (32, 8, 2, 2, 2),
        (32, 16, 2, 2, 1),
        (32, 1, 8, 8, 4),
        (12, 1, 8, 6, 2),  # the largest divisor of the share, not the limit
        (7, 1, 4, 1, 7),  # a prime share above the limit
        (6, 3, 8, 2, 1),  # a share below the limit
        (1, 1, 1, 1, 1),
    ],
)
def test_split_global_batch_table_gives_micro_and_accumulation(
    global_batch_size, num_workers, max_micro, micro, accumulation
):
    split = split_global_batch(global_batch_size, num_workers, max_micro)
    assert (split.micro_batch_size, split.grad_accum_steps) == (micro, accumulation)
    assert split.num_workers == num_workers


@pytest.mark.parametrize(
    ("global_batch_size", "num_workers"), [(32, 6), (16, 32), (15, 2), (33, 32)]
)
def test_split_global_batch_that_workers_cannot_share_is_refused_with_both_numbers(
    global_batch_size, num_workers
):
    with pytest.raises(ValueError, match="multiple of workers_per_trial") as error:
        split_global_batch(global_batch_size, num_workers, 2)
    assert f"({num_workers})" in str(error.value)
    assert str(error.value).endswith(f"got {global_batch_size}")


def test_split_global_batch_of_every_small_case_keeps_the_product_and_is_the_largest():
    for global_batch_size in range(1, 41):
        for num_workers in (n for n in range(1, 9) if global_batch_size % n == 0):
            for limit in range(1, 12):
                split = split_global_batch(global_batch_size, num_workers, limit)
                micro, steps = split.micro_batch_size, split.grad_accum_steps
                assert micro * steps * num_workers == global_batch_size
                assert micro <= limit
                larger = range(micro + 1, limit + 1)
                assert all(global_batch_size % (size * num_workers) for size in larger)
