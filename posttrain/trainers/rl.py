"""Reinforcement learning on verifiable or learned rewards: GRPO and its relatives, RLOO,
REINFORCE++, Kimi k1.5."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.data.prompts import Prompt, PromptConfig, load_prompts, prompts_from_rows
from posttrain.models.load import (
    ModelConfig,
    check_vocabulary,
    end_token_ids,
    load_model,
    load_tokenizer,
    save_model,
    set_dropout,
)
from posttrain.models.policy import Policy
from posttrain.models.reference import has_adapters
from posttrain.packing.plan import PackingConfig
from posttrain.plan.check import MemoryCheck
from posttrain.precision import torch_dtype
from posttrain.rewards.compose import Rewards, RewardsConfig, by_name
from posttrain.rl.algorithms import Algorithm, resolve_algorithm
from posttrain.rl.batches import RolloutBatches, RolloutConfig
from posttrain.rl.curriculum import CurriculumConfig, PromptSampler
from posttrain.rl.environment import Environment, SingleTurn
from posttrain.rl.evaluate import EvaluationConfig
from posttrain.rl.rollouts import Collector
from posttrain.rollout.engine import Engine, SamplingConfig, check_positions
from posttrain.rollout.handover import FolderHandover, Handover, NCCLHandover
from posttrain.rollout.local import LocalConfig, LocalEngine
from posttrain.rollout.receipt import probe_ids, probe_logps
from posttrain.rollout.vllm import Probe, VLLMConfig, VLLMEngine
from posttrain.trainers.base import report_end, run_reference
from posttrain.training.config import TrainConfig, to_dict
from posttrain.training.launch import make_accelerator
from posttrain.training.loop import Loop, TrainResult
from posttrain.training.optimizer import OptimizerConfig
from posttrain.training.reference import ReferenceConfig, RunReference
from posttrain.training.sharding import kind, shards_weights, unwrapped
from posttrain.types import Completion, PromptGroup

Rows = Sequence[Mapping[str, Any]]
RewardFunction = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Everything that decides a reinforcement-learning run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model, full or LoRA"""
    data: PromptConfig = field(default_factory=PromptConfig)
    """Prompts to sample from and to evaluate on"""
    algorithm: str = "grpo"
    """grpo, r1, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce_pp_baseline, k15, or the
    path of an Algorithm."""
    algorithm_options: dict[str, float | int | bool | str] = field(default_factory=dict)
    """Options of its advantages, its loss or itself, e.g. --algorithm_options.epsilon_high 0.28 or
    beta, tau, std."""
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
    packing: PackingConfig = field(default_factory=PackingConfig)
    """Micro-batches: memory and speed, never the gradient"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(name="rl"))
    """Length, cadence and place of the run; batch_size counts prompts per optimizer step"""


_LOOKED_AT = 1000

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


class RLTrainer:
    """``RLTrainer(model="smollm2-135m", train_dataset=rows, rewards={my_reward: 1.0},
    config=...).train()``.

    ``train_dataset``: rows with a prompt (or question, or messages) and what the rewards read.
    ``rewards``: functions ``(completion, sample) -> float | None`` with their weight, beside those
    of ``config.rewards``. ``algorithm`` goes before ``config.algorithm``. ``environment``: what
    answers the model; without it one turn.
    """

    def __init__(
        self,
        *,
        model: Any = None,
        tokenizer: Any = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | None = None,
        rewards: Mapping[RewardFunction, float] | None = None,
        algorithm: Algorithm | None = None,
        environment: Environment | None = None,
        config: RLConfig | None = None,
    ) -> None:
        config = config or RLConfig()
        if isinstance(model, str):
            config, model = replace(config, model=replace(config.model, name=model)), None
        if train_dataset is not None and config.data.train:
            raise ValueError(
                "RLTrainer would ignore something: data.train beside train_dataset. "
                "Give one of them."
            )
        if config.reference.cache:
            raise ValueError(
                "reference.cache holds log-probs of a fixed data set; rollouts are "
                "new in every step. Leave it off."
            )
        self.config = config
        self._model, self._tokenizer, self._environment = model, tokenizer, environment
        self._train_dataset, self._eval_dataset = train_dataset, eval_dataset
        self._rewards = Rewards(
            config.rewards,
            given=by_name(rewards or {}),
            correct_reward=config.evaluation.correct_reward,
        )
        self.algorithm = _resolved(config, algorithm)

    def train(self) -> TrainResult:
        """Runs to the end, or continues where the run folder's newest valid checkpoint stopped."""
        config = self.config
        accelerator, precision = make_accelerator(
            precision=config.train.precision,
            trackers=config.train.trackers,
            project_dir=config.train.folder,
        )
        if shards_weights(accelerator):
            raise ValueError(
                f"Completions are sampled from whole weights, but {kind(accelerator)} holds a part "
                "of them on each process. Launch with ZeRO-2 (launch/zero2.yaml), which shards "
                "only gradients and optimizer state, or with DDP and --model.lora.rank 16."
            )
        torch.manual_seed(config.train.seed)
        tokenizer = self._tokenizer or load_tokenizer(config.model)
        with accelerator.main_process_first():
            train, evaluation, counts = self._all_prompts(tokenizer)
        every = (*train, *(evaluation or ()))
        memory = MemoryCheck.start(
            config,
            "rl",
            accelerator,
            precision,
            model=self._model,
            wants_reference=self.algorithm.needs_reference,
            longest_prompt=max(len(p.ids) for p in every),
            reference_every=self.algorithm.reference_every,
        )
        with accelerator.main_process_first():
            model = self._model
            if model is None:
                model = load_model(
                    config.model, dtype=precision.load_dtype, compute=torch_dtype(precision.compute)
                )
        set_dropout(model, config.model, default=False)
        check_vocabulary(model, tokenizer)
        self._check_prompts(model, train, every)
        if accelerator.is_main_process:
            report_prompts(counts, every, self._rewards)
        loop = Loop(
            accelerator=accelerator,
            precision=precision,
            model=model,
            tokenizer=tokenizer,
            loss=self.algorithm.objective,
            batches=lambda _: [_probe_group(p) for p in train[:2]],
            num_steps=config.train.max_steps
            or config.train.num_steps(len(train)) * config.rollout.epochs,
            train=config.train,
            optimizer_config=config.optimizer,
            packing=config.packing,
            temperature=config.sampling.temperature,
            shown=SHOWN,
            settings=to_dict(config),
            data_counts=counts,
            identity={"algorithm": self.algorithm.name, "data": _digest(train)},
        )
        if self.algorithm.needs_reference:
            loop.reference = _reference(config, self.algorithm, loop)
        try:
            loop.prepare()
            result = loop.run(self._batches(loop, train, evaluation))
        finally:
            self._rewards.close()
        report_end(result, memory, accelerator)
        return result

    def _check_prompts(self, model: Any, train: Sequence[Prompt], every: Sequence[Prompt]) -> None:
        """Before the first rollout, not in the one that draws the longest prompt."""
        config = self.config
        room = max(config.sampling.max_tokens, config.evaluation.max_tokens or 0)
        check_positions(model.config, max(len(p.ids) for p in every) + room)
        for prompt in every:
            self._rewards.verifier(prompt.sample)
            if config.curriculum.order == "prioritized":
                self._rewards.needs_verifier(prompt.sample, "curriculum.order=prioritized")
        _check_budget(config, train)

    def _all_prompts(
        self, tokenizer: Any
    ) -> tuple[list[Prompt], list[Prompt] | None, dict[str, Any]]:
        """(prompts, held-out ones or None, counts)."""
        train, counts = self._prompts(self._train_dataset, self.config.data.train, tokenizer)
        held_out = self.config.data.eval or self._eval_dataset is not None
        return (
            train,
            self._prompts(self._eval_dataset, self.config.data.eval, tokenizer)[0]
            if held_out
            else None,
            counts,
        )

    def _prompts(
        self, rows: Rows | None, sources: Sequence[str], tokenizer: Any
    ) -> tuple[list[Prompt], dict[str, int]]:
        if rows is not None:
            return prompts_from_rows(rows, tokenizer, self.config.data)
        if not sources:
            raise ValueError(
                "There are no prompts. Set --data.train, or give RLTrainer a train_dataset."
            )
        return load_prompts(self.config.data, sources, tokenizer)

    def _batches(
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
                config,
                loop.accelerator,
                compute=loop.precision.compute,
            )
        )
        collector = Collector(
            accelerator=loop.accelerator,
            engine=engine,
            environment=self._environment
            or SingleTurn(loop.tokenizer, tuple(getattr(engine, "stop_ids", ()))),
            rewards=self._rewards,
            prompts=train,
            sampling=config.sampling,
            weights=policy.parameters,
        )
        return RolloutBatches(
            config=config.rollout,
            algorithm=self.algorithm,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            sampler=PromptSampler(
                config.curriculum, [p.sample for p in train], seed=config.train.seed
            ),
            collector=collector,
            policy=loop.policy,
            reference=loop.reference,
            plan=loop.forward_plan,
            held_out=held_out,
            evaluation=config.evaluation,
            folder=config.train.folder / "rollouts",
        )


