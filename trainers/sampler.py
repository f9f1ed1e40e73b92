"""Completions of several adapters at once: one batched `generate` of transformers for all of a pack.

A token is drawn by the Gumbel trick: the largest of log-probability plus noise, where the noise is a hash of the
episode's key, the position and the token. So what an adapter samples does not depend on its neighbours, on the size of
a batch or on a generator's history, but for the rounding of its logits.

Shape legend: n slots, h rows each, B = n h, T positions, V vocabulary, C tokens of a completion.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trainers.adapters import Pack
from trainers.hashing import GOLDEN, mix
from trainers.out_of_memory import NoRoomError, give_back, shortage_in

CACHED_TOKENS = {"cpu": 1 << 15, "cuda": 1 << 17}
"""Tokens whose keys and values one batch holds at most; where that has no room, half."""
_FRACTION_BITS = 53


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is to be continued: ids int64 [T], and a key that decides what is drawn."""

    ids: np.ndarray
    key: int


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled completion, its end token with it where it came to one.

    Args:
        ids: int64 [C], C >= 1.
        logps: of each token by the policy that sampled it, at its temperature, float32 [C].
        entropy: mean of the policy's entropy over the positions, nats.
        is_whole: it came to an end token, not to the limit.
    """

    ids: np.ndarray
    logps: np.ndarray
    entropy: float
    is_whole: bool


def gumbel_noise(keys_B: torch.Tensor, position: int, vocabulary: int) -> torch.Tensor:
    """Noise whose largest sum with log-probabilities is a draw from them, float64 [B, V]."""
    tokens_V = torch.arange(1, vocabulary + 1, device=keys_B.device) * GOLDEN
    at_B = mix(mix(keys_B) + torch.tensor(position + 1, device=keys_B.device) * GOLDEN)
    hashed_BV = mix(at_B[:, None] + tokens_V) & ((1 << _FRACTION_BITS) - 1)
    uniform_BV = (hashed_BV.double() + 0.5) * 2.0**-_FRACTION_BITS
    return -torch.log(-torch.log(uniform_BV))


def episode_key(seed: int, position: int, sample: int) -> int:
    """Key of a sample of the prompt at a position of a trial's order, counted over all epochs."""
    parts = torch.tensor([seed, position, sample], dtype=torch.int64)
    key = mix(parts[:1] + GOLDEN)
    for part in parts[1:]:
        key = mix(key + part * GOLDEN + 1)
    return int(key)


class _Drawing(LogitsProcessor):
    """Adds the noise, and keeps what the policy thought of the token that wins."""

    def __init__(self, keys_B: torch.Tensor, temperature: float) -> None:
        self.keys_B, self.temperature = keys_B, temperature
        self.logps: list[torch.Tensor] = []
        self.entropies: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logp_BV = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        drawn = logp_BV
        if self.temperature > 0:
            drawn = logp_BV + gumbel_noise(self.keys_B, len(self.logps), logp_BV.shape[1])
        self.logps.append(logp_BV.gather(1, drawn.argmax(-1, keepdim=True))[:, 0])
        self.entropies.append(-(logp_BV.exp() * logp_BV).sum(-1))
        return drawn


