"""The engine of a running vLLM server (``launch/vllm.sh``): token ids in, token ids out, over HTTP.

The server runs in an environment of its own; this module needs no vLLM. Weights are handed over
between pausing and resuming the server, and its receipt is compared with what was sent
(``rollout/handover.py``). What a completion's log-probs are depends on how the server was started:
``--logprobs-mode processed_logprobs`` gives those after temperature and truncation. The ids that
truncation leaves are those of the likeliest whose log-prob is not -inf.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import KW_ONLY, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from posttrain.models.load import end_token_ids, save_model
from posttrain.models.policy import Policy, has_adapters
from posttrain.precision import torch_dtype
from posttrain.resolve import check_rules, settings
from posttrain.rollout.engine import (
    Engine,
    FinishReason,
    OnFinished,
    Request,
    Sampled,
    SamplingConfig,
    StopRule,
)
from posttrain.rollout.handover import (
    FolderHandover,
    Handover,
    NCCLHandover,
    Receipt,
    check_probe,
    check_tensors,
    probe_ids,
    probe_logps,
)

log = logging.getLogger(__name__)

TESTED = "0.32"
"""Minor version of the server that the requests below were tested with."""
_CUT = -9999.0
"""What the server sends for a log-prob of -inf, or one that is not a number."""
_TIES = 16
"""Log-probs asked for beyond top_k. At least one must be cut: more than k tokens are left where
several are as likely as the k-th."""
_SEGMENT = 512
"""Tokens between two looks for repetition, which the server does not stop."""


@settings
class VLLMConfig:
    """Where the server is and how patient to be with it."""

    url: str = "http://127.0.0.1:8000"
    """Base URL of the server."""
    handover: Literal["folder", "nccl"] = "folder"
    """How the server gets the weights: it reloads a folder (every device), or they are broadcast
    from GPU to GPU."""
    weights_dir: str = ""
    """folder: seen by trainer and server both. Default: vllm_weights in the run folder."""
    nccl_address: str = "127.0.0.1:29600"
    """nccl: HOST:PORT of the trainer's main process at which the server's workers meet it."""
    concurrency: int = 64
    """Most requests at the same time."""
    timeout_s: float = 600.0
    """Most seconds for one request."""
    retries: int = 5
    """How often a request is tried again when the server does not answer; each time after twice the
    wait, from one second."""
    check_held: bool = True
    """The receipt of a hand-over also says where the server's model holds something else than what
    arrived. false: for a family whose loader changes tensors; what arrived and the probe are
    compared all the same."""
    any_version: bool = False
    """Accept a server of another version than the one tested."""

    def __post_init__(self) -> None:
        check_rules("vllm", self, "concurrency >= 1", "timeout_s > 0", "retries >= 0")
        host, _, port = self.nccl_address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"vllm.nccl_address is HOST:PORT; got {self.nccl_address!r}.")
        if self.handover == "nccl" and self.weights_dir:
            raise ValueError(
                "vllm.weights_dir would be ignored: handover=nccl writes no folder. "
                "Leave one of them out."
            )


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A fixed prompt that trainer and server both know the log-probs of."""

    ids: Sequence[int]
    logps: Callable[[], Sequence[float]]
    """The trainer's, of each id but the first, under its present weights."""
    dtype: str
    """Of the trainer's computation."""


class ServerError(ValueError):
    """The server does not answer, or answers something else than a vLLM server of the right version
    does."""


