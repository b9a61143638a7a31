"""Memory known before the run: the plan against live storages and resident memory of a real run.

    python benchmarks/memory_accuracy.py   # the grid, about 15 minutes on one core; resumes where
                                           # it stopped
    python benchmarks/memory_accuracy.py --only gemma2 --table

A case is one process: a model with random weights is loaded as a run loads it and trained for three
steps of two full rows through the real loop, checkpoint and final model included. `live` is the
most bytes of tensor storages alive at once in its steps (every operator is watched), `resident` the
peak resident set of the whole process (VmHWM). Predicted: `traced`, states and the trace of the
step on fake tensors; `planned`, the same with libraries and the allocator's factor.

    python benchmarks/memory_accuracy.py --further   # adapters, experts and others
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import spawn, status_bytes

if TYPE_CHECKING:
    from posttrain.plan.job import Job

FAMILIES = ("smollm2", "qwen3", "gemma2", "gpt2")
METHODS = ("sft", "dpo", "reward", "rl")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    family: str
    method: str
    tokens: int
    checkpointing: bool
    precision: str
    optimizer: str = "adamw"
    lora: int = 0
    """Rank of adapters; below 0 around weights in 4 bit."""
    watched: bool = True
    """Every operator, for ``live``; steps are not timed then."""
    completion: int = 0
    """Tokens of an RL completion; 0: eight fill a row."""

    @property
    def completion_tokens(self) -> int:
        return self.completion or -(-self.tokens // 8)


def grid() -> list[Case]:
    """Every family with every method; precision, checkpointing and length alternate. Then
    SmolLM2-135M as it is."""
    cases = []
    for i, family in enumerate(FAMILIES):
        for j, method in enumerate(METHODS):
            cases.append(
                Case(
                    family=family,
                    method=method,
                    tokens=(512, 1024, 2048)[(i + 2 * j) % 3],
                    checkpointing=(i + j // 2) % 2 == 1,
                    precision=("fp32", "bf16")[(i + j) % 2],
                )
            )
    small = [
        Case(family="smollm2-135m", method="sft", tokens=512, checkpointing=False, precision="bf16")
    ]
    return [
        *cases,
        *small,
        Case(family="smollm2-135m", method="dpo", tokens=512, checkpointing=True, precision="fp32"),
    ]


def further() -> list[Case]:
    """Adapters, 4 bit, experts, bfloat16 weights, dropout, a longer row, larger models."""
    return _cases(
        ("smollm2", "sft", 1024, False, "bf16", 16),
        ("gemma2", "sft", 2048, True, "fp32", 16),
        ("smollm2", "sft", 1024, False, "bf16", -16),
        ("qwen3_moe", "sft", 1024, False, "bf16", 0),
        ("qwen3_moe", "dpo", 512, True, "fp32", 0),
        ("gemma2", "sft", 1024, False, "bf16-pure", 0),
        ("gpt2-dropout", "sft", 1024, False, "bf16", 0),
        ("smollm2", "sft", 4096, True, "bf16", 0),
        ("smollm2-135m", "rl", 1024, False, "fp32", 0),
        ("smollm2-360m", "sft", 512, False, "bf16", 0),
    )


def _cases(*rows: tuple[str, str, int, bool, str, int]) -> list[Case]:
    return [
        Case(family=f, method=m, tokens=t, checkpointing=c, precision=p, lora=r, optimizer="adamw")
        for f, m, t, c, p, r in rows
    ]


def config_of(family: str) -> Any:
    """20 to 40 million parameters in the shape of the family; SmolLM2-135M as it is."""
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

    common: dict[str, Any] = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    if family == "smollm2-135m":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **common,
        )
    if family == "smollm2-360m":
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=960,
            intermediate_size=2560,
            num_hidden_layers=32,
            num_attention_heads=15,
            num_key_value_heads=5,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            **common,
        )
    if family.startswith("gpt2"):
        dropout = 0.1 if family == "gpt2-dropout" else 0.0
        return GPT2Config(
            vocab_size=50257,
            n_positions=4096,
            n_embd=384,
            n_layer=6,
            n_head=6,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            **common,
        )
    sizes: dict[str, Any] = dict(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        **common,
    )
    if family == "qwen3":
        return Qwen3Config(
            **{**sizes, "vocab_size": 50000, "head_dim": 128}, tie_word_embeddings=True
        )
    if family == "qwen3_moe":
        return Qwen3MoeConfig(
            **sizes,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=352,
            tie_word_embeddings=True,
        )
    if family == "gemma2":
        return Gemma2Config(
            **{**sizes, "vocab_size": 64000, "hidden_size": 384},
            sliding_window=256,
            query_pre_attn_scalar=64,
        )
    return LlamaConfig(**sizes, tie_word_embeddings=False)


class NoTokenizer:
    """The models have none; what loop and reward model ask of it."""

    chat_template = eos_token_id = None
    pad_token_id, unk_token_id = 3, None

    def convert_tokens_to_ids(self, token: str) -> int:
        return 3

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer_config.json").write_text("{}")


def run_case(case: Case) -> dict[str, Any]:
    """In a process of its own: three steps of the real loop, and what they held."""
    import datasets
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from posttrain.losses import policy, preference, reward, sft
    from posttrain.models.heads import Scorer
    from posttrain.packing.plan import PackingConfig
    from posttrain.plan.trace import LiveStorages, worst_case
    from posttrain.training.config import TrainConfig
    from posttrain.training.launch import make_accelerator
    from posttrain.training.loop import Loop
    from posttrain.training.optimizer import OptimizerConfig
    from posttrain.training.reference import ReferenceConfig, RunReference
    from posttrain.training.sharding import base_optimizer

    live, peaks, seconds = LiveStorages(), [], []

    class WatchedLoop(Loop):
        def _step(self, step: int) -> dict[str, Any]:
            live.mark("step", step)
            began = time.perf_counter()
            values = super()._step(step)
            seconds.append(time.perf_counter() - began)
            peaks.append((live.peak_bytes, status_bytes("VmHWM")))
            return values

    losses = {
        "sft": sft.sft,
        "dpo": preference.dpo,
        "reward": reward.bradley_terry,
        "rl": policy.clipped,
    }
    with tempfile.TemporaryDirectory() as folder:
        model_folder = Path(folder) / "model"
        command = [sys.executable, "-c", WRITE_MODEL, case.family, str(model_folder)]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent)
        accelerator, plan = make_accelerator(precision=case.precision, project_dir=Path(folder))
        assert all(
            (datasets, peft, AutoModelForCausalLM, AutoModelForSequenceClassification)
        )  # what every run imports
        libraries, began = status_bytes("VmRSS"), time.perf_counter()
        with live if case.watched else nullcontext():
            model, is_reward = load(case, model_folder, plan.load_dtype), case.method == "reward"
            completions = {"sft": 1, "dpo": 2, "reward": 2}.get(case.method)
            groups = worst_case(
                case.method,
                case.tokens,
                completions=completions or -(-case.tokens // case.completion_tokens),
                rows=2,
            )
            loop = WatchedLoop(
                accelerator=accelerator,
                precision=plan,
                model=model,
                tokenizer=NoTokenizer(),
                loss=losses[case.method],
                batches=lambda _: groups,
                num_steps=3,
                packing=PackingConfig(max_tokens=case.tokens),
                train=TrainConfig(run_dir=folder, max_steps=3, self_check=not is_reward),
                optimizer_config=OptimizerConfig(name=case.optimizer),
            )
            if is_reward:
                loop.policy_class = Scorer
            if case.method == "dpo":
                loop.reference = RunReference(ReferenceConfig(), precision=plan)
            loop.run()
    moments = sum(
        v.untyped_storage().nbytes() for v in tensors(base_optimizer(loop.optimizer).state)
    )
    return {
        "moments": moments,
        "live": max(p for p, _ in peaks),
        "resident": status_bytes("VmHWM"),
        "resident_steps": peaks[-1][1],
        "libraries": libraries,
        "seconds": time.perf_counter() - began,
        "step_s": statistics.median(seconds[1:]),
    }


def load(case: Case, folder: Path, dtype: Any) -> Any:
    """As a run loads it."""
    from posttrain.models.heads import load_reward_model
    from posttrain.models.load import load_model
    from posttrain.precision import PRECISIONS, torch_dtype

    config, compute = (
        settings_of(case, str(folder)).model,
        torch_dtype(PRECISIONS[case.precision].compute),
    )
    if case.method == "reward":
        return load_reward_model(config, NoTokenizer(), dtype=dtype, compute=compute)
    return load_model(config, dtype=dtype, compute=compute)


def tensors(state: Any) -> list[Any]:
    """Of an optimizer, each storage once."""
    found = {
        v.untyped_storage().data_ptr(): v
        for one in state.values()
        for v in one.values()
        if hasattr(v, "untyped_storage")
    }
    return list(found.values())


WRITE_MODEL = "import sys; from memory_accuracy import write_model; write_model(*sys.argv[1:])"


def write_model(family: str, folder: str) -> None:
    """Random weights, as a folder that ``load_model`` reads."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(folder)


