"""DPO with its loss written out: copy this file and change it.

    accelerate launch --config_file launch/cpu.yaml recipes/dpo.py --config \
        recipes/configs/dpo_smollm2.yaml

`posttrain dpo --config dpo_smollm2` trains the same; there --loss names one of 23 losses.
"""

from torch.nn.functional import logsigmoid

from posttrain import DPOConfig, DPOTrainer, LossOutput, loss
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


@loss()
def dpo(logps, *, beta=0.1):
    """-log sigmoid(beta h) of each pair, h = log pi(y_w)/pi_ref(y_w) - log pi(y_l)/pi_ref(y_l).
    Rafailov et al. 2023, arXiv:2305.18290 eq. 7."""
    chosen_S, rejected_S = logps.pairs_B2.T  # which completions each pair compares
    logratio_S = logps.logps_S - logps.reference_S
    h_B = logratio_S[chosen_S] - logratio_S[rejected_S]
    return LossOutput(items=-logsigmoid(beta * h_B), unit="pair")


if __name__ == "__main__":
    config = parse_config(DPOConfig, description=__doc__)
    with one_line_errors():
        DPOTrainer(config=config, loss=dpo).train()
    leave_processes()
