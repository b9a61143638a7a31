"""The last step down, the model's own forward: adapters, reward models, references, and models of
pictures and text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from posttrain import OptimizerConfig, SFTConfig, SFTTrainer, TrainConfig
from posttrain.models.heads import Scorer
from posttrain.models.load import ModelConfig, load_model
from posttrain.models.policy import Policy, frozen_copy
from posttrain.packing.batch import pack
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.training.metrics import read_metrics
from posttrain.training.reference import sequence_key
from posttrain.training.selfcheck import SelfCheckError, self_check
from posttrain.types import SCORE_SLOT, Completion, PromptGroup
from tests.family_table import build
from tests.helpers import VOCAB, gradients_of, tiny_llama
from tests.unit.test_family_sweep import GROUPS, assert_trains_exactly, own_values, trained_values
from tests.unit.test_models_load import make_tokenizer


def checked(model: torch.nn.Module, *, mode: str = "auto") -> Policy:
    policy = Policy(model, PackingConfig(mode=mode))
    assert self_check(policy, GROUPS, max_tokens=500) < 1e-4
    return policy


def test_adapters_on_a_family_whose_own_logits_are_trained():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    policy = checked(get_peft_model(build("bert"), lora))
    assert policy.forward_mode.own_logits
    assert_trains_exactly(policy.eval(), GROUPS)
    trained = gradients_of(policy.model)
    assert trained and all("lora" in name for name in trained)


def test_a_reference_follows_its_policy_down():
    policy = checked(build("bert"))
    twin = frozen_copy(policy)
    assert twin.forward_mode == policy.forward_mode and twin.forward_mode.own_logits
    plan = plan_step(GROUPS, world_size=1, max_tokens=500, mode="single")
    batch = pack(GROUPS, plan.ranks[0][0].parts, mode="single")
    assert torch.equal(twin(batch).logps_T, policy.eval()(batch).logps_T)


def test_a_temperature_divides_the_models_own_logits():
    """At temperature 2 the log-probs are those of a head that gives half as much."""
    found = []
    for temperature, scale in ((2.0, 1.0), (1.0, 0.5)):
        model = build("bert")
        model.get_output_embeddings().register_forward_hook(lambda _, __, x, s=scale: x * s)
        policy = Policy(model, PackingConfig(), temperature=temperature)
        assert self_check(policy, GROUPS, max_tokens=500) < 1e-4
        assert policy.forward_mode.own_logits
        found.append(trained_values(policy.eval(), GROUPS)[0])
    torch.testing.assert_close(*found)


def test_a_transform_after_the_head_is_seen_though_all_logits_are_small(monkeypatch):
    """The self-check cannot see a softcap of 30 on logits of 0.01; a head that gives a ramp can."""
    from posttrain.models import logprobs

    for known, own in ((logprobs.SOFTCAPS, False), ((), True)):
        monkeypatch.setattr(logprobs, "SOFTCAPS", known)
        model = build("recurrent_gemma")
        model.get_output_embeddings().weight.data.mul_(1e-3)
        policy = checked(model)
        assert policy.forward_mode.own_logits == own
        assert ("after the head" in policy.forward_mode.reason) == own


def scored(groups: list[PromptGroup]) -> list[PromptGroup]:
    """As a reward model gets them: every completion ends with its slot, which alone is trained."""

    def with_slot(c: Completion) -> Completion:
        ids = [*(int(i) or 5 for i in c.token_ids), SCORE_SLOT]
        return Completion(token_ids=ids, loss_mask=[0] * (len(ids) - 1) + [1])

    return [replace(g, completions=[with_slot(c) for c in g.completions]) for g in groups]


def test_a_reward_models_own_scores_train():
    torch.manual_seed(0)
    config = replace_labels(tiny_llama().config)
    model = transformers.LlamaForSequenceClassification(config).eval()
    groups = scored(GROUPS)
    scorer = Scorer(model, PackingConfig()).eval()
    packed, packed_gradient = trained_values(scorer, groups)
    while scorer.step_down("for this test"):
        pass
    assert scorer.forward_mode.own_logits
    assert self_check(scorer, groups, max_tokens=500) < 1e-5
    own, own_gradient = trained_values(scorer.eval(), groups)
    torch.testing.assert_close(own, packed)
    assert own_gradient.keys() == packed_gradient.keys()
    for name, gradient in packed_gradient.items():
        torch.testing.assert_close(own_gradient[name], gradient, atol=1e-5, rtol=1e-4)


def replace_labels(config):
    config.num_labels, config.pad_token_id = 1, 0
    return config


def test_a_model_that_sees_later_tokens_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = BertConfig(vocab_size=VOCAB, **sizes, initializer_range=0.2)
    policy = Policy(BertLMHeadModel(config), PackingConfig())
    with pytest.raises(SelfCheckError, match="not causal.*is_decoder"):
        self_check(policy, GROUPS, max_tokens=500)


def test_a_window_that_only_the_mask_knows_is_seen_without_a_long_sequence():
    """The self-check's sequences can be shorter than the window of a large model."""
    policy = Policy(build("phimoe"), PackingConfig())
    assert policy.forward_mode.mode == "single"
    assert "mask alone" in policy.forward_mode.reason
    with pytest.raises(ValueError, match="mask alone"):
        Policy(build("phimoe"), PackingConfig(mode="shared"))


