"""The engine in the training process: any device, no other library, the policy's own forward.

Each prompt is computed once for all its completions, in packed rows. Then all running completions
take one token per forward; a finished one leaves at once and a waiting one takes its slot. Who
enters when depends on the requests alone (never on time or free memory), so the same requests under
the same weights give the same completions, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from posttrain.models.load import end_token_ids
from posttrain.models.logprobs import LogitTransform, logit_transform
from posttrain.models.policy import Policy
from posttrain.packing.batch import Layout, Segments
from posttrain.packing.decode import DecodeLayout
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
from posttrain.rollout.weights import SamplingWeights


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


class RecordingCache(Cache):
    """Keeps what each layer computes for a packed row and changes nothing: keys and values [1, kv
    heads, L, D] by layer."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.recorded: dict[int, tuple[Tensor, Tensor]] = {}

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

    def fill(
        self,
        slot: int,
        recorded: dict[int, tuple[Tensor, Tensor]],
        spans: Sequence[tuple[int, int]],
    ) -> None:
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


@dataclass(frozen=True, kw_only=True)
class _Prefilled:
    """A request whose prompt and prefixes are computed: a recorded row, and the spans of it that
    each completion starts with."""

    recorded: dict[int, tuple[Tensor, Tensor]]
    spans: list[list[tuple[int, int]]]
    """[completion] -> spans, in order."""


