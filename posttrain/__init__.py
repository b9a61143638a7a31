"""Post-training of language models: exact, packed, readable. The public names, loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data import DataConfig
    from posttrain.models.load import LoraConfig, ModelConfig
    from posttrain.packing.plan import PackingConfig
    from posttrain.trainers.sft import SFTConfig, SFTTrainer
    from posttrain.training.config import TrainConfig
    from posttrain.training.optimizer import OptimizerConfig
    from posttrain.types import Completion, LossOutput, LossTerm, PromptGroup, TokenLogps

_HOME = {
    "Completion": "posttrain.types",
    "DataConfig": "posttrain.data",
    "LoraConfig": "posttrain.models.load",
    "LossOutput": "posttrain.types",
    "LossTerm": "posttrain.types",
    "ModelConfig": "posttrain.models.load",
    "OptimizerConfig": "posttrain.training.optimizer",
    "PackingConfig": "posttrain.packing.plan",
    "PromptGroup": "posttrain.types",
    "SFTConfig": "posttrain.trainers.sft",
    "SFTTrainer": "posttrain.trainers.sft",
    "TokenLogps": "posttrain.types",
    "TrainConfig": "posttrain.training.config",
}
__all__ = [
    "Completion",
    "DataConfig",
    "LoraConfig",
    "LossOutput",
    "LossTerm",
    "ModelConfig",
    "OptimizerConfig",
    "PackingConfig",
    "PromptGroup",
    "SFTConfig",
    "SFTTrainer",
    "TokenLogps",
    "TrainConfig",
]


def __getattr__(name: str) -> Any:
    """Imports a public name from where it lives: `import posttrain` itself takes no time."""
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
