"""What a step of reinforcement learning costs: K adapters sampled and trained together against one alone, and against
TRL's GRPOTrainer.

    python benchmarks/rl_step.py                       # the shipped base, K = 2 4 8
    python benchmarks/rl_step.py --widths 192 512      # and one with random weights

A step is 16 prompts of the shipped task with 8 completions each: sampling, scoring, one forward and backward over all
episodes, the optimizer. What is compared alternates within one process. Every width is kept as a part file: the
same command again goes on where it stopped.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    BASE_MODEL,
    base_parser,
    machine_text,
    plain_candidate,
    read_part,
    results_of,
    rewrite_readme,
    say,
    spread_text,
    table,
    write_result,
)
from benchmarks.step_arms import (
    ENDLESS,
    LORA_ALPHA,
    Seconds,
    TrainerSteps,
    model_folder,
)
from benchmarks.step_cells import alternate
from trainers.base_model import BaseSpec, load_base
from trainers.comm import Comm
from trainers.data import DataSpec
from trainers.paths import write_json
from trainers.rewards import Reward
from trainers.rl_spec import RLSpec
from trainers.runs import Run
from trainers.sft_trainer import Station, TrialSpec, run_spec

TASK = BASE_MODEL.parent / "rl" / "parameters.jsonl"
REWARD = {f"{Path(__file__).resolve()}:even_share": 1.0}
"""One by which the completions of every prompt differ: episodes that earn what the others do are not trained on."""
LR = 1e-9
"""The policy stays what it was, so that every step of every arm has episodes of one length."""
TARGET = ("attn", "mlp")
"""Not the head: TRL 1.16 refuses an adapter on lm_head."""
KS, WIDTHS = (2, 4, 8), (192,)


def even_share(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of characters with an even number."""
    return [sum(ord(c) % 2 == 0 for c in text) / max(1, len(text)) for text in completions]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One adapter's step, and how it is measured.

    Args:
        prompts: of a global batch.
        num_generations: completions of each.
        max_completion_length: tokens.
        threads: torch's.
        repeats, min_sample_s: as of pack_step.py.
    """

    prompts: int
    num_generations: int
    max_completion_length: int
    lora_rank: int
    threads: int
    repeats: int
    min_sample_s: float

    def trial(self, model: Path, folder: Path) -> TrialSpec:
        """A trial whose station the steps are made on."""
        candidate = plain_candidate(LR, self.lora_rank, LORA_ALPHA, self.prompts, TARGET)
        return TrialSpec(
            name="bench",
            folder=folder,
            base=BaseSpec(model=str(model), quantization="none", dtype="fp32"),
            data=DataSpec(data=str(TASK), model=str(BASE_MODEL), seq_len=64, eval=0.05),
            candidate=candidate,
            num_examples=ENDLESS,
            eval_every=ENDLESS,
            num_threads=self.threads,
            max_tokens=1 << 14,
            rl=RLSpec(
                reward=REWARD,
                num_generations=self.num_generations,
                max_completion_length=self.max_completion_length,
            ),
        )


class OurSteps:
    """A station with up to `num_adapters` adapters."""

    def __init__(self, spec: TrialSpec, num_adapters: int) -> None:
        self.station = Station(spec, Comm())
        self.runs: list[Run] = []
        for seed in range(num_adapters):
            asked = replace(spec, candidate=replace(spec.candidate, seed=seed))
            self.runs.append(self.station.stand_in(asked.candidate, run_spec(asked)))

    def seconds(self, num_steps: int, num_adapters: int = 1) -> float:
        """Wall seconds in which each of the first adapters makes so many steps."""
        runs = self.runs[:num_adapters]
        goal = {run: run.steps + num_steps for run in runs}
        began = time.perf_counter()
        while active := [run for run in runs if run.steps < goal[run]]:
            self.station.trainer.advance(active)
            if ended := [run.reason for run in active if run.status != "running"]:
                raise RuntimeError(f"a benchmark's run must not end: {ended[0]}")
        return time.perf_counter() - began

    def each_of(self, num_adapters: int) -> Seconds:
        """Seconds that an adapter's steps take beside others."""
        return lambda num_steps: self.seconds(num_steps, num_adapters) / num_adapters

    @property
    def episode_tokens(self) -> float:
        """Mean tokens of the episodes so far, prompt and completion."""
        episodes = (
            sum(run.examples for run in self.runs) * self.station.trainer.spec.num_generations
        )
        return sum(run.tokens for run in self.runs) / episodes


