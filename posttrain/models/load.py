"""From a name to a model and its tokenizer, and back to a folder. Safetensors only, never a
repository's own code.

A name is an embedded model (``smollm2-135m``, needs no hub), a local folder, or a hub id. Whatever
transformers would only warn about and that would make a silently wrong run is an error here:
weights missing from a checkpoint (they would be random), a tokenizer with ids beyond the embedding,
a router loss whose denominator is not global.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import stop_token_ids
from posttrain.models.adapters import LoraConfig, add_adapters, nf4, with_4bit_layers
from posttrain.models.dropout import own_rates, without_dropout
from posttrain.models.embedded import EMBEDDED, embedded_folder, let_weights_be_read_like_the_rest
from posttrain.resolve import did_you_mean, settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SAFETENSORS_NAMES = ("model.safetensors", "model.safetensors.index.json")
_TOKENS_THAT_TEXT_NEVER_HOLDS = ("image_token", "video_token", "audio_token")
_NAMES = f"an embedded model ({', '.join(EMBEDDED)}), a local folder or a hub id"


@settings
class ModelConfig:
    """Which model is trained, and how its weights are held."""

    name: str = "smollm2-135m"
    """Embedded model (smollm2-135m), local folder, or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; None: its main branch."""
    tokenizer: str | None = None
    """Embedded model, local folder or hub id of another tokenizer; None: the model's own."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: about a third more compute for much less memory."""
    dropout: bool | None = None
    """Train with the model's own dropout (and that of adapters). Default None: SFT does;
    preferences, reward models and reinforcement learning do not, which compare probabilities of the
    policy with its own or a reference's."""
    train_without_router_loss: bool = False
    """For a mixture of experts whose config asks for a router auxiliary loss: train without it
    instead of refusing."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters; off at rank 0."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(f"model.name is empty. Give {_NAMES}.")
        if self.revision is not None and _is_local(self.name):
            raise ValueError(
                f"model.revision={self.revision!r} would have no effect: {self.name!r} is not a "
                "hub id. Leave it out."
            )


def load_model(
    config: ModelConfig, *, dtype: torch.dtype, compute: torch.dtype | None = None
) -> PreTrainedModel | PeftModel:
    """The causal language model, with adapters around it if ``config.lora.rank`` > 0.

    The weights are held in ``dtype``; adapters of a model in half precision are held in float32.
    Attention is SDPA where the model supports it, else eager. The 4-bit weights of QLoRA need
    bitsandbytes; their products are in ``compute`` (None: ``dtype``).

    Raises ValueError or FileNotFoundError: no such model, pickle weights only, weights missing from
    the checkpoint, an architecture that needs foreign code or is no causal language model, a router
    loss.
    """
    model, _ = load_pretrained(config, dtype=dtype, compute=compute)
    return as_trained(model, config)


def as_trained(model: Any, config: ModelConfig, *, scores: bool = False) -> Any:
    """The model with its adapters and gradient checkpointing, as the config says. ``scores``: a
    reward model, whose head is trained whole."""
    if config.lora.rank > 0:
        base = base_name(config)
        model = add_adapters(model, config.lora, base=base, revision=config.revision, scores=scores)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    return model


def set_dropout(model: Any, config: ModelConfig, *, default: bool) -> None:
    """Switches the model's dropout off unless ``config.dropout``, or for None the method's
    ``default``, asks for it. ValueError for adapters whose dropout would thus have no effect."""
    if config.dropout or (config.dropout is None and default):
        return
    if config.lora.dropout > 0:
        raise ValueError(
            f"model.lora.dropout={config.lora.dropout} would have no effect: this method trains "
            "without dropout, because it compares probabilities. Leave it out, or set "
            "--model.dropout true."
        )
    without_dropout(model)


def untrained_model(
    model_config: PreTrainedConfig,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    scores: bool = False,
) -> Any:
    """What ``load_model`` (``scores``: ``load_reward_model``) gives, with random weights; with none
    on the meta device."""
    auto_class = _auto_class(model_config, scores=scores)
    if scores:
        model_config = copy.deepcopy(model_config)
        model_config.num_labels = 1
    model = auto_class.from_config(model_config, dtype=dtype)
    if config.lora.quantize_4bit:
        model = with_4bit_layers(model, compute or dtype)
    return as_trained(model, config, scores=scores)


def load_pretrained(
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    scores: bool = False,
) -> tuple[Any, list[str]]:
    """(model without adapters, names of the weights that the checkpoint lacks: those of a reward
    model's head, which are random). Raises as ``load_model`` does."""
    source = resolve_source(config.name)
    _check_weights_are_safetensors(source)
    model_config = read_config(config)
    auto_class = _auto_class(model_config, scores=scores)
    _settle_router_loss(model_config, config)
    if scores:
        model_config.num_labels = 1
    model, report = auto_class.from_pretrained(
        source,
        config=model_config,
        revision=config.revision or "main",
        dtype=dtype,
        quantization_config=nf4(compute or dtype) if config.lora.quantize_4bit else None,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(report["missing_keys"])
    lost = [name for name in missing if not (scores and name.startswith("score."))]
    if lost:
        raise ValueError(
            f"The checkpoint of {config.name!r} lacks {len(lost)} of the model's weights "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); they would be random. "
            "Check that config.json belongs to the weights."
        )
    return model, missing


def _auto_class(config: Any, *, scores: bool) -> Any:
    """The class of transformers that builds the model; a model of pictures and text is one of text
    too. ValueError if none does."""
    import transformers as hf

    wanted = hf.AutoModelForSequenceClassification if scores else hf.AutoModelForCausalLM
    if type(config) in wanted._model_mapping:
        return wanted
    pictures = hf.AutoModelForImageTextToText
    if not scores and type(config) in pictures._model_mapping and not config.is_encoder_decoder:
        return pictures
    raise ValueError(
        f"The model is a {config.model_type!r}, which transformers' {wanted.__name__} does not "
        "have. Only decoder models that predict the next token can be trained here."
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, or the one named by ``config.tokenizer``."""
    from transformers import AutoTokenizer

    name = config.tokenizer or config.name
    source, revision = resolve_source(name), None if config.tokenizer else config.revision
    advice = (
        "A folder needs tokenizer.json or the tokenizer's own files. Copy them there, or name "
        "another tokenizer with --model.tokenizer."
    )
    with _told(name, (OSError, ValueError), f"No tokenizer in {name!r}", advice):
        return AutoTokenizer.from_pretrained(
            source, revision=revision or "main", trust_remote_code=False
        )


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer can make an id without an embedding row. More rows than ids
    are padding: fine.

    Placeholders for images, sound and video are exempt, since text never holds them: Gemma 3's text
    models share a tokenizer whose last id, ``<image_soft_token>``, they have no row for.
    """
    num_rows = int(model.get_input_embeddings().weight.shape[0])
    placeholders = {getattr(tokenizer, name, None) for name in _TOKENS_THAT_TEXT_NEVER_HOLDS}
    vocabulary = tokenizer.get_vocab().items()
    beyond = {i: token for token, i in vocabulary if i >= num_rows and token not in placeholders}
    if beyond:
        raise ValueError(
            f"Tokenizer and model do not fit: the tokenizer's largest id is {max(beyond)} "
            f"({beyond[max(beyond)]!r}), the model's embedding has {num_rows} rows (ids 0 to "
            f"{num_rows - 1}); {len(beyond)} tokens have no row. Use the model's own tokenizer, "
            "or, if you added tokens, resize the embedding (model.resize_token_embeddings) and "
            "save the model before training."
        )


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model and tokenizer to ``folder``, safetensors only, in the dtype the parameters have.

    A plain model loads with ``AutoModelForCausalLM.from_pretrained(folder)`` alone. A model with
    adapters writes the adapters and the name of their base; ``posttrain merge`` makes a plain model
    of it. ``state``: the weights where the model itself is sharded
    (``models.sharding.whole_state``). The saved generation config stops at every token of
    ``end_token_ids``.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        # "auto" would ask the hub for the base model's config, to see whether the vocabulary grew
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
    else:
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = end_token_ids(model, tokenizer)
        with own_rates(model):
            model.save_pretrained(str(folder), state_dict=state)
    tokenizer.save_pretrained(str(folder))
    let_weights_be_read_like_the_rest(Path(folder))


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, the one that the chat template closes a turn with,
    and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys((*stop_token_ids(tokenizer), *map(int, listed))))


def read_config(config: ModelConfig) -> PreTrainedConfig:
    """The transformers config of the model: architecture, sizes, and the dtype its checkpoint was
    saved in."""
    from transformers import AutoConfig

    source = resolve_source(config.name)
    failed = (
        f"Model {config.name!r} is neither an embedded model ({', '.join(EMBEDDED)}) nor a local "
        "folder, and reading it from the hub failed"
    )
    advice = "Check the name, the network and, for a gated model, the login."
    with _told(config.name, OSError, failed, advice):
        return AutoConfig.from_pretrained(
            source, revision=config.revision or "main", trust_remote_code=False
        )


@contextmanager
def _told(name: str, errors: Any, failed: str, advice: str) -> Iterator[None]:
    """Say ``errors`` of transformers in fewer words and with advice."""
    try:
        yield
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name!r} needs Python code from its own repository, which is never run here. Use "
                "a model whose architecture is part of transformers."
            ) from error
        if not isinstance(error, errors):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{failed}: {first} {advice}") from error


