"""`posttrain chat` as a command, in a pipe and on a terminal."""

from __future__ import annotations

import argparse
import io
import os
import pty
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli import chat
from posttrain.models.adapters import LoraConfig
from posttrain.models.load import ModelConfig, load_model, save_model
from posttrain.models.merge import load_to_answer
from tests.e2e.launching import REPO, check, environment, posttrain_warm
from tests.tiny import model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("chat") / "model")


def greedy(folder, messages, count):
    """Tokens one by one, each from a whole forward in the dtype of `chat`."""
    from posttrain.precision import default_precision

    dtype = getattr(torch, default_precision("cpu").compute)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = []
    for _ in range(count):
        token = int(model(torch.tensor([ids + said])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said)


def test_one_turn_is_the_greedy_continuation_of_the_template(model):
    arguments = ["--prompt", "2+2", "--system", "Count.", "--max-tokens", "6", "--temperature", "0"]
    result = check(posttrain_warm("chat", str(model), *arguments))
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": "2+2"}]
    assert result.stdout.strip() == greedy(model, messages, 6).strip()


def test_a_conversation_goes_on_until_reset_or_system_begins_another(
    model, tmp_path, monkeypatch, capsys
):
    lively = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():  # else it says the same to everything
        for weight in lively.parameters():
            weight.mul_(5 if weight.ndim > 1 else 1)
    lively.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path)
    model = tmp_path
    parser = argparse.ArgumentParser()
    chat.declare(parser)
    turns = ["2+2", "and 3", "/reset", "and 3", "/system Count.", "and 3", "", "/quit", "never"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(turns)))
    chat.run(parser.parse_args([str(model), "--max-tokens", "12", "--temperature", "0"]))
    user = [{"role": "user", "content": text} for text in ("2+2", "and 3")]
    first = greedy(model, user[:1], 12)
    conversations = [
        [user[0], {"role": "assistant", "content": first}, user[1]],
        [user[1]],
        [{"role": "system", "content": "Count."}, user[1]],
    ]
    said = [first, *(greedy(model, messages, 12) for messages in conversations)]
    assert len(set(said)) == 4, "the conversations must differ for this test to see them"
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in said)


def test_a_run_folder_means_its_final_model_and_adapters_load_on_their_base(model, tmp_path):
    config = ModelConfig(name=str(model), lora=LoraConfig(rank=2))
    trained = load_model(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    save_model(trained, AutoTokenizer.from_pretrained(model), tmp_path / "run" / "final")
    loaded, _ = load_to_answer(str(tmp_path / "run"), dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, trained.eval()(ids).logits)
    base = AutoModelForCausalLM.from_pretrained(model)
    assert not torch.allclose(base(ids).logits, loaded(ids).logits, atol=1e-3)


def test_a_terminal_gets_two_models_side_by_side(model):
    """Unknown commands are named; nothing is read after /quit."""
    main, worker = pty.openpty()
    command = [sys.executable, "-m", "posttrain.cli.main", "chat", str(model), str(model)]
    result = subprocess.Popen(
        [*command, "--max-tokens", "3", "--temperature", "0"],
        stdin=subprocess.PIPE,
        stdout=worker,
        stderr=subprocess.STDOUT,
        env=environment(TERM="xterm", COLUMNS="80"),
        cwd=REPO,
    )
    os.close(worker)
    assert result.stdin is not None
    result.stdin.write(b"hello\n/nothing\n/quit\nnever\n")
    result.stdin.close()
    shown = b""
    while True:
        try:
            read = os.read(main, 65536)
        except OSError:
            break
        if not read:
            break
        shown += read
    assert result.wait() == 0 and b"/nothing is no command" in shown
    assert b"\xe2\x94\x83" in shown  # the table's bar between the two models


def test_an_unfinished_run_says_what_to_do(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = posttrain_warm("chat", str(tmp_path), "--prompt", "x")
    assert result.returncode == 2 and "not finished" in result.stderr