def settings_of(case: Case, folder: str) -> Any:
    """The settings of a run like it; a server samples for RL, so that the rows are those of the
    update alone."""
    from posttrain import LoraConfig, ModelConfig, OptimizerConfig, PackingConfig
    from posttrain.rollout.engine import SamplingConfig
    from posttrain.trainers.dpo import DPOConfig
    from posttrain.trainers.reward import RewardConfig
    from posttrain.trainers.rl import RLConfig
    from posttrain.trainers.sft import SFTConfig

    lora = LoraConfig(rank=abs(case.lora), quantize_4bit=case.lora < 0)
    common: dict[str, Any] = dict(
        model=ModelConfig(name=folder, gradient_checkpointing=case.checkpointing, lora=lora),
        packing=PackingConfig(max_tokens=case.tokens),
        optimizer=OptimizerConfig(name=case.optimizer),
    )
    if case.method == "rl":
        return RLConfig(
            **common, engine="vllm", sampling=SamplingConfig(max_tokens=case.completion_tokens)
        )
    return {"sft": SFTConfig, "dpo": DPOConfig, "reward": RewardConfig}[case.method](**common)


def job_of(case: Case) -> Job:
    """The planner's view of a case, from its settings and the model's config.json."""
    from posttrain.plan.job import job_of
    from posttrain.precision import PRECISIONS

    with tempfile.TemporaryDirectory() as folder:
        config_of(case.family).save_pretrained(folder)
        job = job_of(
            settings_of(case, folder),
            case.method,
            precision=PRECISIONS[case.precision],
            device="cpu",
            wants_reference=case.method == "dpo",
        )
    return replace(job, merges_adapters=False)


