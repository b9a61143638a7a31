"""A server that lies about the weights it was handed is found out before a token is drawn."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from posttrain.models.load import ModelConfig, load_model
from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.handover import (
    FolderHandover,
    NCCLHandover,
    ReceiptError,
    check_probe,
    check_tensors,
    note,
    notes_of,
    probe_ids,
    probe_logps,
)
from posttrain.rollout.vllm import Probe, VLLMConfig, VLLMEngine
from tests.tiny import model_folder
from tests.unit.test_vllm_client import Server

LAYERS, WIDTH, VOCABULARY, PROBE = 3, 4, 8, (1, 5, 2, 7, 0, 3)
LIES = {
    "drops a tensor": lambda old, new, r: {n: new[n] for n in r.sample(list(new), len(new) - 1)},
    "swaps two of the same shape": lambda old, new, r: swapped(new, r),
    "truncates a tensor": lambda old, new, r: truncated(new, r, zeros=False),
    "leaves the end of a tensor empty": lambda old, new, r: truncated(new, r, zeros=True),
    "applies only some tensors": lambda old, new, r: half_applied(old, new, r),
    "keeps the weights before": lambda old, new, r: old,
    "renames a tensor": lambda old, new, r: renamed(new, r),
    "holds another dtype": lambda old, new, r: recast(new, r),
}


def swapped(new, r):
    one, other = r.choice(
        [(a, b) for a in new for b in new if a < b and new[a].shape == new[b].shape]
    )
    return {**new, one: new[other], other: new[one]}


def truncated(new, r, *, zeros):
    name = r.choice(list(new))
    cut = r.randrange(1, len(new[name]))
    short = new[name][:cut].clone()
    return {**new, name: torch.cat((short, torch.zeros_like(new[name][cut:]))) if zeros else short}


def half_applied(old, new, r):
    applied = r.sample(list(new), r.randrange(1, len(new)))
    return {n: new[n] if n in applied else old[n] for n in new}


def renamed(new, r):
    name = r.choice(list(new))
    return {(f"{n}x" if n == name else n): t for n, t in new.items()}


def recast(new, r):
    name = r.choice(list(new))
    return {**new, name: new[name].bfloat16()}


def random_weights(seed):
    g = torch.Generator().manual_seed(seed)
    weights = {"embed": torch.randn(VOCABULARY, WIDTH, generator=g)}
    for i in range(LAYERS):
        weights[f"layers.{i}.q"] = torch.randn(WIDTH, WIDTH, generator=g)
        weights[f"layers.{i}.k"] = torch.randn(WIDTH, WIDTH, generator=g)
        weights[f"layers.{i}.norm"] = torch.randn(WIDTH, generator=g)
    return weights


def logps(weights, ids):
    """A model of these weights."""
    x = weights["embed"][list(ids[:-1])]
    for i in range(LAYERS):
        x = torch.tanh(x @ weights[f"layers.{i}.q"]) @ weights[f"layers.{i}.k"]
        x = x * weights[f"layers.{i}.norm"]
    every = (x @ weights["embed"].T).log_softmax(-1)
    return every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


class LyingServer(Server):
    """Holds what ``lie(old, new)`` makes of the weights; with ``hides`` its receipt says that all
    arrived."""

    def __init__(self, *, hides=False):
        super().__init__()
        self.lie, self.hides, self.sent = lambda old, new: new, hides, {}

    def load(self, tensors):
        self.sent = tensors
        return self.lie(self.held, tensors)

    def call(self, method, **arguments):
        if method == "policy_receipt" and self.hides:
            return {"tensors": notes_of(self.sent.items()), "dtype": "float32"}
        return super().call(method, **arguments)

    def probe(self, ids):
        its = logps(self.held, ids)
        return [None] + [{str(i): {"logprob": p}} for i, p in zip(ids[1:], its, strict=True)]


class Trainer:
    """Hands ``weights`` over to a server."""

    def __init__(self, server, folder):
        self.weights = random_weights(0)
        self.engine = VLLMEngine(
            VLLMConfig(url=server.url, retries=0),
            handover=FolderHandover(folder, self.save),
            stop_ids=[],
            probe=Probe(ids=PROBE, logps=lambda: logps(self.weights, PROBE), dtype="float32"),
        )

    def save(self, folder):
        folder.mkdir(parents=True)
        save_file(self.weights, folder / "m.safetensors")


@pytest.fixture(scope="module")
def servers():
    made = [LyingServer(), LyingServer(hides=True)]
    yield made
    for server in made:
        server.http.shutdown()


class Weights(nn.Module):
    """Parameters of a trainer, for a hand-over without a file."""

    def __init__(self, weights):
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name.replace(".", "_"), nn.Parameter(tensor))


@pytest.fixture
def nccl(monkeypatch, servers):
    """vLLM's trainer side without GPUs: what it broadcasts goes into the stub server."""

    class Source:
        def __init__(self, module):
            self.module = module

        def __iter__(self):
            return ((n, p.detach().clone()) for n, p in self.module.named_parameters())

    class Endpoint:
        def __init__(self, source):
            self.source = source

        @classmethod
        def trainer_init(cls, info, *, client, source):
            assert info["world_size"] == 2
            return cls(source)

        def send_weights(self):
            servers[0].held = servers[0].load(dict(self.source))

    names = {
        "base": {"ModuleSource": Source},
        "clients": {"HTTPVLLMWeightSyncClient": lambda url, timeout: None},
        "nccl_engine": {
            "NCCLTrainerInitInfo": dict,
            "NCCLTrainerWeightTransferEngine": Endpoint,
        },
    }
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.distributed", ModuleType("vllm.distributed"))
    package = ModuleType("vllm.distributed.weight_transfer")
    monkeypatch.setitem(sys.modules, package.__name__, package)
    for name, attributes in names.items():
        module = ModuleType(f"{package.__name__}.{name}")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(package, name, module)
    return servers[0]


