"""The arm `naive`: the pattern of Ray's user guide "Hyperparameter Tuning with Ray Tune" around TRL and PEFT.

    python benchmarks/naive_sweep.py SPEC.json           # the sweep: Tune -> TorchTrainer -> SFTTrainer
    python benchmarks/naive_sweep.py SPEC.json --trial 0 # one candidate here, without Ray

SPEC.json is written by sweep_makespan.py. Uses nothing of Tenfold: a user of the guide could have
written it. Where the guide or TRL leave a choice, the faster one on a CPU is taken (see README.md).

Source: docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html (Ray 2.60).
"""

# Ray pickles this script's functions by value, without names that only annotations mention.
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRIVER_RESOURCE = "TRAIN_DRIVER_RESOURCE"
"""The guide's name. A Tune function takes 1 CPU by default: two of them would fill 2 cores and their
workers would wait for ever."""
MICRO_BATCH_SIZE = 8

Report = Callable[[dict[str, Any]], None]


def train(config: dict[str, Any], report: Report) -> None:
    """Trains one candidate with TRL's SFTTrainer and reports every evaluation."""
    trainer = make_trainer(config)
    trainer.add_callback(_reporter(report))
    trainer.train()


def make_trainer(config: dict[str, Any]) -> Any:
    """An SFTTrainer over an NF4 base with a fresh LoRA adapter.

    Args:
        config: the spec with one "candidate".
    """
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTTrainer

    candidate = config["candidate"]
    model = AutoModelForCausalLM.from_pretrained(
        config["model"],
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    # Without this, bitsandbytes packs the weights at the first evaluation on a CPU with AVX512-BF16, and
    # its operator for packed ones has no backward pass: what is trained after that is wrong.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    rows = load_dataset("json", data_files={"train": config["train"], "eval": config["eval"]})
    trainer = SFTTrainer(
        model=model,
        args=sft_config(config, len(rows["eval"])),
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        processing_class=AutoTokenizer.from_pretrained(config["model"], trust_remote_code=False),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=candidate["lora_rank"],
            lora_alpha=candidate["lora_alpha"],
            lora_dropout=candidate["dropout"],
            target_modules=config["target_modules"],
        ),
    )
    # TRL stores the adapters of a 4-bit base in bf16, which a CPU without bf16 units multiplies many
    # times slower than fp32, and in which small AdamW updates are lost.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def sft_config(config: dict[str, Any], num_eval_rows: int) -> Any:
    """TRL's settings of one trial: what the candidate says, and the faster choice elsewhere."""
    from trl import SFTConfig

    candidate = config["candidate"]
    return SFTConfig(
        output_dir=config["out"],
        max_length=config["seq_len"],
        max_steps=config["steps"],
        per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=candidate["global_batch_size"] // MICRO_BATCH_SIZE,
        learning_rate=candidate["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=candidate["weight_decay"],
        max_grad_norm=candidate["max_grad_norm"],
        seed=candidate["seed"],
        completion_only_loss=True,
        packing=False,
        eval_strategy="steps",
        eval_steps=config["eval_steps"],
        # One batch of all rows, so that the mean is over tokens as it is in Tenfold.
        per_device_eval_batch_size=num_eval_rows,
        eval_on_start=config.get("eval_on_start", False),
        # TRL's defaults are bf16 and gradient checkpointing: slower on a CPU.
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _reporter(report: Report) -> Any:
    """A callback that reports evaluations with what went before them."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        seconds = eval_seconds = 0.0
        started_at = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.batch = args.per_device_train_batch_size * args.gradient_accumulation_steps

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()
            self.started_at = self.started_at or time.time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.perf_counter() - self.began

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            metrics = kwargs["metrics"]
            self.eval_seconds += metrics["eval_runtime"]
            report(
                {
                    "eval_loss": metrics["eval_loss"],
                    "steps": state.global_step,
                    "examples": state.global_step * self.batch,
                    "seconds": self.seconds,
                    "eval_seconds": self.eval_seconds,
                    "started_at": self.started_at,
                    "at": time.time(),
                }
            )

    return Reporter()


def train_fn_per_worker(config: dict[str, Any]) -> None:
    """What the Train worker runs."""
    import ray.train

    train(config, lambda row: ray.train.report(row))


def train_driver_fn(config: dict[str, Any]) -> None:
    """The Tune trial: launches one Ray Train run with one worker."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_fn_per_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, resources_per_worker={"CPU": config["cpus_per_trial"]}
        ),
        run_config=ray.train.RunConfig(
            name=f"train-trial_id={ray.tune.get_context().get_trial_id()}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def sweep(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the candidates in their order and returns the rows of each."""
    import ray
    from ray import tune

    ray.init(resources={DRIVER_RESOURCE: 1})
    candidates = spec.pop("candidates")
    tuner = tune.Tuner(
        tune.with_resources(train_driver_fn, {DRIVER_RESOURCE: 0.01}),
        param_space=spec | {"candidate": tune.grid_search(candidates)},
        tune_config=tune.TuneConfig(
            metric="eval_loss", mode="min", max_concurrent_trials=spec["concurrency"]
        ),
        run_config=tune.RunConfig(name="naive", storage_path=spec["storage"]),
    )
    results = tuner.fit()
    trials = [
        {
            "candidate": result.config["candidate"],
            "error": str(result.error) if result.error else "",
            "rows": rows_of(result),
        }
        for result in results
    ]
    print("best:", results.get_best_result().config["candidate"])
    ray.shutdown()
    return trials


def rows_of(result: Any) -> list[dict[str, Any]]:
    """Every report of a trial that Tune kept; none of a trial that failed before the first."""
    frame = result.metrics_dataframe
    if frame is None or "eval_loss" not in frame:
        return []
    return json.loads(frame[list(ROW_KEYS)].to_json(orient="records", double_precision=15))


ROW_KEYS = ("eval_loss", "steps", "examples", "seconds", "eval_seconds", "started_at", "at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--trial", type=int, help="train this candidate here, without Ray")
    args = parser.parse_args()
    spec = json.loads(args.spec.read_text(encoding="utf-8"))
    result = Path(spec["result"])
    if args.trial is None:
        trials = sweep(spec)
    else:
        rows: list[dict[str, Any]] = []
        candidate = spec.pop("candidates")[args.trial]
        train(spec | {"candidate": candidate}, rows.append)
        trials = [{"candidate": candidate, "error": "", "rows": rows}]
    temporary = result.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(trials, indent=1), encoding="utf-8")
    os.replace(temporary, result)


if __name__ == "__main__":
    main()
