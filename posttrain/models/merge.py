"""Adapters into a plain model: W' = W + (alpha / rank) * B A, written once, so that inference needs
no peft. Several models into their weighted average."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.files import refuse_filled, whole_folder
from posttrain.models.heads import load_reward_model
from posttrain.models.load import (
    ModelConfig,
    load_model,
    load_tokenizer,
    read_config,
    save_model,
    trained_source,
)
from posttrain.precision import default_precision, torch_dtype

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MERGE_DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def merge_adapter(
    adapter_folder: str | Path, *, out: str | Path, base: str | None = None, dtype: str = "auto"
) -> Path:
    """Merge a LoRA adapter into its base; ``out`` loads with
    ``AutoModelForCausalLM.from_pretrained`` alone (``AutoModelForSequenceClassification`` for a
    reward model).

    The sum is computed in float32 and rounded once, to ``dtype``; ``auto`` is the dtype of the
    base's checkpoint. ``base`` replaces the name that the adapter recorded (needed when that folder
    has moved). Adapters of QLoRA are merged into the unquantised base. An adapter on one side of a
    tied embedding unties it: the two sides then differ.

    ``out`` appears whole or not at all. Raises ValueError or FileNotFoundError if it is no adapter,
    its weights are pickle only, its base is unknown, or ``out`` exists and is not empty.
    """
    if dtype not in MERGE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(MERGE_DTYPES)}; got {dtype!r}.")
    adapter = Path(adapter_folder).expanduser()
    target = Path(out).expanduser()
    recorded = _read_adapter_config(adapter)
    refuse_filled(target)
    name = base or recorded.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{adapter} does not name the model it was trained on. Give --base.")
    revision = None if base else recorded.get("revision")
    config = ModelConfig(name=name, revision=revision, train_without_router_loss=True)
    model, tokenizer = _load_with_adapter(adapter, config, task_type=recorded.get("task_type"))
    merged = _merge(model, _resolve_dtype(dtype, config))
    with whole_folder(target) as folder:
        save_model(merged, tokenizer, folder)
    logger.info("Merged %s into %s: %s", adapter, name, target)
    return target


def average_models(
    names: Sequence[str], *, out: str | Path, weights: Sequence[float] = (), dtype: str = "auto"
) -> Path:
    """W = sum_i w_i W_i / sum_i w_i, in float32, rounded once to ``dtype`` (auto: the first
    model's). Equal weights without ``weights``.

    Kimi k1.5, arXiv:2501.12599 section 2.4 (long2short by averaging a long and a short model);
    Wortsman et al. 2022, arXiv:2203.05482. The tokenizer is the first model's. Raises ValueError
    for models whose parameters have other names or shapes, or other tokens.
    """
    import torch

    weights = [float(w) for w in weights] or [1.0] * len(names)
    if len(weights) != len(names) or sum(weights) <= 0:
        raise ValueError(
            f"--weights has one number for each model, with a sum > 0; got {list(weights)} for "
            f"{len(names)} models."
        )
    target = Path(out).expanduser()
    refuse_filled(target)
    shares = [w / sum(weights) for w in weights]
    model, tokenizer = _load_plain(names[0])
    total = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in total.values():
            parameter.mul_(shares[0])
        for name, share in zip(names[1:], shares[1:], strict=True):
            other, its_tokenizer = _load_plain(name)
            found = dict(other.named_parameters())
            if difference := _unlike(total, found):
                raise ValueError(f"{names[0]} and {name} cannot be averaged: {difference}.")
            if tokenizer.get_vocab() != its_tokenizer.get_vocab():
                raise ValueError(
                    f"{names[0]} and {name} have different tokens: a row of the embedding would be "
                    "the mean of two different ones."
                )
            for key, parameter in found.items():
                total[key].add_(parameter, alpha=share)
    source = ModelConfig(name=_plain_source(names[0]))
    with whole_folder(target) as folder:
        save_model(model.to(_resolve_dtype(dtype, source)), tokenizer, folder)
    return target


def _load_plain(name: str) -> tuple[Any, Any]:
    """In float32, adapters merged."""
    import torch
    from peft import PeftModel

    model, tokenizer = load_to_answer(name, dtype=torch.float32)
    return _merge(model, torch.float32) if isinstance(model, PeftModel) else model, tokenizer


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The first parameter that the two do not have alike; empty where there is none."""
    for key in [*first, *second]:
        shapes = [tuple(m[key].shape) if key in m else "missing" for m in (first, second)]
        if shapes[0] != shapes[1]:
            return f"{key} is {shapes[0]} and {shapes[1]}"
    return ""


def _plain_source(name: str) -> str:
    """Where the weights lie whose dtype an average has: a run's final model, an adapter's base."""
    source = trained_source(name)
    if (Path(source) / "adapter_config.json").is_file():
        return str(_read_adapter_config(Path(source))["base_model_name_or_path"])
    return source


def load_here(name: str) -> tuple[Any, PreTrainedTokenizerBase, torch.device]:
    """(a model that answers, in the precision of this process's device and on it; its tokenizer;
    the device)."""
    from accelerate import PartialState

    device = PartialState().device
    dtype = torch_dtype(default_precision(device.type).compute)
    model, tokenizer = load_to_answer(name, dtype=dtype)
    return model.to(device), tokenizer, device  # type: ignore[arg-type]


def load_to_answer(
    name: str, *, dtype: torch.dtype
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a run folder (its ``final/``), an adapter folder (on the base that
    it recorded) or anything ``load_model`` takes, in evaluation mode.

    Raises as ``load_model`` does, and ValueError for a run without a final model or a reward model.
    """
    source = trained_source(name)
    folder = Path(source)
    if (folder / "checkpoints").is_dir() or (folder / "optimizer.json").is_file():
        raise ValueError(
            f"{folder} is of a run that is not finished: a checkpoint holds the state of training, "
            "not a model. Start the run's command again; it ends with a model in final/."
        )
    if not (folder / "adapter_config.json").is_file():
        config = ModelConfig(name=source, train_without_router_loss=True)
        return load_model(config, dtype=dtype).eval(), load_tokenizer(config)
    recorded = _read_adapter_config(folder)
    if recorded.get("task_type") == "SEQ_CLS":
        raise ValueError(f"{folder} is a reward model: it gives scores and writes no text.")
    config = ModelConfig(
        name=recorded["base_model_name_or_path"],
        revision=recorded.get("revision"),
        train_without_router_loss=True,
    )
    model, tokenizer = _load_with_adapter(folder, config, task_type=recorded.get("task_type"))
    return model.to(dtype), tokenizer


def _read_adapter_config(adapter: Path) -> dict[str, Any]:
    if not adapter.is_dir():
        raise FileNotFoundError(f"Adapter folder {adapter} does not exist.")
    path = adapter / "adapter_config.json"
    if not path.is_file():
        is_model = (adapter / "config.json").is_file()
        hint = " It looks like a plain model already." if is_model else ""
        raise FileNotFoundError(
            f"{adapter} has no adapter_config.json, so it is not an adapter folder.{hint}"
        )
    recorded = json.loads(path.read_text(encoding="utf-8"))
    kind = recorded.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{adapter} is a {kind} adapter; only LORA is merged here.")
    if not (adapter / _WEIGHTS).is_file():
        found = "pickle only" if (adapter / "adapter_model.bin").is_file() else "missing"
        raise ValueError(
            f"The weights of adapter {adapter} are {found}; {_WEIGHTS} is wanted, because "
            "unpickling a file can run code hidden in it. Save the adapter again with a current "
            "peft, which writes safetensors."
        )
    return recorded


def _load_with_adapter(
    adapter: Path, config: ModelConfig, *, task_type: str | None
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    import torch
    from peft import PeftModel

    own = any((adapter / file).is_file() for file in _TOKENIZER_FILES)
    try:
        tokenizer = load_tokenizer(replace(config, tokenizer=str(adapter) if own else None))
        base: Any
        if task_type == "SEQ_CLS":  # a reward model: its head comes with the adapter
            base = load_reward_model(config, tokenizer, dtype=torch.float32)
        else:
            base = load_model(config, dtype=torch.float32)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The base model of {adapter} cannot be read. {error} Or give --base."
        ) from error
    misfit = f"Adapter {adapter} does not fit the base {config.name!r}"
    try:
        _grow(base, adapter)
        model = PeftModel.from_pretrained(base, str(adapter))
    except RuntimeError as error:  # load_state_dict reports different shapes this way
        raise ValueError(f"{misfit}: {error}") from error
    missing, unexpected = _misplaced(model, adapter)
    if missing or unexpected:
        raise ValueError(
            f"{misfit}: {len(missing)} weights are missing from the adapter and {len(unexpected)} "
            f"have no place in the base (first: {(missing + unexpected)[0]}). Give the model it "
            "was trained on with --base."
        )
    return model.eval(), tokenizer


def _grow(base: Any, adapter: Path) -> None:
    """Gives the base as many rows of embedding as the adapter was trained with, where tokens were
    added for it."""
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, framework="pt") as file:
        names = [n for n in file.keys() if n.endswith(("embed_tokens.weight", "lm_head.weight"))]  # noqa: SIM118
        rows = max((file.get_slice(n).get_shape()[0] for n in names), default=0)
    if rows > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _misplaced(model: PeftModel, adapter: Path) -> tuple[list[str], list[str]]:
    """(weights that the file lacks, weights that the model lacks). peft only warns of the first and
    says nothing of the second."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / _WEIGHTS, framework="pt") as file:
        in_file = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    places = {n.replace(".default", "") for n in model.state_dict()}  # a file names no adapter
    return sorted(wanted - in_file), sorted(in_file - wanted - places)


def _merge(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Plain model with the same logits. One tied tensor cannot be an adapted head and a plain
    embedding: untie."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain: Any = model.get_base_model()
    embedding, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    is_adapted = isinstance(embedding, BaseTunerLayer) or isinstance(head, BaseTunerLayer)
    if is_adapted and head is not None and head.weight is embedding.weight:
        bare: Any = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        # peft sees the two tensors and records tie_word_embeddings=False
        bare.weight = torch.nn.Parameter(bare.weight.detach().clone(), requires_grad=False)
    merged: Any = model.base_model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return merged.to(dtype)


def _resolve_dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    import torch

    resolved = read_config(config).dtype or torch.float32 if dtype == "auto" else dtype
    return getattr(torch, resolved) if isinstance(resolved, str) else resolved
