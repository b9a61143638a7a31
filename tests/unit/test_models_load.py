"""Loading and saving: what comes out is what went in, and each bad folder is told apart by its
message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from posttrain.models.load import (
    LoraConfig,
    ModelConfig,
    check_vocabulary,
    load_model,
    load_tokenizer,
    resolve_source,
    save_model,
)

VOCABULARY = 32
PROMPT = torch.tensor([[1, 5, 9, 2, 30]])


def make_tokenizer(num_tokens: int = VOCABULARY) -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, num_tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def make_llama(*, tied: bool = True, vocab_size: int = VOCABULARY) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    make_llama().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


# --- a name becomes a model ---


def test_local_folder_gives_the_saved_logits_attention_and_tokenizer(folder: Path) -> None:
    config = ModelConfig(name=str(folder))
    model, tokenizer = load_model(config, dtype=torch.float32), load_tokenizer(config)
    assert torch.equal(model.eval()(PROMPT).logits, make_llama()(PROMPT).logits)
    assert model.config._attn_implementation == "sdpa"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer("t5 t9")["input_ids"] == [5, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_save_then_load_keeps_logits_dtype_and_tying(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    model = make_llama(tied=tied)
    for (
        parameter
    ) in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
    model.generation_config.max_new_tokens = 7
    save_model(model, make_tokenizer(), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # alone: no dtype, no config
    assert again.dtype == dtype
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    assert again.generation_config.max_new_tokens == 7
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("t5")["input_ids"] == [5]
    assert not [p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pth")]
    assert (
        len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1
    )  # weights as readable as the rest


def test_weights_take_the_dtype_asked_for_and_rotary_frequencies_stay_exact(folder: Path) -> None:
    model = load_model(ModelConfig(name=str(folder)), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    head_dim, theta = 16, 10_000.0
    expected = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq.double(), expected, rtol=1e-6, atol=0
    )


def test_saved_config_does_not_name_an_attention_that_only_this_process_registered(
    tmp_path: Path,
) -> None:
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("test_models_load_attention", sdpa_attention_forward)
    model = make_llama()
    model.set_attn_implementation("test_models_load_attention")
    save_model(model, make_tokenizer(), tmp_path / "out")
    assert "test_models_load_attention" not in (tmp_path / "out" / "config.json").read_text()


def test_gradient_checkpointing_gives_the_same_gradient(folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load_model(
            ModelConfig(name=str(folder), gradient_checkpointing=checkpointing), dtype=torch.float32
        )
        assert model.is_activation_checkpointing == checkpointing
        model.train()(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_another_tokenizer_can_be_named(folder: Path, tmp_path: Path) -> None:
    make_tokenizer(8).save_pretrained(tmp_path / "small")
    assert (
        len(load_tokenizer(ModelConfig(name=str(folder), tokenizer=str(tmp_path / "small")))) == 8
    )


# --- bad input ---


def test_pickle_only_folder_is_refused_and_the_advice_it_gives_works(
    folder: Path, tmp_path: Path
) -> None:
    torch.save(make_llama().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"pickle only \(pytorch_model.bin\).*convert it once"
    ) as caught:
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)
    code = (
        str(caught.value)
        .split('python -c "')[1]
        .rstrip('"')
        .replace("'OUT'", repr(str(tmp_path / "converted")))
    )
    exec(code)  # the command that the message tells the user to run
    model = load_model(ModelConfig(name=str(tmp_path / "converted")), dtype=torch.float32)
    assert torch.equal(model.eval()(PROMPT).logits, make_llama()(PROMPT).logits)


def test_a_pickle_beside_safetensors_is_never_read(folder: Path) -> None:
    wanted = load_model(ModelConfig(name=str(folder)), dtype=torch.float32)(PROMPT).logits
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert torch.equal(
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)(PROMPT).logits, wanted
    )


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="has no weights: model.safetensors or .* is wanted"
    ):
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(ModelConfig(name=str(tmp_path)), dtype=torch.float32)


def test_adapter_folder_as_a_model_names_the_merge_command(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="posttrain merge"):
        load_model(ModelConfig(name=str(tmp_path)), dtype=torch.float32)


def test_missing_folder_near_miss_and_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_source("./no/such/folder")
    with pytest.raises(ValueError, match="Did you mean smollm2-135m"):
        resolve_source("smollm-135m")
    assert resolve_source("organisation/model") == "organisation/model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError, match="neither an embedded model .* nor a local folder, and reading it"
    ):
        load_model(ModelConfig(name="organisation/model"), dtype=torch.float32)


def test_folder_without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="No tokenizer in"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_weights_missing_from_the_checkpoint_are_not_left_random(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of the model's weights \(model.layers.1.mlp.up_proj.weight\)"
    ):
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)


def test_code_from_the_repository_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "made_up",
        "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('foreign code ran')")
    with pytest.raises(ValueError, match="needs Python code from its own repository"):
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)


def test_not_a_causal_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(
        ValueError, match="is a 't5', which transformers' AutoModelForCausalLM does not have"
    ):
        load_model(ModelConfig(name=str(folder)), dtype=torch.float32)


def test_vocabulary_mismatch_names_both_numbers(folder: Path) -> None:
    make_tokenizer(VOCABULARY + 3).save_pretrained(folder)
    with pytest.raises(
        ValueError,
        match=r"largest id is 34 \('t34'\).* 32 rows \(ids 0 to 31\); 3 tokens have no row",
    ):
        check_vocabulary(
            load_model(ModelConfig(name=str(folder)), dtype=torch.float32),
            make_tokenizer(VOCABULARY + 3),
        )


def test_padded_embedding_fits_and_a_placeholder_for_images_is_exempt() -> None:
    model = make_llama()
    check_vocabulary(model, make_tokenizer(VOCABULARY - 5))
    tokenizer = make_tokenizer(VOCABULARY)
    check_vocabulary(model, tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    with pytest.raises(ValueError, match="1 tokens have no row"):
        check_vocabulary(model, tokenizer)
    tokenizer.image_token = "<image_soft_token>"  # as Gemma 3's tokenizer declares it
    check_vocabulary(model, tokenizer)


def test_router_loss_is_refused_unless_left_out_on_purpose(tmp_path: Path) -> None:
    sizes = dict(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    sizes |= dict(num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1)
    for name, wants_router_loss in (("plain", False), ("router", True)):
        config = MixtralConfig(
            **sizes, output_router_logits=wants_router_loss, router_aux_loss_coef=0.02
        )
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    load_model(
        ModelConfig(name=str(tmp_path / "plain")), dtype=torch.float32
    )  # a coefficient alone adds nothing
    with pytest.raises(
        ValueError, match="Router auxiliary loss refused.*router_aux_loss_coef=0.02"
    ):
        load_model(ModelConfig(name=str(tmp_path / "router")), dtype=torch.float32)
    config = ModelConfig(name=str(tmp_path / "router"), train_without_router_loss=True)
    model = load_model(config, dtype=torch.float32)
    assert model(PROMPT, labels=PROMPT).aux_loss is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "must be >= 0"),
        ({"rank": 4, "dropout": 1.0}, "probability"),
        ({"rank": 4, "alpha": 0.0}, "must be > 0"),
        ({"rank": 4, "target_modules": []}, "is empty"),
        ({"quantize_4bit": True}, "lora.quantize_4bit would have no effect: lora.rank is 0"),
        ({"alpha": 8.0, "dropout": 0.1}, "lora.alpha, lora.dropout would have no effect"),
    ],
)
def test_lora_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**options)


def test_revision_of_a_folder_would_be_ignored() -> None:
    with pytest.raises(ValueError, match="would have no effect"):
        ModelConfig(revision="main")


# --- adapters ---


def test_adapters_start_at_the_base_and_only_they_train(folder: Path) -> None:
    config = ModelConfig(name=str(folder), lora=LoraConfig(rank=3))
    model = load_model(config, dtype=torch.float32).eval()
    assert torch.equal(model(PROMPT).logits, make_llama()(PROMPT).logits)  # B = 0
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    per_layer = 7  # q k v o gate up down; neither the LM head nor the embedding
    assert len(trained) == 2 * per_layer * 2
    assert all("lora_A" in name or "lora_B" in name for name in trained)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    assert trained["base_model.model.model.layers.0.self_attn.k_proj.lora_A.default.weight"] == (
        3,
        64,
    )
    assert layer.scaling["default"] == 2.0  # alpha = 2 * rank


def test_adapter_computes_w_plus_scaled_b_a(folder: Path) -> None:
    lora = LoraConfig(rank=2, alpha=3.0, target_modules=["q_proj"])
    model = load_model(ModelConfig(name=str(folder), lora=lora), dtype=torch.float32).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, 64)
    expected = (
        x
        @ (
            layer.base_layer.weight
            + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        ).T
    )
    torch.testing.assert_close(layer(x), expected)


def test_adapter_folder_records_its_base_and_holds_safetensors_only(
    folder: Path, tmp_path: Path
) -> None:
    config = ModelConfig(name=str(folder), lora=LoraConfig(rank=2))
    model, tokenizer = load_model(config, dtype=torch.bfloat16), load_tokenizer(config)
    save_model(model, tokenizer, tmp_path / "adapter")
    recorded = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(folder.resolve())
    assert (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).stat().st_size < 60_000  # no base weights in it
    assert not list((tmp_path / "adapter").glob("*.bin"))


def test_four_bit_weights_are_close_and_gradients_are_those_of_the_dequantised_model(
    folder: Path,
) -> None:
    """The reference is a plain model with the dequantised weights: same loss, same adapter
    gradients, also after an evaluation, which makes bitsandbytes repack weights for a kernel
    without backward on some CPUs."""
    functional = pytest.importorskip("bitsandbytes").functional
    lora = LoraConfig(rank=2, quantize_4bit=True)
    model = load_model(ModelConfig(name=str(folder), lora=lora), dtype=torch.float32)
    plain = load_model(ModelConfig(name=str(folder), lora=LoraConfig(rank=2)), dtype=torch.float32)
    quantised = dict(model.named_modules())
    num_quantised = 0
    for name, module in plain.named_modules():
        if not name.endswith(".base_layer"):
            continue
        weight = quantised[name].weight
        assert weight.dtype == torch.uint8
        num_quantised += 1
        dequantised = functional.dequantize_4bit(weight.data, weight.quant_state)
        relative_error = (dequantised - module.weight).norm() / module.weight.norm()
        assert 0 < relative_error < 0.15  # NF4 of normal weights: about 9 % of their norm
        module.weight.data = dequantised
    assert num_quantised == 2 * 7
    torch.manual_seed(1)
    adapters = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = adapters[name].data = 0.1 * torch.randn(parameter.shape)

    with torch.no_grad():
        evaluated = [m.eval()(PROMPT, labels=PROMPT, use_cache=False).loss for m in (model, plain)]
    torch.testing.assert_close(*evaluated, rtol=1e-5, atol=1e-5)
    for m in (model, plain):
        m.train()(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(
                parameter.grad,
                adapters[name].grad,
                rtol=1e-3,
                atol=1e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )
