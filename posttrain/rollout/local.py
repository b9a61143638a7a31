"""The engine in the training process: any device, no other library, the policy's own forward.

Each prompt is computed once for all its completions, in packed rows. Then all running completions
take one token per forward; a finished one leaves at once and a waiting one takes its slot. Who
enters when depends on the requests alone (never on time or free memory), so the same requests under
the same weights give the same completions, bit for bit.

It samples with the training model itself, or with a copy in the compute dtype. Training in bfloat16
keeps float32 weights and casts them in every forward; decoding makes hundreds of forwards between
two updates. So the copy holds what autocast would cast to (the same log-probs), LoRA merged in.
Every other weight is shared with the training model: nothing is held twice that is not cast. On a
CPU the copy is in oneDNN's blocked layout, which products with few rows read a fifth faster.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from posttrain.models.load import end_token_ids
from posttrain.models.logprobs import LogitTransform, logit_transform
from posttrain.models.policy import Policy, in_eval_mode
from posttrain.packing.attention import DecodeLayout
from posttrain.packing.batch import Layout, Segments
from posttrain.resolve import check_rules, settings
from posttrain.rollout.engine import (
    Engine,
    FinishReason,
    OnFinished,
    Request,
    Sampled,
    SamplingConfig,
    StopRule,
    check_positions,
    draw,
)
from posttrain.rollout.handover import Receipt

log = logging.getLogger(__name__)


class SamplingWeights:
    """``model`` under the policy's present weights, as of the last ``refresh``."""

    def __init__(self, policy: Policy, *, compute: torch.dtype) -> None:
        self._live = policy.base
        self.compute = compute
        self._casts = any(_is_cast(m, compute) for m in self._live.modules())
        self._pairs: list[tuple[Any, SamplingLinear]] = []
        self.model: Any = self._copy() if self._casts else self._live
        self.refresh()

    def _copy(self) -> nn.Module:
        """A model whose own weights are only those that are cast."""
        shared: dict[int, Any] = {
            id(t): t for t in (*self._live.parameters(), *self._live.buffers())
        }
        twin = copy.deepcopy(self._live, shared)
        merged: tuple[str, ...] = ()
        for name, module in self._live.named_modules():
            if name.startswith(merged):
                continue
            if _is_mergeable(module):
                merged += (f"{name}.",)
            elif not _is_cast(module, self.compute):
                continue
            linear = SamplingLinear(getattr(module, "base_layer", module), self.compute)
            parent, _, attribute = name.rpartition(".")
            setattr(twin.get_submodule(parent), attribute, linear)
            self._pairs.append((module, linear))
        return twin.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the present weights."""
        for module, linear in self._pairs:
            linear.take(_merged_weight(module))

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """[B, V] the head on hidden states, before the family's transform."""
        head = self.model.get_output_embeddings()
        if type(head) is nn.Linear:
            hidden_BH = hidden_BH.to(head.weight.dtype)
        with torch.autocast(hidden_BH.device.type, dtype=self.compute, enabled=self._casts):
            return head(hidden_BH)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Inside, no gradients and no dropout."""
        kind = next(self._live.parameters()).device.type
        autocast = torch.autocast(kind, dtype=self.compute, enabled=self._casts)
        with in_eval_mode(self._live), torch.no_grad(), autocast:
            yield


class SamplingLinear(nn.Module):
    """``base`` in the compute dtype; its bias is the training model's."""

    def __init__(self, base: nn.Module, compute: torch.dtype) -> None:
        super().__init__()
        self._base: list[Any] = [base]  # in a list: the training layer is no part of this model
        self._compute = compute
        on_cpu = next(base.parameters()).device.type == "cpu"
        self._blocked = on_cpu and compute == torch.bfloat16 and blocked_products_work()
        self.weight = torch.empty(0)

    def take(self, weight: Tensor) -> None:
        """From now on computes with these values."""
        self.weight = torch.empty(0)  # frees the last ones
        weight = weight.detach().to(self._compute)
        self.weight = _reorder(weight) if self._blocked else weight

    def forward(self, input_H: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        product = _blocked_linear if self._blocked else nn.functional.linear
        bias = self._base[0].bias
        bias = None if bias is None else bias.to(self._compute)
        return product(input_H.to(self._compute), self.weight, bias)


EXPECTED_ROWS = 64
"""Rows of the products that the blocked layout is made for; others are right as well."""


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, EXPECTED_ROWS)


