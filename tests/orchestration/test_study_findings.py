"""What the kinds of study conclude, from trials whose losses were planted."""

import json
import math
import random

import pytest

from orchestration.planning import make_plan
from orchestration.studies.agenda import Agenda
from orchestration.studies.arms import make_arms
from orchestration.studies.config import load_study
from orchestration.studies.findings import findings
from orchestration.studies.frame import StudyFacts
from orchestration.studies.report import render
from search_spaces.candidate import Candidate, trial_name
from trainers.paths import RunPaths, TrialPaths, write_json_lines, write_state

BUDGET = 4800
EVALUATIONS = (0, 1200, 2400, 3600, 4800)
FACTS = {"preset": None, "command": "tenfold study x", "versions": {"python": "3"}}


class Planted:
    """A study played through with losses from a function of (candidate, examples)."""

    def __init__(self, kind: str, folder, loss, **keys) -> None:
        self.config = load_study(kind, "smoke", None, **(WIDE | keys))
        self.plan = make_plan(self.config)
        self.arms = make_arms(kind, self.config, self.plan)
        self.run, self.kind, self.loss = RunPaths(folder), kind, loss
        self.run.trials.mkdir(parents=True)
        self.agenda = Agenda(self.arms, self.config, self.run, self._trial)
        while taken := self.agenda.take():
            for trial in taken:
                self._end(trial)

    def _trial(self, candidate: Candidate) -> dict:
        name = trial_name(candidate)
        return {
            "name": name,
            "folder": str(self.run.trial(name).root),
            "candidate": candidate.to_dict(),
        }

    def _end(self, trial: dict) -> None:
        candidate, paths = (
            Candidate.from_dict(trial["candidate"]),
            TrialPaths(self.run.trial(trial["name"]).root),
        )
        losses = [self.loss(candidate, examples) for examples in EVALUATIONS]
        good = [(n, x) for n, x in zip(EVALUATIONS, losses, strict=True) if math.isfinite(x)]
        rows = [
            {
                "examples": n,
                "steps": n // 16,
                "eval_loss": x,
                "loss_tokens": 50 * n,
                "seconds": 1.0,
                "peak_bytes": 1,
            }
            for n, x in good
        ]
        status = "finished" if len(good) == len(losses) else "diverged"
        write_json_lines(paths.metrics, rows)
        write_state(
            paths.status, {"status": status, "reason": "nan at step 3" * (status != "finished")}
        )

    def results(self) -> dict:
        facts = StudyFacts(kind=self.kind, **FACTS)
        complete, records = self.agenda.is_complete(), self.agenda.records()
        found = findings(facts, self.config, self.plan, self.arms, records, complete=complete)
        json.dumps(found, allow_nan=False)  # strict JSON, as it is written
        assert found["verdict"]["sentence"] in render(found).replace("&#x27;", "'").replace(
            "&gt;", ">"
        )
        return found


WIDE = {
    "examples": BUDGET,
    "eval_every": 1200,
    "seeds": 3,
    "max_extensions": 8,
    "learning_rate": {"low": 1e-3, "high": 1e-1, "num": 9},
    "full_learning_rate": {"low": 1e-4, "high": 1e-2, "num": 9},
    "global_batch_size": 16,
}


def valley(best: float, floor: float, candidate: Candidate, noise: float = 0.002) -> float:
    """Loss around a best learning rate, its seed's noise included."""
    rng = random.Random(f"{candidate.seed} {candidate.learning_rate} {candidate.lora_rank}")
    height = 0.4 * math.log10(candidate.learning_rate / best) ** 2
    return floor + height + 0.01 * candidate.seed + rng.gauss(0, noise)


def with_ratio(ratio_of_alpha, wall: float = math.inf):
    """FullFT's best at 8e-4, LoRA's so many times higher; everything diverges above a wall."""

    def loss(candidate: Candidate, examples: int) -> float:
        best = 8e-4 * (1 if candidate.full_finetune else ratio_of_alpha(candidate.lora_alpha))
        if candidate.learning_rate > wall * best and examples:
            return math.nan
        floor = 2.4 if candidate.full_finetune else 2.5
        return valley(best, floor, candidate) + 0.8 * (1 - examples / BUDGET)

    return loss


