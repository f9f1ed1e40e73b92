"""Inventories as people write them, and what a sweep costs."""

import pytest

from cluster.gpus import parse_inventory, peak_flops
from cluster.hours import flops_per_token, sweep_cost
from search_spaces.architecture import ModelShape
from search_spaces.linear_shape import LinearShape


@pytest.mark.parametrize(
    ("text", "nodes", "gpus", "name", "size"),
    [
        ("8xH100-80GB", 1, 8, "H100", 80e9),
        ("2x8xA100-40GB", 2, 16, "A100", 40e9),
        ("1x24GB", 1, 1, None, 24e9),
        (" 4 x L40S-48GB ", 1, 4, "L40S", 48e9),
        ("8xH200-141GB", 1, 8, "H200", 141e9),
    ],
)
def test_parse_inventory_reads_nodes_gpus_name_and_size(text, nodes, gpus, name, size):
    found = parse_inventory(text)
    assert (found.num_nodes, found.num_gpus, found.gpu_name) == (nodes, gpus, name)
    assert found.gpu_bytes == size
    assert found.gpus_per_node == gpus // nodes


@pytest.mark.parametrize(
    "text", ["", "8", "8xH100", "0x24GB", "8xH100-0GB", "xH100-80GB", "8x-3GB"]
)
def test_parse_inventory_another_form_is_refused_with_the_form(text):
    with pytest.raises(ValueError, match="must be") as error:
        parse_inventory(text)
    assert repr(text) in str(error.value)


def test_peak_flops_tells_an_l40s_from_an_l4():
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    assert peak_flops("Radeon") is None
    assert peak_flops(None) is None


def shape(**changes):
    """One matrix of 10 x 20 in each of 3 layers, and 4 experts of 5 x 6 of which 2 serve a token."""
    mlp = LinearShape(name="up_proj", in_features=10, out_features=20, component="mlp", count=3)
    experts = LinearShape(
        name="experts.down_proj", in_features=5, out_features=6, component="experts", count=4
    )
    sizes = {"hidden_size": 10, "num_layers": 3, "vocab_size": 7, "tied_head": False}
    return ModelShape.from_linears(
        [mlp, experts],
        model_type="x",
        embedding_params=70,
        other_params=0,
        num_experts=4,
        num_active_experts=2,
        **(sizes | changes),
    )


def test_flops_per_token_counts_active_experts_and_the_second_forward():
    met = 3 * 10 * 20 + 4 * 5 * 6 // 2
    assert flops_per_token(shape(), 11, recomputed=False) == 4 * met + 66
    assert flops_per_token(shape(), 11, recomputed=True) == 6 * met + 66


def test_sweep_cost_is_flops_over_peak_and_utilization():
    # 989e12 x 0.3 FLOPs a second for one hour.
    cost = sweep_cost(989e12 * 0.3 * 3600 * 8, gpu_name="H100", num_gpus=8, price_per_gpu_hour=2.0)
    assert cost is not None
    assert cost.hours == pytest.approx(1.0)
    assert cost.gpu_hours == pytest.approx(8.0)
    assert cost.price == pytest.approx(16.0)
    assert cost.low < cost.hours < cost.high
    assert sweep_cost(1e20, gpu_name="unheard of", num_gpus=8, price_per_gpu_hour=None) is None
