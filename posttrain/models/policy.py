"""The module that accelerate wraps: a causal language model whose forward is one packed row ->
log-probs.

Three steps down, never an approximation, each said in one line (``choose_mode``): ``shared`` prefix
-> ``packed``, one segment per completion -> ``single``, one sequence per forward with the model's
own attention.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.dropout import base_model, has_dropout
from posttrain.models.logprobs import logit_transform, token_logps
from posttrain.packing import attention
from posttrain.packing.batch import Layout, PackedBatch, PackingMode
from posttrain.packing.plan import PackingConfig
from posttrain.types import PromptGroup

log = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, kw_only=True)
class ForwardMode:
    """How sequences reach the model, and why."""

    mode: PackingMode
    backend: str | None
    """Attention name registered with transformers; None: the model's own."""
    reason: str
    length_limit: int | None = None
    """Long-RoPE threshold in tokens: rows never mix sequences on both sides of it."""


@dataclass(frozen=True, kw_only=True)
class PlainSequence:
    """One completion with its prompt, for the model's own forward (the self-check)."""

    group: PromptGroup
    completion: int


def _is_prompt_learning(model: nn.Module) -> bool:
    return any(
        getattr(adapter, "is_prompt_learning", False)
        for adapter in getattr(model, "peft_config", {}).values()
    )


def _needs_single(model: nn.Module) -> str | None:
    """Why this model can only run one sequence per forward; None if it can be packed."""
    base = base_model(model)
    config = base.config.get_text_config()
    if _is_prompt_learning(model):
        return "prompt-learning adapters put virtual tokens before every sequence"
    if not getattr(base, "_supports_attention_backend", False):
        return (
            f"{type(base).__name__} does not dispatch its attention through transformers' "
            "AttentionInterface"
        )
    other = set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS
    if other:
        return f"layers of type {sorted(other)} carry state along the row"
    if any(name.rpartition(".")[2] in ("sinks", "sink") for name, _ in base.named_parameters()):
        return "attention sinks are not part of packed attention"
    if any(p.get("rope_type") == "dynamic" for p in _rope_parameters(config)):
        return "dynamic RoPE scales its frequencies with the length of the row"
    return None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _long_rope_limit(config: Any) -> int | None:
    for p in _rope_parameters(config):
        if p.get("rope_type") == "longrope":
            limit = p.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(limit or config.max_position_embeddings)
    return None


def choose_mode(model: nn.Module, packing: PackingConfig, *, device_type: str) -> ForwardMode:
    """The first exact mode for this model; an explicit ``packing.mode`` is honoured or refused,
    never quietly changed."""
    config = base_model(model).config.get_text_config()
    limit = _long_rope_limit(config)
    why_single = _needs_single(model)
    dropout = has_dropout(model)
    if packing.mode in ("shared", "packed") and why_single:
        raise ValueError(
            f"packing.mode={packing.mode} is not exact for this model: {why_single}. "
            "Use --packing.mode single."
        )
    if packing.mode == "single" or why_single:
        return ForwardMode(
            mode="single", backend=None, reason=why_single or "asked for", length_limit=limit
        )
    backend = _choose_backend(packing, device_type=device_type, dropout=dropout)
    if packing.mode == "shared" and dropout:
        raise ValueError(
            "packing.mode=shared is not exact with dropout > 0: completions would share one "
            "dropout mask on the prompt. Set dropout to 0 or use --packing.mode packed."
        )
    if packing.mode == "packed" or dropout:
        reason = (
            "asked for"
            if packing.mode == "packed"
            else ("dropout > 0 draws another mask for each completion's prompt")
        )
        return ForwardMode(mode="packed", backend=backend, reason=reason, length_limit=limit)
    return ForwardMode(
        mode="shared", backend=backend, reason="exact for this model", length_limit=limit
    )


