"""docs/plan.svg: what `posttrain plan` shows for DPO of a Llama of 6.7 billion parameters on 64
GPUs.

python benchmarks/plan_picture.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from transformers import LlamaConfig

from posttrain.models.load import ModelConfig
from posttrain.packing.plan import PackingConfig
from posttrain.plan.job import job_of
from posttrain.plan.price import memory_plan
from posttrain.plan.report import show
from posttrain.precision import PRECISIONS
from posttrain.trainers.dpo import DPOConfig
from posttrain.training.reference import ReferenceConfig

ROOT = Path(__file__).parents[1]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        ).save_pretrained(folder)
        config = DPOConfig(
            model=ModelConfig(name=folder),
            packing=PackingConfig(max_tokens=8192),
            reference=ReferenceConfig(cache=True),
        )
        job = job_of(
            config, "dpo", precision=PRECISIONS["bf16"], device="cuda", wants_reference=True
        )
    console = Console(record=True, width=100)
    show(
        [memory_plan(job.sharded(kind, 64)) for kind in ("whole", "zero1", "zero2", "fsdp2")],
        80e9,
        console=console,
    )
    title = "posttrain plan dpo.yaml --devices 64 --device-memory 80GB"
    (ROOT / "docs" / "plan.svg").write_text(console.export_svg(title=title))
