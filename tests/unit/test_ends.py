"""Where a text begins and ends: stop tokens of the saved model and of sampling, and prompts that do
not end before they begin."""

from __future__ import annotations

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from posttrain.data.prompts import PromptConfig, prompts_from_rows
from posttrain.models.load import ModelConfig, end_token_ids, load_model, save_model
from posttrain.models.policy import Policy
from posttrain.packing.plan import PackingConfig
from posttrain.rl.algorithms import resolve_algorithm
from posttrain.rollout.local import LocalConfig, local_engine
from tests.tiny import byte_tokenizer, model_folder


@pytest.fixture
def base_model(tmp_path):
    """A base model whose own end is <|pad|>; the chat template closes a turn with <|im_end|>."""
    tokenizer = byte_tokenizer()
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = "<|pad|>"
    model = load_model(ModelConfig(name=str(model_folder(tmp_path / "base"))), dtype=torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, 5])
    return model, tokenizer, turn


def test_the_saved_model_stops_where_it_was_trained_to(base_model, tmp_path):
    model, tokenizer, turn = base_model
    save_model(model, tokenizer, tmp_path / "final")
    saved = GenerationConfig.from_pretrained(tmp_path / "final").eos_token_id
    assert set(saved) == {turn, tokenizer.eos_token_id, 5} == set(end_token_ids(model, tokenizer))


def test_sampling_stops_at_every_end_that_the_model_knows(base_model):
    model, tokenizer, turn = base_model
    policy = Policy(model, PackingConfig())
    engine = local_engine(policy, tokenizer, LocalConfig(), compute=torch.float32)
    assert set(engine.stop_ids) == {turn, tokenizer.eos_token_id, 5}


@pytest.mark.parametrize("template", ["plain", "r1-zero"])
def test_a_prompt_does_not_end_in_an_end_of_text(template):
    """A tokenizer that puts BOS before and EOS after every text: the model would continue after the
    end."""
    tokenizer = byte_tokenizer()
    start, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", start), ("<|im_end|>", end)],
    )
    assert tokenizer("a")["input_ids"][-1] == end
    (prompt,), _ = prompts_from_rows(
        [{"prompt": "1+1="}], tokenizer, PromptConfig(template=template)
    )
    assert prompt.ids[0] == start and end not in prompt.ids and start not in prompt.ids[1:]


def test_a_negative_weight_of_the_kl_is_refused():
    with pytest.raises(ValueError, match="beta is the weight of a KL penalty and >= 0; got -0.1"):
        resolve_algorithm("grpo", {"beta": -0.1})
    assert resolve_algorithm("grpo", {"beta": 0.0}).beta == 0.0