def resolve_source(name: str) -> str:
    """What to give to ``from_pretrained``: the folder of an embedded model, a local folder, or a
    hub id as it is.

    Raises FileNotFoundError for what looks like a path and does not exist, ValueError for a near
    miss of an embedded name.
    """
    if name in EMBEDDED:
        return str(embedded_folder(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise ValueError(f"Model {name!r} is a file; give the folder with config.json.")
    looks_like_a_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/")
    if looks_like_a_path or name.count("/") > 1:
        raise FileNotFoundError(
            f"Model folder {name!r} does not exist (looked for {path.resolve()}). Give {_NAMES}."
        )
    near = "" if "/" in name else did_you_mean(name.lower(), EMBEDDED, cutoff=0.8)
    if near:
        raise ValueError(f"Unknown model {name!r}.{near}")
    return name


def trained_source(name: str) -> str:
    """The folder of the model that a run's folder means, its ``final/``; anything else as it is."""
    folder = Path(name).expanduser()
    final = folder / "final"
    return str(final if final.is_dir() else folder if folder.is_dir() else name)


def _is_local(name: str) -> bool:
    return name in EMBEDDED or Path(name).expanduser().is_dir()


def base_name(config: ModelConfig) -> str:
    """What adapters record as their base: the embedded name, the absolute path of a folder, or the
    hub id."""
    is_folder = config.name not in EMBEDDED and _is_local(config.name)
    return str(Path(config.name).expanduser().resolve()) if is_folder else config.name


def _check_weights_are_safetensors(source: str) -> None:
    """For a local folder; for a hub id ``use_safetensors=True`` makes transformers refuse."""
    folder = Path(source)
    if not folder.is_dir():
        return
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise ValueError(
                f"{source} holds adapters, not a model. Make a plain model of it first: "
                f"posttrain merge {source} --out {source.rstrip('/')}-merged"
            )
        raise FileNotFoundError(f"Model folder {source} has no config.json: it is no model folder.")
    if any(name in files for name in _SAFETENSORS_NAMES):
        return
    pickles = [n for n in files if n.endswith(_PICKLE_SUFFIXES) and n != "training_args.bin"]
    if pickles:
        raise ValueError(
            f"Model folder {source} has its weights as pickle only ({', '.join(pickles[:3])}), "
            "and unpickling a file can run code hidden in it. If you trust its origin, convert it "
            'once: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as '
            f"T; M.from_pretrained('{source}', use_safetensors=False, dtype='auto')"
            f".save_pretrained('OUT'); T.from_pretrained('{source}').save_pretrained('OUT')\""
        )
    raise FileNotFoundError(
        f"Model folder {source} has no weights: {' or '.join(_SAFETENSORS_NAMES)} is wanted; "
        f"found {', '.join(files[:8])}. Was a download or a copy cut short?"
    )


def _settle_router_loss(model_config: PreTrainedConfig, config: ModelConfig) -> None:
    """Refuse a router loss that the config asks for: transformers averages it over one
    micro-batch's tokens, so the gradient would depend on how the step is split."""
    text_config = model_config.get_text_config()
    if not getattr(text_config, "output_router_logits", False):
        return
    if not config.train_without_router_loss:
        coefficient = getattr(text_config, "router_aux_loss_coef", None)
        raise ValueError(
            f"Router auxiliary loss refused: the config of {config.name!r} asks for one "
            f"(output_router_logits=true, router_aux_loss_coef={coefficient}), which depends on "
            "how a step is split. Train without it: --model.train_without_router_loss true. A loss "
            "of your own can ask the forward for the routers' probabilities (outputs: 'router')."
        )
    text_config.output_router_logits = False
    logger.warning("The router auxiliary loss of %s is left out, as asked.", config.name)