@dataclass
class VLLMEngine:
    """Draws through the server; ``handover`` brings the policy's weights there."""

    config: VLLMConfig
    _: KW_ONLY
    handover: Handover
    stop_ids: Sequence[int]
    decode: Callable[[Sequence[int]], str] | None = None
    """Turns ids into text, for stop strings."""
    is_main: bool = True
    """This rank hands the weights over."""
    barrier: Callable[[], None] = lambda: None
    """Waits for all ranks."""
    probe: Probe | None = None
    """None compares checksums only."""
    is_reproducible = False

    def __post_init__(self) -> None:
        self._probe_logps: Sequence[float] = ()
        self._ties = _TIES
        self._receipt = Receipt(version=-1)
        self._version = -1
        self._mark: str | None = None
        self._model = ""
        self._check_server()

    def refresh(self, version: int) -> Receipt:
        """Hands the present weights over; the same version twice costs nothing. Raises ReceiptError
        where the server then has others."""
        if version == self._version:
            return self._receipt
        if self.probe is not None:
            self._probe_logps = self.probe.logps()  # any rank hands over again after a restart
        self.barrier()  # nobody samples from the old weights any more
        if self.is_main:
            self.handover.take()
            self._load_weights(version)
        self.barrier()
        self._version, self._mark = version, self._server_mark()
        return self._receipt

    def _load_weights(self, version: int) -> None:
        self._call("POST", "/pause?mode=wait")
        try:
            self._rpc("mark_policy", mark=None)
            sent = self.handover.send(self._call)
            self._call("POST", "/reset_prefix_cache")
            answers = self._rpc("policy_receipt")
            read_back = check_tensors(sent, answers, held=self.config.check_held)
        finally:
            self._call("POST", "/resume")
        gap = self._probe_gap(str(answers[0].get("dtype"))) if self.probe is not None else 0.0
        self._rpc("mark_policy", mark=str(version))
        self._receipt = Receipt(
            version=version,
            tensors=len(sent),
            read_back=read_back,
            probe_gap_nats=gap,
        )
        log.info("the server has the policy's weights: %s", self._receipt)

    def _probe_gap(self, server_dtype: str) -> float:
        """The server's log-probs of the probe against the trainer's."""
        assert self.probe is not None
        ids = list(self.probe.ids)
        body = {
            "model": self._model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
        }
        answer = self._call("POST", "/v1/completions", body)["choices"][0]
        rows = (answer.get("prompt_logprobs") or [])[1:]
        its = [
            float((row or {}).get(str(token), {}).get("logprob", math.nan))
            for token, row in zip(ids[1:], rows, strict=False)
        ]
        return check_probe(self._probe_logps, its, dtypes=(server_dtype, self.probe.dtype))

    def _rpc(self, method: str, **arguments: Any) -> list[Any]:
        """A method of launch/vllm_reload.py in every worker."""
        return self._call("POST", "/collective_rpc", {"method": method, "kwargs": arguments}).get(
            "results"
        ) or [None]

    def _server_mark(self) -> str | None:
        """Which weights the server's present process was given: 'VERSION PROCESS'; None: none since
        it started."""
        return self._rpc("policy_mark")[0]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        on_finished: OnFinished | None = None,
    ) -> list[list[Sampled]]:
        """[request][completion]. A completion that fails is asked for again, after the weights are
        there again."""
        results: list[list[Any]] = [[None] * len(r.seeds) for r in requests]
        left = [(i, k) for i, r in enumerate(requests) for k in range(len(r.seeds))]
        problem: Exception | None = None
        for attempt in range(self.config.retries + 1):
            if attempt:
                log.warning("%d completions failed (%s); attempt %d", len(left), problem, attempt)
                time.sleep(2.0 ** (attempt - 1))
                try:
                    self._weights_again()
                except ServerError as error:
                    problem = error
                    continue
            failed: list[tuple[int, int]] = []
            with ThreadPoolExecutor(self.config.concurrency) as pool:
                futures = {
                    pool.submit(self._complete, requests[i], k, sampling): (i, k) for i, k in left
                }
                for future in as_completed(futures):
                    i, k = futures[future]
                    try:
                        results[i][k] = future.result()
                    except (OSError, HTTPException) as error:
                        failed.append((i, k))
                        problem = error
                        continue
                    if on_finished is not None:
                        on_finished(i, k, results[i][k])
            if not failed:
                return results
            left = sorted(failed)
        raise ServerError(
            f"The vLLM server at {self.config.url} failed {self.config.retries + 1} times on "
            f"{len(left)} completions, the last time with: {problem}. What was finished is in the "
            "run's journal: start the server and the same command again."
        )

    def _weights_again(self) -> None:
        """A server that was restarted has the weights it was started with: they are handed over
        again."""
        self._check_server()
        if self._version >= 0:
            mark = self._server_mark()
            if mark is None or mark.split()[0] != str(self._version):
                self.handover.forget()
                self._load_weights(self._version)
                mark = self._server_mark()
            self._mark = mark

    def _complete(self, request: Request, k: int, sampling: SamplingConfig) -> Sampled:
        """One completion, by segments where repetition is looked for. It ends where the local
        engine would end it."""
        prefix = request.prefixes[k]
        rule = StopRule(sampling, self.stop_ids, self.decode)
        limit = sampling.max_tokens - len(prefix)
        limit = min(limit, sampling.budget_tokens or limit)
        drawn: list[int] = []
        logps: list[float] = []
        kept: list[tuple[int, ...]] = []
        reason: FinishReason | None = None
        while reason is None:
            ahead = min(limit - len(drawn), _SEGMENT if sampling.repeat_ngram else limit)
            ids, segment_logps, segment_kept, stopped = self._segment(
                [*request.prompt_ids, *prefix, *drawn], request, k, ahead, sampling
            )
            for token, logp, left in zip(ids, segment_logps, segment_kept, strict=True):
                drawn.append(token)
                logps.append(logp)
                kept.append(left)
                reason = rule.reason(prefix, drawn)
                if reason is not None:
                    break
            else:
                reason = "stop" if stopped else None
        return Sampled(
            token_ids=tuple(drawn),
            logps=tuple(logps),
            finish_reason=reason,
            policy_version=self._version,
            kept_ids=tuple(kept) if _returns_kept(sampling) else None,
        )

    def _segment(
        self, before: list[int], request: Request, k: int, max_tokens: int, sampling: SamplingConfig
    ) -> tuple[list[int], list[float], list[tuple[int, ...]], bool]:
        """(ids, log-probs, ids that truncation left, whether the server says that they end in a
        stop token or string) of what comes after ``before``. Raises OSError where the server broke
        off: the completion is drawn again."""
        noise = request.seeds[k] + 0x9E3779B9 * (len(before) - len(request.prompt_ids))
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": before,
            "max_tokens": max_tokens,
            "seed": noise % 2**31,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_tokens": 0,  # else those of the model's generation_config
            "logprobs": sampling.top_k + self._ties if _returns_kept(sampling) else 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stop_token_ids": list(self.stop_ids),
            "stop": sampling.stop_strings or None,
            "include_stop_str_in_output": True,
        }
        choice = self._completion(body)["choices"][0]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ConnectionResetError(f"the server ended a completion: {choice['finish_reason']}")
        ids, logps = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        if len(ids) != len(logps) or not ids:
            raise ServerError(
                f"The server gave {len(ids)} token ids and {len(logps)} log-probs. "
                f"Is it vLLM {TESTED}?"
            )
        if not all(p is not None and _CUT < p <= 1e-3 for p in logps):
            raise ServerError(
                f"The server gave a log-prob that is no number or of a token that was cut: {logps}."
            )
        kept: list[tuple[int, ...]] = [()] * len(ids)
        if _returns_kept(sampling):
            found = [_kept_ids(row, body["logprobs"]) for row in choice["logprobs"]["top_logprobs"]]
            if any(left is None for left in found):
                self._ties = max(self._ties, 4 * (body["logprobs"] - sampling.top_k))
                return self._segment(before, request, k, max_tokens, sampling)
            kept = [left for left in found if left is not None]
        return ids, [float(p) for p in logps], kept, choice["finish_reason"] == "stop"

    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """Raises OSError if the server was restarted since it was given the weights: another policy
        may have drawn this."""
        try:
            answer = self._request("POST", "/v1/completions", body)
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise ServerError(
                    f"{self.config.url} refuses a request of {len(body['prompt'])} prompt tokens "
                    f"and {body['max_tokens']} new ones: "
                    f"{error.read()[:500].decode(errors='replace')}. Was it started with a large "
                    "enough MAX_MODEL_LEN?"
                ) from error
            raise
        if self._version >= 0 and self._server_mark() != self._mark:
            raise ConnectionResetError("the server was restarted meanwhile")
        return answer

    def _check_server(self) -> None:
        version = str(self._call("GET", "/version").get("version", "unknown"))
        if not version.startswith(f"{TESTED}.") and not self.config.any_version:
            raise ServerError(
                f"{self.config.url} runs vLLM {version}; its requests were tested with {TESTED}. "
                "Install that version (launch/vllm.sh), or set --vllm.any_version true."
            )
        self._model = str(self._call("GET", "/v1/models")["data"][0]["id"])

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """A control request: tried again with growing waits."""
        for attempt in range(self.config.retries + 1):
            try:
                return self._request(method, path, body)
            except (OSError, HTTPException) as error:
                problem = error
                if isinstance(error, urllib.error.HTTPError) and error.code in (400, 404, 405):
                    raise ServerError(
                        f"{self.config.url}{path} answered {error.code}: not a vLLM server with "
                        "VLLM_SERVER_DEV_MODE=1. Start it with launch/vllm.sh."
                    ) from error
                if attempt < self.config.retries:
                    time.sleep(2.0**attempt)
        raise ServerError(
            f"No vLLM server answers at {self.config.url} ({problem}). Start it with "
            "launch/vllm.sh MODEL, or set --vllm.url."
        ) from problem

    def _request(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.config.url.rstrip("/") + path,
            data=data,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=self.config.timeout_s) as response:  # noqa: S310 - the user's own server
            text = response.read().decode()
        try:
            answer = json.loads(text) if text.strip() else {}
        except ValueError as error:
            raise ServerError(
                f"{self.config.url}{path} answered something that is not JSON: {text[:200]!r}."
            ) from error
        return answer if isinstance(answer, dict) else {"value": answer}


