"""Post-training of language models: exact, packed, readable. The public names, loaded when first
used."""

# ruff: noqa: F401 - editors and type checkers find the names here, __getattr__ at run time
from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if (
    "torch" not in sys.modules
):  # torch reads it once; large CPU tensors in huge pages cost a tenth less time per step
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from posttrain.data import DataConfig
    from posttrain.models.adapters import LoraConfig
    from posttrain.models.load import ModelConfig
    from posttrain.packing.plan import PackingConfig
    from posttrain.rewards import reward
    from posttrain.rewards.compose import RewardsConfig
    from posttrain.rl.algorithms import Algorithm
    from posttrain.rl.batches import RolloutConfig
    from posttrain.rl.credit import Credit, Rollout, credit
    from posttrain.rl.environment import Environment, SingleTurn
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.trainers.dpo import DPOConfig, DPOTrainer
    from posttrain.trainers.reward import RewardConfig, RewardTrainer
    from posttrain.trainers.rl import RLConfig, RLTrainer
    from posttrain.trainers.sft import SFTConfig, SFTTrainer
    from posttrain.training.config import TrainConfig
    from posttrain.training.optimizer import OptimizerConfig
    from posttrain.training.reference import ReferenceConfig
    from posttrain.types import (
        BatchStatistic,
        Completion,
        Forward,
        Logps,
        Loss,
        LossOutput,
        LossTerm,
        Pair,
        PromptGroup,
        as_loss,
        loss,
    )

_NAMES = {
    "rl.algorithms": "Algorithm",
    "data": "DataConfig",
    "models.adapters": "LoraConfig",
    "models.load": "ModelConfig",
    "packing.plan": "PackingConfig",
    "rewards": "reward",
    "rewards.compose": "RewardsConfig",
    "rollout.engine": "SamplingConfig",
    "trainers.dpo": "DPOConfig DPOTrainer",
    "trainers.reward": "RewardConfig RewardTrainer",
    "trainers.rl": "RLConfig RLTrainer",
    "trainers.sft": "SFTConfig SFTTrainer",
    "training.config": "TrainConfig",
    "rl.batches": "RolloutConfig",
    "rl.credit": "Credit Rollout credit",
    "rl.environment": "Environment SingleTurn",
    "training.optimizer": "OptimizerConfig",
    "training.reference": "ReferenceConfig",
    "types": "BatchStatistic Completion Forward Logps Loss LossOutput LossTerm Pair PromptGroup "
    "as_loss loss",
}
_HOME = {name: f"posttrain.{module}" for module, names in _NAMES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name from where it lives: `import posttrain` itself takes no time."""
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
