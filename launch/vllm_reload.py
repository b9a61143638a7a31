"""Runs inside the vLLM server (launch/vllm.sh): reloads the policy's weights, with all that was
made of them at the first load.

On a CPU, vLLM 0.32 packs the LM head's weight for its matrix product. Where the head is tied to the
embedding, its own ``reload_weights`` renews the embedding and leaves the packed copy as it was:
samples then come from a mixture of two policies.
"""

from __future__ import annotations

import uuid
from typing import Any

PROCESS = uuid.uuid4().hex


class ReloadPolicy:
    """Further methods of a worker, called by ``/collective_rpc``."""

    def mark_policy(self, mark: str | None) -> None:
        """Says which weights the worker has from now on; None: none in particular."""
        self._policy_mark = None if mark is None else f"{mark} {PROCESS}"

    def policy_mark(self) -> str | None:
        """The mark and the process that was given it; None in one that was started since."""
        return getattr(self, "_policy_mark", None)

    def reload_policy(self, weights_path: str) -> None:
        """Weights from a folder of safetensors."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        for module in worker.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
