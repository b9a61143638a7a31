"""Reward models: a sequence classifier of transformers with one score per sequence, read at its
last real token.

transformers pools the last token that is not the pad token, wherever the padding is. That is the
last real token only if the pad token never ends a sequence, so the model is given a pad token of
its own, distinct from EOS and from every token that the chat template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.load import (
    ModelConfig,
    as_trained,
    load_pretrained,
    load_tokenizer,
    read_config,
    trained_source,
)
from posttrain.models.policy import Policy, plain_attention
from posttrain.packing.batch import PackedBatch, long
from posttrain.types import Forward, PromptGroup

PAD_TOKEN = "<|posttrain_pad|>"


def load_reward_model(
    config: ModelConfig,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    compute: torch.dtype | None = None,
    seed: int = 0,
) -> nn.Module:
    """``AutoModelForSequenceClassification`` with one label on the weights of ``config``, and a pad
    token for both.

    A checkpoint without a score head gets one drawn from N(0, 1 / (H + 1)^2), so that the first
    rewards are close to 0; one with a head of one label keeps it. The tokenizer is changed in
    place. Raises ValueError for models that are no decoder or hide their head.
    """
    model, missing = load_pretrained(config, dtype=dtype, compute=compute, scores=True)
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            "A reward model needs one linear `score` head on the last hidden state; "
            f"{type(model).__name__} of {config.name!r} has {head!r}. Use a decoder model such as "
            "Llama, Qwen or Gemma, saved with num_labels=1 if it has a head already."
        )
    if missing:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(head.weight.shape, generator=generator)
        head.weight.data.copy_(drawn / (head.in_features + 1))
    give_pad_token(model, tokenizer)
    model.config.problem_type = None
    return as_trained(model, config, scores=True)


def is_reward_model(name: str) -> bool:
    """Whether a folder (of a run, its final/) holds a classifier."""
    folder = Path(trained_source(name))
    if not (folder / "config.json").is_file():
        return False
    known = read_config(ModelConfig(name=str(folder))).architectures or []
    return any(kind.endswith("ForSequenceClassification") for kind in known)


def load_scorer(name: str, *, dtype: torch.dtype) -> tuple[Any, Any]:
    """A trained reward model and its tokenizer, in evaluation mode."""
    config = ModelConfig(name=trained_source(name))
    tokenizer = load_tokenizer(config)
    return load_reward_model(config, tokenizer, dtype=dtype).eval(), tokenizer


def give_pad_token(model: Any, tokenizer: Any) -> None:
    """A pad token that no text or template produces, in tokenizer and config; the embedding grows
    by a row if it is full."""
    if tokenizer.convert_tokens_to_ids(PAD_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.pad_token = PAD_TOKEN
    pad = int(tokenizer.pad_token_id)
    if pad >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[pad].zero_()
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad


class Scorer(Policy):
    """``Scorer(model, packing)(batch) -> scores_T``: one score for every completion, at the token
    before its score slot."""

    @property
    def head(self) -> Any:
        """From hidden states to scores."""
        return self.base.score

    def _hides_a_transform(self) -> bool:
        return False

    def compute(self, batch: PackedBatch, outputs: Sequence[Any] = ()) -> Forward:
        """``logps_T`` are scores [T], at least float32; T is the number of completions: each has
        one trained position, its slot."""
        if self.forward_mode.own_logits or batch.inputs:
            with plain_attention(self.model):
                scores_T = self.model(
                    input_ids=batch.input_ids_L[None], use_cache=False, **batch.inputs
                ).logits[: batch.targets_T.shape[0], 0]
        else:
            hidden_TH = (
                self._backbone(batch).last_hidden_state[0].index_select(0, batch.predictor_T)
            )
            scores_T = self.head(hidden_TH)[:, 0] if len(hidden_TH) else hidden_TH.sum(-1)
        return Forward(scores_T.to(torch.promote_types(scores_T.dtype, torch.float32)))

    def plain_values(self, group: PromptGroup, k: int) -> Tensor:
        """[1] the score by transformers' own forward of the sequence without its slot."""
        completion = group.completions[k]
        device = self.base.get_input_embeddings().weight.device
        ids = long([group.prompt_ids, completion.token_ids[:-1]]).to(device)
        inputs = {n: torch.as_tensor(v).to(device) for n, v in group.inputs.items()}
        with plain_attention(self.model):
            logits = self.model(input_ids=ids[None], use_cache=False, **inputs).logits
        return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32))