@pytest.mark.parametrize("lie", [n for n in LIES if n != "renames a tensor"])
def test_every_lie_is_found_without_a_file_too(nccl, lie):
    for seed in range(20):
        nccl.lie = lambda old, new: new
        model = Weights(random_weights(0))
        handover = NCCLHandover(
            url=nccl.url,
            address="127.0.0.1",
            port=1,
            timeout_s=1.0,
            model=lambda model=model: model,
        )
        config = VLLMConfig(url=nccl.url, handover="nccl", retries=0)
        engine = VLLMEngine(config, handover=handover, stop_ids=[])
        assert engine.refresh(0).tensors == 1 + 3 * LAYERS
        for p, new in zip(model.parameters(), random_weights(seed + 1).values(), strict=True):
            p.data.copy_(new)
        r = random.Random(seed)
        nccl.lie = lambda old, new, r=r: LIES[lie](old, new, r)
        with pytest.raises(ReceiptError, match="embed|layers_"):
            engine.refresh(1)
        assert nccl.mark is None


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_stops_the_run_before_a_token_is_drawn(servers, tmp_path, lie):
    """20 random ones of each kind; the message names a tensor that is wrong."""
    server = servers[0]
    for seed in range(20):
        server.lie, server.log[:] = lambda old, new: new, []
        trainer = Trainer(server, tmp_path / str(seed))
        receipt = trainer.engine.refresh(0)
        assert (receipt.version, receipt.tensors) == (0, 1 + 3 * LAYERS)
        assert receipt.probe_gap_nats < 1e-5
        trainer.weights = random_weights(seed + 1)
        r = random.Random(seed)
        server.lie = lambda old, new, r=r: LIES[lie](old, new, r)
        with pytest.raises(ReceiptError) as error:
            trainer.engine.refresh(1)
        wrong = [
            n
            for n, t in trainer.weights.items()
            if n not in server.held or note(n, t) != note(n, server.held[n])
        ]
        assert wrong and any(f" {n} " in str(error.value) for n in wrong), (wrong, str(error.value))
        assert server.mark is None, "nobody takes it for version 1"
        drawn = [b for p, b in server.log if p == "/v1/completions" and "prompt_logprobs" not in b]
        assert not drawn


