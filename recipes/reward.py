"""Reward modelling: a score per answer, learned from comparisons (Bradley-Terry).

    accelerate launch --config_file launch/cpu.yaml recipes/reward.py --config
    recipes/configs/reward_smollm2.yaml

Rows are comparisons (prompt, chosen, rejected) or ranked answers; `posttrain prep pairs` makes them
of raw data. Ends with a table of held-out figures before and after. runs/<name>/final/ loads with
AutoModelForSequenceClassification alone.
"""

from posttrain.trainers.reward import RewardConfig, RewardTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def main() -> None:
    config = parse_config(RewardConfig, description=__doc__)
    with one_line_errors():
        RewardTrainer(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main()
