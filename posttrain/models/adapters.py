"""Low-rank adapters (LoRA, QLoRA) through peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from posttrain.resolve import settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


@settings
class LoraConfig:
    """Low-rank adapters: W + (alpha / rank) * B A, only A and B are trained. Hu et al. 2021,
    arXiv:2106.09685."""

    rank: int = 0
    """Rank of the update; 0 trains the whole model instead."""
    alpha: float | None = None
    """Numerator of the scale alpha / rank; None: 2 * rank."""
    dropout: float = 0.0
    """Probability of dropping an adapter input, in [0, 1). Above 0 it stops prompts from being
    shared."""
    target_modules: list[str] | None = None
    """Last parts of the names of the modules that get an adapter; None: every linear layer except
    the LM head."""
    quantize_4bit: bool = False
    """QLoRA: keep the frozen weights in 4-bit NF4 (bitsandbytes). Dettmers et al. 2023,
    arXiv:2305.14314."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be >= 0 (0: no adapters); got {self.rank}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is a probability in [0, 1); got {self.dropout}.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(
                f"lora.alpha must be > 0; got {self.alpha}. Leave it out for 2 * rank."
            )
        if self.target_modules == []:
            raise ValueError("lora.target_modules is empty. Leave it out for every linear layer.")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if self.rank == 0 and given:
            raise ValueError(
                f"{', '.join(f'lora.{name}' for name in given)} would have no effect: lora.rank is "
                "0, so there are no adapters. Set --model.lora.rank 16, or leave these options out."
            )


def nf4(compute: torch.dtype) -> Any:
    """QLoRA's quantisation of the frozen weights, whose products are in ``compute``; ValueError
    without bitsandbytes."""
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "lora.quantize_4bit needs bitsandbytes. Run: pip install 'posttrain[qlora]', or leave "
            "it out."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def with_4bit_layers(model: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """A model on the meta device with the layers in 4 bit that ``from_pretrained`` would make."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    replace_with_bnb_linear(model, get_keys_to_not_convert(model), nf4(compute))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what peft asks before it prepares the rest
    return model


def _keep_4bit_layers_differentiable(model: PreTrainedModel) -> None:
    """Turn off the repacking that bitsandbytes does on CPUs with avx512_bf16 at the first forward
    in eval mode.

    Training does not undo it, and the kernel for repacked weights has no backward: after one
    evaluation, the layers below would silently get no gradient.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


@contextmanager
def products_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, 4-bit layers multiply in float32; afterwards in the dtype that they were loaded
    with."""
    import torch

    own: dict[Any, Any] = {
        m: m.compute_dtype
        for m in model.modules()
        if type(m).__module__ == "bitsandbytes.nn.modules" and hasattr(m, "compute_dtype")
    }
    try:
        for layer in own:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in own.items():
            layer.compute_dtype = dtype


def add_adapters(
    model: PreTrainedModel, lora: LoraConfig, *, base: str, revision: str | None, scores: bool
) -> PeftModel:
    """LoRA around the model. ``base`` is recorded as where the base can be loaded from.
    ``scores``: a reward model, whose head is trained whole and saved with the adapters."""
    import peft

    if lora.quantize_4bit:
        _keep_4bit_layers_differentiable(model)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    adapters: Any = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        task_type=peft.TaskType.SEQ_CLS if scores else peft.TaskType.CAUSAL_LM,
        modules_to_save=["score"] if scores else None,
        revision=revision,
    )
    wrapped = peft.get_peft_model(model, adapters)
    adapters.base_model_name_or_path = base
    return wrapped


def with_adapters(model: Any, peft_config: Any, *, base: str) -> PeftModel:
    """A loaded model with the adapters of a config of peft's own (DoRA, rsLoRA, trained modules,
    ...). ValueError for those that add tokens to the prompt, and for a model that has adapters."""
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("The model has adapters already; give peft_config or such a model.")
    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(
            "peft_config is a config of peft, such as peft.LoraConfig(r=16); got a "
            f"{type(peft_config).__name__}. Settings of model.lora go into config.model.lora."
        )
    if isinstance(peft_config, peft.PromptLearningConfig):
        raise ValueError(
            f"{type(peft_config).__name__} adds tokens to every prompt, which packed rows do not "
            "have. Use peft.LoraConfig."
        )
    wrapped = peft.get_peft_model(model, peft_config)
    peft_config.base_model_name_or_path = base
    return wrapped