def _blocked_linear(input_H: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input_H, weight, bias, "none", [], "")


@cache
def blocked_products_work() -> bool:
    """Whether oneDNN's blocked bfloat16 layout works on this CPU, found out by one small product.

    The two operators are private to torch and exist on every x86 build; on a CPU with neither
    AVX-512 nor avx_ne_convert they raise. Without them the same numbers come from torch's own
    layout, which is read more slowly.
    """
    ones = torch.ones(64, 64, dtype=torch.bfloat16)
    try:
        return bool((_blocked_linear(ones[:2], _reorder(ones), None) == 64).all())
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        log.info("sampling reads bfloat16 weights in torch's own layout: %s", reason)
        return False


def _is_cast(module: nn.Module, compute: torch.dtype) -> bool:
    """A plain linear layer that autocast would cast (also an output head that shares the
    embedding's weight)."""
    is_16_bit = compute in (torch.bfloat16, torch.float16)
    return type(module) is nn.Linear and module.weight.dtype == torch.float32 and is_16_bit


def _is_mergeable(module: Any) -> bool:
    """A LoRA layer on a plain linear one, without DoRA."""
    return (
        hasattr(module, "lora_A")
        and type(getattr(module, "base_layer", None)) is nn.Linear
        and not getattr(module, "fan_in_fan_out", False)
        and not any(getattr(module, "use_dora", {}).values())
        and not getattr(module, "merged_adapters", [])
    )


def _merged_weight(module: Any) -> Tensor:
    if type(module) is nn.Linear:
        return module.weight
    weight = module.base_layer.weight
    if not module.disable_adapters:
        for name in module.active_adapters:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight


@settings
class LocalConfig:
    """Memory and speed of sampling in the training process; never what is sampled."""

    max_rows: int = 64
    """Most completions that run at the same time."""
    kv_cache_gb: float = 4.0
    """Most memory of their keys and values, 10^9 bytes; fewer completions run at the same time
    where it is too little."""

    def __post_init__(self) -> None:
        check_rules("local", self, "max_rows >= 1", "kv_cache_gb > 0")


Recorded = dict[int, tuple[Tensor, Tensor]]
"""{layer: keys and values of a row}"""


class RecordingCache(Cache):
    """Keeps what each layer computes for a packed row and changes nothing: keys and values [1, kv
    heads, L, D] by layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.recorded: Recorded = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer."""
        self.recorded[layer_idx] = (key_states, value_states)
        return key_states, value_states


ROOM_STEP = 64
"""Tokens by which slots grow. A decode step reads slots whole, masked: a part of them would be
copied by every product (15 % of a step's time on a CPU)."""


