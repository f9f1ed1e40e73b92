"""Train's controller starts no new workers for a sweep or a trial that has ended."""

import time

import pytest
import ray

from orchestration.group_watch import ANSWER_S, SETTLE_S, require_alive
from tests.orchestration.local_cluster import bare_ray


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with bare_ray():
        yield


class Owner:
    """A trial's actor, or the broker."""

    def busy(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.mark.ray
@pytest.mark.slow
def test_require_alive_takes_an_actor_that_answers_and_one_that_is_busy():
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    require_alive(owner, "the trial")
    owner.busy.remote(10 * (SETTLE_S + ANSWER_S))  # a Tune function, in the middle of its training
    require_alive(owner, "the trial")
    ray.kill(owner)


@pytest.mark.ray
@pytest.mark.slow
def test_require_alive_refuses_an_actor_that_dies_while_it_settles():
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    ray.get(owner.__ray_ready__.remote())
    owner.busy.remote(60)
    ray.kill(owner)
    with pytest.raises(
        ValueError, match="no new workers: the trial that they worked for has ended"
    ):
        require_alive(owner, "the trial that they worked for")