@pytest.mark.parametrize(
    ("ratio", "status"), [(10.0, "supported"), (2.4, "contradicted"), (31.0, "contradicted")]
)
def test_lr_ratio_planted_ratio_gives_its_verdict(tmp_path, ratio, status):
    found = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda alpha: ratio)).results()
    assert found["status"] == "complete"
    assert found["verdict"]["status"] == status
    main = found["claims"][0]
    assert (main["name"], main["predicted"]) == ("10 x FullFT", 10.0)
    assert main["low"] < ratio < main["high"]
    assert main["measured"] == pytest.approx(ratio, rel=0.15)
    assert [claim["predicted"] for claim in found["claims"]] == [10.0, 3.0, 15.0]  # 192 / (2 x 32)
    gap = found["tables"][0]["rows"][0][3]
    assert float(gap) == pytest.approx(0.1, abs=0.01)


def test_lr_ratio_other_alphas_tell_laws_apart_and_leave_the_verdict(tmp_path):
    laws = with_ratio(lambda alpha: {32.0: 10.0, 8.0: 25.0}[alpha])
    found = Planted("lr-ratio", tmp_path / "run", laws, lora_alpha=[32, 8]).results()
    assert found["verdict"]["status"] == "supported"
    status = {(c["arm"], c["name"]): c["status"] for c in found["claims"]}
    assert status["r4 alpha 8", "10 x FullFT"] == "contradicted"
    predicted = {(c["arm"], c["name"]): c["predicted"] for c in found["claims"]}
    assert predicted["r4 alpha 8", "hidden / (2 alpha)"] == 12.0


def test_lr_ratio_of_one_alpha_that_is_not_the_doctrines_is_judged_by_it(tmp_path):
    found = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda a: 2.0), lora_alpha=8).results()
    assert found["verdict"]["status"] == "contradicted"


def test_lr_ratio_diverged_runs_are_points_without_a_loss_and_never_best(tmp_path):
    found = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda a: 10.0, wall=2.0)).results()
    full = found["arms"][0]
    diverged = [p for p in full["points"] if p["status"] == "diverged"]
    assert diverged
    assert all(p["eval_loss"] is None and p["reason"] for p in diverged)
    assert all(p["learning_rate"] > 2 * 8e-4 for p in diverged)
    assert full["fit"]["low"] < 8e-4 < full["fit"]["high"]


def test_lr_ratio_regrets_of_the_priors_are_their_distance_from_the_best(tmp_path):
    found = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda a: 10.0)).results()
    rows = {(row[0], row[1]): row for row in found["tables"][1]["rows"]}
    assert float(rows["FullFT", "doctrine"][2]) == pytest.approx(1.04e-3)
    # 0.4 x (log10(1.04e-3 / 8e-4))^2 = 0.0053 nats of 2.41
    assert float(rows["FullFT", "doctrine"][3].rstrip("%")) == pytest.approx(0.2, abs=0.2)
    assert ("r4 alpha 32", "tinker") in rows


def test_lr_ratio_of_a_flat_surface_is_undecided(tmp_path):
    def flat(candidate: Candidate, examples: int) -> float:
        rng = random.Random(f"{candidate}")
        return 2.5 + rng.gauss(0, 0.01)

    found = Planted("lr-ratio", tmp_path / "run", flat).results()
    assert found["verdict"]["status"] == "undecided"
    assert found["verdict"]["would_decide"]


def by_rank(candidate: Candidate, examples: int) -> float:
    """Rank 1 stops learning after a quarter of the budget, rank 8 follows full fine-tuning."""
    learnt = min(examples, 1200) if candidate.lora_rank == 1 else examples
    best = 8e-4 if candidate.full_finetune else 4e-3
    return valley(best, 2.4, candidate) + 0.8 * (1 - learnt / BUDGET)


def test_rank_that_stops_learning_leaves_the_curve_where_it_does(tmp_path):
    found = Planted("rank", tmp_path / "run", by_rank, lora_rank=[1, 8]).results()
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rows["r1 alpha 32"][3] == "2,400"  # the first evaluation above the curve
    assert rows["r8 alpha 32"][3] == "stays"
    # 2 bits x 16,832 parameters of a rank; the bits of an example are its loss-bearing tokens
    assert rows["r1 alpha 32"][1] == "33,664"
    assert "r1 alpha 32 from 2,400 examples on" in found["verdict"]["sentence"]
    names = [series["name"] for series in found["figures"][0]["series"]]
    assert names == ["FullFT", "r1 alpha 32", "r8 alpha 32"]


def by_layers(worse: float):
    def loss(candidate: Candidate, examples: int) -> float:
        extra = worse if candidate.target == ("attn",) else 0.0
        return valley(4e-3, 2.5 + extra, candidate) + 0.8 * (1 - examples / BUDGET)

    return loss


@pytest.mark.parametrize(
    ("worse", "status"), [(0.1, "supported"), (-0.1, "contradicted"), (0.0, "undecided")]
)
def test_layers_attention_alone_is_judged_against_mlp(tmp_path, worse, status):
    found = Planted("layers", tmp_path / "run", by_layers(worse), lora_rank=8).results()
    assert found["verdict"]["status"] == status
    claim = found["claims"][0]
    assert claim["measured"] == pytest.approx(worse, abs=0.01)
    assert [row[1] for row in found["tables"][0]["rows"]] == ["26", "16", "10", "8"]


def by_batch(extra: float):
    def loss(candidate: Candidate, examples: int) -> float:
        large = candidate.global_batch_size == 64
        gap = 0.0 if candidate.full_finetune else 0.05 + extra * large
        best = 8e-4 if candidate.full_finetune else 4e-3
        return valley(best, 2.4 + gap, candidate) + 0.8 * (1 - examples / BUDGET)

    return loss


@pytest.mark.parametrize(
    ("extra", "status"), [(0.1, "supported"), (-0.1, "contradicted"), (0.0, "undecided")]
)
def test_batch_gap_is_compared_over_batches(tmp_path, extra, status):
    keys = {"global_batch_size": [16, 64]}
    found = Planted("batch", tmp_path / "run", by_batch(extra), **keys).results()
    assert found["verdict"]["status"] == status
    assert [row[1] for row in found["tables"][0]["rows"]] == ["300", "75"]
    drawn = found["figures"][0]["series"][0]
    assert drawn["y"] == pytest.approx([0.05, 0.05 + extra], abs=0.01)


def test_findings_of_an_unfinished_study_say_so(tmp_path):
    study = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda a: 10.0))
    trial = next(study.run.trials.glob("full-*"))
    (trial / "status.json").unlink()
    study.agenda = Agenda(study.arms, study.config, study.run, study._trial)
    assert study.results()["status"] == "unfinished"


def test_limits_say_what_the_protocol_lacks(tmp_path):
    short = {"examples": 160, "eval_every": 80, "seeds": 2}
    study = Planted("lr-ratio", tmp_path / "run", with_ratio(lambda a: 10.0), **short)
    limits = " ".join(study.results()["limits"])
    assert "Runs of 10 steps: below 300" in limits
    assert "2 seed(s): 3 are the least" in limits
    assert "more than one epoch" not in limits
    whole = Planted("lr-ratio", tmp_path / "whole", with_ratio(lambda a: 10.0))
    said = " ".join(whole.results()["limits"])
    assert "steps" not in said
    assert "more than one epoch" in said  # 4,800 examples of 932 rows


