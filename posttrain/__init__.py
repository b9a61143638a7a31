"""Post-training of language models: exact, packed, readable. The public names, loaded when first
used."""

# ruff: noqa: F401 - editors and type checkers find the names here, __getattr__ at run time
from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data import DataConfig
    from posttrain.data.prompts import PromptConfig
    from posttrain.losses.distillation import distillation
    from posttrain.losses.policy import (
        cispo,
        clip_cov,
        clipped,
        gmpo,
        gspo,
        kl_cov,
        mirror_descent,
        objective,
        reinforce,
        sapo,
        vespo,
    )
    from posttrain.losses.preference import (
        apo_down,
        apo_zero,
        bco,
        cdpo,
        cpo,
        discopop,
        dpo,
        dpo_norm,
        dpop,
        exo,
        hinge,
        ipo,
        ipo_avg,
        nca,
        nll_chosen,
        orpo,
        r_dpo,
        robust,
        rpo,
        simpo,
        sppo,
    )
    from posttrain.losses.reward import bradley_terry
    from posttrain.losses.sft import sft
    from posttrain.losses.unpaired import kto
    from posttrain.models.adapters import LoraConfig
    from posttrain.models.load import ModelConfig
    from posttrain.packing.plan import PackingConfig
    from posttrain.rewards import CompletionText, reward
    from posttrain.rewards.answers import (
        choice_answer,
        exact_answer,
        gym_answer,
        math_answer,
        numeric_answer,
    )
    from posttrain.rewards.code import code_tests
    from posttrain.rewards.compose import RewardsConfig
    from posttrain.rewards.model import llm_judge, reward_model
    from posttrain.rewards.text import (
        cosine_length,
        k15_length,
        language_consistency,
        overlong_penalty,
        repetition_penalty,
        think_answer_format,
    )
    from posttrain.rl.algorithms import (
        ALGORITHMS,
        CISPO,
        CLIP_COV,
        DAPO,
        DISTILL,
        DR_GRPO,
        GDPO,
        GMPO,
        GRPO,
        GSPO,
        KIMI_K15,
        KL_COV,
        MAXRL,
        R1,
        REINFORCE_PP,
        REINFORCE_PP_BASELINE,
        RLOO,
        SAPO,
        VESPO,
        Algorithm,
    )
    from posttrain.rl.batches import CurriculumConfig, RolloutConfig
    from posttrain.rl.credit import Credit, Rollout, credit
    from posttrain.rl.evaluate import EvaluationConfig
    from posttrain.rl.trajectory import Environment, SingleTurn
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.rollout.local import LocalConfig
    from posttrain.rollout.vllm import VLLMConfig
    from posttrain.trainers.distill import DistillConfig, DistillTrainer, TeacherConfig
    from posttrain.trainers.dpo import DPOConfig, DPOTrainer
    from posttrain.trainers.reward import RewardConfig, RewardTrainer
    from posttrain.trainers.rl import RLConfig, RLTrainer
    from posttrain.trainers.sft import SFTConfig, SFTTrainer
    from posttrain.training.config import TrainConfig
    from posttrain.training.forward import Evaluated
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

NAMES = {
    "data": "DataConfig",
    "data.prompts": "PromptConfig",
    "losses.distillation": "distillation",
    "losses.policy": "clipped reinforce cispo gspo mirror_descent gmpo sapo vespo clip_cov kl_cov "
    "objective",
    "losses.preference": "dpo cdpo robust ipo ipo_avg hinge dpo_norm simpo orpo cpo bco "
    "apo_zero apo_down exo nca sppo rpo nll_chosen dpop r_dpo discopop",
    "losses.reward": "bradley_terry",
    "losses.sft": "sft",
    "losses.unpaired": "kto",
    "models.adapters": "LoraConfig",
    "models.load": "ModelConfig",
    "packing.plan": "PackingConfig",
    "rewards": "reward CompletionText",
    "rewards.answers": "math_answer numeric_answer exact_answer choice_answer gym_answer",
    "rewards.code": "code_tests",
    "rewards.compose": "RewardsConfig",
    "rewards.model": "reward_model llm_judge",
    "rewards.text": "think_answer_format language_consistency k15_length overlong_penalty "
    "cosine_length repetition_penalty",
    "rl.algorithms": "Algorithm GRPO R1 DR_GRPO DAPO GSPO CISPO GMPO SAPO VESPO MAXRL GDPO "
    "CLIP_COV KL_COV RLOO REINFORCE_PP REINFORCE_PP_BASELINE KIMI_K15 DISTILL ALGORITHMS",
    "rl.batches": "RolloutConfig CurriculumConfig",
    "rl.credit": "Credit Rollout credit",
    "rl.trajectory": "Environment SingleTurn",
    "rl.evaluate": "EvaluationConfig",
    "rollout.engine": "SamplingConfig",
    "rollout.local": "LocalConfig",
    "rollout.vllm": "VLLMConfig",
    "trainers.distill": "DistillConfig DistillTrainer TeacherConfig",
    "trainers.dpo": "DPOConfig DPOTrainer",
    "trainers.reward": "RewardConfig RewardTrainer",
    "trainers.rl": "RLConfig RLTrainer",
    "trainers.sft": "SFTConfig SFTTrainer",
    "training.config": "TrainConfig",
    "training.forward": "Evaluated",
    "training.optimizer": "OptimizerConfig",
    "training.reference": "ReferenceConfig",
    "types": "BatchStatistic Completion Forward Logps Loss LossOutput LossTerm Pair "
    "PromptGroup as_loss loss",
}
"""{module: its public names}"""
_HOME = {name: f"posttrain.{module}" for module, names in NAMES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name from where it lives: `import posttrain` itself takes no time."""
    if name not in _HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, also those that are not loaded yet."""
    return [*globals(), *__all__]
