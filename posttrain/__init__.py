"""Post-training of language models: exact, packed, readable. The public names, loaded when first
used."""

# ruff: noqa: F401 - editors and type checkers find the names here, __getattr__ at run time
from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
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
        kto,
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


def _homes() -> dict[str, str]:
    """{name: module} of the imports above, which only type checkers run."""
    found = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    imports = [n for n in found if isinstance(n, ast.ImportFrom)]
    return {n.name: str(i.module) for i in imports for n in i.names if "posttrain" in str(i.module)}


HOME = _homes()
__all__ = list(HOME)


def __getattr__(name: str) -> Any:
    """Imports a public name from where it lives: `import posttrain` itself takes no time."""
    if name not in HOME:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module(HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, also those that are not loaded yet."""
    return [*globals(), *__all__]
