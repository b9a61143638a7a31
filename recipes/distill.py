"""On-policy distillation: a student samples and learns at each token what its teachers would do.

    accelerate launch --config_file launch/cpu.yaml recipes/distill.py --config
    recipes/configs/distill_smollm2.yaml

Rows have a prompt (or question, or messages); rewards are optional, and --reward_weight mixes them
in. Writes runs/<name>/ as recipes/rl.py does.
"""

from posttrain.trainers.distill import DistillConfig, DistillTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def main() -> None:
    config = parse_config(DistillConfig, description=__doc__)
    with one_line_errors():
        DistillTrainer(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main()
