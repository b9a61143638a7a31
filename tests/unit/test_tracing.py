"""What a plan says an update holds is what the real step of a real loop holds, to the byte."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from posttrain.losses.distillation import TeacherDivergence, distillation
from posttrain.losses.policy import clipped
from posttrain.losses.preference import dpo
from posttrain.losses.reward import bradley_terry
from posttrain.losses.sft import sft
from posttrain.models.adapters import LoraConfig
from posttrain.models.heads import Scorer
from posttrain.models.load import ModelConfig, set_dropout, untrained_model
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig
from posttrain.plan.job import Job
from posttrain.plan.price import memory_plan
from posttrain.plan.states import parameters_of
from posttrain.plan.trace import LiveStorages, worst_case
from posttrain.precision import PRECISIONS, torch_dtype
from posttrain.trainers.distill import _frozen_forward
from posttrain.training.config import TrainConfig
from posttrain.training.launch import make_accelerator
from posttrain.training.loop import Loop
from posttrain.training.optimizer import OptimizerConfig
from posttrain.training.reference import ReferenceConfig, RunReference

LOSSES = {"sft": sft, "reward": bradley_terry, "dpo": dpo, "rl": clipped}
TOKENS = 96
PACKING = PackingConfig(max_tokens=TOKENS, logits_chunk=32)


def llama(**overrides):
    from transformers import LlamaConfig

    settings = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaConfig(**{**settings, **overrides})


def others(name):
    from transformers import Gemma2Config, GPT2Config, Qwen3Config, Qwen3MoeConfig

    if name == "gpt2":
        return GPT2Config(
            vocab_size=97,
            n_positions=256,
            n_embd=32,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    if name == "qwen3_moe":
        return Qwen3MoeConfig(
            **sizes,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            decoder_sparse_step=1,
        )
    return Gemma2Config(**sizes, sliding_window=32) if name == "gemma2" else Qwen3Config(**sizes)


@pytest.fixture(autouse=True)
def other_precisions():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module", autouse=True)
def libraries_have_made_their_own_tensors(tmp_path_factory):
    """At the first run of a process, for good: they are in no plan."""
    measured(tmp_path_factory.mktemp("first"), llama(), "sft", "fp32")


class NoTokenizer:
    chat_template = eos_token_id = None

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer_config.json").write_text("{}")


class MeasuredLoop(Loop):
    """Peak of live storages of the last step, when the moments exist."""

    def step(self, step):
        self.live.mark("step", step)
        return super().step(step)


COMPLETIONS = {"sft": 1, "reward": 2, "dpo": 2, "rl": 8}


def build(config, method, precision, lora, checkpointing):
    settings = ModelConfig(lora=lora or LoraConfig(), gradient_checkpointing=checkpointing)
    model = untrained_model(
        config,
        settings,
        dtype=precision.load_dtype,
        compute=torch_dtype(precision.compute),
        scores=method == "reward",
    )
    set_dropout(model, settings, default=method == "sft")
    return model


def planned(config, method, precision, *, lora=None, checkpointing=False, teacher=None):
    plan = PRECISIONS[precision]
    with torch.device("meta"):
        model = build(config, method, plan, lora, checkpointing)
        teachers = () if teacher is None else (build(teacher, "rl", plan, None, False),)
    parameters = tuple(parameters_of(model))
    reference = parameters if method == "dpo" and lora is None else ()
    for other in teachers:
        reference += tuple(parameters_of(other))
    job = Job(
        method=method,
        model=model,
        parameters=parameters,
        precision=plan,
        packing=PACKING,
        completions=COMPLETIONS[method],
        checkpointing=checkpointing,
        reference=reference,
        teachers=teachers,
    )
    return memory_plan(job).live_bytes


def measured(tmp_path, config, method, precision, *, lora=None, checkpointing=False, loss=None):
    """Through the real loop: accelerate's wrappers, the real reference, two steps of two rows."""
    accelerator, plan = make_accelerator(precision=precision, project_dir=tmp_path)
    live = LiveStorages()
    with live:
        torch.manual_seed(0)
        groups = worst_case(method, TOKENS, completions=COMPLETIONS[method], rows=2)
        loop = MeasuredLoop(
            accelerator=accelerator,
            precision=plan,
            model=build(config, method, plan, lora, checkpointing),
            tokenizer=NoTokenizer(),
            loss=loss or LOSSES[method],
            batches=lambda _: groups,
            num_steps=2,
            train=TrainConfig(run_dir=str(tmp_path), max_steps=2, self_check=False),
            optimizer_config=OptimizerConfig(),
            packing=PACKING,
            policy_class=Scorer if method == "reward" else Policy,
        )
        loop.live = live
        if method == "dpo":
            loop.reference = RunReference(ReferenceConfig(), precision=plan)
        loop.run()
    return live.peak_bytes


