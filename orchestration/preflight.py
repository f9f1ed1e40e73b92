"""Before anything starts on a cluster that was joined: every node that can host workers is asked for what a
run needs of it, and all that is missing is told at once.

What decides numbers must be equal on the driver and on every node, to the last digit: torch, transformers,
PEFT, bitsandbytes and tokenizers compute them, Ray and DeepSpeed move them, and two workers of one
trial that differ would train two models. A build's own suffix (+cu128) may differ, as a head without a
GPU has another build of one release. safetensors and numpy carry a file format and a data format here,
which their feature releases keep: major.minor must be equal. Python pickles functions by bytecode: major.minor.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.inventory import Inventory, TrialDemand, max_concurrent_trials
from orchestration.checkpoint_bytes import ended_bytes, running_bytes
from orchestration.config import local_inputs
from orchestration.node_facts import NodeFacts, Question, free_bytes, node_facts, storage_free_bytes
from orchestration.packs import adapter_params, plan_packs, trial_demand
from orchestration.run_folder import storage_of
from orchestration.storage_probe import probing
from orchestration.sweep import DRIVER_RESOURCE
from trainers.base_fetch import is_hub_id
from trainers.data.cache import cache_root
from trainers.object_store import is_url
from trainers.paths import RunPaths

if TYPE_CHECKING:
    from orchestration.planning import Plan

EQUAL = ("ray", "torch", "transformers", "peft", "bitsandbytes", "tokenizers")
SHARDING = ("deepspeed",)
EQUAL_FEATURES = ("safetensors", "numpy")
WAIT_S = 120.0
"""How long a node may take to start a worker process, unpack our packages (megabytes) and answer: 2 to 4 s on
a machine with two busy cores. The rest is for nodes that read Python from a slow network file system."""
SHIPPED = "py_modules_files"
"""In the path of what Ray unpacked of a job's py_modules."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run needs of the nodes.

    Args:
        model, revision, inputs, storage: see node_facts.Question.
        demand: of one worker group.
        storage_bytes: what the run will write there.
        work_bytes: what the copies of one worker's trials take on its node, of a run at a URL.
        sharded: whether DeepSpeed will partition the base.
    """

    model: str
    revision: str | None
    inputs: tuple[str, ...]
    storage: str
    demand: TrialDemand
    storage_bytes: int
    work_bytes: int = 0
    sharded: bool = False

    @property
    def equal_packages(self) -> tuple[str, ...]:
        """Packages of one release on all nodes."""
        return EQUAL + (SHARDING if self.sharded else ())

    def question(self, probe: str, asks_gpu: bool) -> Question:
        """What a node is asked."""
        return Question(
            packages=(*self.equal_packages, *EQUAL_FEATURES),
            model=self.model,
            revision=self.revision,
            inputs=self.inputs,
            storage=self.storage,
            probe=probe,
            asks_gpu=asks_gpu,
        )


def needs_of(
    plan: "Plan",
    run: RunPaths,
    inventory: Inventory,
    *,
    keep_weights: bool = True,
    full_ft_params: int = 0,
) -> Needs:
    """What a plan's run needs.

    Args:
        keep_weights: whether the weights of every trial stay; else of those that run at once.
        full_ft_params: parameters of a full fine-tuning, where the run has any.

    Raises:
        ValueError: as packs.plan_packs.
    """
    config, packs = plan.config, plan_packs(plan, inventory)
    demand = trial_demand(config, inventory, packs.workers_per_group)
    groups = max_concurrent_trials(demand, inventory)
    at_once = packs.num_groups * packs.places if config.engine == "packed" else groups
    largest_first = sorted(adapter_params(plan), reverse=True)
    full = [full_ft_params] * groups if full_ft_params else []
    running = [*largest_first[:at_once], *full]
    kept = [*largest_first, *full] if keep_weights else running
    num_bytes = ended_bytes(kept) + running_bytes(running)
    storage = storage_of(run)
    pack = largest_first[: packs.places if config.engine == "packed" else 1]
    written = sum(file.stat().st_size for file in run.trials.rglob("*") if file.is_file())
    return Needs(
        model=config.model if is_hub_id(config.model) else _absolute(config.model),
        revision=config.revision,
        inputs=tuple(sorted(_absolute(name) for name in local_inputs(config))),
        storage=storage,
        demand=demand,
        storage_bytes=max(0, num_bytes - written),
        work_bytes=ended_bytes(pack) + running_bytes(pack) if is_url(storage) else 0,
        sharded=packs.strategy == "zero3",
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def checked_inventory(
    needs: Needs, inventory: Inventory, *, local: bool, wait_s: float = WAIT_S
) -> Inventory:
    """The inventory, with its smallest GPU over all nodes, of a cluster on which the run can start.

    Args:
        local: the cluster was started here, on this machine alone: only the disk is looked at.
        wait_s: see WAIT_S.

    Raises:
        ValueError: what is missing, one line for each problem of each node. Nothing is left behind.
    """
    if local:
        free = None if is_url(needs.storage) else free_bytes(Path(needs.storage))
        _refuse([*storage_problems(needs, free), *_work_problem(needs, free_bytes(cache_root()))])
        return inventory
    nodes = {str(node["NodeID"]): _node_name(node) for node in hosts(_nodes(), needs.demand)}
    with probing(needs.storage) as probe:
        asks_gpu = bool(needs.demand.gpus_per_worker)
        driver = node_facts(needs.question(probe.name, asks_gpu=False), None)
        answers = _asked(needs.question(probe.name, asks_gpu), list(nodes), wait_s)
        unseen = [node for node in nodes if not probe.has_answered(node)]
        free = storage_free_bytes(needs.storage)
    lines = storage_problems(needs, free)
    for node, name in nodes.items():
        answer = answers[node]
        if isinstance(answer, NodeFacts):
            found = problems(needs, driver, answer, storage_seen=node not in unseen)
        else:
            found = [answer]
        lines += [f"node {name}: {problem}" for problem in found]
    _refuse(lines)
    return with_smallest_gpu(inventory, answers.values())


def _nodes() -> list[dict[str, Any]]:
    import ray

    return ray.nodes()


def hosts(nodes: Sequence[Mapping[str, Any]], demand: TrialDemand) -> list[Mapping[str, Any]]:
    """The living nodes of `ray.nodes()` that can host a worker, and the head, where the drivers are."""

    def can_host(resources: Mapping[str, float]) -> bool:
        return (
            resources.get("CPU", 0) >= demand.cpus_per_worker
            and resources.get("GPU", 0) >= demand.gpus_per_worker
        )

    return [
        node
        for node in nodes
        if node["Alive"] and (can_host(node["Resources"]) or DRIVER_RESOURCE in node["Resources"])
    ]


def _node_name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']}, {node['NodeID'][:8]})"


def _asked(question: Question, nodes: Sequence[str], wait_s: float) -> dict[str, NodeFacts | str]:
    """Node -> its facts, or why there are none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(node_facts)
    asked = {
        node: ask.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(question, node)
        for node in nodes
    }
    ready, waiting = ray.wait(list(asked.values()), num_returns=len(asked), timeout=wait_s)
    for reference in waiting:
        ray.cancel(reference, force=True)
    return {
        node: _answer(reference)
        if reference in ready
        else f"must answer within {wait_s:g} s, did not; look at it with `ray status`, mend or remove it"
        for node, reference in asked.items()
    }


