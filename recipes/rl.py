"""Reinforcement learning with verifiable rewards: GRPO, DAPO, RLOO, Kimi k1.5, ...

    accelerate launch --config_file launch/cpu.yaml recipes/rl.py --config
    recipes/configs/grpo_smollm2.yaml

Rows have a prompt (or question, or messages) and what the rewards read (answer, tests, ...). Writes
runs/<name>/: config.yaml, metrics.jsonl, rollouts/, checkpoints/, final/. A second start with the
same name continues from the newest checkpoint.
"""

from posttrain.trainers.rl import RLConfig, RLTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def main() -> None:
    config = parse_config(RLConfig, description=__doc__)
    with one_line_errors():
        RLTrainer(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main()
