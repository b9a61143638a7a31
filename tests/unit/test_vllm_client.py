"""The client against a server that fails in every way a real one does.
(tests/e2e/test_vllm_server.py has the real one.)"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.rollout.engine import Request, SamplingConfig
from posttrain.rollout.handover import FolderHandover, NCCLHandover, notes_of
from posttrain.rollout.vllm import ServerError, VLLMConfig, VLLMEngine

REQUESTS = [Request(prompt_ids=(1, 2), seeds=(10, 11)), Request(prompt_ids=(3,), seeds=(12, 13))]


class Server:
    """Answers as vLLM 0.32 does; ``misbehave(path, count)`` may return (code, body) or "drop";
    ``draw(body)``: two tokens."""

    def __init__(
        self,
        version="0.32.0",
        misbehave=lambda path, count: None,
        draw=lambda body: [body["seed"], 7],
        finish=None,
        left=3,
    ):
        self.left, self.held = left, {}
        self.log: list[tuple[str, dict]] = []
        self.mark, self.process = None, 1
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                self.answer(
                    {
                        "/version": {"version": version},
                        "/v1/models": {"data": [{"id": "m"}]},
                        "/get_world_size": {"world_size": 1},
                    }.get(self.path, {})
                )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                outer.log.append((self.path, body))
                count = sum(path == self.path for path, _ in outer.log)
                odd = misbehave(self.path, count)
                if odd == "drop":
                    self.connection.close()
                elif odd is not None:
                    self.answer(odd[1], code=odd[0])
                elif self.path == "/collective_rpc":
                    self.answer({"results": [outer.call(body["method"], **body["kwargs"])]})
                elif "prompt_logprobs" in body:
                    self.answer({"choices": [{"prompt_logprobs": outer.probe(body["prompt"])}]})
                elif self.path == "/v1/completions":
                    ids = draw(body)[: body["max_tokens"]]
                    top = [outer.likeliest(token, body["logprobs"]) for token in ids]
                    logprobs = {"token_logprobs": [-0.5] * len(ids), "top_logprobs": top}
                    reason = finish or ("stop" if len(ids) == 2 else "length")
                    choice = {"token_ids": ids, "logprobs": logprobs, "finish_reason": reason}
                    self.answer({"choices": [choice]})
                else:
                    self.answer({})

            def answer(self, body, code=200):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def call(self, method, **arguments):
        """What launch/vllm_reload.py does."""
        if method == "mark_policy":
            mark = arguments["mark"]
            self.mark = None if mark is None else f"{mark} {self.process}"
        if method == "reload_policy":
            self.held = self.load(load_file(Path(arguments["weights_path"]) / "m.safetensors"))
        if method == "policy_receipt":
            return {"tensors": notes_of(self.held.items()), "dtype": "float32"}
        return self.mark if method == "policy_mark" else None

    def load(self, tensors):
        """What it holds after it was sent ``tensors``."""
        return tensors

    def probe(self, ids):
        """Its prompt_logprobs."""
        return [None] + [{str(i): {"logprob": -1.0}} for i in ids[1:]]

    def likeliest(self, token, count):
        """The token and those after it; all but ``left`` are cut."""
        ids = [token + i for i in range(count)]
        return {f"token_id:{t}": -0.5 if t < token + self.left else -9999.0 for t in ids}

    def restart(self):
        self.mark, self.process = None, self.process + 1

    def paths(self):
        """Control methods by their name, questions for the mark left out."""
        named = [body["method"] if path == "/collective_rpc" else path for path, body in self.log]
        return [name for name in named if name not in ("policy_mark", "policy_receipt")]


@pytest.fixture
def serve(monkeypatch, tmp_path):
    servers = []
    monkeypatch.setattr("posttrain.rollout.vllm.time.sleep", lambda s: None)

    def start(retries=3, **options):
        servers.append(Server(**options))
        saved = []

        def save(folder):
            folder.mkdir(parents=True)
            save_file({"w": torch.full((2, 2), float(len(saved)))}, folder / "m.safetensors")
            saved.append(folder)

        config = VLLMConfig(url=servers[-1].url, retries=retries, concurrency=4)
        handover = FolderHandover(tmp_path / "w", save)
        return (
            servers[-1],
            lambda: VLLMEngine(
                config, handover=handover, stop_ids=[2], decode=lambda i: bytes(i).decode()
            ),
            saved,
        )

    yield start
    for server in servers:
        server.http.shutdown()


def test_tokens_in_tokens_out(serve):
    server, make, _ = serve()
    drawn = make().generate(REQUESTS, SamplingConfig(max_tokens=5, temperature=0.7))
    assert [[d.token_ids for d in row] for row in drawn] == [[(10, 7), (11, 7)], [(12, 7), (13, 7)]]
    assert all(d.finish_reason == "stop" and d.logps == (-0.5, -0.5) for row in drawn for d in row)
    body = next(b for p, b in server.log if p == "/v1/completions" and b["seed"] == 12)
    assert (
        body["prompt"] == [3]
        and body["stop_token_ids"] == [2]
        and body["top_p"] == 1.0
        and body["temperature"] == 0.7
    )
    neutral = {
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }
    assert body.items() >= neutral.items(), (
        "what is not sent comes from the model's generation_config"
    )


def test_partial_rollouts_send_what_there_is(serve):
    server, make, _ = serve()
    request = Request(prompt_ids=(3,), seeds=(12,), prefixes=((8, 9),))
    ((drawn,),) = make().generate([request], SamplingConfig(max_tokens=5, budget_tokens=1))
    assert server.log[-1][1]["prompt"] == [3, 8, 9] and drawn.finish_reason == "budget"
    assert drawn.token_ids == (server.log[-1][1]["seed"],) != (12,), (
        "noise of its own, not that of the first tokens"
    )


@pytest.mark.parametrize("segment", [512, 3])
def test_a_loop_is_left_where_the_local_engine_leaves_it(serve, monkeypatch, segment):
    """Two tokens in a row four times; the server would go on to the end."""
    monkeypatch.setattr("posttrain.rollout.vllm._SEGMENT", segment)
    server, make, _ = serve(
        draw=lambda body: [5, 6] * 100 if len(body["prompt"]) % 2 else [6, 5] * 100
    )
    request = Request(prompt_ids=(3,), seeds=(12,))
    ((drawn,),) = make().generate(
        [request], SamplingConfig(max_tokens=200, repeat_ngram=2, repeat_times=4)
    )
    assert (
        drawn.token_ids == (5, 6) * 4 and drawn.finish_reason == "repeat" and len(drawn.logps) == 8
    )
    assert server.paths().count("/v1/completions") == (1 if segment == 512 else 3)


def test_a_stop_string_that_begins_in_the_prefix_ends_a_completion(serve):
    _, make, _ = serve(draw=lambda body: list(b"cde"))
    request = Request(prompt_ids=(3,), seeds=(12,), prefixes=(tuple(b"ab"),))
    ((drawn,),) = make().generate([request], SamplingConfig(max_tokens=5, stop_strings=["bc"]))
    assert drawn.token_ids == tuple(b"c") and drawn.finish_reason == "stop"


def test_weights_go_between_pause_and_resume(serve):
    server, make, saved = serve()
    engine = make()
    engine.refresh(4)
    engine.refresh(4)
    handed_over = ["mark_policy", "reload_policy", "/reset_prefix_cache"]
    paths = ["/pause?mode=wait", *handed_over, "/resume", "mark_policy"]
    assert server.paths() == paths and len(saved) == 1
    assert server.log[2][1]["kwargs"]["weights_path"].endswith("w/current")
    assert engine.generate(REQUESTS, SamplingConfig(max_tokens=5))[0][0].policy_version == 4


@pytest.mark.parametrize("odd", ["drop", (503, {"error": "busy"}), (500, {})])
def test_a_failing_server_loses_no_sample_and_gets_the_weights_again(serve, odd):
    server, make, _ = serve(
        misbehave=lambda path, n: odd if path == "/v1/completions" and n in (2, 3) else None
    )
    engine = make()
    engine.refresh(1)
    finished = []
    drawn = engine.generate(
        REQUESTS, SamplingConfig(max_tokens=5), on_finished=lambda i, k, d: finished.append((i, k))
    )
    assert sorted(finished) == [(0, 0), (0, 1), (1, 0), (1, 1)] and all(
        d is not None for row in drawn for d in row
    )
    assert server.paths().count("/v1/completions") == 6
    assert server.paths().count("reload_policy") == 1, "the same process still has them"


@pytest.mark.parametrize("when", ["between", "meanwhile"])
def test_what_a_restarted_server_drew_is_not_taken(serve, when):
    """It answers, under the weights that it was started with."""
    server, make, _ = serve(
        misbehave=lambda path, n: server.restart() if path == "/v1/completions" and n == 2 else None
    )
    engine = make()
    engine.refresh(1)
    if when == "between":
        server.restart()
    drawn_under = []
    drawn = engine.generate(
        REQUESTS,
        SamplingConfig(max_tokens=5),
        on_finished=lambda *_: drawn_under.append(server.mark),
    )
    assert drawn_under == [f"1 {server.process}"] * len(drawn_under) or when == "meanwhile"
    assert (
        len(drawn_under) == 4
        and server.paths().count("reload_policy") == 2
        and all(all(row) for row in drawn)
    )
    assert server.paths().count("/v1/completions") > 4


def test_a_server_that_does_not_take_the_weights_is_not_sampled_from(serve):
    broken = []
    server, make, _ = serve(
        retries=2,
        misbehave=lambda path, n: (500, {}) if path == "/reset_prefix_cache" and broken else None,
    )
    engine = make()
    engine.refresh(1)
    server.restart()
    broken.append(True)
    finished = []
    with pytest.raises(ServerError, match="failed 3 times on 4 completions"):
        engine.generate(
            REQUESTS, SamplingConfig(max_tokens=5), on_finished=lambda *_: finished.append(1)
        )
    assert not finished


def test_a_refused_request_is_not_tried_again(serve):
    server, make, _ = serve(
        misbehave=lambda path, n: (400, b"too long") if path == "/v1/completions" else None
    )
    with pytest.raises(
        ServerError,
        match="refuses a request of . prompt tokens and 5 new ones: too long.*MAX_MODEL_LEN",
    ):
        make().generate(REQUESTS, SamplingConfig(max_tokens=5))
    assert server.paths().count("/v1/completions") <= 4


def test_a_dead_server_is_given_up_with_a_clear_error(serve):
    server, make, _ = serve(
        retries=2, misbehave=lambda path, n: "drop" if path == "/v1/completions" and n > 1 else None
    )
    finished = []
    with pytest.raises(ServerError, match="failed 3 times on 3 completions.*journal"):
        make().generate(
            REQUESTS,
            SamplingConfig(max_tokens=5),
            on_finished=lambda i, k, d: finished.append((i, k)),
        )
    assert len(finished) == 1
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ServerError, match="No vLLM server answers.*launch/vllm.sh"):
        make()


def test_the_wrong_server_is_told_apart(serve):
    with pytest.raises(ServerError, match="runs vLLM 0.31.1"):
        serve(version="0.31.1")[1]()
    _, make, _ = serve(misbehave=lambda path, n: (404, {}) if path == "/collective_rpc" else None)
    with pytest.raises(ServerError, match="not a vLLM server with VLLM_SERVER_DEV_MODE"):
        make().refresh(1)
    with pytest.raises(ServerError, match="not JSON"):
        serve(misbehave=lambda path, n: (200, b"<html>"))[1]().generate(
            REQUESTS, SamplingConfig(max_tokens=5)
        )


@pytest.mark.parametrize("left", [3, 40])
def test_a_truncated_draw_says_which_ids_were_left(serve, left):
    """Those that are not cut. Where ties at the edge leave more than were asked for, more are."""
    server, make, _ = serve(left=left)
    sampling = SamplingConfig(max_tokens=5, top_k=2, top_p=0.9, min_p=0.1)
    for row in make().generate(REQUESTS, sampling):
        for d in row:
            assert d.kept_ids == tuple(tuple(range(t, t + left)) for t in d.token_ids)
    bodies = [body for path, body in server.log if path == "/v1/completions"]
    for body in bodies:
        assert (body["top_k"], body["top_p"], body["min_p"]) == (2, 0.9, 0.1)
        assert body["return_tokens_as_token_ids"]
    assert {body["logprobs"] for body in bodies} == ({18, 66} if left == 40 else {18})
    whole = make().generate(REQUESTS, SamplingConfig(max_tokens=5))
    assert all(d.kept_ids is None for row in whole for d in row)


def test_a_completion_that_the_server_breaks_off_is_drawn_again(serve):
    server, make, _ = serve(retries=1, finish="abort")
    with pytest.raises(ServerError, match="failed 2 times on 4 completions.*abort"):
        make().generate(REQUESTS, SamplingConfig(max_tokens=5))
    assert server.paths().count("/v1/completions") == 8


def test_nccl_needs_vllm_beside_the_trainer_and_ignores_no_option():
    with pytest.raises(ValueError, match="vLLM's trainer side.*--vllm.handover folder"):
        NCCLHandover(
            url="http://127.0.0.1:1",
            address="127.0.0.1",
            port=29600,
            timeout_s=1.0,
            model=lambda: None,
        )
    with pytest.raises(ValueError, match="weights_dir would be ignored"):
        VLLMConfig(handover="nccl", weights_dir="w")
    with pytest.raises(ValueError, match="HOST:PORT"):
        VLLMConfig(nccl_address="29600")
