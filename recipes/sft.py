"""Supervised fine-tuning with its loss written out: copy this file and change it.

    accelerate launch --config_file launch/cpu.yaml recipes/sft.py --config \
        recipes/configs/sft_smollm2.yaml

`posttrain sft --config sft_smollm2` trains the same; there --loss names a loss.
"""

from posttrain import LossOutput, SFTConfig, SFTTrainer, loss
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


@loss(reference=False, couples_completions=False)
def negative_log_likelihood(logps):
    """-log pi of each trained token. A loss returns items; the step divides by their number in the
    whole global batch."""
    return LossOutput(items=-logps.logps_T)


if __name__ == "__main__":
    config = parse_config(SFTConfig, description=__doc__)
    with one_line_errors():
        SFTTrainer(config=config, loss=negative_log_likelihood).train()
    leave_processes()