class LocalEngine:
    """Draws from ``policy``. ``refresh`` after every update of its weights.

    ``compute``: dtype of the matrix products, as in training (autocast's). Raises ValueError for a
    model that cannot run packed (``models/policy.py`` says which): sample from those with the vLLM
    engine.
    """

    is_reproducible = True

    def __init__(
        self,
        policy: Policy,
        *,
        compute: torch.dtype,
        stop_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        config: LocalConfig | None = None,
    ) -> None:
        """``decode``: ids to text, for stop strings."""
        if policy.forward_mode.backend is None:
            why = policy.forward_mode.reason
            raise ValueError(f"This model cannot be sampled here: {why}. Use a vLLM server.")
        self._policy = policy
        self._config = config or LocalConfig()
        self.stop_ids, self._decode = tuple(stop_ids), decode
        self._transform: LogitTransform = replace(logit_transform(policy.config), temperature=1.0)
        self._weights = SamplingWeights(policy, compute=compute)
        self.version = 0
        """Updates that the weights have seen."""
        self.kv_dtype = self._weights.compute
        self.prefill_tokens = policy.packing.max_tokens
        """Most tokens of a row of prompts."""
        self.device = next(policy.parameters()).device

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
        stop = StopRule(sampling, self.stop_ids, self._decode)
        self._check_lengths(requests, sampling)
        with self._weights.sampling():
            return _Run(self, requests, sampling, stop, on_finished).to_the_end()

    def _check_lengths(self, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        longest = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens
        shortest = min(len(r.prompt_ids) for r in requests)
        limit = self._policy.forward_mode.length_limit
        if limit is not None and shortest <= limit < longest:
            raise ValueError(
                f"This model has other positions above {limit} tokens: {shortest} and {longest} "
                "cannot be sampled together. Lower sampling.max_tokens, or use a vLLM server."
            )
        check_positions(self._policy.config, longest)

    def slots(self, completions: int, capacity: int) -> int:
        """How many of ``completions``, of at most ``capacity`` tokens, run at the same time."""
        config = self._policy.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        each = 2 * config.num_hidden_layers * heads * width * capacity * self.kv_dtype.itemsize
        fit = int(self._config.kv_cache_gb * 1e9 // each)
        if fit < 1:
            raise ValueError(
                f"Keys and values of {capacity} tokens take {each / 1e9:.2f} GB, the budget is "
                f"{self._config.kv_cache_gb:g} GB. Raise kv_cache_gb or lower sampling.max_tokens."
            )
        return min(fit, self._config.max_rows, completions)

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


class _Run:
    """One call of ``generate``."""

    def __init__(
        self,
        engine: LocalEngine,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        stop: StopRule,
        on_finished: OnFinished | None,
    ) -> None:
        self._engine, self._requests, self._sampling, self._stop = engine, requests, sampling, stop
        self._on_finished = on_finished
        self._results: list[list[Any]] = [[None] * len(r.seeds) for r in requests]
        self._waiting = [(i, k) for i, r in enumerate(requests) for k in range(len(r.seeds))][::-1]
        self._prefilled: dict[int, _Prefilled] = {}
        self._rows: list[_Row] = []
        capacity = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens
        slots = engine.slots(len(self._waiting), capacity)
        self._cache = SlotCache(slots=slots, capacity=capacity, dtype=engine.kv_dtype)

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
            request, done = self._requests[i], self._prefilled[i]
            prefix = request.prefixes[k] if request.prefixes else ()
            self._cache.fill(len(self._rows), done.recorded, done.spans[k])
            self._rows.append(
                _Row(
                    request=i,
                    completion=k,
                    seed=request.seeds[k],
                    prefix=prefix,
                    length=sum(end - start for start, end in done.spans[k]),
                    next_input=prefix[-1] if prefix else request.prompt_ids[-1],
                )
            )
        next_one = {i for i, _ in self._waiting[-1:]}  # of the others all completions run
        self._prefilled = {i: done for i, done in self._prefilled.items() if i in next_one}

    def _prefill(self, wanted: Sequence[int]) -> None:
        """Prompts and prefixes without their last token, which is the first input of the decoding;
        several to a row."""
        rows: list[list[int]] = [[]]
        tokens = 0
        for i in wanted:
            request = self._requests[i]
            own = len(request.prompt_ids) + sum(map(len, request.prefixes))
            if rows[-1] and tokens + own > self._engine.prefill_tokens:
                rows.append([])
                tokens = 0
            rows[-1].append(i)
            tokens += own
        for row in rows:
            self._prefill_row(row)

    def _prefill_row(self, wanted: Sequence[int]) -> None:
        row = Segments()
        spans: dict[int, list[list[tuple[int, int]]]] = {}
        for i in wanted:
            request = self._requests[i]
            n = len(request.prompt_ids)
            prompt = request.prompt_ids if any(request.prefixes) else request.prompt_ids[:-1]
            start = row.add_segment(prompt, first_position=0, prefix=-1)
            of_prompt = len(row.lengths) - 1
            spans[i] = []
            for prefix in request.prefixes or [()] * len(request.seeds):
                own = [(start, start + (n if prefix else n - 1))]
                if len(prefix) > 1:
                    at = row.add_segment(prefix[:-1], first_position=n, prefix=of_prompt)
                    own.append((at, len(row)))
                spans[i].append(own)
        cache = RecordingCache()
        if len(row):
            ids, positions = row.ids[None], row.positions[None]
            device = self._engine.device
            self._engine.hidden(ids.to(device), positions.to(device), cache, row.layout)
        for i in wanted:
            self._prefilled[i] = _Prefilled(recorded=cache.recorded, spans=spans[i])

    def _step(self) -> None:
        """One token for every running completion."""
        rows, device = self._rows, self._engine.device
        lengths = torch.tensor([r.length for r in rows], device=device)
        num_keys = self._cache.begin_step(lengths, max(r.length for r in rows) + 1)
        inputs = torch.tensor([[r.next_input] for r in rows], device=device)
        layout = DecodeLayout(num_keys_B=lengths + 1, longest=num_keys)
        hidden = self._engine.hidden(inputs, lengths[:, None], self._cache, layout)
        drawn = draw(
            self._engine.logits(hidden[:, 0]),
            self._sampling,
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
            reason = self._stop.reason(row.prefix, row.token_ids)
            if reason is not None:
                finished.add(b)
                self._finish(row, reason)
        self._close_gaps(finished)

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        sampled = Sampled(
            token_ids=tuple(row.token_ids),
            logps=tuple(row.logps),
            finish_reason=reason,
            policy_version=self._engine.version,
            kept_ids=tuple(row.kept_ids) if row.kept_ids else None,
        )
        self._results[row.request][row.completion] = sampled
        if self._on_finished is not None:
            self._on_finished(row.request, row.completion, sampled)

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