def local_engine(
    policy: Policy, tokenizer: Any, config: LocalConfig, *, compute: torch.dtype
) -> Engine:
    """The engine in this process; ``compute``: the dtype of training's matrix products."""
    return LocalEngine(
        policy,
        compute=compute,
        stop_ids=end_token_ids(policy.base, tokenizer),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        config=config,
    )


def vllm_engine(
    policy: Policy, tokenizer: Any, config: RLConfig, accelerator: Any, *, compute: str
) -> Engine:
    """The engine of a running server, fed with the policy's weights."""
    ids = probe_ids(policy.config.get_text_config().vocab_size)

    def merged() -> Any:
        model: Any = policy.model
        return copy.deepcopy(model).merge_and_unload() if has_adapters(model) else model

    handover: Handover
    if config.vllm.handover == "nccl":
        host, _, port = config.vllm.nccl_address.rpartition(":")
        handover = NCCLHandover(
            url=config.vllm.url,
            address=host,
            port=int(port),
            timeout_s=config.vllm.timeout_s,
            model=merged,
        )
    else:
        folder = (
            Path(config.vllm.weights_dir)
            if config.vllm.weights_dir
            else config.train.folder / "vllm_weights"
        )
        handover = FolderHandover(folder, lambda to: save_model(merged(), tokenizer, to))
    return VLLMEngine(
        config.vllm,
        handover=handover,
        stop_ids=end_token_ids(policy.base, tokenizer),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        is_main=accelerator.is_main_process,
        barrier=accelerator.wait_for_everyone,
        probe=Probe(
            ids=ids,
            logps=lambda: probe_logps(policy.model, ids, compute=torch_dtype(compute)),
            dtype=compute,
        ),
    )


