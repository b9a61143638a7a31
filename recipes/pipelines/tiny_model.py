"""A random model with 2 layers and its tokenizer, for the pipelines' size `tiny`; or a smaller
student: every second layer of a model.

    python recipes/pipelines/tiny_model.py --out DIR [--student-of MODEL]
"""

from __future__ import annotations

import argparse
from typing import Any

from material import WORDS

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PIECES = """
<think> </think> <answer> </answer> system user assistant Check: sentence with The word is
on the hill by lake in house under tree near road""".split()
SENTENCES = ["Think, then answer.", "How many words are in this list?"]


def tokenizer() -> Any:
    """Words of the pipelines' data, and single bytes for everything else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_tokens([*SENTENCES, *dict.fromkeys([*PIECES, *WORDS])])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = CHATML
    return made


def random_model(out: str, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokens.save_pretrained(out)


def student(of: str, out: str) -> None:
    """Layers 0, 2, 4, ... of a model."""
    import torch

    from posttrain.models.load import save_model
    from posttrain.models.merge import load_to_answer

    model, tokens = load_to_answer(of, dtype=torch.float32)
    layers: Any = model.get_submodule("model.layers")
    kept = torch.nn.ModuleList(layers[::2])
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    model.model.layers = kept  # type: ignore[union-attr]
    model.config.num_hidden_layers = len(kept)
    save_model(model, tokens, out)
    print(f"{len(layers)} layers -> {len(kept)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--student-of", metavar="MODEL")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if asked.student_of:
        student(asked.student_of, asked.out)
    else:
        random_model(asked.out, asked.seed)