def _answer(reference: Any) -> NodeFacts | str:
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference)
    except RayError as error:  # whatever ended the task there is that node's problem
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"must be able to run Tenfold, cannot ({lines[-1][:300]}); install Tenfold's dependencies there"


def problems(needs: Needs, driver: NodeFacts, node: NodeFacts, *, storage_seen: bool) -> list[str]:
    """What a node lacks, a line each: what must hold, what it has, what to do.

    Args:
        storage_seen: whether the driver finds what the node wrote into the storage.
    """
    return [
        *_version_problems(needs, driver, node),
        *_input_problems(needs, driver, node),
        *_storage_problem(needs, node, storage_seen),
        *_base_problem(needs, node),
        *_work_problem(needs, node.work_free_bytes),
    ]


def _version_problems(needs: Needs, driver: NodeFacts, node: NodeFacts) -> Iterator[str]:
    if features(node.python) != features(driver.python):
        yield (
            f"Python must be {features(driver.python)} as on the driver, is {node.python}; "
            "install that one there"
        )
    for package in needs.equal_packages:
        if release(node.versions[package]) != release(driver.versions[package]):
            yield _other_version(package, release(driver.versions[package]), node)
    for package in EQUAL_FEATURES:
        if features(node.versions[package]) != features(driver.versions[package]):
            yield _other_version(package, features(driver.versions[package]), node)
    for package, folder in node.imports.items():
        # A folder of the user's with such a name, where the driver was started, comes first on a worker.
        if SHIPPED not in folder and folder != driver.imports[package]:
            yield (
                f"{package} must be the driver's, which was sent there, is {folder}; rename that folder, or "
                "start from another one"
            )