class Sampler:
    """Samples for the slots of a pack, or for its base.

    Args:
        end_ids: tokens that end a completion.
        max_completion_length: tokens of a completion, end token included, >= 1.
        temperature: >= 0; 0: the likeliest token, whatever the key.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        pad_id: int,
        end_ids: Iterable[int],
        max_completion_length: int,
        temperature: float,
    ) -> None:
        self.pack, self.temperature = pack, temperature
        self.pad_id, self.end_ids = pad_id, sorted(set(end_ids))
        self.max_completion_length = max_completion_length
        self.cached_tokens = CACHED_TOKENS[pack.device.type]

    def sample(
        self, asked: Sequence[tuple[int | None, Sequence[Prompt]]]
    ) -> list[list[Completion]]:
        """Completions of each slot's prompts, in their order. A slot None: the base, or a whole model, which has no
        neighbours.

        Raises:
            NoRoomError: not even a row of each slot fits.
        """
        found: list[list[Completion]] = [[] for _ in asked]
        while left := [
            at for at, (_, prompts) in enumerate(asked) if len(found[at]) < len(prompts)
        ]:
            chosen = left[: self._rows(asked, left)]
            waiting = [asked[at][1][len(found[at]) :] for at in chosen]
            height = min(self._rows(asked, left) // len(chosen), *map(len, waiting))
            rows = [list(islice(prompts, height)) for prompts in waiting]
            done = self._tried([asked[at][0] for at in chosen], rows)
            for at, completions in zip(chosen, done, strict=True):
                found[at] += completions
        return found

    def _rows(self, asked: Sequence[tuple[int | None, Sequence[Prompt]]], left: list[int]) -> int:
        """Most rows of a batch; of the widest, so that every batch of these has as many."""
        widest = max(len(prompt.ids) for at in left for prompt in asked[at][1])
        return max(1, self.cached_tokens // (widest + self.max_completion_length))

    def _tried(self, slots: list[int | None], rows: list[list[Prompt]]) -> list[list[Completion]]:
        """A batch; where it has no room nothing, and the next ones will be half as large."""
        done: list[list[Completion]] = [[] for _ in slots]
        shortage = shortage_in(lambda: done.__setitem__(slice(None), self._batch(slots, rows)))
        if shortage is None:
            return done
        give_back()
        count = sum(map(len, rows))
        if count == 1:
            raise NoRoomError(f"out of memory for a single completion: {shortage.text}")
        width = max(len(prompt.ids) for part in rows for prompt in part)
        self.cached_tokens = max(1, count // 2) * (width + self.max_completion_length)
        return [[] for _ in slots]

    @torch.no_grad()
    def _batch(self, slots: list[int | None], rows: list[list[Prompt]]) -> list[list[Completion]]:
        adapted = [slot for slot in slots if slot is not None]
        assert len(adapted) in (0, len(slots)), "the base has no neighbours"
        self.pack.activate(adapted)
        flat = [prompt for part in rows for prompt in part]
        width = max(len(prompt.ids) for prompt in flat)
        ids = np.full((len(flat), width), self.pad_id, dtype=np.int64)
        seen = np.zeros_like(ids)
        for at, prompt in enumerate(flat):
            ids[at, width - len(prompt.ids) :] = prompt.ids
            seen[at, width - len(prompt.ids) :] = 1
        device = self.pack.device
        keys_B = torch.tensor([prompt.key for prompt in flat], dtype=torch.int64, device=device)
        drawing = _Drawing(keys_B, self.temperature)
        out = self.pack.model.generate(  # pyright: ignore[reportCallIssue]
            torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(seen).to(device),
            logits_processor=LogitsProcessorList([drawing]),
            generation_config=self._config(),
        )
        return _parted(self._completions(out[:, width:], drawing), rows)

    def _config(self) -> GenerationConfig:
        """Of our own: a model's may ask for sampling of another kind."""
        return GenerationConfig(
            do_sample=False,
            max_new_tokens=self.max_completion_length,
            pad_token_id=self.pad_id,
            eos_token_id=self.end_ids,
        )

    def _completions(self, out_BC: torch.Tensor, drawing: _Drawing) -> list[Completion]:
        ids = out_BC.cpu().numpy()
        logps = torch.stack(drawing.logps, 1).cpu().numpy()
        entropies = torch.stack(drawing.entropies, 1).cpu().numpy()
        ends = np.isin(ids, self.end_ids)
        found = []
        for at, is_end in enumerate(ends):
            is_whole = bool(is_end.any())
            length = int(is_end.argmax()) + 1 if is_whole else ids.shape[1]
            found.append(
                Completion(
                    ids=ids[at, :length],
                    logps=logps[at, :length],
                    entropy=float(entropies[at, :length].mean()),
                    is_whole=is_whole,
                )
            )
        return found


def _parted(completions: list[Completion], rows: list[list[Prompt]]) -> list[list[Completion]]:
    left = iter(completions)
    return [list(islice(left, len(part))) for part in rows]