def left_out(config, method, precision, *, lora=None):
    """Bytes that a plan does not count: of the row before, which the step keeps for its messages,
    ids, positions and a sum in float32 for each completion; buffers (rotary frequencies) of the
    model, and of a reference that is another one."""
    groups = worst_case(method, TOKENS, completions=COMPLETIONS[method])
    completions = tuple(range(len(groups[0].completions)))
    row = vars(pack(groups, [GroupPart(group=0, completions=completions)], mode="shared"))
    tensors = [*row.values(), *row["columns_S"].values(), *row["columns_T"].values()]
    kept = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)) + 4 * len(completions)
    with torch.device("meta"):
        model = build(config, method, PRECISIONS[precision], lora, False)
    models = 2 if method == "dpo" and lora is None else 1
    return kept + models * sum(b.nbytes for b in model.buffers())


CASES = [
    *[
        (llama(), method, precision, None, False)
        for method, precision in itertools.product(LOSSES, ("fp32", "bf16"))
    ],
    *[(llama(), method, "fp32", None, True) for method in LOSSES],
    (llama(), "sft", "bf16", None, True),
    (llama(tie_word_embeddings=True), "sft", "bf16", None, False),
    (llama(tie_word_embeddings=True), "dpo", "bf16", None, False),
    *[(llama(), method, "fp32", LoraConfig(rank=4), True) for method in ("sft", "dpo", "reward")],
    (llama(), "rl", "bf16", LoraConfig(rank=4), False),
    (llama(), "sft", "bf16-pure", None, False),
    *[(others(name), "dpo", "fp32", None, False) for name in ("gpt2", "gemma2", "qwen3")],
    *[
        (others("qwen3_moe"), method, "bf16-pure", None, method == "dpo")
        for method in ("sft", "dpo")
    ],
    *[(others("qwen3_moe"), "sft", precision, None, False) for precision in ("fp32", "bf16")],
]


@pytest.mark.parametrize(
    ("config", "method", "precision", "lora", "checkpointing"),
    CASES,
    ids=lambda v: (
        getattr(v, "model_type", None) or ("lora" if isinstance(v, LoraConfig) else str(v))
    ),
)
def test_planned_is_what_the_real_loop_holds(
    tmp_path, config, method, precision, lora, checkpointing
):
    found = measured(tmp_path, config, method, precision, lora=lora, checkpointing=checkpointing)
    plan = planned(config, method, precision, lora=lora, checkpointing=checkpointing)
    assert found - plan == left_out(config, method, precision, lora=lora)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_planned_is_what_a_distillation_holds(tmp_path, precision):
    """A teacher of another shape: its weights, and the logits of both."""
    config, teacher = llama(), llama(hidden_size=48, intermediate_size=64, num_hidden_layers=6)
    with torch.device("meta"):
        buffers = build(teacher, "rl", PRECISIONS[precision], None, False).buffers()
    build(teacher, "rl", PRECISIONS["fp32"], None, False).save_pretrained(tmp_path / "teacher")
    output = TeacherDivergence("teacher", _frozen_forward(str(tmp_path / "teacher")))
    loss = distillation([(1.0, output)])
    found = measured(tmp_path / "run", config, "rl", precision, loss=loss)
    plan = planned(config, "rl", precision, teacher=teacher)
    left = left_out(config, "rl", precision) + sum(b.nbytes for b in buffers)
    assert found - plan == left


def test_the_peak_is_that_of_torchs_own_tracker():
    """Both count the same step on fake tensors (a tracker that agrees with a tracker; the test
    above has the real loop)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import LlamaForCausalLM

    with FakeTensorMode():
        model = LlamaForCausalLM(llama())
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.zeros(2, 64, dtype=torch.long)

        def step():
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()  # makes the moments
        theirs = MemTracker()
        theirs.track_external(model, optimizer, ids)
        with theirs:
            step()
        live = LiveStorages()
        live.watch(model)
        for value in (v for state in optimizer.state.values() for v in state.values()):
            live.own(value, "weights")
        live.own(ids, "activations")
        with live:
            step()
    assert live.peak_bytes == sum(
        device["Total"] for device in theirs.get_tracker_snapshot("peak").values()
    )