class SlotCache(Cache):
    """Keys and values of sequences that grow, one slot for each, dense at the front: [2, slots, kv
    heads, room, D] by layer. The room grows with the longest row, up to ``capacity``."""

    def __init__(self, *, slots: int, capacity: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.slots, self._capacity, self._dtype, self._room = slots, capacity, dtype, 0
        self._stores: dict[int, Tensor] = {}
        self._lengths_B = torch.zeros(0, dtype=torch.long)

    def _store(self, layer: int, like: Tensor) -> Tensor:
        if layer not in self._stores:
            shape = (2, self.slots, like.shape[1], self._room, like.shape[-1])
            self._stores[layer] = like.new_zeros(shape, dtype=self._dtype)
        return self._stores[layer]

    def _grow(self, longest: int) -> None:
        """Room for sequences of ``longest`` tokens."""
        if longest > self._room:
            before = self._room
            self._room = min(-(-longest // ROOM_STEP) * ROOM_STEP, self._capacity)
            for layer, store in self._stores.items():
                self._stores[layer] = F.pad(store, (0, 0, 0, self._room - before))

    def fill(self, slot: int, recorded: Recorded, spans: Sequence[tuple[int, int]]) -> None:
        """Copies the given spans of a recorded row, one after the other, to the start of a slot."""
        self._grow(sum(end - start for start, end in spans) + 1)
        for layer, both in recorded.items():
            for store, states in zip(self._store(layer, both[0]), both, strict=True):
                at = 0
                for start, end in spans:
                    store[slot, :, at : at + end - start] = states[0, :, start:end]
                    at += end - start

    def move(self, source: int, target: int, length: int) -> None:
        """Slot ``source`` takes the place of ``target``."""
        for store in self._stores.values():
            store[:, target, :, :length] = store[:, source, :, :length]

    def begin_step(self, lengths_B: Tensor, longest: int) -> int:
        """The next forward appends one token to each of the first B slots, which are
        ``lengths_B`` long; ``longest`` counts it. Returns the keys it sees."""
        self._grow(longest)
        self._lengths_B = lengths_B
        return self._room

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by every attention layer with [B, kv heads, 1, D]; returns views of the rows'
        slots."""
        store = self._store(layer_idx, key_states)
        rows_B = torch.arange(len(self._lengths_B), device=store.device)
        store[0, rows_B, :, self._lengths_B] = key_states[:, :, 0].to(store.dtype)
        store[1, rows_B, :, self._lengths_B] = value_states[:, :, 0].to(store.dtype)
        return store[0, : len(rows_B)], store[1, : len(rows_B)]


@dataclass(kw_only=True)
class _Row:
    """A completion that is being drawn."""

    request: int
    completion: int
    seed: int
    prefix: tuple[int, ...]
    length: int
    """Tokens in its slot."""
    next_input: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    kept_ids: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Index in its completion of the token that is drawn next."""
        return len(self.prefix) + len(self.token_ids)


@dataclass
class LocalEngine:
    """Draws from ``policy``. ``refresh`` after every update of its weights.

    Raises ValueError for a model that cannot run packed (``models/policy.py`` says which): sample
    from those with the vLLM engine.
    """

    policy: Policy
    _: KW_ONLY
    compute: torch.dtype
    """Of the matrix products, as in training (autocast's)."""
    stop_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str] | None = None
    """Ids to text, for stop strings."""
    config: LocalConfig = field(default_factory=LocalConfig)
    version: int = 0
    """Updates that the weights have seen."""
    is_reproducible = True

    def __post_init__(self) -> None:
        mode = self.policy.forward_mode
        if mode.backend is None:
            raise ValueError(
                f"This model cannot be sampled here: {mode.reason}. Use a vLLM server."
            )
        transform = logit_transform(self.policy.config)
        self._transform: LogitTransform = replace(transform, temperature=1.0)
        self._weights = SamplingWeights(self.policy, compute=self.compute)
        self.device = next(self.policy.parameters()).device

    def refresh(self, version: int) -> Receipt:
        """From now on samples come from the policy's present weights, which are the result of
        ``version`` updates. They are the trainer's own tensors: nothing is handed over."""
        self._weights.refresh()
        self.version = version
        return Receipt(version=version)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        on_finished: OnFinished | None = None,
    ) -> list[list[Sampled]]:
        """[request][completion]; see ``engine.Engine``."""
        if not requests:
            return []
        stop = StopRule(sampling, self.stop_ids, self.decode)
        self._check_lengths(requests, sampling)
        with self._weights.sampling():
            return _Run(self, requests, sampling, stop, on_finished).to_the_end()

    def _check_lengths(self, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        longest = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens
        shortest = min(len(r.prompt_ids) for r in requests)
        limit = self.policy.forward_mode.length_limit
        if limit is not None and shortest <= limit < longest:
            raise ValueError(
                f"This model has other positions above {limit} tokens: {shortest} and {longest} "
                "cannot be sampled together. Lower sampling.max_tokens, or use a vLLM server."
            )
        check_positions(self.policy.config, longest)

    def slots(self, completions: int, capacity: int) -> int:
        """How many of ``completions``, of at most ``capacity`` tokens, run at the same time."""
        config = self.policy.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * heads * width * capacity * self.compute.itemsize
        fit = int(self.config.kv_cache_gb * 1e9 // each)
        if fit < 1:
            raise ValueError(
                f"Keys and values of {capacity} tokens take {each / 1e9:.2f} GB, the budget is "
                f"{self.config.kv_cache_gb:g} GB. Raise kv_cache_gb or lower sampling.max_tokens."
            )
        return min(fit, self.config.max_rows, completions)

    def hidden(
        self, ids: Tensor, positions: Tensor, cache: Any, layout: Layout | DecodeLayout
    ) -> Tensor:
        """[rows, tokens, H] the backbone's last hidden states."""
        decoder = self._weights.model.get_decoder()
        output = decoder(
            input_ids=ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            packing=layout,
        )
        return output.last_hidden_state

    def logits(self, hidden_BH: Tensor) -> Tensor:
        """[B, V] in at least float32, after the family's transform, at temperature 1."""
        logits = self._weights.logits(hidden_BH)
        with torch.autocast(hidden_BH.device.type, enabled=False):
            return self._transform.apply(
                logits.to(torch.promote_types(logits.dtype, torch.float32))
            )


@dataclass
class _Run:
    """One call of ``generate``."""

    engine: LocalEngine
    requests: Sequence[Request]
    sampling: SamplingConfig
    stop: StopRule
    on_finished: OnFinished | None

    def __post_init__(self) -> None:
        self._results: list[list[Any]] = [[None] * len(r.seeds) for r in self.requests]
        order = [(i, k) for i, r in enumerate(self.requests) for k in range(len(r.seeds))]
        self._waiting = order[::-1]
        self._prefilled: dict[int, tuple[Recorded, list[list[tuple[int, int]]]]] = {}
        """Requests whose prompt and prefixes are computed: a recorded row, and the spans of it that
        each completion starts with."""
        self._rows: list[_Row] = []
        capacity = max(len(r.prompt_ids) for r in self.requests) + self.sampling.max_tokens
        slots = self.engine.slots(len(order), capacity)
        self._cache = SlotCache(slots=slots, capacity=capacity, dtype=self.engine.compute)

    def to_the_end(self) -> list[list[Sampled]]:
        """[request][completion], once all are drawn."""
        while self._waiting or self._rows:
            self._admit()
            self._step()
        return self._results

    def _admit(self) -> None:
        """Waiting completions, first come first served, into the free slots behind the running
        ones."""
        free = self._cache.slots - len(self._rows)
        entering = [self._waiting.pop() for _ in range(min(free, len(self._waiting)))]
        self._prefill([i for i in dict(entering) if i not in self._prefilled])
        for i, k in entering:
            request, (recorded, spans) = self.requests[i], self._prefilled[i]
            prefix = request.prefixes[k]
            self._cache.fill(len(self._rows), recorded, spans[k])
            self._rows.append(
                _Row(
                    request=i,
                    completion=k,
                    seed=request.seeds[k],
                    prefix=prefix,
                    length=sum(end - start for start, end in spans[k]),
                    next_input=prefix[-1] if prefix else request.prompt_ids[-1],
                )
            )
        next_one = {i for i, _ in self._waiting[-1:]}  # of the others all completions run
        self._prefilled = {i: done for i, done in self._prefilled.items() if i in next_one}

    def _prefill(self, wanted: Sequence[int]) -> None:
        """Prompts and prefixes without their last token, which is the first input of the decoding;
        several to a row."""
        row, spans = Segments(), dict[int, list[list[tuple[int, int]]]]()
        for i in wanted:
            request = self.requests[i]
            own = len(request.prompt_ids) + sum(map(len, request.prefixes))
            if spans and len(row) + own > self.engine.policy.packing.max_tokens:
                self._compute(row, spans)
                row, spans = Segments(), {}
            spans[i] = _add(row, request)
        self._compute(row, spans)

    def _compute(self, row: Segments, spans: Mapping[int, list[list[tuple[int, int]]]]) -> None:
        cache = RecordingCache()
        if len(row):
            ids, positions = row.ids[None], row.positions[None]
            device = self.engine.device
            self.engine.hidden(ids.to(device), positions.to(device), cache, row.layout)
        for i, its in spans.items():
            self._prefilled[i] = cache.recorded, its

    def _step(self) -> None:
        """One token for every running completion."""
        rows, device = self._rows, self.engine.device
        lengths = torch.tensor([r.length for r in rows], device=device)
        num_keys = self._cache.begin_step(lengths, max(r.length for r in rows) + 1)
        inputs = torch.tensor([[r.next_input] for r in rows], device=device)
        layout = DecodeLayout(num_keys_B=lengths + 1, longest=num_keys)
        hidden = self.engine.hidden(inputs, lengths[:, None], self._cache, layout)
        drawn = draw(
            self.engine.logits(hidden[:, 0]),
            self.sampling,
            seeds=[r.seed for r in rows],
            positions=[r.position for r in rows],
        )
        tokens, logps = drawn.token_ids_B.tolist(), drawn.logps_B.tolist()
        finished: set[int] = set()
        for b, row in enumerate(rows):
            row.length += 1
            row.next_input = tokens[b]
            row.token_ids.append(tokens[b])
            row.logps.append(logps[b])
            if drawn.kept_BV is not None:
                row.kept_ids.append(tuple(drawn.kept_BV[b].nonzero()[:, 0].tolist()))
            reason = self.stop.reason(row.prefix, row.token_ids)
            if reason is not None:
                finished.add(b)
                self._finish(row, reason)
        self._close_gaps(finished)

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        sampled = Sampled(
            token_ids=tuple(row.token_ids),
            logps=tuple(row.logps),
            finish_reason=reason,
            policy_version=self.engine.version,
            kept_ids=tuple(row.kept_ids) or None,
        )
        self._results[row.request][row.completion] = sampled
        if self.on_finished is not None:
            self.on_finished(row.request, row.completion, sampled)

    def _close_gaps(self, gone: set[int]) -> None:
        """The last running rows move into the slots of those that left."""
        last = len(self._rows) - 1
        for b in sorted(gone):
            while last in gone:
                last -= 1
            if b >= last:
                break
            self._cache.move(last, b, self._rows[last].length)
            self._rows[b] = self._rows[last]
            last -= 1
        del self._rows[len(self._rows) - len(gone) :]


def _add(row: Segments, request: Request) -> list[list[tuple[int, int]]]:
    """[completion] the spans of the row, in order, that it starts with."""
    n, spans = len(request.prompt_ids), []
    prompt = request.prompt_ids if any(request.prefixes) else request.prompt_ids[:-1]
    start = row.add_segment(prompt, first_position=0, prefix=-1)
    of_prompt = len(row.lengths) - 1
    for prefix in request.prefixes:
        spans.append([(start, start + (n if prefix else n - 1))])
        if len(prefix) > 1:
            at = row.add_segment(prefix[:-1], first_position=n, prefix=of_prompt)
            spans[-1].append((at, len(row)))
    return spans


def local_engine(
    policy: Policy, tokenizer: Any, config: LocalConfig, *, compute: torch.dtype
) -> Engine:
    """The engine in this process; ``compute``: the dtype of training's matrix products."""
    return LocalEngine(
        policy,
        compute=compute,
        stop_ids=end_token_ids(policy.base, tokenizer),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        config=config,
    )
