"""Plans as text and as JSON.

Plain text, not rich: importing and laying out rich is a fifth of `tenfold plan`, which answers in under
half a second, and lines that are not wrapped to a terminal can be searched.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestration.checkpoint_bytes import checkpoints_line
from orchestration.forgetting import retention_sentence
from orchestration.measured import capacity_sentence
from orchestration.placing import cost_text, packs_lines
from orchestration.show_audit import short_lines
from trainers.terminal import printable

SCALED_LR = "LR x scale"
"""learning_rate x lora_alpha / lora_rank (rsLoRA: its root): comparable between ranks, alphas and variants."""
MAX_LISTED = 20
"""Candidates of a kind that a terminal lists; the JSON has all of them."""


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]], numeric: int = 0) -> str:
    """Rows in columns as wide as their widest cell; the first `numeric` columns stand right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  "
        + "  ".join(
            cell.rjust(width) if column < numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def show_plan(plan: dict[str, Any]) -> None:
    """The whole plan, candidates grouped as the pruner judged them."""
    parts = (
        _model,
        coverage_lines,
        _data,
        bits_lines,
        retention_lines,
        _budget,
        _packs,
        _checkpoints,
        _settings,
        confirmation_lines,
        _candidates,
        _discarded,
        _pitfalls,
    )
    print(printable("\n".join(line for part in parts for line in part(plan))))


def _model(plan: dict[str, Any]) -> list[str]:
    model = plan["model"]
    experts = f", {model['num_experts']} experts ({model['num_active_experts']} active)"
    return [
        f"{plan['name']}: {model['name']} ({model['model_type']}, {model['num_params']:,} parameters, "
        f"hidden {model['hidden_size']}, {model['num_layers']} layers{experts if model['num_experts'] else ''}), "
        f"{plan['method']}",
        *shape_lines(plan),
    ]


def shape_lines(plan: dict[str, Any]) -> list[str]:
    """Where the layers were read, if not from the config alone."""
    if not plan["model"].get("is_from_model"):
        return []
    return [
        f"  model type {plan['model']['model_type']} has no reader here: its layers were read from the model that "
        "transformers builds without weights (on the meta device)"
    ]


def coverage_lines(plan: dict[str, Any]) -> list[str]:
    """What each target adapts, and what it leaves alone; of a plan that was written before this was in it,
    nothing."""
    return [
        f"adapts {'+'.join(found['target'])}: "
        + " + ".join(f"{count:,} {component}" for component, count in found["matrices"].items())
        + " matrices, each checked in the loaded model; frozen: "
        + ", ".join([*found["left_out"], *found["frozen"]])
        for found in plan.get("coverage", ())
    ]


def _data(plan: dict[str, Any]) -> list[str]:
    return short_lines(plan["data"] | {"seq_len": plan["seq_len"]}) if plan["data"] else []


def bits_lines(plan: dict[str, Any]) -> list[str]:
    """What the data count for, and by which rule or measurement."""
    return [
        f"dataset: {amount_text(plan)} = {plan['dataset_bits']:,} bits to hold",
        f"  {capacity_sentence(plan)}",
    ]


def amount_text(plan: dict[str, Any]) -> str:
    """What a plan's bits are counted from."""
    if rl := plan.get("rl"):
        return (
            f"{rl['num_prompts']:,} prompts x {rl['num_generations']} completions = {rl['num_episodes']:,} "
            "episodes a trial"
        )
    return f"{plan['dataset_tokens']:,} loss-bearing tokens"


def retention_lines(plan: dict[str, Any]) -> list[str]:
    """The retention set, where there is one."""
    return [retention_sentence(plan["retention"])] if plan["retention"] else []


def _budget(plan: dict[str, Any]) -> list[str]:
    if not plan["budget"]:
        return []
    budget = plan["budget"]
    rl = plan.get("rl")
    unit = "prompts" if rl else "sequences" if plan["packing"] else "examples"
    lines = [
        f"a trial: {budget['num_examples']:,} {unit}, evaluated every {budget['eval_every']:,}"
    ]
    if rl:
        lines.append(
            f"  rewarded by {_rewards(rl)}; completions of at most {rl['max_completion_length']:,} tokens at "
            f"temperature {rl['temperature']:g}; batches are counted in prompts, each {rl['num_generations']} episodes"
        )
    return lines + _choice(plan)


def _choice(plan: dict[str, Any]) -> list[str]:
    """How the best is chosen, where it is not simply the lowest eval_loss, and what ends the sweep before."""
    choice, task, lines = plan["choice"], plan["task"], []
    if task:
        lines.append(
            f"  judged by {_rewards(task)} of the answers to at most {task['num_rows']} held-out rows, always the "
            f"likeliest token, at most {task['max_completion_length']}"
        )
    elif choice["key"] == "eval_bits_per_byte":
        lines.append("  judged by bits per byte")
    parts = []
    if choice["select"] != "best":
        parts.append(choice["select"])
    if choice["max_forgetting"] is not None:
        parts.append(
            f"retention_loss at most {choice['max_forgetting']:g} nats/token over the base's"
        )
    if choice["confirm"]:
        parts.append(f"the best two trained again on {choice['confirm']} new seeds")
    lines += [f"  chosen: {'; '.join(parts)}"] if parts else []
    limits = [f"{key} {choice[key]}" for key in ("time_budget", "max_cost") if choice[key]]
    return lines + ([f"  ends at {' or '.join(limits)}, with the best so far"] if limits else [])


def _rewards(spec: dict[str, Any]) -> str:
    return ", ".join(f"{weight:g} x {name}" for name, weight in spec["reward"].items())


def _packs(plan: dict[str, Any]) -> list[str]:
    if plan["engine"] == "solo":
        return ["engine solo: every trial on workers of its own"]
    return packs_lines(plan["packs"]) if plan["packs"] else []


def _checkpoints(plan: dict[str, Any]) -> list[str]:
    return [checkpoints_line(plan["checkpoints"])]


def _settings(plan: dict[str, Any]) -> list[str]:
    rows = [(note["key"], note["value"], note["source"]) for note in plan["defaults"]]
    return ["settings", text_table(("key", "value", "source"), rows)]


def confirmation_lines(plan: dict[str, Any]) -> list[str]:
    """The trials that would confirm a learning rate that was carried here, where one was."""
    if (found := plan["confirmation"]) is None:
        return []
    size = f" x {found['num_examples']:,} examples" if found["num_examples"] else ""
    size += f", {found['num_tokens']:,} tokens in all" if found["num_tokens"] else ""
    cost = (plan["packs"] or {}).get("confirmation_cost")
    size += f", {cost_text(cost)}" if cost else ""
    return [
        f"confirm the carried learning rate first: {found['num_trials']} trials{size}, with these keys in "
        "the place of the sweep's",
        *(f"  {line}" for line in found["yaml"].splitlines()),
    ]


def _candidates(plan: dict[str, Any]) -> list[str]:
    if plan["num_proposed"]:
        return [f"{plan['num_proposed']:,} candidates proposed by Optuna within the admitted space"]
    count = len(plan["candidates"])
    headers = ("rank", "learning_rate", SCALED_LR, "batch", "adapter params", "capacity", "target")
    rows = [_candidate_row(item, plan["dataset_bits"]) for item in plan["candidates"][:MAX_LISTED]]
    lines = [f"{count:,} admitted, in the order in which they start"]
    lines += [text_table(headers, rows, numeric=6)] if rows else []
    return (
        [*lines, f"  ... and {count - MAX_LISTED:,} more (--json lists all)"]
        if count > MAX_LISTED
        else lines
    )


def _candidate_row(item: dict[str, Any], dataset_bits: int) -> tuple[str, ...]:
    c = item["candidate"]
    margin = f"{item['adapter_bits'] / dataset_bits:.2f}x" if dataset_bits else ""
    rates = (f"{c['learning_rate']:.2e}", f"{item['scaled_learning_rate']:.2e}")
    numbers = (str(c["lora_rank"]), *rates, str(c["global_batch_size"]))
    return (*numbers, f"{item['adapter_params']:,}", margin, target_text(c))


def target_text(candidate: Mapping[str, Any]) -> str:
    """The adapted layers, and the variant where it is not plain LoRA."""
    variant = candidate.get("variant")
    return "+".join(candidate["target"]) + (f" ({variant})" if variant else "")


def _discarded(plan: dict[str, Any]) -> list[str]:
    lines = [f"{len(plan['discarded']):,} discarded before any trial"]
    lines += [f"  cut before any draw: {sentence}" for sentence in cut_ranks(plan)]
    lines += [f"  cut before any draw: {sentence}" for sentence in cut_others(plan)]
    lines += [f"  no room: lora_rank {_ranks(cut)}" for cut in plan["unfit_ranks"]]
    reasons = Counter(item["reason"] for item in plan["discarded"])
    lines += [f"  {count:,} x {reason}" for reason, count in reasons.items()]
    advised = dict.fromkeys(item["reason"] for item in plan["advised"])
    return lines + [f"  kept, as capacity_policy is advisory: {reason}" for reason in advised]


def _ranks(cut: dict[str, Any]) -> str:
    return f"{', '.join(map(str, cut['lora_ranks']))} on {'+'.join(cut['target'])}"


def _pitfalls(plan: dict[str, Any]) -> list[str]:
    return pitfall_lines(plan["pitfalls"])


def pitfall_lines(pitfalls: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each pitfall, or the one that says that there is none."""
    lines = [
        f"{p['severity']} {p['code']}: {p['evidence']}: {p['symptom']}. Fix: {p['fix']}"
        for p in pitfalls
    ]
    return lines or ["no pitfall found"]


def cut_others(plan: dict[str, Any]) -> list[str]:
    """The variants and dropouts that a random or Optuna search never tries, a sentence for each target."""
    return [
        f"{cut['key']} {', '.join(map(str, cut['values']))} on {'+'.join(cut['target'])}: {cut['reason']}"
        for cut in plan.get("cut_values", ())
    ]


def cut_ranks(plan: dict[str, Any]) -> list[str]:
    """The ranks that a random or Optuna search never tries, a sentence for each target."""
    return [
        f"lora_rank {', '.join(map(str, cut['lora_ranks']))} on {'+'.join(cut['target'])}: "
        f"the data needs {cut['sufficient_rank']}"
        for cut in plan["cut_ranks"]
    ]
