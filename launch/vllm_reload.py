"""Runs inside the vLLM server (launch/vllm.sh): reloads the policy's weights, with all that was made of them at the first load.

On a CPU, vLLM 0.32 packs the LM head's weight for its matrix product. Where the head is tied to the embedding, its own
``reload_weights`` renews the embedding and leaves the packed copy as it was: samples then come from a mixture of two policies.
"""

from __future__ import annotations

from typing import Any


class ReloadPolicy:
    """A worker's further method, called by ``/collective_rpc``."""

    def reload_policy(self, weights_path: str) -> None:
        """Weights from a folder of safetensors."""
        worker: Any = self
        worker.reload_weights(weights_path=weights_path)
        for module in worker.model_runner.get_model().modules():
            if type(module).__name__ == "ParallelLMHead":
                module.quant_method.process_weights_after_loading(module)
