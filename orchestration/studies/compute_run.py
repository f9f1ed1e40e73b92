"""compute: the costs of a step, measured in processes of their own on this machine; no Ray."""

from pathlib import Path
from typing import Any

from orchestration.console import PlainConsole
from orchestration.models import model_shape
from orchestration.run_folder import driving
from orchestration.studies.common import begin, conclude, removed_if_refused
from orchestration.studies.compute import GPU, LAPTOP, SMOKE, ComputeRecipe, CostModel, run_compute
from orchestration.studies.config import ASSETS, StudyConfig
from orchestration.studies.frame import StudyFacts, frame
from orchestration.studies.results import model_facts, write_results
from trainers.paths import RunPaths

RECIPES = {"smoke": SMOKE, "laptop": LAPTOP, "gpu": GPU, "cluster": GPU}


def run_compute_study(config: StudyConfig, run: RunPaths, facts: StudyFacts) -> int:
    """Runs the study, or goes on with it, and returns the exit code.

    Raises:
        ValueError: a model that cannot be read, or another study's folder.
    """
    recipe, console = recipe_of(config, facts.preset), PlainConsole()
    model = model_facts(config, model_shape(config.model, config.revision))
    with driving(run), removed_if_refused(run):
        begin(run, config, facts, {"recipe": recipe.model_dump(mode="json")})

        def progress(line: str) -> None:
            console.print(line, markup=False, soft_wrap=True)

        found = run_compute(recipe, run.root, progress)
        data = {"name": "random tokens"}
        results = frame(facts, run.root.name, complete=True, model=model, data=data) | found
        write_results(run, results)
    return conclude(console, run, results)


def recipe_of(config: StudyConfig, preset: str | None) -> ComputeRecipe:
    """The preset's recipe; a model or ranks that the user set take the place of its own."""
    recipe = RECIPES[preset or "laptop"]
    given: dict[str, Any] = {}
    if config.model != str(ASSETS / "tiny-llama"):
        given["models"] = (CostModel(name=Path(config.model).name, folder=config.model),)
    if config.lora_rank is not None:
        ranks = config.lora_rank
        given["ranks"] = tuple(ranks) if isinstance(ranks, list) else (ranks,)
    return recipe.model_copy(update=given)