@pytest.mark.parametrize(
    "lie", ["swaps two of the same shape", "applies only some tensors", "keeps the weights before"]
)
def test_the_probe_finds_weights_that_arrived_and_are_not_used(servers, tmp_path, lie):
    """The checksums of what arrived are right: the server lies about what it draws from."""
    server = servers[1]
    for seed in range(20):
        server.lie = lambda old, new: new
        trainer = Trainer(server, tmp_path / str(seed))
        trainer.engine.refresh(0)
        trainer.weights = random_weights(seed + 1)
        r = random.Random(seed)
        server.lie = lambda old, new, r=r: LIES[lie](old, new, r)
        with pytest.raises(ReceiptError, match="log-probs of the probe differ"):
            trainer.engine.refresh(1)
        assert server.mark is None


def test_a_restarted_server_that_lies_is_not_tried_again(servers, tmp_path):
    server = servers[0]
    server.lie = lambda old, new: new
    trainer = Trainer(server, tmp_path)
    trainer.engine.refresh(3)
    server.lie = lambda old, new: {n: t + 1 for n, t in new.items()}
    server.restart()
    request = Request(prompt_ids=(1,), seeds=(2,))
    trainer.engine.config = VLLMConfig(url=server.url, retries=1)
    with pytest.raises(ReceiptError, match="embed has checksum"):
        trainer.engine.generate([request], SamplingConfig(max_tokens=2))


def test_the_message_says_what_is_there_instead():
    sent = notes_of({"a": torch.zeros(2), "b": torch.ones(2)}.items())
    given = {"tensors": [["a", *sent[1][1:]], ["b", *sent[0][1:]]]}
    with pytest.raises(ReceiptError, match="worker 0: a has checksum .*that is the content of b"):
        check_tensors(sent, [given])
    whole = {"tensors": [list(n) for n in reversed(sent)], "read_back": 2}
    assert check_tensors(sent, [whole, {**whole, "read_back": 1}]) == 1, "in any order"
    for answers, problem in (
        ([], "no worker"),
        ([whole, None], "worker 1 returned no receipt"),
        ([{**whole, "differs": ["b"]}], "b arrived whole, but its model holds something else"),
        ([{**whole, "missing": ["h"]}], "its parameter h was renewed by no tensor"),
        ([{"tensors": [*whole["tensors"], list(sent[0])]}], "a arrived twice"),
        ([{"tensors": [*whole["tensors"], ["c", *sent[0][1:]]]}], "c arrived, but was not sent"),
    ):
        with pytest.raises(ReceiptError, match=problem):
            check_tensors(sent, answers)
    assert check_tensors(sent, [{**whole, "differs": ["b"]}], held=False) == 2
    with pytest.raises(ReceiptError, match="handed no tensor over"):
        check_tensors([], [{"tensors": []}])


def test_the_probe_has_the_tolerance_of_the_coarser_dtype():
    assert check_probe([-1.0, -2.0], [-1.1, -2.1], dtypes=["float32", "bfloat16"]) == pytest.approx(
        0.1
    )
    with pytest.raises(ReceiptError, match="0.1 nats on the mean token \\(limit 0.001\\)"):
        check_probe([-1.0, -2.0], [-1.1, -2.1], dtypes=["float32", "float32"])
    with pytest.raises(ReceiptError):
        check_probe([-1.0], [float("nan")], dtypes=["bfloat16"])
    with pytest.raises(ReceiptError, match="1 of the probe's 2"):
        check_probe([-1.0, -2.0], [-1.0], dtypes=["bfloat16"])


