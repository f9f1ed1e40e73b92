"""Seconds of `tenfold plan`, a whole process as a user starts it: for Llama-3.1-70B and 2.0e9 tokens, and
for the shipped base and the demo's data, whose count is cached.

    python benchmarks/plan_latency.py

Prints the median and the range of 5 runs, beside those of `python -c pass`, and the heavy packages that
the command imported (there must be none). Asserts nothing: machines are noisy.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 5
ASSETS = Path(__file__).resolve().parent.parent / "trainers" / "assets"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
}
PROBE = (
    "import sys; from orchestration.cli import main; main(['plan', sys.argv[1]]); "
    "print([m for m in ('torch', 'ray', 'transformers', 'datasets', 'numpy') if m in sys.modules], file=sys.stderr)"
)


def seconds(command: list[str]) -> list[float]:
    """Wall seconds of a command, several times."""
    measured = []
    for _ in range(RUNS):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measured.append(time.perf_counter() - began)
    return measured


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model, sweep = Path(folder) / "config.json", Path(folder) / "sweep.yaml"
        model.write_text(json.dumps(CONFIG))
        sweep.write_text(f"model: {model}\ndataset_tokens: 2.0e9\n")
        tenfold = Path(sys.executable).with_name("tenfold")
        counted = Path(folder) / "counted.yaml"
        counted.write_text(
            f"model: {ASSETS / 'tiny-llama'}\ndata: {ASSETS / 'demo' / 'functions.jsonl'}\n"
        )
        subprocess.run([str(tenfold), "plan", str(counted)], check=True, stdout=subprocess.DEVNULL)
        for name, command in (
            ("tenfold plan, token count given", [str(tenfold), "plan", str(sweep)]),
            ("tenfold plan, token count cached", [str(tenfold), "plan", str(counted)]),
            ("python -c pass", [sys.executable, "-c", "pass"]),
        ):
            times = seconds(command)
            print(
                f"{name}: median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f} s"
            )
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, str(sweep)], check=True, capture_output=True, text=True
        )
        print("heavy imports:", probe.stderr.strip())


if __name__ == "__main__":
    main()