def test_rank_whose_best_rate_is_not_bounded_has_a_curve_all_the_same(tmp_path):
    def flat_rank_1(candidate: Candidate, examples: int) -> float:
        if candidate.lora_rank != 1:
            return by_rank(candidate, examples)
        rng = random.Random(f"{candidate}")
        wall = max(0.0, abs(math.log10(candidate.learning_rate / 4e-3)) - 0.6)
        return 2.9 + wall**2 + rng.gauss(0, 0.01) + 0.4 * (1 - examples / BUDGET)

    found = Planted("rank", tmp_path / "run", flat_rank_1, lora_rank=[1, 8], seeds=2).results()
    arm = next(arm for arm in found["arms"] if arm["label"] == "r1 alpha 32")
    assert arm["fit"] is None
    assert arm["unsettled"]
    rows = {row[0]: row for row in found["tables"][0]["rows"]}
    assert float(rows["r1 alpha 32"][4]) == pytest.approx(2.9, abs=0.03)
    assert rows["r1 alpha 32"][3] != "no curve"


def rewarded(gain_of):
    """minus the held-out reward: from 0.1 on up to a plateau that depends on the arm and the learning rate."""

    def loss(candidate: Candidate, examples: int) -> float:
        best = 8e-4 if candidate.full_finetune else 8e-3
        away = math.log10(candidate.learning_rate / best)
        rng = random.Random(f"{candidate}")
        gain = max(0.0, gain_of(candidate) - 0.3 * away**2)
        return -(0.1 + (gain + 0.005 * candidate.seed + rng.gauss(0, 0.002)) * examples / BUDGET)

    return loss


RL = {"lora_rank": [1, 4], "global_batch_size": 16, "max_completion_length": 8}


def test_rl_rewards_of_the_arms_stand_as_rewards_with_their_gain_and_ratio(tmp_path):
    found = Planted("rl", tmp_path / "run", rewarded(lambda _: 0.7), **RL).results()
    assert found["objective"] == "eval_reward"
    assert found["verdict"]["status"] == "supported"
    assert "FullFT from 0.10 to 0.8" in found["verdict"]["sentence"]
    gains = [c for c in found["claims"] if c["name"].startswith("learns")]
    assert [c["arm"] for c in gains] == ["FullFT", "r1 alpha 32", "r4 alpha 32"]
    assert [c["status"] for c in gains] == ["supported"] * 3
    assert all(c["low"] < c["measured"] < c["high"] for c in gains)
    assert all(c["measured"] == pytest.approx(0.705, abs=0.03) for c in gains)
    ratios = [c for c in found["claims"] if c["name"] == "10 x FullFT"]
    assert all(c["low"] < 10 < c["high"] for c in ratios)
    assert "15 x (short runs)" not in {c["name"] for c in found["claims"]}
    rewards = {row[0]: row for row in found["tables"][0]["rows"]}
    assert rewards["r1 alpha 32"][2] == "0.100"
    assert float(rewards["r1 alpha 32"][3]) == pytest.approx(0.805, abs=0.03)
    curves = found["figures"][0]
    assert curves["y_title"].startswith("eval_reward")
    assert all(series["y"][-1] > 0.7 for series in curves["series"])
    page = render(found)
    assert "eval_reward" in page
    assert "nats/token" not in page.split("<script")[0]


def test_rl_arm_that_learns_nothing_is_not_said_to_learn(tmp_path):
    by_rank = rewarded(lambda candidate: -0.02 if candidate.lora_rank == 1 else 0.7)
    found = Planted("rl", tmp_path / "run", by_rank, **RL).results()
    status = {c["arm"]: c["status"] for c in found["claims"] if c["name"].startswith("learns")}
    assert status["r1 alpha 32"] != "supported"
    assert status["FullFT"] == status["r4 alpha 32"] == "supported"


def test_rl_lora_worse_than_full_finetuning_by_a_reward_has_a_negative_gap(tmp_path):
    worse = rewarded(lambda candidate: 0.7 if candidate.full_finetune else 0.5)
    found = Planted("rl", tmp_path / "run", worse, **RL).results()
    table = next(t for t in found["tables"] if t["title"] == "LoRA against full fine-tuning")
    assert table["headers"][3][0].startswith("best reward over FullFT's")
    assert float(table["rows"][0][3]) == pytest.approx(-0.2, abs=0.02)
    low, high = map(float, table["rows"][0][4].split(" to "))
    assert low < -0.2 < high
