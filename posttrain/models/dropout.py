"""Dropout of a model: found, switched off for methods that compare probabilities, and kept in what
is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model (its layers carry the adapter), or the model
    itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _config_rates(model: nn.Module) -> dict[str, float]:
    """The rates > 0 in the config, but those of other heads."""
    return {
        name: value
        for name, value in base_model(model).config.get_text_config().to_dict().items()
        if "drop" in name and not name.startswith(("classifier", "summary"))
        if isinstance(value, float) and value > 0
    }


def has_dropout(model: nn.Module) -> bool:
    """A dropout module, or any dropout rate in the config (OPT and others call F.dropout) but those
    of other heads."""
    modules = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    return modules or bool(_config_rates(model))


def without_dropout(model: nn.Module) -> None:
    """Sets every dropout rate of the model and its adapters to 0, in place.

    A policy that is compared with a reference, or with itself a moment ago, must be the same
    function both times: with dropout, DPO at its start is not ln 2, and the ratios of a first
    update are not 1. The modules stay in training mode, which gradient checkpointing asks for.
    ``own_rates`` gives the config its rates back while it is saved.
    """
    base = base_model(model)
    base.own_dropout_rates = getattr(base, "own_dropout_rates", {}) | _config_rates(model)
    _set_rates(base, dict.fromkeys(base.own_dropout_rates, 0.0))
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and (
                "drop" in name or (name == "p" and isinstance(module, nn.Dropout))
            ):
                setattr(module, name, 0.0)


@contextmanager
def own_rates(model: nn.Module) -> Iterator[None]:
    """Inside, the config says the rates that the model came with."""
    base = base_model(model)
    rates = getattr(base, "own_dropout_rates", {})
    _set_rates(base, rates)
    try:
        yield
    finally:
        _set_rates(base, dict.fromkeys(rates, 0.0))


def _set_rates(base: Any, rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        setattr(base.config.get_text_config(), name, rate)
