"""The arms of pack_step.py: each makes optimizer steps of one kind and is asked to make n more of them."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.common import BASE_MODEL
from search_spaces.architecture import ModelShape
from trainers.adapters import Pack
from trainers.base_model import BaseSpec, load_base
from trainers.batches import RowSource, example_order
from trainers.composer import ForwardLimits
from trainers.data.token_set import TokenizedSet
from trainers.full import unfreeze
from trainers.loop import Trainer
from trainers.runs import Run, RunSpec, new_run
from trainers.slots import AdapterSpec

CONFIG = {"vocab_size": 3072, "max_position_embeddings": 1024, "tie_word_embeddings": True}
NUM_LAYERS = {128: 4, 256: 4, 512: 2, 1024: 2}
"""Few enough that a step takes seconds; width 192 is the shipped base with its 4 layers."""
ENDLESS = 10**9
LORA_ALPHA, LORA_LR, FULL_LR = 32.0, 1e-3, 1e-5
TRL_WARMUP_STEPS = 2

Seconds = Callable[[int], float]
"""Makes n optimizer steps (of each adapter) and returns the wall seconds of all of them."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the arms of one table share.

    Args:
        model: folder of the base.
        rows: what is trained on.
        batch: rows of a step of one adapter.
        max_tokens: of one forward of ours; 0: not known yet.
        quantization: of the base, "nf4" or "none".
        dtype: compute type, "fp32" or "bf16".
    """

    model: Path
    shape: ModelShape
    rows: TokenizedSet
    batch: int
    lora_rank: int
    target: tuple[str, ...]
    max_tokens: int
    device: torch.device
    quantization: Any
    dtype: str

    def base(self, quantization: Any = None, *, keep: bool = True) -> Any:
        """The frozen base, loaded as a worker loads it."""
        spec = BaseSpec(
            model=str(self.model),
            quantization=quantization or self.quantization,
            dtype=self.dtype,
            keep_dequantized=keep,
        )
        return load_base(spec, self.device)

    @property
    def linears(self) -> tuple[Any, ...]:
        return tuple(self.shape.resolve_target(self.target))


def model_folder(hidden: int, work: Path) -> Path:
    """A Llama of a width: the shipped base at 192, else random weights, written once."""
    if hidden == 192:
        return BASE_MODEL
    from transformers import LlamaConfig

    head_dim = 32 if hidden <= 256 else 64
    heads = hidden // head_dim
    config = LlamaConfig(
        **CONFIG,
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 32) * 32,
        num_hidden_layers=NUM_LAYERS[hidden],
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
    )
    return random_model(config, work / "models" / f"llama-{hidden}", torch.float32)


def config_model_folder(config_file: Path, work: Path, dtype: torch.dtype) -> Path:
    """A base with random weights of a published config.json."""
    from transformers import AutoConfig

    values = json.loads(config_file.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return random_model(config, work / "models" / config_file.stem, dtype)


def random_model(config: Any, folder: Path, dtype: torch.dtype) -> Path:
    """Writes a model with random weights, unless it is there."""
    from transformers import AutoModelForCausalLM

    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        ).save_pretrained(folder)
    return folder


def fixed_rows(count: int, length: int, vocab_size: int) -> TokenizedSet:
    """Random rows of one length; the second half of each bears loss, as a completion does."""
    ids = np.random.default_rng(0).integers(0, vocab_size, count * length, dtype=np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    mask = np.tile(np.arange(length) >= length // 2, count)
    return TokenizedSet(
        input_ids=ids,
        loss_mask=mask,
        offsets=offsets,
        row_loss_tokens=np.full(count, length - length // 2, dtype=np.int64),
        row_loss_bytes=np.full(count, length, dtype=np.int64),
    )


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PackSteps:
    """Our trainer over up to `num_adapters` adapters, or (full=True) over a whole model."""

    def __init__(
        self, bench: Bench, model: Any, num_adapters: int = 1, *, full: bool = False
    ) -> None:
        self.bench = bench
        self.pack = unfreeze(model) if full else Pack(model)
        spec = AdapterSpec(lora_rank=bench.lora_rank, lora_alpha=LORA_ALPHA, linears=bench.linears)
        slots = (
            [0]
            if full
            else [self.pack.enter(replace(spec, seed=seed)) for seed in range(num_adapters)]
        )
        source = RowSource(bench.rows, 0, bench.device)
        limits = ForwardLimits(max_tokens=bench.max_tokens)
        self.trainer = Trainer(self.pack, source, source, limits=limits)
        run = RunSpec(
            learning_rate=FULL_LR if full else LORA_LR,
            global_batch_size=bench.batch,
            num_examples=ENDLESS,
            eval_every=ENDLESS,
        )
        self.runs = [
            new_run(self.pack, slot, replace(run, seed=seed)) for seed, slot in enumerate(slots)
        ]

    def seconds(self, num_steps: int, num_adapters: int = 1) -> float:
        """Wall seconds in which each of the first adapters makes so many steps."""
        runs = self.runs[:num_adapters]
        goal = {run: run.steps + num_steps for run in runs}
        synchronize(self.bench.device)
        began = time.perf_counter()
        while active := [run for run in runs if run.steps < goal[run]]:
            self._advance(active)
        synchronize(self.bench.device)
        seconds = time.perf_counter() - began
        for run in runs:  # what a sample left over must not be given to the next one's neighbours
            run.rows_done = 0.0
        return seconds

    def _advance(self, active: list[Run]) -> None:
        self.trainer.advance(active)
        ended = [run.reason for run in active if run.status != "running"]
        if ended:
            raise RuntimeError(f"a benchmark's run must not end: {ended[0]}")

    @property
    def adapter_bytes(self) -> int:
        """Weights, gradients and moments of one adapter as they are held."""
        return (
            4 * self.runs[0].slot.weights[0].numel() * self.runs[0].slot.weights[0].element_size()
        )


class HandSteps:
    """The loop that a careful user of PEFT writes: a whole batch in one forward, padded to its longest
    row, logits of all positions, clip, fused AdamW.

    No attention mask: rows are padded on the right and padding bears no loss, so causal attention is
    exact and takes torch's fast path.
    """

    def __init__(self, bench: Bench, model: Any, micro_batch: int | None = None) -> None:
        from peft import LoraConfig, get_peft_model

        self.bench, self.micro = bench, micro_batch or bench.batch
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=bench.lora_rank,
            lora_alpha=LORA_ALPHA,  # pyright: ignore[reportArgumentType]
            target_modules=sorted({linear.name for linear in bench.linears}),
        )
        self.model = get_peft_model(model, config)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LORA_LR, weight_decay=0.0, fused=True
        )
        self.step = 0

    def seconds(self, num_steps: int) -> float:
        synchronize(self.bench.device)
        began = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        synchronize(self.bench.device)
        return time.perf_counter() - began

    def _step(self) -> None:
        batch, rows = self.bench.batch, self.bench.rows
        order = example_order(len(rows), 0, self.step * batch, (self.step + 1) * batch)
        num_loss_tokens = int(rows.loss_token_counts[order].sum())
        for part in np.split(order, range(self.micro, batch, self.micro)):
            ids, labels = self._batch(part)
            logits = self.model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
            )
            (loss / num_loss_tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _batch(self, order: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        examples = [self.bench.rows.example(int(row)) for row in order]
        width = max(len(example.input_ids) for example in examples)
        ids = np.zeros((len(examples), width), dtype=np.int64)
        labels = np.full_like(ids, -100)
        for at, example in enumerate(examples):
            length = len(example.input_ids)
            ids[at, :length] = example.input_ids
            labels[at, :length] = np.where(example.loss_mask, example.input_ids, -100)
        device = self.bench.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)


class TrainerSteps:
    """A trainer of transformers' kind in its steady state: the time from the end of one step to the end of the next."""

    def __init__(self, trainer: Any) -> None:
        from transformers import PrinterCallback

        self.trainer, self.ends = trainer, []
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_end_times(self.ends))

    def seconds(self, num_steps: int) -> float:
        self.ends.clear()
        self.trainer.args.max_steps = num_steps + TRL_WARMUP_STEPS
        self.trainer.train()
        return self.ends[-1] - self.ends[TRL_WARMUP_STEPS - 1]


