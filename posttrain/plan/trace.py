"""The real forward and backward on fake tensors: what they hold beside weights and gradients.

Fake tensors have a shape, a dtype and a storage without bytes, so a step of any model runs in
seconds and counts what the code does. Only the first layers run, every kind of layer at least
twice; what a layer adds and frees is then replayed for all layers. Of the chunks of logits only the
first two and the last run: the others are like the second.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal
from unittest import mock
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from posttrain import blocks
from posttrain.losses.distillation import TeacherDivergence, distillation
from posttrain.losses.policy import clipped
from posttrain.losses.preference import dpo
from posttrain.losses.reward import bradley_terry
from posttrain.losses.sft import sft
from posttrain.models import logprobs
from posttrain.models.dropout import base_model
from posttrain.models.heads import Scorer
from posttrain.models.policy import Policy, freeze, plain_attention
from posttrain.packing import attention
from posttrain.packing.batch import pack
from posttrain.packing.plan import PackingConfig, plan_step
from posttrain.plan.states import decoder_layers
from posttrain.precision import PrecisionPlan, torch_dtype
from posttrain.rollout.local import RecordingCache
from posttrain.training.step import step_gradient
from posttrain.types import SCORE_SLOT, Completion, PromptGroup

Method = Literal["sft", "reward", "dpo", "rl"]
Device = Literal["cpu", "cuda"]
LOSSES: dict[Method, Any] = {"sft": sft, "reward": bradley_terry, "dpo": dpo, "rl": clipped}
CATEGORIES = ("weights", "gradients", "activations", "recomputed", "casts", "logits", "temporaries")
"""recomputed: by gradient checkpointing in the backward. casts: weights in the compute dtype.
logits: [tokens, V]. temporaries: the rest, mostly gradients of activations."""


@dataclass
class Segment:
    """Bytes by category between two marks of a trace."""

    name: tuple[str, int]
    start: Counter[str]
    peak: Counter[str]
    end: Counter[str] = field(default_factory=Counter)


class LiveStorages(TorchDispatchMode):
    """``with LiveStorages() as live: ...`` counts the storages that operators make or read inside.

    One storage counts once, however many views it has, from its first operator until it is freed.
    What a kernel takes and gives back while it runs is not seen. ``vocabulary``: tensors with so
    many columns are logits.
    """

    def __init__(self, *, vocabulary: int = 0) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._vocabulary = vocabulary
        self._held: Counter[str] = Counter()
        self._known: dict[int, tuple[int, str, Any]] = {}
        self._total = self._highest = 0
        self.next_mark = ""
        """Of a mark at the next operator."""
        self.mark("start")

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once since the last ``mark``."""
        return self._highest

    def mark(self, name: str, index: int = 0) -> None:
        """Ends a segment and begins the next one."""
        if self.segments:
            self.segments[-1].end = self._held.copy()
        self.segments.append(Segment((name, index), self._held.copy(), self._held.copy()))
        self._highest = self._total

    def own(self, tensor: Tensor, category: str) -> None:
        """Counts a tensor made elsewhere, or gives a known one another category."""
        storage = tensor.untyped_storage()
        size, before, weak = self._known.get(id(storage)) or self._add(storage, category)
        self._held[before] -= size
        self._held[category] += size
        self._known[id(storage)] = (size, category, weak)

    def watch(self, model: nn.Module) -> None:
        """Parameters and buffers are weights (a tied one once); their gradients are told from
        other results of the backward."""
        for p in model.parameters():
            for tensor in (p, *storages_4bit(p)):
                self.own(tensor, "weights")
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(
                    lambda p: self.own(p.grad, "gradients") if p.grad is not None else None
                )
        for buffer in model.buffers():
            self.own(buffer, "weights")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.next_mark:
            self.mark(self.next_mark)
            self.next_mark = ""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter((args, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                known = self._known.get(id(storage))
                if known is None:
                    self._add(storage, self._category(tensor, func, args))
                elif known[0] != storage.nbytes():  # resized
                    self._known[id(storage)] = (storage.nbytes(), *known[1:])
                    self._change(known[1], storage.nbytes() - known[0])
        return result

    def _category(self, tensor: Tensor, func: Any, args: Any) -> str:
        if func is torch.ops.aten._to_copy.default:
            source = self._known.get(id(args[0].untyped_storage()))
            if source is not None and source[1] == "weights":
                return "casts"
        if self._vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary:
            return "logits"
        if in_backward():
            return "recomputed" if torch.is_grad_enabled() else "temporaries"
        return "activations" if torch.is_grad_enabled() else "temporaries"

    def _add(self, storage: Any, category: str) -> tuple[int, str, Any]:
        key = id(storage)

        def gone(_: Any) -> None:
            size, category, _ = self._known.pop(key)
            self._change(category, -size)

        self._known[key] = (storage.nbytes(), category, ref(storage, gone))
        self._change(category, storage.nbytes())
        return self._known[key]

    def _change(self, category: str, size: int) -> None:
        self._held[category] += size
        self._total += size
        if self._total > self._highest:
            self._highest, self.segments[-1].peak = self._total, self._held.copy()


def in_backward() -> bool:
    """Whether autograd runs a backward, recomputation included."""
    return torch._C._current_graph_task_id() != -1


def storages_4bit(weight: Any) -> list[Tensor]:
    """The tensors beside a weight in 4 bit; none of another weight."""
    state = getattr(weight, "quant_state", None)
    parts = () if state is None else (state, state.state2)
    return [t for part in parts for t in vars(part).values() if isinstance(t, Tensor)]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the bytes of a forward and backward of a model."""

    method: Method
    packing: PackingConfig
    """The row fills ``max_tokens``."""
    precision: PrecisionPlan
    completions: int = 1
    """To a prompt in a full row."""
    checkpointing: bool = False
    gathered: bool = False
    """Sharded weights, which arrive in the compute dtype."""
    device: Device = "cpu"
    """Whose dtype rules and fused attention are applied."""
    temperature: float = 1.0
    teachers: tuple[nn.Module, ...] = field(default=(), repr=False)
    """Models on the meta device whose logits the student's are compared with (distillation)."""
    trains: bool = True
    """False: the forward alone, without gradients."""
    every_layer: bool = False
    """Nothing is replayed."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """The worst moment of a forward and backward whose gradients exist already."""

    moment: str
    items: dict[str, int]
    """Bytes beside weights and gradients by category, of those that are not 0."""
    is_estimate: bool
    """Extrapolated in tokens."""

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return sum(self.items.values())


def trace(model: nn.Module, setting: Setting) -> Traced:
    """The worst moment of a model on the meta device, which stays as it is.

    A scan (state-space layers, linear attention) runs token by token or chunk by chunk, so its
    trace at two small counts of tokens is extended in a straight line.
    """
    step, tokens = _scan_step(model), setting.packing.max_tokens
    is_estimate = 0 < 2 * step < tokens
    counts = (step, 2 * step) if is_estimate else (tokens, tokens)
    few, many = (
        _peaks(model, replace(setting, packing=replace(setting.packing, max_tokens=n)))
        for n in counts
    )
    factor = (tokens - counts[1]) / step if is_estimate else 0
    peaks = [
        (name, {n: int(b[n] + factor * (b[n] - a[n])) for n in CATEGORIES})
        for (_, a), (name, b) in zip(few, many, strict=True)
    ]
    moment, worst = max(peaks, key=lambda peak: sum(peak[1].values()))
    items = {n: worst[n] for n in CATEGORIES[2:] if worst[n]}
    return Traced(moment=moment, items=items, is_estimate=is_estimate)


def _scan_step(model: Any) -> int:
    """Tokens of a chunk of a scan, or a few where there are no chunks; 0 without a scan."""
    if not any("A_log" in n or ".dt_" in n for n, _ in model.named_parameters()):
        return 0
    text = model.config.get_text_config()
    chunks = (getattr(text, name, None) for name in ("chunk_size", "mamba_chunk_size"))
    return next((int(c) for c in chunks if c), 64)


@lru_cache(maxsize=256)
def _peaks(model: nn.Module, setting: Setting) -> list[tuple[str, Counter[str]]]:
    """(name, bytes by category) of the peak in every stretch of a forward and backward."""
    precision, compute = setting.precision, torch_dtype(setting.precision.compute)
    stack = decoder_layers(model)
    kinds = [] if stack is None else kinds_of(model, stack[1])
    count = len(kinds) if setting.every_layer else _enough(kinds)
    live = LiveStorages(vocabulary=model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    with ExitStack() as rules:
        for place in (blocks, logprobs):
            rules.enter_context(mock.patch.object(place, "slices", _few_slices))
        for place, name, value in _CUDA_RULES if setting.device == "cuda" else ():
            rules.enter_context(mock.patch.object(place, name, value))
        rules.enter_context(FakeTensorMode())
        rules.enter_context(_Gaps())
        with _cut(model, stack, count):
            twin = twin_of(model, dtype=compute if setting.gathered else None)
        _set_checkpointing(twin, setting.checkpointing)
        policy = (Scorer if setting.method == "reward" else Policy)(
            twin, setting.packing, device_type=setting.device, temperature=setting.temperature
        )
        policy.train(setting.trains)
        live.watch(policy)
        teachers = [_teacher(t, policy, compute, setting) for t in setting.teachers]
        for teacher in teachers:
            live.watch(teacher)
        for p in policy.parameters() if setting.trains else ():
            if p.requires_grad:
                p.grad = torch.empty_like(p)
                live.own(p.grad, "gradients")
        if stack is not None:
            _mark_layers(live, decoder_layers(twin)[1])  # type: ignore[index]
        casts = precision.compute != precision.weight and not setting.gathered
        with live:
            _run(policy, setting, teachers, _OneDevice(compute if casts else None))
    live.mark("done")
    segments = live.segments[:-1]
    if count < len(kinds) and len({s.name for s in segments}) < len(segments):
        return _peaks(model, replace(setting, every_layer=True))  # a layer ran more than once
    return _replay(segments, kinds, count)


def _teacher(model: nn.Module, policy: Policy, compute: torch.dtype, setting: Setting) -> Policy:
    """A frozen model with the first layers: without gradients those after them leave no more."""
    stack = decoder_layers(model)
    with _cut(model, stack, 0 if stack is None else _enough(kinds_of(model, stack[1]))):
        twin = twin_of(model)
    return freeze(policy.around(twin, device_type=setting.device), compute=compute)


def _run(
    policy: Any, setting: Setting, teachers: Sequence[Policy], accelerator: _OneDevice
) -> None:
    """The only call of the step. The reference is a frozen model whose forward holds less."""
    mode, budget = policy.forward_mode.mode, setting.packing.max_tokens
    completions = 1 if mode == "single" else setting.completions
    groups = worst_case(setting.method, budget, completions=completions, shares=mode == "shared")
    plan = plan_step(groups, world_size=1, max_tokens=budget, mode=mode, coupled=True)
    if not setting.trains:
        with torch.no_grad(), accelerator.autocast():
            policy(pack(groups, plan.ranks[0][0].parts, mode=mode))
        return
    reference = None
    if setting.method == "dpo":
        reference = lambda _, batch: torch.zeros(batch.predictor_T.shape[0])  # noqa: E731
    loss = LOSSES[setting.method]
    if teachers:
        forwards = [lambda _, batch, t=t: t.head_input(batch) for t in teachers]
        loss = distillation([(1.0, TeacherDivergence(str(i), f)) for i, f in enumerate(forwards)])
    step_gradient(accelerator, policy, groups, plan, loss, mode=mode, reference=reference)


def worst_case(
    method: Method, max_tokens: int, *, completions: int = 1, shares: bool = True, rows: int = 1
) -> list[PromptGroup]:
    """Groups that fill ``rows`` rows of ``max_tokens`` tokens, all trained but prompts of one
    token; fewer ``completions`` where a row cannot hold so many."""
    room = max_tokens - (1 if shares else completions)
    count = max(1, min(completions, room))
    answers = []
    for k in range(count):
        n = room * (k + 1) // count - room * k // count + 1
        mask = [0] * (n - 1) + [1] if method == "reward" else [1] * n
        rl: dict[str, Any] = {"advantage": 1.0, "sampler_logps": [-1.0] * n}
        answers.append(
            Completion(
                token_ids=[SCORE_SLOT] * n, loss_mask=mask, columns=rl if method == "rl" else {}
            )
        )
    return [
        PromptGroup(prompt_ids=[1], completions=answers, meta={"file": "worst case", "row": row})
        for row in range(rows)
    ]


# ---- the first layers, and all of them

_NUMBERS_A_LAYER = re.compile("idx|index|layer_id|layer_num")


def kinds_of(model: nn.Module, layers: nn.ModuleList) -> list[str]:
    """What tells one layer from another: classes, settings and parameters of its modules; every
    layer is a kind of its own where they share parameters."""
    shared = len(list(layers.named_parameters(remove_duplicate=False)))
    if shared > len(list(layers.parameters())):
        return [str(i) for i in range(len(layers))]
    types = getattr(model.config.get_text_config(), "layer_types", None) or []  # type: ignore[union-attr, operator]

    def settings(module: nn.Module) -> list[Any]:
        return [
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, (int, str)) and not _NUMBERS_A_LAYER.search(name)
        ]

    return [
        str(
            (
                types[i] if i < len(types) else None,
                [(n, type(m), settings(m)) for n, m in layer.named_modules()],
                [(n, p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()],
            )
        )
        for i, layer in enumerate(layers)
    ]


def _enough(kinds: list[str]) -> int:
    """The first layers in which every kind comes twice, or as often as it does, and one more: the
    last layer differs, since what the model's forward holds ends with it."""
    missing = Counter({kind: min(n, 2) for kind, n in Counter(kinds).items()})
    count = 0
    while missing:
        missing -= Counter([kinds[count]])
        count += 1
    return min(count + 1, len(kinds))


@contextmanager
def _cut(model: nn.Module, stack: tuple[str, nn.ModuleList] | None, count: int) -> Iterator[None]:
    """Inside, the model has its first ``count`` layers."""
    if stack is None:
        yield
        return
    place, _, name = stack[0].rpartition(".")
    setattr(model.get_submodule(place), name, stack[1][:count])
    try:
        yield
    finally:
        setattr(model.get_submodule(place), name, stack[1])


def _mark_layers(live: LiveStorages, layers: nn.ModuleList) -> None:
    """Marks where each layer begins, in the forward and in the backward."""
    last = len(layers) - 1

    def begins_backward(tensor: Any, name: str, index: int) -> None:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: live.mark(name, index))

    def before(index: int, args: Any, kwargs: Any) -> None:
        if not in_backward():  # else it is recomputed
            live.mark("forward", index)
            entered = args[0] if args else kwargs.get("hidden_states")
            begins_backward(entered, "backward" if index else "end", max(index - 1, 0))

    def after(output: Any) -> None:
        if not in_backward():
            live.next_mark = "head"  # when the caller has let go of the layer's input
            begins_backward(output[0] if isinstance(output, tuple) else output, "backward", last)

    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True
        )
    layers[last].register_forward_hook(lambda _m, _i, output: after(output))


