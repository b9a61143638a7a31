"""Merging: the plain model has the logits of the model with adapters, and the command says what is
wrong in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from posttrain.cli.main import main
from posttrain.models.adapters import LoraConfig
from posttrain.models.load import ModelConfig, load_model, load_tokenizer, save_model
from posttrain.models.merge import MERGE_DTYPES, merge_adapter

PROMPT = torch.tensor([[1, 5, 9, 2, 30], [3, 3, 4, 8, 7]])


def write_base(
    folder: Path, *, tied: bool = True, num_layers: int = 2, hidden_size: int = 16
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        intermediate_size=24,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def write_adapter(
    base: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **lora: object
) -> torch.Tensor:
    """An adapter with random A and B; returns the logits of the model that carries it."""
    config = ModelConfig(name=str(base), lora=LoraConfig(**({"rank": 4} | lora)))  # type: ignore[arg-type]
    model = load_model(config, dtype=dtype).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, load_tokenizer(config), folder)
    with torch.no_grad():
        return model(PROMPT).logits


def plain_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(PROMPT).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rank": 3, "alpha": 5.0, "dropout": 0.3},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=["all-linear", "alpha-dropout", "two-modules", "head", "embedding", "embedding-head"],
)
def test_merged_logits_are_those_of_the_adapter_model(
    tmp_path: Path, tied: bool, lora: dict
) -> None:
    write_base(tmp_path / "base", tied=tied)
    expected = write_adapter(tmp_path / "base", tmp_path / "adapter", **lora)
    assert (
        expected - plain_logits(tmp_path / "base")
    ).abs().max() > 0.1  # the adapter does something
    out = merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    torch.testing.assert_close(plain_logits(out), expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out)("a a")["input_ids"] == [2, 2]
    if tied and not {"lm_head", "embed_tokens"} & set(lora.get("target_modules", [])):
        merged = AutoModelForCausalLM.from_pretrained(out)
        assert merged.lm_head.weight is merged.model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_that_were_added_for_an_adapter_are_in_the_merged_model(
    tmp_path: Path, tied: bool
) -> None:
    """Embedding and head are in the adapter whole, with more rows than the base has."""
    import peft

    write_base(tmp_path / "base", tied=tied)
    config = ModelConfig(name=str(tmp_path / "base"))
    tokenizer = load_tokenizer(config)
    tokenizer.add_tokens(["<step>", "<verdict>"])
    model = load_model(config, dtype=torch.float32)
    rows = model.get_input_embeddings().weight.shape[0] + 2
    model.resize_token_embeddings(rows, mean_resizing=False)
    lora = peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(model, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, rows - 2, 2, rows - 1]])
    with torch.no_grad():
        expected = adapted(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(
            merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
        ).eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_merged_weight_is_w_plus_scaled_b_a(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_adapter(base, tmp_path / "adapter", rank=2, alpha=3.0, target_modules=["v_proj"])
    out = merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if "v_proj" in name:
            prefix = "base_model.model." + name.removesuffix("weight")
            weight = (
                weight + 1.5 * adapter[prefix + "lora_B.weight"] @ adapter[prefix + "lora_A.weight"]
            )
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-7)


def test_adapter_trained_on_4_bit_weights_is_added_to_the_unquantised_ones(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = write_adapter(base, tmp_path / "adapter", quantize_4bit=True)
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        )
        expected = model.eval()(PROMPT).logits
    assert (expected - quantised).abs().max() > 1e-3
    out = merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    torch.testing.assert_close(plain_logits(out), expected, rtol=1e-5, atol=1e-5)


def test_a_trained_copy_of_a_tied_head_is_kept(base: Path, tmp_path: Path) -> None:
    """peft's modules_to_save trains a full copy of the head: the merged model must not be tied
    again when it is loaded."""
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    torch.nn.init.normal_(model.base_model.model.lm_head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(PROMPT).logits
    out = merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    torch.testing.assert_close(plain_logits(out), expected, rtol=1e-5, atol=1e-5)


def test_dtype_is_the_one_of_the_base_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    write_base(tmp_path / "wide")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16)
    save_model(model, AutoTokenizer.from_pretrained(tmp_path / "wide"), tmp_path / "base")
    write_adapter(tmp_path / "base", tmp_path / "adapter", dtype=torch.bfloat16)
    weights = {}
    for dtype in ("auto", "float32"):
        out = merge_adapter(tmp_path / "adapter", out=tmp_path / dtype, dtype=dtype)
        weights[dtype] = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, exact in weights["float32"].items():
        assert exact.dtype == torch.float32
        assert weights["auto"][name].dtype == torch.bfloat16
        assert torch.equal(weights["auto"][name], exact.to(torch.bfloat16)), (
            name
        )  # rounded once, from the exact sum


def test_moved_base_is_told_and_can_be_given(base: Path, tmp_path: Path) -> None:
    expected = write_adapter(base, tmp_path / "adapter")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="The base model of .* cannot be read.*does not exist.*give --base"
    ):
        merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    out = merge_adapter(
        tmp_path / "adapter", out=tmp_path / "merged", base=str(tmp_path / "elsewhere")
    )
    torch.testing.assert_close(plain_logits(out), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"num_layers": 1}, {"num_layers": 3}, {"hidden_size": 32}])
def test_a_base_that_does_not_fit_is_refused(base: Path, tmp_path: Path, sizes: dict) -> None:
    write_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_base(tmp_path / "other", **sizes)
    with pytest.raises(ValueError, match="does not fit the base"):
        merge_adapter(tmp_path / "adapter", out=tmp_path / "merged", base=str(tmp_path / "other"))
    assert not (tmp_path / "merged").exists()


def test_bad_folders(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        merge_adapter(tmp_path / "nowhere", out=tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="looks like a plain model already"):
        merge_adapter(base, out=tmp_path / "merged")
    write_adapter(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is not empty"):
        merge_adapter(tmp_path / "adapter", out=base)
    with pytest.raises(ValueError, match="must be one of auto"):
        merge_adapter(tmp_path / "adapter", out=tmp_path / "merged", dtype="int8")
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(
        tmp_path / "adapter" / "adapter_model.bin"
    )
    with pytest.raises(ValueError, match="are pickle only"):
        merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PROMPT_TUNING"})
    )
    with pytest.raises(ValueError, match="is a PROMPT_TUNING adapter"):
        merge_adapter(tmp_path / "adapter", out=tmp_path / "merged")


# --- the command ---


def test_command_merges(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write_adapter(base, tmp_path / "adapter")
    out = tmp_path / "deep" / "merged"
    assert (
        main(
            [
                "merge",
                str(tmp_path / "adapter"),
                "--out",
                str(out),
                "--base",
                str(base),
                "--dtype",
                "float32",
            ]
        )
        == 0
    )
    assert str(out) in capsys.readouterr().out
    torch.testing.assert_close(plain_logits(out), expected, rtol=1e-5, atol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_command_offers_the_dtypes_there_are(base: Path, tmp_path: Path) -> None:
    from posttrain.cli.main import build_parser

    for dtype in MERGE_DTYPES:
        assert (
            build_parser().parse_args(["merge", "a", "--out", "b", "--dtype", dtype]).dtype == dtype
        )


def test_command_errors_are_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["merge", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"posttrain merge: Adapter folder {tmp_path / 'nowhere'} does not exist.\n"
    monkeypatch.setenv("POSTTRAIN_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["merge", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


def test_help_is_instant_and_names_every_command() -> None:
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "posttrain.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 1.0
    assert "merge" in done.stdout and "version" in done.stdout
    assert " torch" not in done.stderr and " transformers" not in done.stderr  # the import log


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out
