"""The module that accelerate wraps: a causal language model whose forward is one packed row ->
log-probs.

Three steps down, never an approximation, each said in one line (``choose_mode``): ``shared`` prefix
-> ``packed``, one segment per completion -> ``single``, one sequence per forward with the model's
own attention.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from posttrain.models.dropout import base_model, has_dropout
from posttrain.models.logprobs import (
    OUTPUTS,
    HeadInput,
    LogitTransform,
    logit_transform,
    token_logps,
)
from posttrain.packing import attention
from posttrain.packing.batch import Layout, PackedBatch, PackingMode, long
from posttrain.packing.plan import PackingConfig
from posttrain.types import Forward, PromptGroup

log = logging.getLogger(__name__)

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, kw_only=True)
class ForwardMode:
    """How sequences reach the model, and why."""

    mode: PackingMode
    backend: str | None
    """Attention name registered with transformers; None: the model's own."""
    reason: str
    own_logits: bool = False
    """The last step down: logits by the model's own forward, whatever it does before them."""
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


def _window(config: Any) -> int | None:
    """The sliding window of some or all layers."""
    kinds = getattr(config, "layer_types", None)
    unused = getattr(config, "use_sliding_window", True) is False
    if unused or (kinds and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)


def backbone(base: Any) -> Any:
    """What turns token ids into the last hidden state."""
    decoder = base.get_decoder()
    return getattr(base, "model", base) if decoder is base else decoder


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
        own_attention = base.config._attn_implementation
        if self.forward_mode.backend is not None:
            attention.register()
            base.set_attn_implementation(attention.SEGMENT_NAME)
            why_not = self._probe({"packing": Layout(lengths=(1, 1), prefixes=(-1, -1))})
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
        if self.forward_mode.backend is None and (why_not := self._probe({})):
            self.forward_mode = replace(self.forward_mode, own_logits=True, reason=why_not)
        elif packing.mode in ("auto", "single") and self._hides_a_transform():
            while not self.forward_mode.own_logits:
                self._lower(f"{type(base).__name__} changes its logits after the head")
        log.info("attention: %s (%s)", self.forward_mode.mode, self.forward_mode.reason)

    def around(self, model: nn.Module, *, device_type: str) -> Policy:
        """The same forward of another model. ValueError if that one can only run one sequence at a
        time while this one's rows hold several."""
        other = type(self)(
            model, self.packing, device_type=device_type, temperature=self.transform.temperature
        )
        if other.forward_mode.mode == "single" != self.forward_mode.mode:
            raise ValueError(
                f"{type(base_model(model)).__name__} runs one sequence per forward "
                f"({other.forward_mode.reason}), but the trained model's rows hold several. Use "
                "--packing.mode single for both."
            )
        other.follow(self)
        return other

    def step_down(self, reason: str) -> bool:
        """The next mode that may be exact: one sequence at a time, then the model's own logits too.
        False where there is none, or packing.mode asks for this one."""
        mode = self.forward_mode
        if mode.own_logits or (self.packing.mode != "auto" and mode.mode != "single"):
            return False
        self._lower(reason)
        log.info("attention: single (%s)", reason)
        return True

    def follow(self, other: Policy) -> None:
        """Steps down as far as ``other`` did: a reference with the policy that it belongs to."""
        while _depth(self.forward_mode) < _depth(other.forward_mode):
            self._lower(other.forward_mode.reason)

    def _lower(self, reason: str) -> None:
        mode = self.forward_mode
        if mode.backend is not None:
            self.base.set_attn_implementation(plain_name(self.base))
        self.forward_mode = replace(
            mode, mode="single", backend=None, own_logits=mode.mode == "single", reason=reason
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
    def _hides_a_transform(self) -> bool:
        """Whether the model does more between head and logits than ``self.transform``: its head is
        made to give a ramp."""
        weight = self.base.get_input_embeddings().weight
        head = self.head
        if head is None or weight.is_meta or isinstance(weight, FakeTensor):
            return False
        ramp: list[Tensor] = []

        def give_ramp(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            ramp.append(torch.linspace(-50, 50, output.shape[-1]).to(output).expand_as(output))
            return ramp[0]

        handle = head.register_forward_hook(give_ramp)
        ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
        try:
            with in_eval_mode(self.model), plain_attention(self.model):
                logits = self.base(input_ids=ids, use_cache=False).logits.float()
        finally:
            handle.remove()
        if not ramp or ramp[0].shape != logits.shape:
            return False  # another forward was put around the model: the self-check will tell
        known = replace(self.transform, temperature=1.0)
        # MiniCPM scales the hidden states, which is the same
        return not any(
            torch.allclose(logits, transform.apply(ramp[0].float()), rtol=0.02)
            for transform in (known, replace(known, scale=1.0))
        )

    @torch.no_grad()
    def _probe(self, packing: dict[str, Layout]) -> str | None:
        """Two tokens (as two sequences): why the backbone cannot be called this way, or None."""
        base = base_model(self.model)
        if _is_prompt_learning(self.model):
            return "virtual tokens are put in by the whole model"
        zeros = torch.zeros(
            1, 2, dtype=torch.long, device=base.get_input_embeddings().weight.device
        )
        try:
            with in_eval_mode(base):
                output = backbone(base)(
                    input_ids=zeros, position_ids=zeros, use_cache=False, **packing
                )
                if not hasattr(output, "last_hidden_state"):
                    return f"{type(base).__name__} hides its last hidden state"
                self.head(output.last_hidden_state)
        except Exception as error:  # noqa: BLE001 - whatever it is, a step further down is exact
            return str(error).partition("\n")[0] or type(error).__name__
        window = _window(base.config.get_text_config())
        if packing and window not in {None, *packing["packing"].cache[attention.WINDOWS]}:
            return f"the mask alone knows its sliding window of {window} tokens"
        return None

    @property
    def config(self) -> Any:
        """The model's config; accelerate and DeepSpeed read it."""
        return self.base.config

    @property
    def base(self) -> Any:
        """The transformers model, inside of peft's wrapper if there is one."""
        return base_model(self.model)

    @property
    def head(self) -> Any:
        """From hidden states to logits."""
        return self.base.get_output_embeddings()

    def forward(
        self, batch: PackedBatch | PlainSequence, outputs: Sequence[Any] = ()
    ) -> Forward | Tensor:
        """``compute`` of a packed row; ``plain_values`` of a sequence: sharded weights are whole
        only inside of forward."""
        if isinstance(batch, PlainSequence):
            return self.plain_values(batch.group, batch.completion)
        return self.compute(batch, outputs)

    def compute(self, batch: PackedBatch, outputs: Sequence[Any] = ()) -> Forward:
        """Log-probs of the trained tokens at least in float32, and the outputs that were asked for:
        names in ``OUTPUTS``, or objects with a ``name`` that are called with a ``HeadInput``."""
        x = self.head_input(batch, outputs)
        logps_T = token_logps(
            x.hidden_TH,
            batch.targets_T,
            x.head,  # type: ignore[arg-type]
            transform=x.transform,
            chunk=x.chunk,
            kept=x.kept,
        )
        return Forward(logps_T, {output_name(o): _output(o)(x) for o in outputs})

    def head_input(self, batch: PackedBatch, outputs: Sequence[Any] = ()) -> HeadInput:
        """The states that predict a trained token. Where only the model's own forward is exact they
        are its logits, and the head is the identity."""
        if batch.inputs and self.forward_mode.mode != "single":
            raise ValueError(
                f"Groups with model inputs ({', '.join(batch.inputs)}) run one sequence at a time "
                f"through the model's own forward; this run packs them ({self.forward_mode.mode}). "
                "Use --packing.mode single."
            )
        assert self.forward_mode.mode != "single" or len(batch.layout.lengths) <= 1, batch.layout
        own = self.forward_mode.own_logits or bool(batch.inputs)
        common: dict[str, Any] = {
            "chunk": self.packing.logits_chunk,
            "kept": batch.kept_ids,
            "batch": batch,
            "policy": self,
        }
        if own:
            logits_TV = self._own_logits(batch)
            transform = LogitTransform(temperature=self.transform.temperature)
            return HeadInput(hidden_TH=logits_TV, head=nn.Identity(), transform=transform, **common)
        more = {"output_router_logits": True} if "router" in outputs else {}
        backbone = self._backbone(batch, **more)
        return HeadInput(
            hidden_TH=backbone.last_hidden_state[0].index_select(0, batch.predictor_T),
            head=self.head,
            transform=self.transform,
            backbone=backbone,
            **common,
        )

    def _backbone(self, batch: PackedBatch, **more: Any) -> Any:
        extra = {} if self.forward_mode.backend is None else {"packing": batch.layout}
        return backbone(self.base)(
            input_ids=batch.input_ids_L[None],
            position_ids=batch.position_ids_L[None],
            use_cache=False,
            **extra,
            **more,
        )

    def _own_logits(self, batch: PackedBatch) -> Tensor:
        """[T, V] by the whole model, adapters' virtual tokens included: counted from the end."""
        length = batch.input_ids_L.shape[0]
        with plain_attention(self.model):
            logits = self.model(
                input_ids=batch.input_ids_L[None], use_cache=False, **batch.inputs
            ).logits[0]
        return logits[len(logits) - length :].index_select(0, batch.predictor_T)

    def plain_values(self, group: PromptGroup, k: int) -> Tensor:
        """[t] what ``values`` gives for one completion, through the model as transformers ships it:
        for the self-check."""
        completion = group.completions[k]
        last = completion.num_inputs
        device = self.base.get_input_embeddings().weight.device
        ids = long([group.prompt_ids, completion.token_ids[: last + 1]]).to(device)
        inputs: dict[str, Any] = {n: torch.as_tensor(v).to(device) for n, v in group.inputs.items()}
        if "logits_to_keep" in inspect.signature(self.base.forward).parameters:
            inputs["logits_to_keep"] = last + 1
        with plain_attention(self.model):
            logits = self.model(input_ids=ids[None, :-1], use_cache=False, **inputs).logits[0]
        trained = torch.from_numpy(completion.trained).to(device)
        logits_TV = logits[len(logits) - last - 1 :][trained] / self.transform.temperature
        logps_TV = torch.log_softmax(
            logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32)), dim=-1
        )
        return logps_TV.gather(1, ids[len(group.prompt_ids) :][trained, None]).squeeze(1)


