"""Groups -> token-budget micro-batches -> one packed row each, and the attention that keeps
sequences apart."""