def _replay(
    segments: list[Segment], kinds: list[str], count: int
) -> list[tuple[str, Counter[str]]]:
    """The peaks with all layers: those that did not run do what the last of their kind did."""
    if count == len(kinds):
        return [(s.name[0], s.peak) for s in segments]
    found = {segment.name: segment for segment in segments}
    latest = {kind: i for i, kind in enumerate(kinds[: count - 1])}
    source = [i if i < count - 1 else latest[kind] for i, kind in enumerate(kinds)]
    if kinds[-1] == kinds[count - 1]:
        source[-1] = count - 1
    order = [("start", 0), *(("forward", i) for i in source), ("head", 0)]
    order += [*(("backward", i) for i in reversed(source)), ("end", 0)]
    level, peaks = Counter[str](), []
    for segment in (found[name] for name in order if name in found):
        peaks.append((segment.name[0], _moved(level, segment.start, segment.peak)))
        level = _moved(level, segment.start, segment.end)
    return peaks


def _moved(level: Counter[str], start: Counter[str], end: Counter[str]) -> Counter[str]:
    return Counter({name: level[name] + end[name] - start[name] for name in CATEGORIES})


# ---- fake tensors, and the rules of a device


def cached_elements(model: nn.Module) -> int:
    """Elements that the cache of the engine in this process keeps of one token, in all layers."""
    cache = RecordingCache()
    with torch.no_grad(), FakeTensorMode(), _Gaps():
        twin, ids = twin_of(model), torch.zeros(1, 2, dtype=torch.long)
        with plain_attention(twin):
            base_model(twin).get_decoder()(
                input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True
            )
    return sum(t.numel() // 2 for pair in cache.recorded.values() for t in pair)


def twin_of(
    model: nn.Module, *, device: str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy with new tensors in the place of its own, on ``device`` (fake ones under the mode);
    parameters are in ``dtype``, where it is given."""
    in_4bit = {id(m.weight): m for m in model.modules() if type(m).__name__ == "Linear4bit"}
    made: dict[int, Any] = {}
    for p in model.parameters():
        if (state := getattr(p, "quant_state", None)) is not None:
            made[id(state)] = None
        own = dtype or p.dtype if state is None else state.dtype
        made[id(p)] = nn.Parameter(
            torch.empty(p.shape, dtype=own, device=device), requires_grad=p.requires_grad
        )
        if id(p) in in_4bit and device == "cpu":
            made[id(p)] = _packed_4bit(in_4bit[id(p)])
    for m in model.modules():
        for t in (*m._buffers.values(), *vars(m).values()):
            if isinstance(t, Tensor):
                made[id(t)] = torch.empty(t.shape, dtype=t.dtype, device=device)
    return copy.deepcopy(model, made)


def _packed_4bit(layer: Any) -> Any:
    """The weight of such a layer as it is once quantised."""
    from bitsandbytes import functional

    with mock.patch.dict(functional.name2qmap, clear=True):  # it would keep the fake tables
        values = torch.empty(layer.out_features, layer.in_features, dtype=layer.weight.dtype)
        packed, state = functional.quantize_4bit(values, compress_statistics=True, quant_type="nf4")
    weight: Any = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    return weight


def _set_checkpointing(model: Any, wanted: bool) -> None:
    base = base_model(model)
    if wanted:
        base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    elif base.is_activation_checkpointing:
        base.activation_checkpointing_disable()


def _few_slices(total: int, size: int, *, slices: Any = blocks.slices) -> list[slice]:
    """The first two and the last: what others hold is what the second one does."""
    every = slices(total, size)
    return every[:2] + every[2:][-1:]


class _Fused(torch.autograd.Function):
    """What a fused attention kernel of a GPU keeps: q, k, v, its output and one number a query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        output = value.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Fused.apply(query, key, value)


_CUDA_RULES: tuple[tuple[Any, str, Any], ...] = (
    (attention, "CPU_FLOAT32_KEYS", 0),
    (blocks, "CPU_BLOCK_ELEMENTS", 2**62),
    (attention, "why_not_flex", lambda *_, **__: None),
    (attention.flex, "attend", _fused),
    (torch.nn.functional, "scaled_dot_product_attention", _fused),
)


class _Gaps(TorchDispatchMode):
    """What fake tensors lack: numbers that Python asks for (a loss), here 1, and a CPU's grouped
    products in float32, [T, H] x [E, H, F] -> [T, F] or [H, T] x [T, F] -> [E, H, F]."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        if func is not torch.ops.aten._grouped_mm.default or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        left, right = args[:2]
        experts = [len(args[2] if len(args) > 2 else kwargs["offs"])] * (right.dim() == 2)
        return left.new_empty((*experts, left.shape[0], right.shape[-1]))


class _OneDevice:
    """What ``step_gradient`` needs of an Accelerator."""

    process_index, num_processes, scaler, distributed_type = 0, 1, None, "NO"
    device = torch.device("cpu")

    def __init__(self, lowered: torch.dtype | None) -> None:
        self._lowered = lowered

    def autocast(self) -> Any:
        lowered = self._lowered
        return nullcontext() if lowered is None else torch.autocast("cpu", dtype=lowered)

    def backward(self, loss: Tensor) -> None:
        (loss / 1).backward()  # accelerate divides by its accumulation steps

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor
