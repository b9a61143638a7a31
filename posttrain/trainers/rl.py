"""Reinforcement learning on verifiable or learned rewards: GRPO and its relatives, RLOO,
REINFORCE++, Kimi k1.5."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from typing import Any, Literal

from posttrain.data.prompts import Prompt, PromptConfig, load_prompts, prompts_from_rows
from posttrain.plan.check import MemoryCheck
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.resolve import settings
from posttrain.rewards.compose import Rewards, RewardsConfig, by_name, trl_rewards
from posttrain.rl.algorithms import Algorithm, resolve_algorithm
from posttrain.rl.batches import CurriculumConfig, RolloutBatches, RolloutConfig
from posttrain.rl.evaluate import EvaluationConfig
from posttrain.rl.rollouts import Collector, report_prompts
from posttrain.rl.trajectory import Environment, SingleTurn
from posttrain.rollout.engine import SamplingConfig, check_positions
from posttrain.rollout.local import LocalConfig, local_engine
from posttrain.rollout.vllm import VLLMConfig, vllm_engine
from posttrain.trainers.base import BaseConfig, RunData, Trainer, run_reference
from posttrain.training.config import TrainConfig, set_options
from posttrain.training.identity import code_digest, source_digest
from posttrain.training.loop import Loop, TrainResult
from posttrain.training.reference import ReferenceConfig, RunReference
from posttrain.training.sharding import kind, shards_weights, unwrapped
from posttrain.types import Completion, PromptGroup

Rows = Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., Any]


@settings
class RLConfig(BaseConfig):
    """Everything that decides a reinforcement-learning run."""

    data: PromptConfig = field(default_factory=PromptConfig)  # type: ignore[assignment]
    """Prompts to sample from and to evaluate on"""
    algorithm: str = "grpo"
    """grpo, r1, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce_pp_baseline, k15, or the
    path of an Algorithm."""
    beta: float | None = None
    """Weight of the KL to the reference. Default: the algorithm's (grpo 0.04, dapo 0)."""
    epsilon_low: float | None = None
    """Lower clipping bound 1 - epsilon_low of the ratio. Default: the algorithm's."""
    epsilon_high: float | None = None
    """Upper clipping bound 1 + epsilon_high of the ratio. Default: the algorithm's."""
    tau: float | None = None
    """k15: weight of the KL to the policy at the start of the iteration. Default 1."""
    entropy_weight: float | None = None
    """Weight of the entropy bonus. Default: the algorithm's, 0."""
    algorithm_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Further options of its advantages, its loss or itself, e.g. --algorithm_options.std none, or
    aggregation, ceiling."""

    @property
    def options(self) -> dict[str, Any]:
        """Of the algorithm, all that are set."""
        names = ("beta", "epsilon_low", "epsilon_high", "tau", "entropy_weight")
        return set_options(self, names, self.algorithm_options)

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn"""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How an iteration is made"""
    engine: Literal["local", "vllm"] = "local"
    """Where completions are drawn: in this process, or by a running vLLM server
    (launch/vllm.sh)."""
    local: LocalConfig = field(default_factory=LocalConfig)
    """Sampling in this process: memory and speed"""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The vLLM server"""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """What completions are worth"""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """The order of prompts"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How held-out problems are answered"""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """The model of the KL penalty; read by algorithms with beta > 0"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="rl"))
    """Length, cadence and place of the run; batch_size counts prompts per optimizer step"""


SHOWN = (
    "reward",
    "accuracy",
    "length",
    "kl_reference_nats",
    "surprise_nats",
    "rollout_tokens_per_s",
    "scores_per_s",
    "update_tokens_per_s",
)
"""The live line. ``surprise_nats``: -log pi of the sampled tokens, whose mean is the entropy."""


class RLTrainer(Trainer):
    """``RLTrainer(model="smollm2-135m", train_dataset=rows, rewards={my_reward: 1.0},
    config=...).train()``.

    ``train_dataset``: rows with a prompt (or question, or messages) and what the rewards read; a
    stream is read to its end first. ``rewards``: functions ``(completion, sample) -> float | None``
    with their weight, beside those of ``config.rewards``; ``reward_funcs``: functions as TRL's,
    ``(prompts, completions, **columns) -> list``, each with weight 1. ``algorithm`` goes before
    ``config.algorithm``. ``environment``: what answers the model; without it one turn. The rest is
    as in ``Trainer``, without ``loss`` and ``compute_metrics``.
    """

    config_class = RLConfig

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        rewards: Mapping[RewardFunction, float] | None = None,
        reward_funcs: Sequence[Any] | Any = (),
        algorithm: Algorithm | None = None,
        environment: Environment | None = None,
        **others: Any,
    ) -> None:
        for name in ("loss", "compute_metrics"):
            if others.get(name) is not None:
                raise ValueError(
                    f"{type(self).__name__} takes no {name}: the loss is an Algorithm's "
                    "(algorithm=...), and what is measured beside is a reward of weight 0."
                )
        self._given_algorithm, self._environment = algorithm, environment
        self._batches: RolloutBatches | None = None
        super().__init__(model, args, **others)
        config = self.config
        if config.reference.cache:
            raise ValueError(
                "reference.cache holds log-probs of a fixed data set; rollouts are "
                "new in every step. Leave it off."
            )
        given = {**by_name(rewards or {}), **trl_rewards(reward_funcs)}
        self._rewards = Rewards(
            config.rewards, given=given, correct_reward=config.evaluation.correct_reward
        )

    def _choose_loss(self, given: Any) -> None:
        self.algorithm = _resolved(self.config, self._given_algorithm)
        self.loss = self.algorithm.objective
        self.wants_reference = self.algorithm.needs_reference

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"reinforcement learning ({self.algorithm.name})"

    def _check_launch(self, accelerator: Any) -> None:
        if shards_weights(accelerator):
            raise ValueError(
                f"Completions are sampled from whole weights, but {kind(accelerator)} holds a part "
                "of them on each process. Launch with ZeRO-2 (launch/zero2.yaml), which shards "
                "only gradients and optimizer state, or with DDP and --model.lora.rank 16."
            )

    def _plan_memory(
        self, data: RunData, accelerator: Any, precision: PrecisionPlan, model: Any
    ) -> MemoryCheck:
        return MemoryCheck.start(
            self.config,
            "rl",
            accelerator,
            precision,
            model=model,
            wants_reference=self.wants_reference,
            longest_prompt=max(len(p.ids) for p in _every(data)),
            reference_every=self.algorithm.reference_every,
        )

    def _identity(self) -> dict[str, Any]:
        learned = self.config.rewards.options.get("reward_model", {}).get("model")
        return super()._identity() | {
            "algorithm": code_digest(self.algorithm),
            "rewards": code_digest(self._rewards.functions),
            "environment": code_digest(self._environment),
            **({"reward_model": source_digest(learned)} if learned else {}),
        }

    def _trained(self, data: RunData, tokenizer: Any, *, is_main: bool) -> dict[str, Any]:
        config, train = self.config, data.train
        if is_main:
            report_prompts(data.counts, _every(data), self._rewards)
        return {
            "loss": self.loss,
            "batches": lambda _: [_probe_group(p) for p in train[:2]],
            "num_steps": config.train.max_steps
            or config.train.num_steps(len(train)) * config.rollout.epochs,
            "temperature": config.sampling.temperature,
            "shown": SHOWN,
        }

    def _set_up(self, loop: Loop, data: RunData) -> None:
        """Before the first rollout, not in the one that draws the longest prompt."""
        config, every = self.config, _every(data)
        room = max(config.sampling.max_tokens, config.evaluation.max_tokens or 0)
        check_positions(loop.model.config, max(len(p.ids) for p in every) + room)
        for prompt in every:
            self._rewards.verifier(prompt.sample)
            if config.curriculum.order == "prioritized":
                self._rewards.needs_verifier(prompt.sample, "curriculum.order=prioritized")
        check_prompt_budget(config, data.train)
        self._data = data
        if self.wants_reference:
            loop.reference = _reference(config, self.algorithm, loop)

    def _run(self, loop: Loop) -> TrainResult:
        try:
            return loop.run(self._sampled(loop))
        finally:
            self._rewards.close()

    def _evaluate(self, loop: Loop) -> dict[str, float]:
        try:
            return self._sampled(loop).evaluate(0)
        finally:
            self._rewards.close()

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        """Held-out figures of the present weights on the trainer's own held-out prompts;
        ``evaluation`` says how they are sampled."""
        if eval_dataset is not None:
            raise ValueError(
                "RLTrainer.evaluate reads the eval_dataset that the trainer was given."
            )
        return super().evaluate()

    def _sampled(self, loop: Loop) -> RolloutBatches:
        if self._batches is None:
            loop.prepare()
            held_out = self._data.eval.get("")
            self._batches = self._make_batches(loop, self._data.train, held_out)
        return self._batches

    def _read(self, tokenizer: Any, *, is_main: bool) -> RunData:
        if set(self._eval_datasets) != {""}:
            raise ValueError("RLTrainer takes one eval_dataset; mark kinds with a column instead.")
        train, counts = self._prompts(self._train_dataset, self.config.data.train, tokenizer)
        rows, sources = self._eval_datasets[""], self.config.data.eval
        held_out = (
            {"": self._prompts(rows, sources, tokenizer)[0]} if sources or rows is not None else {}
        )
        return RunData(
            train=train, eval=held_out, counts=counts, sizes=[len(train)], digest=_digest(train)
        )

    def _prompts(
        self, rows: Any, sources: Sequence[str], tokenizer: Any
    ) -> tuple[list[Prompt], dict[str, int]]:
        if rows is not None:
            rows = rows if hasattr(rows, "__len__") else list(rows)
            return prompts_from_rows(rows, tokenizer, self.config.data)
        if not sources:
            raise ValueError(
                "There are no prompts. Set --data.train, or give RLTrainer a train_dataset."
            )
        return load_prompts(self.config.data, sources, tokenizer)

    def _make_batches(
        self, loop: Loop, train: Sequence[Prompt], held_out: Sequence[Prompt] | None
    ) -> RolloutBatches:
        config, policy = self.config, unwrapped(loop.policy)
        engine = (
            local_engine(
                policy,
                loop.tokenizer,
                config.local,
                compute=torch_dtype(loop.precision.compute),
            )
            if config.engine == "local"
            else vllm_engine(
                policy,
                loop.tokenizer,
                config.vllm,
                loop.accelerator,
                compute=loop.precision.compute,
                weights_dir=config.train.folder / "vllm_weights",
            )
        )
        collector = Collector(
            accelerator=loop.accelerator,
            engine=engine,
            environment=self._environment
            or SingleTurn(loop.tokenizer, tuple(getattr(engine, "stop_ids", ()))),
            rewards=self._rewards,
            sampling=config.sampling,
        )
        return RolloutBatches(
            config=config.rollout,
            algorithm=self.algorithm,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            prompts=train,
            curriculum=config.curriculum,
            collector=collector,
            policy=loop.policy,
            reference=loop.reference,
            plan=loop.forward_plan,
            held_out=held_out,
            evaluation=config.evaluation,
            folder=config.train.folder / "rollouts",
        )


def _digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits of all prompts and their rows, to know other data on resume."""
    content = hashlib.sha256()
    for prompt in prompts:
        row = {k: v for k, v in prompt.sample.items() if k != "_where"}
        content.update(repr((prompt.ids, sorted(row.items(), key=str))).encode())
    return content.hexdigest()[:16]


