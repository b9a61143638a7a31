"""On-policy distillation: the student samples, teachers say at every token what they would have
done, with or without rewards beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Any

from torch import nn

from posttrain.losses.distillation import DivergenceKind, TeacherDivergence, distillation
from posttrain.losses.reduce import weighted_sum
from posttrain.models.load import ModelConfig, load_model, load_tokenizer
from posttrain.models.logprobs import compute_dtype
from posttrain.models.policy import Policy, freeze
from posttrain.resolve import settings
from posttrain.rewards import reward
from posttrain.rl.algorithms import Algorithm, resolve_algorithm
from posttrain.rl.credit import group_normalised
from posttrain.trainers.base import RunData
from posttrain.trainers.rl import RLConfig, RLTrainer, check_sampling
from posttrain.training.config import TrainConfig
from posttrain.training.identity import source_digest
from posttrain.types import as_loss


@settings
class TeacherConfig:
    """One teacher."""

    model: str = ""
    """Folder or name of a model with the student's vocabulary."""
    weight: float = 1.0
    """Of its divergence in the loss."""
    divergence: DivergenceKind = "reverse_kl"
    """reverse_kl: KL(student || teacher); forward_kl: KL(teacher || student); jensen_shannon."""
    mix: float = 0.5
    """jensen_shannon: the teacher's share of the mixture."""


@settings
class DistillConfig(RLConfig):
    """Everything that decides an on-policy distillation: an RL run whose loss is a divergence."""

    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="distill"))
    """Length, cadence and place of the run; batch_size counts prompts per optimizer step"""
    teachers: list[TeacherConfig] = field(default_factory=list)
    """Whom the student is compared with"""
    reward_weight: float = 0.0
    """Weight of the loss of ``algorithm`` beside the divergence; 0: the rewards are only logged."""


class DistillTrainer(RLTrainer):
    """``DistillTrainer("student", teachers=["teacher"], train_dataset=rows).train()``.

    Agarwal et al. 2023 (GKD), arXiv:2306.13649 with all data on-policy. ``teachers``: folders or
    loaded models, each with weight 1 and the reverse KL; ``config.teachers`` says more. The
    divergence is exact over the vocabulary, at the sampling temperature for both.
    """

    def __init__(
        self,
        model: Any = None,
        args: DistillConfig | None = None,
        *,
        teachers: Sequence[str | nn.Module] = (),
        config: DistillConfig | None = None,
        **others: Any,
    ) -> None:
        config = config or args or DistillConfig()
        if bool(teachers) == bool(config.teachers):
            raise ValueError(
                "DistillTrainer needs teachers, in one place: teachers=[...] or config.teachers; "
                f"got {'both' if teachers else 'none'}. On the command line: --teachers "
                "'[{model: FOLDER}]'."
            )
        named: list[tuple[Any, TeacherConfig]] = [(t.model, t) for t in config.teachers]
        named = named or [
            (t, TeacherConfig(model=t if isinstance(t, str) else "")) for t in teachers
        ]
        self._teachers = [teacher for teacher, _ in named]
        losses: list[tuple[float, TeacherDivergence]] = []
        for number, (teacher, how) in enumerate(named):
            output = TeacherDivergence(
                str(number) if len(named) > 1 else "teacher",
                _frozen_forward(teacher),
                kind=how.divergence,
                mix=how.mix,
            )
            losses.append((how.weight, output))
        if not (config.rewards.functions or config.rewards.by_task or others.get("rewards")):
            others["rewards"] = {no_reward: 1.0}
        super().__init__(model, config=config, algorithm=_algorithm(config, losses), **others)

    def _choose_loss(self, given: Any) -> None:
        check_sampling(self.config)
        assert self._given_algorithm is not None
        self.algorithm = self._given_algorithm  # it has the options
        self.loss = self.algorithm.objective
        self.wants_reference = self.algorithm.needs_reference

    def _read(self, tokenizer: Any, *, is_main: bool) -> RunData:
        for teacher in self._teachers:
            if isinstance(teacher, str):
                _check_same_vocabulary(tokenizer, teacher)
        return super()._read(tokenizer, is_main=is_main)

    def _identity(self) -> dict[str, Any]:
        folders = [source_digest(t) for t in self._teachers if isinstance(t, str)]
        return super()._identity() | {"teachers": folders}


def _algorithm(
    config: DistillConfig, teachers: Sequence[tuple[float, TeacherDivergence]]
) -> Algorithm:
    """The divergence, and ``reward_weight`` times the loss of the algorithm with its credit."""
    loss = distillation(teachers)
    if not config.reward_weight:
        if config.options:
            raise ValueError(
                f"{', '.join(config.options)} is read with a reward_weight; set it above 0."
            )
        return Algorithm(name="distill", advantages=group_normalised, loss=loss, skip_zero="never")
    base = resolve_algorithm(config.algorithm, config.options)
    of_rewards = as_loss(base.loss).with_options(**base.loss_options)
    both = weighted_sum([(1.0, loss), (config.reward_weight, of_rewards)])
    return replace(
        base, name=f"distill + {base.name}", loss=both, loss_options={}, skip_zero="never"
    )


def _check_same_vocabulary(tokenizer: Any, teacher: str) -> None:
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(ModelConfig(name=teacher)).get_vocab()
    if theirs != ours:
        other = next(t for t in {**ours, **theirs} if theirs.get(t) != ours.get(t))
        raise ValueError(
            f"A teacher is compared token by token, and the vocabulary of {teacher} is not the "
            f"student's: {len(theirs):,} and {len(ours):,} tokens, {other!r} is "
            f"{theirs.get(other)} there and {ours.get(other)} here. Use a teacher of the same "
            "family."
        )


def _frozen_forward(model: str | nn.Module) -> Callable[[Any, Any], Any]:
    """(student's policy, batch) -> the teacher's states and head. The teacher's policy is made at
    the first call, when the student's packing, device and temperature are known."""
    made: dict[str, Policy] = {}

    def forward(student: Policy, batch: Any) -> Any:
        if "teacher" not in made:
            device = batch.input_ids_L.device
            weight = next(student.parameters())
            loaded, compute = model, None
            if isinstance(loaded, str):  # a loaded one is the user's: its weights stay as they are
                loaded = load_model(ModelConfig(name=loaded), dtype=weight.dtype)
                compute = compute_dtype(weight)
            policy = Policy.around(student, loaded.to(device), device_type=device.type)
            made["teacher"] = freeze(policy, compute=compute)
        return made["teacher"].head_input(batch)

    return forward


@reward(batched=True)
def no_reward(completions: Sequence[str], samples: Sequence[Any]) -> list[float]:
    """0 for every completion: pure distillation trains on the divergence alone."""
    return [0.0] * len(completions)
