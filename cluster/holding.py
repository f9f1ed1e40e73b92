"""What a worker's memory depends on, beside the shape of the model: how it holds the base, what a forward holds."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseHolding:
    """How a worker holds the frozen base.

    Args:
        quantized: NF4 with double quantization.
        compute_bytes: of the compute type, in which everything else stays: 2 (bf16) or 4 (fp32).
        num_workers: workers of the group that trains one pack, >= 1.
        sharded: each of them holds its part of every weight (ZeRO-3), and layers are recomputed.
        gradient_checkpointing: layers are recomputed in the backward pass.
        keep_dequantized: NF4's weights in the compute type instead of four bits.
    """

    quantized: bool
    compute_bytes: int
    num_workers: int = 1
    sharded: bool = False
    gradient_checkpointing: bool = False
    keep_dequantized: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.compute_bytes < 1:
            raise ValueError(
                f"num_workers and compute_bytes must be >= 1, got {self.num_workers} and {self.compute_bytes}"
            )
        if self.sharded and self.num_workers < 2:
            raise ValueError("a sharded base needs num_workers >= 2, got 1; set sharded: false")
        if self.sharded and self.keep_dequantized:
            raise ValueError(
                "a sharded base is never kept dequantized; set keep_dequantized: false"
            )

    @property
    def num_shards(self) -> int:
        """Parts of the base, of which a worker holds one."""
        return self.num_workers if self.sharded else 1

    @property
    def recomputes(self) -> bool:
        """Whether a layer's insides are computed again in its backward pass."""
        return self.gradient_checkpointing or self.sharded

    @property
    def holds_nf4(self) -> bool:
        """Whether the weights are multiplied from four bits."""
        return self.quantized and not self.keep_dequantized


@dataclass(frozen=True, kw_only=True)
class Forward:
    """One forward of a worker, padding included.

    Args:
        num_adapters: segments of the batch, >= 1.
        tokens: of all rows, >= 1.
        row_tokens: of one row, <= tokens.
        loss_tokens: positions that bear loss, >= 0.
        lora_rank: largest of the adapters, >= 1.
        dropout: an adapter drops inputs.
        magnitudes: an adapter is a DoRA, which keeps the outputs of its layers.
        packed: rows hold several examples, which a mask keeps apart.
    """

    num_adapters: int
    tokens: int
    row_tokens: int
    loss_tokens: int
    lora_rank: int
    dropout: bool = False
    magnitudes: bool = False
    packed: bool = False

    def __post_init__(self) -> None:
        if min(self.num_adapters, self.tokens, self.row_tokens, self.lora_rank) < 1:
            raise ValueError(
                f"num_adapters, tokens, row_tokens and lora_rank must be >= 1, got {self}"
            )
        if self.row_tokens > self.tokens or not 0 <= self.loss_tokens <= self.tokens:
            raise ValueError(f"row_tokens and loss_tokens must be at most tokens, got {self}")
