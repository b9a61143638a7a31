"""Tiny tokenizers, templates and rows for the data tests: byte-level BPE, and one that adds a space
to every text."""

import dataclasses
import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data import load_groups

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
CORPUS = ["user assistant system\n\n hello yes no the answer is four five\n\n\n question reply"] * 3

# as SmolLM2's: a default system message, no markers
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def marked(body: str) -> str:
    """ChatML in which `body` renders the assistant's turn."""
    return (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}" + body + "{% else %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    ) + GENERATION_PROMPT


HEADER = "{{ '<|im_start|>assistant\n' }}"
MARKED_WITH_END = marked(
    HEADER + "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
)
MARKED_WITHOUT_END = marked(
    HEADER + "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
)
MARKED_WITH_HEADER = marked(
    "{% generation %}" + HEADER + "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
NO_GENERATION_PROMPT = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
# deletes the reasoning of all turns but the last, as several reasoning models do
FORGETS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
) + GENERATION_PROMPT
ALTERNATING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@cache
def _metaspace() -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(
        [*CORPUS, "[INST] [/INST] abcdefghijklmnopqrstuvwxyz0123456789.,"], trainer
    )
    return tokenizer.to_str()


def byte_level(template: str | None = CHATML, *, eos: str | None = "<|im_end|>", bos: bool = False):
    tokenizer = Tokenizer.from_str(_byte_level())
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 3)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def metaspace(template: str | None = INST):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_metaspace()), eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def trained_text(group, tokenizer) -> str:
    """What is under the loss mask, decoded."""
    (completion,) = group.completions
    ids = [t for t, m in zip(completion.token_ids, completion.loss_mask, strict=True) if m]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def whole_text(group, tokenizer) -> str:
    ids = [*group.prompt_ids, *group.completions[0].token_ids]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def pairs(n, start=0, words=1):
    return [
        {"prompt": f"question {i}", "completion": " ".join(["four"] * words)}
        for i in range(start, start + n)
    ]


def load(config, tokenizer=None, **changes):
    return load_groups(
        dataclasses.replace(config, **changes), tokenizer or byte_level(), progress=False
    )


def everything(dataset):
    return [
        (
            g.prompt_ids.tolist(),
            g.completions[0].token_ids.tolist(),
            g.completions[0].loss_mask.tolist(),
            g.meta,
        )
        for g in dataset
    ]
