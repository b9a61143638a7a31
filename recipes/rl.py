"""GRPO with its advantages and its loss written out: copy this file and change it.

    accelerate launch --config_file launch/cpu.yaml recipes/rl.py --config \
        recipes/configs/grpo_smollm2.yaml

`posttrain rl --config grpo_smollm2` trains the same; there --algorithm names one of 18 algorithms.
"""

from statistics import fmean, pstdev

import torch

from posttrain import Algorithm, LossOutput, RLConfig, RLTrainer, loss
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def advantages(rewards):
    """(r - mean) / std of each prompt's completions; rewards are [prompt][completion], None where a
    completion could not be scored. Shao et al. 2024, arXiv:2402.03300 section 4.1.2."""
    result = []
    for group in rewards:
        known = [r for r in group if r is not None]
        mean, std = (fmean(known), pstdev(known)) if known else (0.0, 0.0)
        result.append([None if r is None else (r - mean) / std if std else 0.0 for r in group])
    return result


@loss(reference=False, couples_completions=False)
def clipped(logps, *, epsilon=0.2):
    """-min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) by token, rho = pi / pi_old; the mean over
    the tokens of each completion, then over completions. The same paper, eq. 3."""
    advantage_T = logps.by_token("advantage")
    ratio_T = torch.exp(logps.logps_T - logps.proximal_T)
    clipped_T = ratio_T.clamp(1 - epsilon, 1 + epsilon)
    items_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    return LossOutput(items=items_T, aggregation="sequence_mean")


# beta: the weight of the KL to the reference, put around any loss
MINE = Algorithm(name="mine", advantages=advantages, loss=clipped, beta=0.04)


if __name__ == "__main__":
    config = parse_config(RLConfig, description=__doc__)
    with one_line_errors():
        RLTrainer(config=config, algorithm=MINE).train()
    leave_processes()
