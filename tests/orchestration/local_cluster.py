"""A Ray of this process for tests that bring workers of their own."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from orchestration.local_ray import end_alone, tell_api_server


@contextmanager
def local_cluster() -> Iterator[None]:
    """Two CPUs, with a state API as a sweep's own Ray has it: where Train's controller is killed, it is
    PlacementGroupCleaner that frees its workers' CPUs, and it asks there."""
    ray.init(
        address="local",
        num_cpus=2,
        log_to_driver=False,
        logging_level="error",
        **tell_api_server(),
    )
    try:
        yield
    finally:
        ray.shutdown()
        end_alone()
