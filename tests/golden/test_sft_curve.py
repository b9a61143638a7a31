"""Twenty optimizer steps against a loop written from the definitions, and TRL's loss on the same
rows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import OptimizerConfig, PackingConfig, SFTConfig, SFTTrainer, TrainConfig
from posttrain.data import batch_indices, groups_from_rows
from posttrain.training.metrics import read_metrics
from tests.helpers import plain_logps
from tests.tiny import model_folder

ROWS = [{"prompt": f"{a}+{b}", "completion": f"It is {a + b}."} for a in range(6) for b in range(6)]
LR, DECAY, STEPS, BATCH = 3e-3, 0.1, 20, 8


def plain_loop(folder) -> list[float]:
    """One sequence at a time, token mean over the batch, clip to 1, AdamW by hand-picked groups,
    linear decay to 0."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    groups = groups_from_rows(ROWS, tokenizer)
    decayed = [p for n, p in model.named_parameters() if "proj" in n]
    others = [p for n, p in model.named_parameters() if "proj" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], lr=LR
    )
    losses = []
    for step in range(STEPS):
        picked = batch_indices(step, seed=0, batch_size=BATCH, sizes=[len(groups)])
        flat = torch.cat([plain_logps(model, groups[i], 0) for _, i in picked])
        loss = -flat.sum() / flat.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for settings in optimizer.param_groups:
            settings["lr"] = LR * (STEPS - step) / STEPS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_twenty_steps_are_those_of_a_plain_loop(tmp_path):
    folder = model_folder(tmp_path / "model")
    config = SFTConfig(
        train=TrainConfig(
            run_dir=str(tmp_path), max_steps=STEPS, batch_size=BATCH, precision="fp32"
        ),
        optimizer=OptimizerConfig(lr=LR, weight_decay=DECAY, schedule="linear"),
        packing=PackingConfig(max_tokens=150, logits_chunk=16),
    )
    result = SFTTrainer(model=str(folder), train_dataset=ROWS, config=config).train()
    got = [m["loss"] for m in read_metrics(result.folder / "metrics.jsonl") if "loss" in m]
    wanted = plain_loop(folder)
    assert wanted[-1] < wanted[0] - 1.0, "a curve that moves"
    assert got == pytest.approx(wanted, rel=2e-4)


def test_the_loss_is_trls_on_the_same_rows(tmp_path):
    """TRL 1.16's SFTTrainer on one padded batch, prompt-completion rows; the same trained tokens up
    to the template's newline."""
    import trl
    from datasets import Dataset

    from posttrain.packing.plan import count_units

    folder = model_folder(tmp_path / "model")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = ROWS[:6]
    chat = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            "completion": [{"role": "assistant", "content": r["completion"]}],
        }
        for r in rows
    ]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=6,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(chat),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    batch["labels"] = labels.masked_fill(
        labels == newline, -100
    )  # TRL also trains the newline after the end-of-turn token
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, batch))
    groups = groups_from_rows(rows, tokenizer)
    flat = torch.cat([plain_logps(trainer.model, g, 0) for g in groups]).detach()
    assert int((batch["labels"][:, 1:] != -100).sum()) == count_units(groups).tokens
    config = SFTConfig(
        train=TrainConfig(run_dir=str(tmp_path), max_steps=1, batch_size=6, precision="fp32")
    )
    result = SFTTrainer(model=str(folder), train_dataset=rows, config=config).train()
    assert (
        result.metrics["loss"]
        == pytest.approx(theirs, abs=1e-5)
        == pytest.approx(float(-flat.mean()), abs=1e-5)
    )
