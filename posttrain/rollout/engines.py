"""The engines with what they need of a policy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from posttrain.models.load import end_token_ids, save_model
from posttrain.models.policy import Policy
from posttrain.models.reference import has_adapters
from posttrain.precision import torch_dtype
from posttrain.rollout.engine import Engine
from posttrain.rollout.handover import FolderHandover, Handover, NCCLHandover
from posttrain.rollout.local import LocalConfig, LocalEngine
from posttrain.rollout.receipt import probe_ids, probe_logps
from posttrain.rollout.vllm import Probe, VLLMConfig, VLLMEngine


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
    policy: Policy,
    tokenizer: Any,
    config: VLLMConfig,
    accelerator: Any,
    *,
    compute: str,
    weights_dir: Path,
) -> Engine:
    """The engine of a running server, fed with the policy's weights. ``weights_dir``: for
    ``handover: folder``, where ``config`` names none."""
    ids = probe_ids(policy.config.get_text_config().vocab_size)

    def merged() -> Any:
        model: Any = policy.model
        return copy.deepcopy(model).merge_and_unload() if has_adapters(model) else model

    handover: Handover
    if config.handover == "nccl":
        host, _, port = config.nccl_address.rpartition(":")
        handover = NCCLHandover(
            url=config.url, address=host, port=int(port), timeout_s=config.timeout_s, model=merged
        )
    else:
        folder = Path(config.weights_dir) if config.weights_dir else weights_dir
        handover = FolderHandover(folder, lambda to: save_model(merged(), tokenizer, to))
    return VLLMEngine(
        config,
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