def _returns_kept(sampling: SamplingConfig) -> bool:
    """Without top_k the whole vocabulary would have to be sent for every token."""
    return sampling.top_k > 0 and sampling.temperature > 0


def _kept_ids(top_logprobs: Mapping[str, float], asked: int) -> tuple[int, ...] | None:
    """Ids that are not cut, among the likeliest; None where more may be left than were asked
    for."""
    kept = [key for key, logp in top_logprobs.items() if logp > _CUT]
    if len(kept) == len(top_logprobs) >= asked:
        return None
    return tuple(sorted(int(key.removeprefix("token_id:")) for key in kept))


def vllm_engine(
    policy: Policy,
    tokenizer: Any,
    config: VLLMConfig,
    accelerator: Any,
    *,
    compute: str,
    weights_dir: Path,
) -> Engine:
    """The engine of a running server, fed with the policy's weights. ``weights_dir``: for
    ``handover: folder``, where ``config`` names none."""
    ids = probe_ids(policy.config.get_text_config().vocab_size)

    def merged() -> Any:
        model: Any = policy.model
        return copy.deepcopy(model).merge_and_unload() if has_adapters(model) else model

    handover: Handover
    if config.handover == "nccl":
        host, _, port = config.nccl_address.rpartition(":")
        handover = NCCLHandover(
            url=config.url, address=host, port=int(port), timeout_s=config.timeout_s, model=merged
        )
    else:
        folder = Path(config.weights_dir) if config.weights_dir else weights_dir
        handover = FolderHandover(folder, lambda to: save_model(merged(), tokenizer, to))
    return VLLMEngine(
        config,
        handover=handover,
        stop_ids=end_token_ids(policy.base, tokenizer),
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        is_main=accelerator.is_main_process,
        barrier=accelerator.wait_for_everyone,
        probe=Probe(
            ids=ids,
            logps=lambda: probe_logps(policy.model, ids, compute=torch_dtype(compute)),
            dtype=compute,
        ),
    )
