"""Preference optimisation: DPO and its relatives (IPO, SimPO, ORPO, KTO, ...).

    accelerate launch --config_file launch/cpu.yaml recipes/dpo.py --config
    recipes/configs/dpo_smollm2.yaml

Rows are comparisons (prompt, chosen, rejected), ranked or labelled answers; `posttrain prep pairs`
makes them of raw data. Ends with a table of held-out figures before and after. Writes runs/<name>/:
config.yaml, metrics.jsonl, checkpoints/, final/. A second start with the same name continues from
the newest checkpoint.
"""

from posttrain.trainers.dpo import DPOConfig, DPOTrainer
from posttrain.training.config import one_line_errors, parse_config
from posttrain.training.launch import leave_processes


def main() -> None:
    config = parse_config(DPOConfig, description=__doc__)
    with one_line_errors():
        DPOTrainer(config=config).train()
    leave_processes()


if __name__ == "__main__":
    main()