def _other_version(package: str, wanted: str, node: NodeFacts) -> str:
    has = node.versions[package] or "not installed"
    return (
        f"{package} must be {wanted} as on the driver, is {has}; install {package}=={wanted} there"
    )


def release(version: str) -> str:
    """A version without its build's suffix: 2.11.0+cu128 -> 2.11.0."""
    return version.partition("+")[0]


def features(version: str) -> str:
    """major.minor of a version."""
    return ".".join(release(version).split(".")[:2])


def _input_problems(needs: Needs, driver: NodeFacts, node: NodeFacts) -> Iterator[str]:
    for path, here in driver.inputs.items():
        what, there = "model" if path == needs.model else "data", node.inputs[path]
        advice = "put it on a folder that all nodes share"
        if what == "model":
            advice += ", or give a hub id"
        if not there:
            yield f"{what} {path} must be readable there, nothing is; {advice}"
        elif there.startswith("unreadable"):
            yield f"{what} {path} must be readable there, is {there}; mend its permissions"
        elif there != here:
            yield f"{what} {path} must be the driver's, it holds something else; {advice}"


def _storage_problem(needs: Needs, node: NodeFacts, storage_seen: bool) -> Iterator[str]:
    error = node.storage_error or ("" if storage_seen else "what it writes is not seen here")
    if error and is_url(needs.storage):
        yield (
            f"storage {needs.storage} must be readable and writable there: {error}; give the node the store's "
            "client, credentials and endpoint"
        )
    elif error:
        yield (
            f"storage {needs.storage} must be a folder that all nodes share: {error}; set storage to a "
            "shared folder (NFS) or to a URL (s3://BUCKET/runs)"
        )


def _work_problem(needs: Needs, free: int) -> Iterator[str]:
    if needs.work_bytes > free:
        yield (
            f"the copies of a worker's trials need {needs.work_bytes:,} bytes on its own disk, {free:,} are "
            "free; free some, set TENFOLD_CACHE to a larger disk, or train smaller candidates"
        )


def _base_problem(needs: Needs, node: NodeFacts) -> Iterator[str]:
    if node.base_bytes is None:
        yield (
            f"{node.base_error}; give the cluster a network or HF_TOKEN, or put the model's folder on "
            "the shared storage"
        )
    elif node.base_bytes > node.cache_free_bytes:
        yield (
            f"model {needs.model} needs {node.base_bytes:,} bytes in the hub's cache, {node.cache_free_bytes:,} "
            "are free; free some, or set HF_HOME there to a larger disk"
        )


def storage_problems(needs: Needs, free: int | None) -> list[str]:
    """Whether what the run will write fits the storage; None: an object store has no end."""
    if free is None or needs.storage_bytes <= free:
        return []
    return [
        f"storage {needs.storage}: the run's checkpoints need {needs.storage_bytes:,} bytes, {free:,} are free; "
        "free some, set storage to a larger disk, or train fewer or smaller candidates"
    ]


def _refuse(lines: list[str]) -> None:
    if lines:
        raise ValueError("\n".join(lines))


def with_smallest_gpu(inventory: Inventory, answers: Iterable[NodeFacts | str]) -> Inventory:
    """The inventory with the smallest GPU of all nodes: any of them may get the largest pack."""
    sizes = [answer.gpu_bytes for answer in answers if isinstance(answer, NodeFacts)]
    known = [size for size in (*sizes, inventory.gpu_bytes) if size is not None]
    return replace(inventory, gpu_bytes=min(known)) if known else inventory
