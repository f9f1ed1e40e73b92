"""Which way a pack is trained, from bytes that a test can sum by hand."""

from dataclasses import replace

import pytest

from cluster.gpus import parse_inventory
from cluster.inventory import Inventory
from cluster.strategy import Asked, DoesNotFitError, Way, Workload, choose

GB = 10**9
WORK = Workload(
    lora_rank=16, row_tokens=1024, global_batch_sizes=(16, 32), num_trials=8, quantized=True
)


def needs(base_gb: float, per_token_mb: float = 1.0):
    """A base, 0.1 GB for each unit of rank of an adapter, and activations: a tenth of them recomputed."""

    def needed(way: Way, workload: Workload, *, num_slots: int, tokens: int) -> int:
        base = base_gb * GB * (1 if workload.quantized else 4)
        held = base / way.num_workers if way.strategy == "zero3" else base
        token = per_token_mb * 1e6 * (0.1 if way.gradient_checkpointing else 1)
        return int(held + num_slots * workload.lora_rank * 0.1 * GB + tokens * token)

    return needed


def chosen(needed, inventory: str | Inventory, workload: Workload = WORK, asked=None, tokens=16384):
    present = parse_inventory(inventory) if isinstance(inventory, str) else inventory
    return choose(needed, workload, present, asked or Asked(), wanted_tokens=tokens)


def test_choose_a_base_with_room_is_held_whole_and_nothing_is_recomputed():
    fit = chosen(needs(5), "1x80GB")
    assert fit.way == Way(strategy="single", num_workers=1, gradient_checkpointing=False)
    assert fit.tokens == 16384


def test_choose_little_room_is_recomputed_rather_than_trained_in_crumbs():
    # 20 + 1.6 GB leave 2.4: two rows as they are, all 16 where layers are recomputed.
    fit = chosen(needs(20), "1x24GB")
    assert fit.way == Way(strategy="single", num_workers=1, gradient_checkpointing=True)
    assert fit.tokens == 16384


def test_choose_a_base_beyond_one_gpu_is_sharded_over_as_few_as_hold_it():
    fit = chosen(needs(100), "8x40GB")
    assert fit.way == Way(strategy="zero3", num_workers=4, gradient_checkpointing=True)


def test_choose_a_number_of_workers_that_shares_no_batch_is_passed_over():
    # Three would hold it, but 16 and 32 rows cannot be cut in three.
    assert chosen(needs(100), "8x48GB").way.num_workers == 4


def test_choose_workers_fill_whole_nodes_where_one_node_is_too_small():
    assert chosen(needs(290), "2x4x48GB").way.num_workers == 8
    with pytest.raises(DoesNotFitError):
        chosen(needs(290), "2x3x48GB")  # 6 of 6: no batch of 16


def test_choose_a_group_that_fits_one_machine_stays_in_one():
    # Two of three GPUs in each of two machines: the third pair would cross the network.
    fit = chosen(needs(60), "2x3x40GB")
    assert (fit.way.strategy, fit.way.num_workers, fit.num_groups) == ("zero3", 2, 2)


def test_choose_more_gpus_than_trials_share_the_batches():
    fit = chosen(needs(5), "8x80GB", replace(WORK, num_trials=2))
    assert fit.way == Way(strategy="ddp", num_workers=4, gradient_checkpointing=False)
    assert chosen(needs(5), "8x80GB", replace(WORK, num_trials=8)).way.strategy == "single"


def test_choose_boundary_one_byte_less_is_refused():
    exactly = int(20 * GB + 1.6 * GB + 1024 * 0.1e6)
    machine = Inventory(num_cpus=8, num_gpus=1, where="x", gpu_bytes=exactly)
    assert chosen(needs(20), machine).tokens == 1024
    with pytest.raises(DoesNotFitError):
        chosen(needs(20), replace(machine, gpu_bytes=exactly - 1))


def test_choose_refusal_names_the_bytes_and_the_smallest_change_of_each_kind():
    # 30 GB of base and 12.8 of adapter on 40 GB, one GPU, where nothing can be shared.
    with pytest.raises(DoesNotFitError) as error:
        chosen(needs(30), "1x40GB", replace(WORK, lora_rank=128))
    message = str(error.value)
    assert "rank 128" in message
    assert "42.9 GB" in message
    assert "1x40GB has 40.0 GB" in message
    assert "lora_rank 64" in message
    assert "2 such GPUs" in message
    assert "GPUs of 48 GB" in message
    assert "seq_len" not in message  # no shorter row would do


def test_choose_refusal_of_an_unquantized_base_offers_nf4_and_shorter_rows():
    with pytest.raises(DoesNotFitError, match="quantization: nf4"):
        chosen(needs(10), "1x24GB", replace(WORK, quantized=False))
    with pytest.raises(DoesNotFitError, match="seq_len 4096"):
        chosen(needs(20, per_token_mb=5), "1x24GB", replace(WORK, row_tokens=8192))


def test_choose_what_the_user_fixed_is_kept_or_refused():
    asked = Asked(num_workers=2, strategy="zero3")
    assert chosen(needs(5), "8x80GB", asked=asked).way == Way(
        strategy="zero3", num_workers=2, gradient_checkpointing=True
    )
    assert chosen(needs(5), "8x80GB", asked=Asked(num_workers=4)).way.strategy == "ddp"
    with pytest.raises(DoesNotFitError, match="whole base on one worker"):
        chosen(needs(100), "8x40GB", asked=Asked(strategy="single"))
    with pytest.raises(ValueError, match=r"multiple of workers_per_trial \(3\), got 16"):
        chosen(needs(5), "8x80GB", asked=Asked(num_workers=3))
    kept = chosen(needs(20), "1x24GB", asked=Asked(gradient_checkpointing=False))
    assert (kept.way.gradient_checkpointing, kept.tokens) == (False, 2048)


def test_choose_on_cpus_the_groups_share_the_memory_and_are_as_many_as_fit():
    machine = Inventory(num_cpus=4, num_gpus=0, where="this machine", memory_bytes=125 * GB)
    fit = chosen(needs(20), machine, tokens=2048)
    assert (fit.num_groups, fit.room_bytes) == (4, 25 * GB)  # 80% of 125 GB in four
    fit = chosen(needs(30), machine, tokens=2048)
    assert (fit.num_groups, fit.room_bytes) == (3, 100 * GB // 3)
    assert chosen(needs(5), machine, replace(WORK, num_trials=2)).num_groups == 2
    with pytest.raises(DoesNotFitError, match="share of the memory"):
        chosen(needs(100), machine)


def test_choose_unknown_room_takes_what_is_wanted():
    unknown = Inventory(num_cpus=4, num_gpus=0, where="the Ray cluster")
    fit = chosen(needs(10_000), unknown, tokens=2048)
    assert (fit.tokens, fit.room_bytes, fit.way.strategy) == (2048, None, "single")
