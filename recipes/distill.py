"""On-policy distillation: a student samples and learns at each token what its teachers would do.
Copy this file and change it.

    accelerate launch --config_file launch/cpu.yaml recipes/distill.py --config \
        recipes/configs/distill_smollm2.yaml

`posttrain distill --config distill_smollm2` trains the same. The reward below is only logged.
"""

from posttrain import DistillConfig, DistillTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def ended(completion, sample):
    """1 where the student ended its answer by itself."""
    return float(completion.finish_reason == "stop")


if __name__ == "__main__":
    config = parse_config(DistillConfig, description=__doc__)
    with one_line_errors():
        DistillTrainer(config=config, rewards={ended: 0.0}).train()
    leave_processes()
