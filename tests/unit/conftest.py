"""Fixtures of more than one file."""

from __future__ import annotations

import pytest

from posttrain.rewards.compose import Rewards, RewardsConfig


@pytest.fixture
def rewards_of():
    made = []

    def make(config: RewardsConfig, **more) -> Rewards:
        made.append(Rewards(config, **more))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()


@pytest.fixture
def no_measurement(monkeypatch):
    """Runs do not measure the machine's matmul peak."""
    monkeypatch.setattr("posttrain.training.loop.measure_matmul_peak", lambda device, dtype: 1e12)