def _resolved(config: RLConfig, given: Algorithm | None) -> Algorithm:
    options = config.options
    if given is not None and options:
        raise ValueError(
            f"{', '.join(options)} beside an Algorithm would be ignored. Set them on it "
            "(dataclasses.replace)."
        )
    if given is not None and config.algorithm != RLConfig.algorithm:
        raise ValueError(
            f"The algorithm is given in Python, so --algorithm {config.algorithm} would be "
            "ignored. Change it there, or leave it out (`posttrain rl` takes --algorithm)."
        )
    algorithm = given if given is not None else resolve_algorithm(config.algorithm, options)
    if algorithm.loss_options.get("aggregation") == "constant" and not algorithm.loss_options.get(
        "constant"
    ):
        constant = float(config.sampling.max_tokens)
        algorithm = replace(
            algorithm, loss_options={**algorithm.loss_options, "constant": constant}
        )
    check_sampling(config)
    return algorithm


def check_sampling(config: RLConfig) -> None:
    """ValueError for settings of sampling and rewards that cannot train."""
    if config.engine == "vllm" and config.sampling.truncates and config.sampling.top_k == 0:
        raise ValueError(
            "With a vLLM server sampling.top_p and min_p need sampling.top_k: the tokens that they "
            "leave are read off the top_k likeliest. Set --sampling.top_k 50, or --engine local."
        )
    rewards = config.rewards
    formatted = any(
        "think_answer_format" in names for names in (rewards.functions, *rewards.by_task.values())
    )
    if (
        formatted
        and "<think>" in config.data.opening
        and not rewards.options.get("think_answer_format", {}).get("opened")
    ):
        raise ValueError(
            "data.opening opens <think> in the prompt, so completions have no opening tag and "
            "think_answer_format would give all of them 0. Set --rewards.options "
            "'{think_answer_format: {opened: true}}'."
        )
    if config.sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature is 0: all completions of a prompt would be the same. Use 1.0."
        )