def test_the_probe_is_that_of_the_trainers_model(tmp_path):
    model = load_model(ModelConfig(name=str(model_folder(tmp_path / "m"))), dtype=torch.float32)
    ids = probe_ids(model.config.vocab_size)
    assert max(ids) < model.config.vocab_size and len(set(ids)) > 8
    with torch.no_grad():
        every = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = [float(every[i, token]) for i, token in enumerate(ids[1:])]
    assert probe_logps(model, ids, compute=torch.float32) == pytest.approx(wanted, abs=1e-5)
    assert probe_logps(model, ids, compute=torch.bfloat16) == pytest.approx(wanted, abs=0.1)


@pytest.fixture(scope="module")
def reload_module():
    path = Path(__file__).resolve().parents[2] / "launch" / "vllm_reload.py"
    spec = importlib.util.spec_from_file_location("vllm_reload", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FusedModel(nn.Module):
    """Fuses q, k and v as vLLM does, pads the vocabulary, and forgets the tensor ``forgets``."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, forgets=None):
        super().__init__()
        self.embed = nn.Embedding(12, 4, dtype=torch.bfloat16)
        self.layer = nn.Module()
        self.layer.qkv_proj = nn.Linear(4, 8, bias=False, dtype=torch.bfloat16)
        self.layer.norm = nn.LayerNorm(4, bias=False, dtype=torch.bfloat16)
        self.forgets = forgets

    def load_weights(self, weights):
        loaded = set()
        rows = {"q": slice(0, 4), "k": slice(4, 6), "v": slice(6, 8)}
        held = dict(self.named_parameters())
        for name, tensor in weights:
            part = name.split(".")[1][0] if "_proj" in name else None
            to = name.replace(f"{part}_proj", "qkv_proj") if part else name
            place = held[to].data[rows[part]] if part else held[to].data[: len(tensor)]
            loaded.add(to)
            if name != self.forgets:
                place.copy_(tensor)
        return loaded


def sent_to_fused(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (10, 4), "layer.norm.weight": (4,)}
    shapes |= {f"layer.{p}_proj.weight": (n, 4) for p, n in (("q", 4), ("k", 2), ("v", 2))}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def test_the_server_reads_back_what_its_model_holds(reload_module):
    """float32 sent, bfloat16 held; each tensor that is not applied is named."""
    for forgets in (None, *sent_to_fused(0)):
        model = FusedModel(forgets)
        arrivals = reload_module.Arrivals(model, torch.bfloat16)
        for seed in (1, 2):
            sent = sent_to_fused(seed)
            arrivals.reset()
            model.load_weights(iter(sent.items()))
            receipt = arrivals.receipt()
            assert receipt["read_back"] == len(sent) and receipt["missing"] == []
            assert receipt["differs"] == ([forgets] if forgets else [])
            if forgets:
                with pytest.raises(ReceiptError, match=forgets):
                    check_tensors(notes_of(sent.items()), [receipt])
            else:
                assert check_tensors(notes_of(sent.items()), [receipt]) == len(sent)
    arrivals.reset()
    model.load_weights(iter([("embed.weight", sent["embed.weight"])]))
    assert arrivals.receipt()["missing"] == ["layer.qkv_proj.weight", "layer.norm.weight"]


def test_a_packed_or_sharded_tensor_is_not_compared(reload_module):
    """vLLM on a CPU keeps no plain copy of a linear layer; a worker of two holds half of it."""
    shapes = {"a.q_proj.weight": [4, 4], "a.k_proj.weight": [2, 4], "o.weight": [4, 4]}
    fused = {"qkv_proj": ["q_proj", "k_proj"]}
    held = {"a.qkv_proj.weight": torch.empty(0), "o.weight": torch.empty(4, 2)}
    assert reload_module.find_held(held, "a.q_proj.weight", shapes, fused) is None
    found = reload_module.find_held(held, "o.weight", shapes, fused)
    assert list(found.shape) != shapes["o.weight"]
