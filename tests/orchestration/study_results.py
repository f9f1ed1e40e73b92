"""results.json of studies that never ran, one of each sort that the page must show."""

import math
import random

BASE_LOSS = 3.62


def point(learning_rate: float, seed: int, loss: float | None, status: str = "finished") -> dict:
    return {
        "learning_rate": learning_rate,
        "seed": seed,
        "status": status,
        "reason": "train_loss nan at step 17 <b>" if status == "diverged" else "",
        "eval_loss": loss if status == "finished" else None,
        "base_loss": BASE_LOSS,
        "examples": 4800,
        "steps": 300,
        "loss_tokens": 312_345,
        "seconds": 41.25,
        "peak_bytes": 512 * 2**20,
        "trial": f"t-{learning_rate:.2e}-{seed}",
    }


def arm(label: str, best_rate: float, best_loss: float, *, lora_rank: int, wall: float) -> dict:
    """Runs on a parabola with a steep right side: near the wall losses explode, past it runs diverge."""
    noise = random.Random(label)
    center = round(math.log10(best_rate) * 4) / 4
    points = []
    for step in range(-5, 6):
        rate = 10 ** (center + step / 4)
        for seed in range(3):
            away = math.log10(rate / best_rate)
            loss = best_loss + 0.22 * away**2 + noise.gauss(0, 0.004)
            loss += 4 * max(0.0, away - wall + 0.5) ** 2
            status = "diverged" if away > wall and (seed + step) % 3 else "finished"
            points.append(point(rate, seed, loss, status))
    fit = {
        "learning_rate": best_rate,
        "loss": best_loss,
        "low": best_rate / 1.3,
        "high": best_rate * 1.25,
        "tolerance_low": best_rate / 2.5,
        "tolerance_high": best_rate * 2,
        "tolerance_frac": 0.01,
        "open_low": False,
        "open_high": False,
        "parabola": {"log10_lr": math.log10(best_rate), "loss": best_loss, "curvature": 0.22},
    }
    return {
        "label": label,
        "method": "lora" if lora_rank else "full",
        "lora_rank": lora_rank,
        "lora_alpha": 32.0,
        "target": ["attn", "mlp"],
        "global_batch_size": 16,
        "trained_params": 40_960 * lora_rank or 1_312_000,
        "points": points,
        "fit": fit,
        "unsettled": None,
    }


def study(kind: str, name: str) -> dict:
    return {
        "kind": kind,
        "name": name,
        "preset": "laptop",
        "status": "complete",
        "command": f"tenfold study {kind} --preset laptop --name '{name}'",
        "question": "How many times the full-fine-tuning learning rate is the best one of LoRA?",
        "verdict": {"status": "measured", "sentence": "It was measured.", "would_decide": None},
        "limits": ["One base of 1.3M parameters.", "300 steps: the <ratio> is biased below 100."],
        "protocol": [["optimizer", "AdamW, no weight decay, clip 1.0"], ["seeds", "0, 1, 2"]],
        "versions": {"torch": "2.13.0", "tenfold": "0.1.0"},
        "machine": "2 cores of an Intel Xeon, 8 GiB",
        "model": {
            "name": "tiny-llama",
            "num_params": 1_312_000,
            "hidden_size": 128,
            "num_layers": 4,
        },
        "data": {"train": "gsm8k", "rows": 7473},
        "arms": [],
        "claims": [],
        "tables": [],
        "figures": [],
    }


def series(name: str, x: list, y: list, half: float | None = None, mode: str = "lines+markers"):
    low = None if half is None else [v - half for v in y]
    high = None if half is None else [v + half for v in y]
    return {"name": name, "x": x, "y": y, "low": low, "high": high, "mode": mode, "dash": "solid"}


def figure(title: str, x_title: str, y_title: str, *all_series: dict, **more: object) -> dict:
    plain = {"x_log": False, "y_log": False, "hlines": [], "vlines": [], "x_labels": None}
    names = {"title": title, "x_title": x_title, "y_title": y_title}
    return names | plain | {"series": list(all_series)} | more


def lr_ratio() -> dict:
    results = study("lr-ratio", "lr ratio & <script>alert(1)</script>")
    results["verdict"] = {
        "status": "contradicted",
        "sentence": "On this model the best LoRA learning rate is 2.1 (95%: 1.7 to 2.7) times FullFT's, not 10.",
        "would_decide": "The same at hidden 640 and above, where hidden / (2 alpha) gives 10.",
    }
    results["arms"] = [
        arm("FullFT", 1.6e-3, 2.34, lora_rank=0, wall=0.9),
        arm("r4 alpha 32", 3.0e-3, 2.60, lora_rank=4, wall=0.7),
        arm("r16 alpha 32", 3.4e-3, 2.54, lora_rank=16, wall=0.6),
        arm("r16 <i>alpha</i> 8", 8.0e-3, 2.58, lora_rank=16, wall=0.6),
    ]
    settled, unsettled = results["arms"][2:]
    settled["fit"] |= {"open_high": True}
    unsettled |= {"fit": None, "unsettled": "its best rate lies beside a diverged one"}
    claim = {"name": "10 x FullFT", "arm": "r16 alpha 32", "predicted": 10.0, "measured": 2.125}
    claim |= {"low": 1.71875, "high": 2.75, "status": "contradicted", "sentence": "10 is outside."}
    rival = claim | {"name": "hidden / (2 alpha)", "predicted": 2.0, "status": "supported"}
    unknown = {"arm": "r16 alpha 8", "measured": None, "low": None, "high": None}
    results["claims"] = [claim, rival, claim | unknown | {"status": "undecided"}]
    labels = [each["label"] for each in results["arms"][1:]]
    ratios = series("measured", [0, 1, 2], [1.9, 2.125, 5.0], 0.6, "markers")
    law = series("hidden / (2 alpha)", [0, 1, 2], [2.0, 2.0, 8.0], None, "markers")
    lines = [{"y": 10, "text": "10 x FullFT"}, {"y": 15, "text": "15, short runs"}]
    more = {"y_log": True, "hlines": lines, "x_labels": labels}
    results["figures"] = [figure("Ratio by arm", "", "LoRA / FullFT", ratios, law, **more)]
    headers = [["prior", False], ["regret (nats)", True]]
    results["tables"] = [
        {
            "title": "Regret of the priors",
            "note": "In nats/token.",
            "headers": headers,
            "rows": [["10 x", "0.31"], ["tinker", "0.12"]],
        }
    ]
    return results


def unfinished() -> dict:
    results = lr_ratio() | {"name": "half done", "status": "unfinished", "claims": []}
    results["verdict"] = {
        "status": "undecided",
        "sentence": "Not all runs have ended.",
        "would_decide": "The remaining runs.",
    }
    results["arms"] = results["arms"][:2]
    for each in results["arms"]:
        each |= {"fit": None, "unsettled": "runs are missing"}
        for late in each["points"][-12:]:
            late |= {"status": "unfinished", "eval_loss": None, "seconds": None, "steps": None}
            late |= {"peak_bytes": None, "trial": None, "reason": None, "loss_tokens": None}
    results["arms"][1]["points"][0] |= {"status": "failed", "eval_loss": None, "reason": "OSError"}
    return results


def nothing_yet() -> dict:
    results = unfinished() | {"figures": [], "tables": []}
    for each in results["arms"]:
        for late in each["points"]:
            late |= {"status": "unfinished", "eval_loss": None, "base_loss": None}
    return results


def capacity() -> dict:
    results = study("capacity", "capacity")
    loads = [2.0**k for k in range(8, 19, 2)]
    stored = {r: [min(load, 2.0 * 1280 * r) for load in loads] for r in (1, 4, 16)}
    lines = [series(f"r{r}", loads, bits, 0.05 * min(bits), "lines") for r, bits in stored.items()]
    places = [{"x": 2.0 * 1280 * r, "text": f"2 bits x r{r}"} for r in stored]
    over_load = figure("Bits stored as the load grows", "bits in the facts", "bits stored", *lines)
    over_load |= {"x_log": True, "y_log": True, "vlines": places}
    per_param = series("stored", [1, 4, 16, 64], [1.92, 1.88, None, 1.7])
    per_param |= {"low": [1.8, 1.8, None, 1.6], "high": [2.0, 1.95, None, 1.8]}
    by_rank = figure("Bits a parameter", "lora_rank", "bits/parameter", per_param, x_log=True)
    by_rank |= {"hlines": [{"y": 2.0, "text": "2 bits a parameter"}]}
    results["figures"] = [over_load, by_rank]
    headers = [["rank", True], ["stored bits", True]]
    rows = [[str(r), f"{bits[-1]:,.0f}"] for r, bits in stored.items()]
    results["tables"] = [
        {"title": "Stored", "note": None, "headers": headers, "rows": rows},
        {
            "title": "Bound",
            "note": None,
            "headers": [["rank", True], ["bound", True]],
            "rows": [["1", "9"]],
        },
    ]
    return results


def points_of(results: dict, status: str) -> list[dict]:
    return [p for each in results["arms"] for p in each["points"] if p["status"] == status]
