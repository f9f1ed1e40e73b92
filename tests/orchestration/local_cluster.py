"""A Ray of this process for tests that bring workers of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from orchestration.local_ray import end_alone, tell_api_server


@contextmanager
def bare_ray() -> Iterator[None]:
    """Two CPUs and no dashboard.

    ray.init leaves RAY_AUTH_MODE=token in the environment, and there it must stay: Ray's core has it from then on, and
    a later Ray of this process that is started without a token is refused by it.
    """
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def local_cluster() -> Iterator[None]:
    """Two CPUs, with a state API as a sweep's own Ray has it: where Train's controller is killed, it is
    PlacementGroupCleaner that frees its workers' CPUs, and it asks there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        options = {"log_to_driver": False, "logging_level": "error", **tell_api_server()}
        ray.init(address="local", num_cpus=2, **options)
        try:
            yield
        finally:
            ray.shutdown()
            end_alone()