IMAGE = VOCAB - 1


def tiny_llava() -> torch.nn.Module:
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
    )
    text = dict(**tiny_llama().config.to_dict())
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def with_picture(group: PromptGroup, seed: int) -> PromptGroup:
    """The group with a picture of four patches before its prompt."""
    pixels = np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)

    def text(ids):
        return [int(i) % IMAGE for i in ids]

    return replace(
        group,
        prompt_ids=[1, *[IMAGE] * 4, *text(group.prompt_ids)],
        completions=[replace(c, token_ids=text(c.token_ids)) for c in group.completions],
        inputs={"pixel_values": pixels},
    )


PICTURES = [with_picture(group, seed) for seed, group in enumerate(GROUPS)]


def test_groups_with_pictures_train_the_vision_tower():
    policy = Policy(tiny_llava(), PackingConfig(mode="single"))
    assert self_check(policy, PICTURES, max_tokens=500) < 1e-5
    assert_trains_exactly(policy.eval(), PICTURES)
    gradient = gradients_of(policy.model)
    vision = [g for name, g in gradient.items() if "vision" in name and "patch_embedding" in name]
    assert vision and all(float(g.abs().max()) > 1e-4 for g in vision)
    other = [replace(PICTURES[0], inputs=PICTURES[1].inputs), *PICTURES[1:]]
    values, others = (own_values(policy.model, groups)[0] for groups in (PICTURES, other))
    num_first = PICTURES[0].num_trained
    assert not torch.allclose(values[:num_first], others[:num_first], atol=1e-3)
    assert torch.equal(values[num_first:], others[num_first:])


def test_a_packed_run_refuses_pictures_and_says_what_to_do():
    policy = Policy(tiny_llava(), PackingConfig())
    assert policy.forward_mode.mode == "shared"
    with pytest.raises(ValueError, match="pixel_values.*packing.mode single"):
        trained_values(policy, PICTURES)


def test_the_text_of_a_model_of_pictures_is_packed():
    policy = checked(tiny_llava())
    assert policy.forward_mode.mode == "shared"
    assert_trains_exactly(policy.eval(), GROUPS)


def test_pictures_are_part_of_a_sequences_key():
    one, other = with_picture(GROUPS[0], 1), with_picture(GROUPS[0], 2)
    keys = {sequence_key(g, g.completions[0]) for g in (GROUPS[0], one, other)}
    assert len(keys) == 3


def test_a_model_of_pictures_and_text_loads(tmp_path):
    model = tiny_llava()
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), dtype=torch.float32)
    assert type(loaded) is type(model)
    wanted, got = (own_values(m, PICTURES)[0] for m in (model, loaded.eval()))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", ["bert", "cpmant"])
def test_a_run_steps_down_or_stops(family, tmp_path):
    """The whole loop on the model's own logits; a model that is not causal stops before a step."""
    groups = [
        replace(
            g, completions=[replace(c, token_ids=[*c.token_ids[:-1], 1]) for c in g.completions]
        )
        for g in GROUPS
    ]
    run = SFTTrainer(
        model=build(family).train(),
        tokenizer=make_tokenizer(VOCAB),
        train_dataset=groups,
        eval_dataset=groups,
        config=SFTConfig(
            train=TrainConfig(run_dir=str(tmp_path), max_steps=4, batch_size=2, precision="fp32"),
            optimizer=OptimizerConfig(lr=1e-2),
        ),
    )
    if family == "cpmant":
        with pytest.raises(SelfCheckError, match="not causal"):
            run.train()
        return
    result = run.train()
    steps = [m["loss"] for m in read_metrics(result.folder / "metrics.jsonl") if "loss" in m]
    values, _ = own_values(build(family), groups)
    assert steps[0] == pytest.approx(-float(values.mean()), abs=1e-4)
    assert steps[-1] < steps[0] - 0.1
