"""Rewards that tests hand to worker processes by name."""

from __future__ import annotations

import math
import os
import time

from posttrain import reward


def hangs(completion, sample):
    while True:
        pass


def sleeps_for_bad_ones(completion, sample):
    if completion == "bad":
        time.sleep(60)
    return 1.0


def raises(completion, sample):
    raise KeyError(sample["name"])


def is_nan(completion, sample):
    return math.nan


def eats_memory(completion, sample):
    return len("x" * (1 << 40))


def dies(completion, sample):
    os._exit(3)


@reward(on_timeout=0.0)
def dies_and_is_wrong(completion, sample):
    os._exit(3)


@reward(on_timeout=0.0)
def dies_once(completion, sample):
    """Of what is not its own fault: the second time there is a mark."""
    if os.path.exists(sample["mark"]):
        return 1.0
    with open(sample["mark"], "w"):
        os._exit(3)


def chatters(completion, sample):
    print("noise " * 100_000)
    return float(len(completion)) + sample["plus"]


async def asynchronous(completion, sample):
    if completion == "bad":
        raise ValueError("no")
    return 2.0


@reward(batched=True)
def batched(completions, samples):
    return [float(len(c)) for c in completions]


def starts_with_digit(completion, sample):
    return 1.0 if completion[:1].isdigit() else 0.0


def nothing(completion, sample):
    return 0.0


def slow_digit(completion, sample):
    time.sleep(0.02)
    return starts_with_digit(completion, sample)


def always(completion, sample):
    return 1.0