def _choose_backend(packing: PackingConfig, *, device_type: str, dropout: bool) -> str:
    if packing.backend == "flex" and device_type != "cuda":
        raise ValueError(
            "packing.backend=flex needs CUDA: FlexAttention has no backward on CPU. "
            "Use --packing.backend sdpa."
        )
    if packing.backend == "flex" and dropout:
        raise ValueError(
            "packing.backend=flex has no dropout. Use --packing.backend sdpa, or set dropout to 0."
        )
    flex = packing.backend == "flex" or (
        packing.backend == "auto" and device_type == "cuda" and not dropout
    )
    return attention.FLEX_NAME if flex else attention.SEGMENT_NAME


class Policy(nn.Module):
    """``Policy(model, packing)(batch) -> logps_T``: the backbone over one packed row, the head on
    trained tokens only."""

    def __init__(
        self,
        model: nn.Module,
        packing: PackingConfig,
        *,
        device_type: str = "cpu",
        temperature: float = 1.0,
    ) -> None:
        """``temperature``: log-probs are those of the logits divided by it, as the sampler's."""
        super().__init__()
        self.model = model
        self.packing = packing
        self.forward_mode = choose_mode(model, packing, device_type=device_type)
        base = base_model(model)
        self.transform = replace(logit_transform(base.config), temperature=temperature)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        if self.forward_mode.backend is not None:
            attention.register()
            own_attention = base.config._attn_implementation
            base.set_attn_implementation(attention.SEGMENT_NAME)
            why_not = self._probe()
            if why_not:
                base.set_attn_implementation(own_attention)
                if packing.mode != "auto":
                    raise ValueError(
                        f"packing.mode={packing.mode} is not exact for this model: {why_not}. Use "
                        "--packing.mode single."
                    )
                self.forward_mode = replace(
                    self.forward_mode, mode="single", backend=None, reason=why_not
                )
            elif self.forward_mode.backend == attention.FLEX_NAME:
                self._use_flex(torch.device(device_type))
        log.info("attention: %s (%s)", self.forward_mode.mode, self.forward_mode.reason)

    def around(self, model: nn.Module, *, device_type: str) -> Policy:
        """The same forward of another model."""
        return Policy(
            model, self.packing, device_type=device_type, temperature=self.transform.temperature
        )

    def _use_flex(self, device: torch.device) -> None:
        """FlexAttention where its kernel works on this device, else attention by segment, with one
        line that says why."""
        config = self.base.config.get_text_config()
        why_not = attention.why_not_flex(
            device,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            width=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            softcap=getattr(config, "attn_logit_softcapping", None),
        )
        if why_not is None:
            self.base.set_attn_implementation(attention.FLEX_NAME)
            return
        if self.packing.backend == "flex":
            raise ValueError(
                f"packing.backend=flex does not work here: {why_not}. Use --packing.backend sdpa."
            )
        log.warning(
            "FlexAttention does not work here (%s); attention runs segment by segment, "
            "exact but slower",
            why_not,
        )
        self.forward_mode = replace(self.forward_mode, backend=attention.SEGMENT_NAME)

    @torch.no_grad()
    def _probe(self) -> str | None:
        """Two tokens as two sequences: why this model's layers do not pass the layout on to the
        attention, or None."""
        base = base_model(self.model)
        zeros = torch.zeros(
            1, 2, dtype=torch.long, device=base.get_input_embeddings().weight.device
        )
        layout = Layout(lengths=(1, 1), prefixes=(-1, -1))
        try:
            with in_eval_mode(base):
                output = base.get_decoder()(
                    input_ids=zeros, position_ids=zeros, use_cache=False, packing=layout
                )
        except attention.NotPackable as error:
            return str(error)
        return (
            None
            if hasattr(output, "last_hidden_state")
            else (f"{type(base).__name__} hides its last hidden state")
        )

    @property
    def config(self) -> Any:
        """The model's config; accelerate and DeepSpeed read it."""
        return self.base.config

    @property
    def base(self) -> Any:
        """The transformers model, inside of peft's wrapper if there is one."""
        return base_model(self.model)

    def forward(self, batch: PackedBatch | PlainSequence) -> Tensor:
        """``values`` of a packed row; ``plain_values`` of a sequence: sharded weights are whole
        only inside of forward."""
        return (
            self.plain_values(batch.group, batch.completion)
            if isinstance(batch, PlainSequence)
            else self.values(batch)
        )

    def values(self, batch: PackedBatch) -> Tensor:
        """logps_T [T]: natural-log probability of each trained token under the model, at least
        float32."""
        if self.forward_mode.backend is None and _is_prompt_learning(self.model):
            return self._plain_logps(batch)
        head = self.base.get_output_embeddings()
        hidden_TH = self.hidden(batch)
        return token_logps(
            hidden_TH,
            batch.targets_T,
            head,
            transform=self.transform,
            chunk=self.packing.logits_chunk,
            kept=batch.kept_ids,
        )

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[T, H] the backbone's last hidden states at the positions that predict a trained
        token."""
        extra = {} if self.forward_mode.backend is None else {"packing": batch.layout}
        output = self.base.get_decoder()(
            input_ids=batch.input_ids_L[None],
            position_ids=batch.position_ids_L[None],
            use_cache=False,
            **extra,
        )
        return output.last_hidden_state[0].index_select(0, batch.predictor_T)

    def plain_values(self, group: PromptGroup, k: int) -> Tensor:
        """[t] what ``values`` gives for one completion, through the model as transformers ships it:
        for the self-check."""
        completion = group.completions[k]
        last = max(i for i, m in enumerate(completion.loss_mask) if m)
        device = self.base.get_input_embeddings().weight.device
        ids = torch.tensor([*group.prompt_ids, *completion.token_ids[: last + 1]], device=device)
        forward = base_model(self.model).forward
        keep = (
            {"logits_to_keep": last + 1}
            if "logits_to_keep" in inspect.signature(forward).parameters
            else {}
        )
        with plain_attention(self.model):
            logits = self.model(input_ids=ids[None, :-1], use_cache=False, **keep).logits[
                0, -(last + 1) :
            ]
        mask = torch.tensor([bool(m) for m in completion.loss_mask[: last + 1]], device=device)
        logits_TV, targets_T = logits[mask] / self.transform.temperature, ids[-(last + 1) :][mask]
        logps_TV = torch.log_softmax(
            logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), dim=-1
        )
        return logps_TV.gather(1, targets_T[:, None]).squeeze(1)

    def _plain_logps(self, batch: PackedBatch) -> Tensor:
        """Through the whole model, adapters' virtual tokens included (prompt-learning PEFT): its
        own logits, from the end."""
        logits = self.model(input_ids=batch.input_ids_L[None], use_cache=False).logits[0]
        logits_TV = logits[-batch.input_ids_L.shape[0] :].index_select(0, batch.predictor_T)
        logits_TV = (
            logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
            / self.transform.temperature
        )
        return torch.log_softmax(logits_TV, dim=-1).gather(1, batch.targets_T[:, None]).squeeze(1)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode (dropout off); afterwards in the mode that it was in."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def segment_attention(model: nn.Module) -> Iterator[None]:
    """Inside, a packed model attends segment by segment: nothing is compiled for rows that are
    computed once."""
    with _attention(model, attention.SEGMENT_NAME, instead_of=(attention.FLEX_NAME,)):
        yield


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs as transformers ships it (generation, evaluation by others); outside,
    packed again."""
    plain = "sdpa" if getattr(base_model(model), "_supports_sdpa", False) else "eager"
    with _attention(model, plain, instead_of=(attention.SEGMENT_NAME, attention.FLEX_NAME)):
        yield


@contextmanager
def _attention(model: nn.Module, name: str, *, instead_of: tuple[str, ...]) -> Iterator[None]:
    base = base_model(model)
    own = base.config._attn_implementation
    if own not in instead_of:
        yield
        return
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(own)