class TrlSteps(TrainerSteps):
    """TRL's SFTTrainer. Adapters in fp32 (TRL stores those of a 4-bit base in bf16), no gradient checkpointing."""

    def __init__(self, bench: Bench, model: Any, work: Path) -> None:
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from transformers import AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        disable_progress_bars()
        examples = [bench.rows.example(at) for at in range(len(bench.rows))]
        data = {
            "input_ids": [e.input_ids.tolist() for e in examples],
            "completion_mask": [e.loss_mask.astype(int).tolist() for e in examples],
        }
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(work / "trl"),
                per_device_train_batch_size=bench.batch,
                learning_rate=LORA_LR,
                lr_scheduler_type="constant",
                completion_only_loss=True,
                bf16=bench.dtype == "bf16",
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=bench.device.type == "cpu",
            ),
            train_dataset=Dataset.from_dict(data),
            processing_class=AutoTokenizer.from_pretrained(
                str(BASE_MODEL), trust_remote_code=False
            ),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=bench.lora_rank,
                lora_alpha=LORA_ALPHA,  # pyright: ignore[reportArgumentType]
                target_modules=sorted({linear.name for linear in bench.linears}),
            ),
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        super().__init__(trainer)


def _end_times(ends: list[float]) -> Any:
    from transformers import TrainerCallback

    class EndTimes(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    return EndTimes()


def one_at_a_time(bench: Bench, work: Path, *, full: bool) -> dict[str, Seconds]:
    """Arms that train one adapter (or, full, the whole model as well), each on a base of its own."""
    arms: dict[str, Seconds] = {"ours": PackSteps(bench, bench.base()).seconds}
    arms["PEFT by hand"] = HandSteps(bench, bench.base(keep=False)).seconds
    if bench.batch > 1 and bench.device.type == "cuda":
        arms["PEFT by hand, 1 row at a time"] = HandSteps(bench, bench.base(keep=False), 1).seconds
    if bench.quantization == "nf4":
        arms["ours, not kept dequantized"] = PackSteps(bench, bench.base(keep=False)).seconds
        arms["PEFT by hand, plain base"] = HandSteps(bench, bench.base("none")).seconds
    arms["TRL SFTTrainer"] = TrlSteps(bench, bench.base(keep=False), work).seconds
    if full:
        arms["full fine-tuning"] = PackSteps(bench, bench.base("none"), full=True).seconds
    return arms