def planned(case: Case) -> dict[str, int]:
    """The trace with the states, alone and with libraries and allocator."""
    from posttrain.plan.price import memory_plan

    plan = memory_plan(job_of(case))
    return {"traced": plan.live_bytes, "planned": plan.peak_bytes}


def error(predicted: int | None, measured: int) -> str:
    """Signed, in percent of what was measured."""
    return "" if predicted is None else f"{100 * (predicted / measured - 1):+.1f}"


def factor(row: dict[str, Any]) -> float:
    """What ``ALLOCATOR_FACTOR`` would have to be for this row."""
    from posttrain.plan.price import LIBRARIES_BYTES

    return (row["resident"] - LIBRARIES_BYTES["cpu"]) / row["live"]


def adapters(row: dict[str, Any]) -> str:
    """Said beside the family."""
    rank = row.get("lora", 0)
    return "" if rank == 0 else ", LoRA" if rank > 0 else ", QLoRA"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; MB are 1e6 bytes, errors in percent."""
    lines = [
        "| family | method | tokens | checkpointing | precision | live MB | traced % | resident MB "
        "| planned % | (resident - libraries) / live |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['family']}{adapters(r)} | {r['method']} | {r['tokens']} | "
            f"{'yes' if r['checkpointing'] else 'no'} | {r['precision']} | {r['live'] / 1e6:.0f} | "
            f"{error(r['traced'], r['live'])} | {r['resident'] / 1e6:.0f} | "
            f"{error(r['planned'], r['resident'])} | {factor(r):.2f} |"
        )
    return "\n".join(lines)


def case_of(row: dict[str, Any]) -> Case:
    """Of a line of results."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__ if name in row})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        default="runs/memory_accuracy.jsonl",
        help="one line per finished case; these are not run again",
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument(
        "--table", action="store_true", help="print the table of what is there, run nothing"
    )
    parser.add_argument(
        "--further",
        action="store_true",
        help="ten cases with adapters, experts, dropout and others",
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(Case(**json.loads(args.case)))))
        return
    results = Path(args.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    )
    done = {json.dumps(asdict(case_of(r))) for r in rows}
    for case in [] if args.table else further() if args.further else grid():
        key = json.dumps(asdict(case))
        if key in done or args.only not in key:
            continue
        row = {**asdict(case), **planned(case), **spawn(__file__, ["--case", key])}
        rows.append(row)
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]).splitlines()[-1], f"{row['seconds']:.0f} s", flush=True)
    shown = [r for r in rows if args.only in json.dumps(r)]
    print(table([r | planned(case_of(r)) for r in shown]))


if __name__ == "__main__":
    main()