def _depth(mode: ForwardMode) -> int:
    """Steps down to it."""
    return (mode.mode == "single") + mode.own_logits


def output_name(output: Any) -> str:
    """Under which an output of the forward is read."""
    return output if isinstance(output, str) else str(output.name)


def _output(output: Any) -> Any:
    if not isinstance(output, str):
        return output
    if output not in OUTPUTS:
        raise ValueError(
            f"A loss asks the forward for {output!r}; it knows {', '.join(OUTPUTS)}, or an object "
            "with a name that is called with a HeadInput."
        )
    return OUTPUTS[output]


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode (dropout off); afterwards each of its parts is in the mode
    that it was in."""
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


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
    plain = plain_name(base_model(model))
    with _attention(model, plain, instead_of=(attention.SEGMENT_NAME, attention.FLEX_NAME)):
        yield


def plain_name(base: Any) -> str:
    """The attention that transformers would take for the model."""
    return "sdpa" if getattr(base, "_supports_sdpa", False) else "eager"


@contextmanager
def _attention(model: nn.Module, name: str, *, instead_of: tuple[str, ...]) -> Iterator[None]:
    base = base_model(model)
    own = base.config.get_text_config()._attn_implementation
    if own not in instead_of:
        yield
        return
    base.set_attn_implementation(name)
    try:
        yield
    finally:
        base.set_attn_implementation(own)


# ---- a reference: the policy as it was, by one of two ways that give the same log-probs: a frozen
# copy of the weights, or under LoRA the base model itself, with the adapters switched off


def frozen_copy(policy: Policy, *, compute: torch.dtype | None = None) -> Policy:
    """The same policy with weights of its own that never get a gradient, in eval mode.

    ``compute``: weights of linear layers are held in this dtype, which is what autocast would cast
    them to in every forward: bit-identical log-probs from half the memory. None keeps every weight
    as it is.
    """
    twin = policy.around(
        copy.deepcopy(policy.model), device_type=next(policy.parameters()).device.type
    )
    return freeze(twin, compute=compute)


def freeze(policy: Policy, *, compute: torch.dtype | None = None) -> Policy:
    """No gradients, eval mode, linear weights in ``compute``. Tied weights are left alone: the
    embedding reads them as they are."""
    policy.requires_grad_(False)
    policy.eval()
    if compute is None:
        return policy
    tied = {id(m.weight) for m in policy.modules() if isinstance(m, nn.Embedding)}
    for weight in [m.weight for m in policy.modules() if type(m) is nn.Linear]:
        if id(weight) not in tied and weight.dtype == torch.float32:
            weight.data = weight.data.to(compute)
    return policy


def has_adapters(model: nn.Module) -> bool:
    """Whether peft wraps the model."""
    return hasattr(model, "peft_config")


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Inside, the model is its base, in eval mode (dropout off)."""
    with in_eval_mode(model), model.disable_adapter():
        yield


def weights_digest(model: nn.Module) -> str:
    """blake2b over name, shape, dtype and bytes of every weight but the adapters', the same for a
    base with and without adapters around it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_base_weights(model).items()):
        flat = tensor.detach().reshape(-1).cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    if not has_adapters(model):
        return dict(model.named_parameters())
    return {
        n.replace("base_model.model.", "", 1).replace(".base_layer.", "."): p
        for n, p in model.named_parameters()
        if ".lora_" not in n and ".modules_to_save." not in n
    }
