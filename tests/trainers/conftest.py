"""Fixtures of the training tests."""

import pytest

from tests.trainers.tiny import Rows, random_rows


@pytest.fixture
def rows() -> Rows:
    return random_rows(40)


@pytest.fixture
def held_out() -> Rows:
    return random_rows(7, seed=1)