def report_prompts(counts: Mapping[str, Any], prompts: Sequence[Prompt], rewards: Rewards) -> None:
    """Prints how many prompts there are, which columns were read, and answers that no verifier can
    read (of 1,000 prompts)."""
    used, left = (
        ", ".join(counts["columns"].get(use, {})) or "none" for use in ("used", "for the rewards")
    )
    print(
        f"{counts['kept']:,} prompts ({counts['too long']:,} left out as too long); read: "
        f"{used}; for the rewards: {left}"
    )
    some = prompts[:: max(1, len(prompts) // _LOOKED_AT)][:_LOOKED_AT]
    for name, places in rewards.unreadable([p.sample for p in some]).items():
        if len(places) == len(some):
            raise ValueError(
                f"{name} can read the answer of no prompt, the first {places[0]}. Is "
                "the answer in another column?"
            )
        print(
            f"{name} cannot read the answers of {len(places):,} of {len(some):,} prompts, the "
            f"first {places[0]}. Their completions are unscored unless they say the very same."
        )


def _digest(prompts: Sequence[Prompt]) -> str:
    """16 hex digits of all prompts and their rows, to know other data on resume."""
    content = hashlib.sha256()
    for prompt in prompts:
        row = {k: v for k, v in prompt.sample.items() if k != "_where"}
        content.update(repr((prompt.ids, sorted(row.items(), key=str))).encode())
    return content.hexdigest()[:16]


def _resolved(config: RLConfig, given: Algorithm | None) -> Algorithm:
    options = dict(config.algorithm_options)
    if given is not None and options:
        raise ValueError(
            "algorithm_options beside an Algorithm would be ignored. Set them on it "
            "(dataclasses.replace)."
        )
    algorithm = given if given is not None else resolve_algorithm(config.algorithm, options)
    if algorithm.loss_options.get("aggregation") == "constant" and not algorithm.loss_options.get(
        "constant"
    ):
        constant = float(config.sampling.max_tokens)
        algorithm = replace(
            algorithm, loss_options={**algorithm.loss_options, "constant": constant}
        )
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
    return algorithm


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


def _check_budget(config: RLConfig, prompts: Sequence[Prompt]) -> None:
    longest = max(len(p.ids) for p in prompts) + config.sampling.max_tokens
    if longest - 1 > config.packing.max_tokens:
        raise ValueError(
            "One completion with its prompt must fit into packing.max_tokens; the longest may "
            f"have {longest} tokens (prompt and sampling.max_tokens), the budget is "
            f"{config.packing.max_tokens}. Raise --packing.max_tokens or lower "
            "--sampling.max_tokens."
        )
