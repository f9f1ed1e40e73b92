"""The loss of a batch without the logits of positions that bear none.

The hidden states of the loss-bearing positions are gathered, and the head and its cross-entropy run over
them in chunks. In training each chunk's backward pass runs at once, so that one chunk's logits are the
most that is ever held, and nothing is computed twice.

Shape legend: n segments, B rows, T positions, H hidden, V vocabulary, M loss-bearing positions in blocks.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from trainers.adapters import Pack
from trainers.batches import IGNORED, Batch, LossBlocks
from trainers.dropout import DropoutTokens

CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Logits held at once: on a CPU what stays near its cache, on a GPU what fills it."""


@dataclass(frozen=True)
class Chunk:
    """Whole blocks of loss-bearing positions: where they are in M, the segment of each block."""

    where: slice
    segments: tuple[int, ...]


class LossHead:
    """Loss-bearing hidden states -> nats, through the model's own head."""

    def __init__(self, pack: Pack) -> None:
        self.pack, self.decoder = pack, pack.model.base_model
        self.scaled = logit_scaling(pack.model)
        chunk_bytes = CHUNK_BYTES[pack.device.type]
        self.max_positions = max(1, chunk_bytes // (4 * vocabulary_size(pack.model)))

    def train_nats(
        self,
        batch: Batch,
        slots: tuple[int, ...],
        scale_n: list[float],
        dropout: DropoutTokens | None = None,
    ) -> torch.Tensor:
        """Summed nats of each segment (of a policy's batch, its objective), float64 [n]; adds the gradients
        of sum(nats x scale) to the slots. slots: empty for full fine-tuning (one segment)."""
        self.pack.activate(slots, dropout)
        hidden = self._hidden(batch)
        nats_n = torch.zeros(len(scale_n), dtype=torch.float64, device=hidden.device)
        with head_weights(self.pack):
            selected, grad = self._through_head(batch, hidden, nats_n, slots, scale_n, dropout)
        if selected.requires_grad:
            # layers may be computed again
            self.pack.activate(slots, dropout, same_weights=True)
            selected.backward(grad)
        if self.pack.sharding is not None:
            self.pack.sharding.end_backward()
        return nats_n

    def _through_head(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        nats_n: torch.Tensor,
        slots: tuple[int, ...],
        scale_n: list[float],
        dropout: DropoutTokens | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss-bearing hidden states with their gradients; adds the nats of each segment."""
        if batch.loss is None:
            # With nothing to learn the backward pass still has to run where others wait for it.
            rows = hidden.flatten(0, 1)[:1] if self.pack.sharding else hidden.detach()[:0]
            return rows, torch.zeros_like(rows)
        selected = hidden.flatten(0, 1)[batch.loss.index_M]
        grad = torch.empty_like(selected)
        for chunk in self._chunks(batch.loss):
            part = selected.detach()[chunk.where].requires_grad_()
            chosen = dropout.select(batch.loss.index_M[chunk.where]) if dropout else None
            self._activate(slots, chunk, chosen)
            losses_b = self._block_losses(part, batch, chunk)
            scales = torch.tensor([scale_n[k] for k in chunk.segments], dtype=losses_b.dtype)
            (losses_b * scales.to(losses_b.device)).sum().backward()
            assert part.grad is not None
            grad[chunk.where] = part.grad
            where = torch.tensor(chunk.segments, device=nats_n.device)
            nats_n.index_add_(0, where, losses_b.detach().double())
        return selected, grad

    @torch.no_grad()
    def eval_nats(self, batch: Batch, slot: int | None) -> torch.Tensor:
        """Summed nats of the rows, a float64 scalar; of the base alone where slot is None."""
        slots = () if slot is None else (slot,)
        self.pack.activate(slots)
        hidden = self._hidden(batch)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        flat, loss = hidden.flatten(0, 1), batch.loss
        with head_weights(self.pack):
            if loss is None:
                return total
            for chunk in self._chunks(loss):
                self._activate(slots, chunk, None)
                part = flat[loss.index_M[chunk.where]]
                total += self._token_nats(part, batch, chunk).double().sum()
        return total

    def _hidden(self, batch: Batch) -> torch.Tensor:
        own = {} if batch.positions_BT is None else {"position_ids": batch.positions_BT}
        return self.decoder(input_ids=batch.ids_BT, use_cache=False, **own).last_hidden_state

    def _activate(
        self, slots: tuple[int, ...], chunk: Chunk, dropout: DropoutTokens | None
    ) -> None:
        chosen = [slots[k] for k in chunk.segments] if slots else ()
        self.pack.activate(chosen, dropout, same_weights=True)

    def _chunks(self, loss: LossBlocks) -> Iterator[Chunk]:
        size = len(loss.index_M) // len(loss.segment_of_block)
        blocks = max(1, self.max_positions // size)
        for first in range(0, len(loss.segment_of_block), blocks):
            segments = loss.segment_of_block[first : first + blocks]
            yield Chunk(slice(first * size, (first + len(segments)) * size), segments)

    def _block_losses(self, part: torch.Tensor, batch: Batch, chunk: Chunk) -> torch.Tensor:
        """What is minimised, summed over each block: nats, or what the objective of a policy makes of them."""
        losses = self._token_nats(part, batch, chunk)
        if batch.policy is not None:
            losses = batch.policy.losses(losses, chunk.where)
        return losses.view(len(chunk.segments), -1).sum(1)

    def _token_nats(self, part: torch.Tensor, batch: Batch, chunk: Chunk) -> torch.Tensor:
        assert batch.loss is not None
        head = output_head(self.pack.model)
        logits = self.scaled(head(part.view(len(chunk.segments), -1, part.shape[-1])))
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        if batch.policy is not None and batch.policy.temperature != 1:
            logits = logits / batch.policy.temperature
        targets = batch.loss.targets_M[chunk.where]
        return F.cross_entropy(
            logits.flatten(0, 1), targets, reduction="none", ignore_index=IGNORED
        )


def head_weights(pack: Pack) -> AbstractContextManager[None]:
    """The head's weights are there within; of a sharded base all workers must come along."""
    return nullcontext() if pack.sharding is None else pack.sharding.head()


def output_head(model: PreTrainedModel) -> torch.nn.Module:
    """The model's head (adapted or not); `.weight` is [V, H]."""
    head = model.get_output_embeddings()
    return head if head is not None else model.lm_head


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the head."""
    weight = output_head(model).weight
    assert isinstance(weight, torch.Tensor)
    return getattr(weight, "ds_shape", weight.shape)[0]  # a sharded one is empty


Scaling = Callable[[torch.Tensor], torch.Tensor]


def logit_scaling(model: PreTrainedModel) -> Scaling:
    """What the model's own forward does to the head's output."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:  # Gemma 2 and 3
        return lambda logits: cap * torch.tanh(logits / cap)
    if (factor := getattr(config, "logit_scale", None)) is not None:  # Cohere
        return lambda logits: logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        return lambda logits: logits / divisor
    return lambda logits: logits


@contextmanager
def _gathered_when_called(pack: Pack) -> Iterator[None]:
    """A sharded head gathers its weights at every call: in the model's own forward the decoder comes
    first, and would let go of a tied head's."""
    head, open_gathers = output_head(pack.model), ExitStack()
    before = head.register_forward_pre_hook(
        lambda *_: open_gathers.enter_context(head_weights(pack))
    )
    after = head.register_forward_hook(lambda *_: open_gathers.close())
    try:
        yield
    finally:
        before.remove()
        after.remove()


@torch.no_grad()
def check_head(pack: Pack) -> None:
    """Compares decoder and head, run apart, with the model's own forward on a few tokens.

    Raises:
        ValueError: the model does more between its hidden states and its logits than we know of.
    """
    pack.activate(())
    ids = torch.arange(1, 5, device=pack.device)[None]
    hidden = pack.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    with _gathered_when_called(pack):
        expected = pack.model(input_ids=ids, use_cache=False).logits
        got = logit_scaling(pack.model)(output_head(pack.model)(hidden))
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(
            f"{type(pack.model).__name__}: its logits must be finite, they are not in"
            f" {expected.dtype}; load whole weights, or another dtype"
        )
    if not torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"{type(pack.model).__name__}: its logits must be its head over its hidden states, they "
            f"differ by {float((got - expected).abs().max()):.3g}; this architecture cannot be trained yet"
        )


@torch.no_grad()
def check_packing(pack: Pack) -> None:
    """Runs two examples in one sequence, and looks whether the second sees anything of the first.

    Raises:
        ValueError: it does, so that the model cannot train on packed sequences.
    """
    pack.activate(())
    ids = torch.arange(1, 13, device=pack.device) % vocabulary_size(pack.model)
    first, other, second = ids.chunk(3)
    positions = torch.arange(4, device=pack.device).repeat(2)[None]

    def hidden(*parts: torch.Tensor, **own: torch.Tensor) -> torch.Tensor:
        out = pack.model.base_model(input_ids=torch.cat(parts)[None], use_cache=False, **own)
        return out.last_hidden_state[0, -len(second) :]

    packed = hidden(first, second, position_ids=positions)
    leaks = not torch.equal(packed, hidden(other, second, position_ids=positions))
    moved = not torch.allclose(packed.float(), hidden(second).float(), rtol=1e-2, atol=1e-2)
    if leaks or moved:
        raise ValueError(
            f"packing: {type(pack.model).__name__} must keep the examples of a sequence apart by their "
            f"positions, but {'attends across them' if leaks else 'places them differently'};"
            " set packing: false"
        )
