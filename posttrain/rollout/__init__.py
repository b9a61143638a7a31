"""Sampling: the engine protocol, the engine in the training process, a vLLM server, and what is
kept between iterations."""
