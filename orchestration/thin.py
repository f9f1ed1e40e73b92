"""A Ray Tune trial that trains nothing itself: it asks the warm workers for its next evaluation.

Its actor is reused from trial to trial and imports no torch. Nothing of a trial lives here: a step is
one question to the broker, which answers a repeated question alike, so a trial may be started again,
or set up beside itself, as Tune does.
"""

from typing import Any

import ray
from ray import tune

from trainers.metrics import DIVERGED_LOSS, Judge

WAIT_S = 5.0
"""How long the broker holds a question; a stopped trial's actor is free after that."""


class ThinTrial(tune.Trainable):
    """config: {"trial": the trial's dict, "broker": {"name", "namespace"}, "seen": trial ->
    how many of its evaluations the scheduler saw before a resume}."""

    def setup(self, config: dict[str, Any]) -> None:
        self.broker = ray.get_actor(**config["broker"])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self.trial = config["trial"]
        self.index = config["seen"].get(self.trial["name"], 0)

    def step(self) -> dict[str, Any]:
        """The next evaluation. A trial that ended without one reports its end."""
        answer: Any = None
        while answer is None:
            answer = ray.get(self.broker.row.remote(self.trial, self.index, WAIT_S))
        self.index += 1
        if "ended" in answer:
            return self._end(answer["ended"], answer["row"])
        judged = {"eval_loss": self._loss(answer["row"]), "trial": self.trial["name"]}
        return {**answer["row"], **judged, "done": answer["last"]}

    def _loss(self, row: dict[str, Any]) -> float:
        """What Tune minimises, under the one name that it knows."""
        return Judge(**self.trial.get("judge", {})).loss(row)

    def _end(self, ended: dict[str, str], row: dict[str, Any] | None) -> dict[str, Any]:
        # Schedulers and Tune want the metric with every result; a failed or diverged trial ranks last.
        usable = ended["status"] in ("finished", "stopped") and row is not None
        return {
            "eval_loss": self._loss(row) if usable and row else DIVERGED_LOSS,
            "examples": row["examples"] if usable and row else self.trial["num_examples"],
            "trial": self.trial["name"],
            "ended": ended,
            "done": True,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {"index": self.index}

    def load_checkpoint(self, checkpoint: Any) -> None:
        self.index = checkpoint["index"]
