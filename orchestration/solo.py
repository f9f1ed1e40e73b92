"""Engine `solo`: every trial is a Ray Train run of its own, started and ended with the trial.

The trial's driver is a Tune function that holds no torch of its own; the base, the data and the
training live in the Train workers.
"""

from typing import Any

WORKER_FAILURES = 2
"""Worker deaths a trial survives: the group restarts and goes on from the last checkpoint."""


def solo_trial(config: dict[str, Any]) -> None:
    """The Tune trainable. `config`: {"trial": the trial's dict, "workers": what its group
    reserves, "seen": trial -> how many of its evaluations the scheduler saw before a resume}."""
    # Built here, in the trial's process: TuneReportCallback needs the Tune session, and what the
    # hardware can do is asked where it is, never on the driver's machine.
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from orchestration.group_watch import TrialWatch

    workers = config["workers"]
    resources = {"CPU": workers["cpus_per_worker"]}
    if workers["gpus_per_worker"]:
        resources["GPU"] = workers["gpus_per_worker"]
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "trial": config["trial"],
            "seen": config["seen"].get(config["trial"]["name"], 0),
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers["num_workers"],
            use_gpu=bool(workers["gpus_per_worker"]),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=config["trial"]["name"],
            storage_path=workers["storage"],
            callbacks=[TuneReportCallback(), TrialWatch()],
            failure_config=ray.train.FailureConfig(
                max_failures=WORKER_FAILURES, controller_failure_limit=0
            ),
        ),
    )
    trainer.fit()


def _train_worker(config: dict[str, Any]) -> dict[str, str]:
    from trainers.worker import train_worker  # torch is imported in the worker alone

    return train_worker(config)