def _reference(config: RLConfig, algorithm: Algorithm, loop: Loop) -> RunReference:
    settings = config.reference
    if algorithm.reference_every and not settings.sync_every:
        settings = replace(settings, sync_every=algorithm.reference_every, sync_mix=1.0)
    return run_reference(settings, loop)


def _probe_group(prompt: Prompt) -> PromptGroup:
    """Before anything is sampled, the self-check compares the second half of two prompts as if they
    were completions."""
    cut = max(1, len(prompt.ids) // 2)
    tail = prompt.ids[cut:] or prompt.ids[-1:]
    completions = [
        Completion(token_ids=tail, loss_mask=(1,) * len(tail)),
        Completion(token_ids=tail[:1], loss_mask=(1,)),
    ]
    return PromptGroup(prompt_ids=prompt.ids[:cut], completions=completions, pairs=())


def _every(data: RunData) -> list[Prompt]:
    return [*data.train, *(p for prompts in data.eval.values() for p in prompts)]


def check_prompt_budget(config: RLConfig, prompts: Sequence[Prompt]) -> None:
    longest = max(len(p.ids) for p in prompts) + config.sampling.max_tokens
    if longest - 1 > config.packing.max_tokens:
        raise ValueError(
            "One completion with its prompt must fit into packing.max_tokens; the longest may "
            f"have {longest} tokens (prompt and sampling.max_tokens), the budget is "
            f"{config.packing.max_tokens}. Raise --packing.max_tokens or lower "
            "--sampling.max_tokens."
        )
