"""Supervised fine-tuning.

    accelerate launch --config_file launch/cpu.yaml recipes/sft.py --config
    recipes/configs/sft_smollm2.yaml

The loss is on assistant tokens only. Writes runs/<name>/: config.yaml, metrics.jsonl, checkpoints/,
final/. A second start with the same name continues from the newest checkpoint.
"""

from posttrain.trainers.sft import SFTConfig, SFTTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def main() -> None:
    config = parse_config(SFTConfig, description=__doc__)
    with one_line_errors():
        SFTTrainer(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main()