class GrpoSteps(TrainerSteps):
    """TRL's GRPOTrainer with the same prompts, rewards and settings."""

    def __init__(self, step: Step, model: Path, work: Path) -> None:
        from datasets import Dataset, disable_progress_bars
        from peft import LoraConfig
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        disable_progress_bars()
        rows = [json.loads(line) for line in TASK.read_text().splitlines()]
        reward = Reward(REWARD)

        def scored(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> Any:
            return reward(prompts, completions, answer)

        spec = step.trial(model, work)
        linears = Station(spec, Comm()).shape.resolve_target(TARGET)
        trainer = GRPOTrainer(
            model=load_base(spec.base),
            reward_funcs=scored,
            args=GRPOConfig(
                output_dir=str(work / "trl"),
                per_device_train_batch_size=step.prompts * step.num_generations,
                num_generations=step.num_generations,
                max_completion_length=step.max_completion_length,
                learning_rate=LR,
                lr_scheduler_type="constant",
                loss_type="dapo",
                scale_rewards="none",
                importance_sampling_level="token",
                beta=0.0,
                temperature=1.0,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": row["prompt"], "answer": row["completion"]} for row in rows]
            ),
            processing_class=AutoTokenizer.from_pretrained(BASE_MODEL, trust_remote_code=False),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=step.lora_rank,
                lora_alpha=LORA_ALPHA,  # pyright: ignore[reportArgumentType]
                target_modules=sorted({linear.name for linear in linears}),
            ),
        )
        super().__init__(trainer)


def main() -> None:
    args = parse_args()
    if args.readme:
        rewrite_readme("rl_step", readme_lines(args.results))
        return
    step = Step(
        prompts=16,
        num_generations=8,
        max_completion_length=args.max_completion_length,
        lora_rank=args.lora_rank,
        threads=args.threads,
        repeats=args.repeats,
        min_sample_s=args.min_sample_s,
    )
    values = {str(width): width_part(width, step, args.work / "rl_step") for width in args.widths}
    print("\n".join(lines(values)))
    name = f"rl_step-cpu-{'.'.join(map(str, args.widths))}"
    write_result(args.results / f"{name}.json", asdict(step), {"widths": values})


def parse_args() -> argparse.Namespace:
    parser = base_parser(__doc__ or "")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--min-sample-s", type=float, default=2.0)
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--max-completion-length", type=int, default=16)
    return parser.parse_args()


def width_part(width: int, step: Step, work: Path) -> dict[str, Any]:
    """The numbers of a base: from disk, else measured and kept."""
    settings = "-".join(str(value) for value in asdict(step).values())
    path = work / "parts" / f"{width}-{settings}.json"
    found = read_part(path)
    if found is None:
        found = measured(model_folder(width, work), step)
        write_json(path, found)
    return found


def measured(model: Path, step: Step) -> dict[str, Any]:
    """Seconds of an adapter's step: alone, at each K with the ratio to one alone right beside it, and TRL's."""
    torch.set_num_threads(step.threads)
    with tempfile.TemporaryDirectory() as folder:
        ours = OurSteps(step.trial(model, Path(folder)), max(KS))
        trl = GrpoSteps(step, model, Path(folder))
        trl_found = paired({"alone": ours.seconds, "k": trl.seconds}, step)
        say(f"  TRL: {spread_text(trl_found['ratio'])} of one alone")
        found: dict[str, Any] = {}
        for k in KS:
            arms: dict[str, Seconds] = {"alone": ours.seconds, "k": ours.each_of(k)}
            found[str(k)] = paired(arms, step)
            say(f"  K={k}: {spread_text(found[str(k)]['ratio'])} of one alone")
    return {"trl": trl_found, "k": found, "episode_tokens": ours.episode_tokens}


def paired(arms: dict[str, Seconds], step: Step) -> dict[str, list[float]]:
    """Seconds of both arms, and their ratio sample by sample."""
    found = alternate(arms, step.repeats, step.min_sample_s)
    return found | {"ratio": [k / one for k, one in zip(found["k"], found["alone"], strict=True)]}


def lines(values: dict[str, Any]) -> list[str]:
    """The table: one line for each base and arm."""
    head = ["hidden", "arm", "seconds of an adapter's step", "over one alone"]
    rows = []
    for width, found in values.items():
        alone = [each for part in found["k"].values() for each in part["alone"]]
        rows.append([width, "one alone", spread_text(alone), "1"])
        for k, part in found["k"].items():
            rows.append([width, f"K = {k}", spread_text(part["k"]), spread_text(part["ratio"])])
        trl = found["trl"]
        rows.append([width, "TRL's GRPOTrainer", spread_text(trl["k"]), spread_text(trl["ratio"])])
    return table(head, rows)


def readme_lines(results: Path) -> list[str]:
    """What README.md shows of all results."""
    shown = []
    for name, result in results_of(results, "rl_step-*.json"):
        shown += [f"**{name}** ({machine_text(result)})", "", *lines(result["widths"]), ""]
    return shown


if __name__ == "__main__":
    main()
