"""A reward model with its loss written out: copy this file and change it.

    accelerate launch --config_file launch/cpu.yaml recipes/reward.py --config \
        recipes/configs/reward_smollm2.yaml

`posttrain reward --config reward_smollm2` trains the same. The result is an
AutoModelForSequenceClassification with one score.
"""

from torch.nn.functional import logsigmoid

from posttrain import LossOutput, RewardConfig, RewardTrainer, loss
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


@loss(reference=False)
def bradley_terry(logps):
    """-log sigmoid(r(x, y_w) - r(x, y_l)) of each pair of a prompt's answers.
    Ouyang et al. 2022, arXiv:2203.02155 eq. 1."""
    score_S = logps.logps_S  # of a reward model, the scores
    chosen_S, rejected_S = logps.pairs_B2.T
    margin_B = score_S[chosen_S] - score_S[rejected_S]
    metrics = {"accuracy": (margin_B > 0).to(margin_B.dtype)}
    return LossOutput(items=-logsigmoid(margin_B), unit="pair", metrics=metrics)


if __name__ == "__main__":
    config = parse_config(RewardConfig, description=__doc__)
    with one_line_errors():
        RewardTrainer(config=config, loss=bradley_terry).train()
    leave_processes()
