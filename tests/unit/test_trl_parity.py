"""The same batch through TRL's own losses: padded and concatenated there, packed with shared
prompts here. float32, 1e-5.

Where TRL deviates from a paper, a test says so: `ipo` averages over tokens, `sigmoid` ignores label
smoothing, `sft` averages over the tokens of the batch.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from posttrain.losses import preference
from posttrain.losses.preference import preference_metrics
from posttrain.losses.reduce import reduce_term, weighted_sum
from posttrain.losses.reward import bradley_terry
from posttrain.models.policy import Policy
from posttrain.packing.batch import GroupPart, pack
from posttrain.packing.plan import PackingConfig, count_units
from posttrain.types import Completion, Pair, PromptGroup
from tests.helpers import tiny_llama
from tests.tiny import byte_tokenizer
from tests.unit.preference_batches import batch_of

ROWS = [
    {
        "prompt_ids": [5, 6, 7, 8],
        "chosen_ids": [9, 10, 11],
        "rejected_ids": [12, 13, 14, 15, 16, 17, 18],
    },
    {"prompt_ids": [20, 21], "chosen_ids": [22, 23, 24, 25, 26], "rejected_ids": [27]},
    {
        "prompt_ids": [30, 31, 32, 33, 34, 35, 36],
        "chosen_ids": [37, 38],
        "rejected_ids": [39, 40, 41],
    },
]
BETA = 0.3


def sharp_llama(seed):
    """Log-probs far from uniform, so that no two losses agree by chance."""
    return tiny_llama(seed=seed, vocab_size=300, initializer_range=0.5)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4)
    config = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        report_to=[],
        beta=BETA,
        gradient_checkpointing=False,
        bf16=False,
    )
    return DPOTrainer(
        model=sharp_llama(0),
        ref_model=sharp_llama(1),
        args=config,
        train_dataset=text,
        processing_class=byte_tokenizer(),
    )


def theirs(trainer, loss_type, **settings):
    """TRL's loss and logged metrics of ROWS; ``settings`` for this call only."""
    wanted = {
        "loss_types": [loss_type] if isinstance(loss_type, str) else loss_type,
        "loss_weights": [1.0],
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        **settings,
    }
    before = {name: getattr(trainer, name) for name in wanted}
    for name, value in wanted.items():
        setattr(trainer, name, value)
    inputs = trainer.data_collator([{k: list(v) for k, v in row.items()} for row in ROWS])
    trainer._metrics["train"].clear()
    trainer.model.train()
    try:
        return trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    finally:
        for name, value in before.items():
            setattr(trainer, name, value)


def groups():
    def completion(ids):
        return Completion(token_ids=ids, loss_mask=[1] * len(ids))

    return [
        PromptGroup(
            prompt_ids=r["prompt_ids"],
            completions=[completion(r["chosen_ids"]), completion(r["rejected_ids"])],
        )
        for r in ROWS
    ]


def forward(model):
    policy = Policy(copy.deepcopy(model), PackingConfig(mode="shared"))
    batch = pack(
        groups(), [GroupPart(group=i, completions=(0, 1)) for i in range(len(ROWS))], mode="shared"
    )
    return policy, batch, policy(batch).logps_T


@pytest.fixture(scope="module")
def logps(trainer):
    _, batch, logps_T = forward(trainer.model)
    return batch.with_logps(logps_T.detach(), reference_T=forward(trainer.ref_model)[2].detach())


def reduced(output, logps):
    return float(sum(reduce_term(term, logps, count_units(groups())) for term in output.terms))


VARIANTS = [
    ("sigmoid", "dpo", {}, {}),
    ("hinge", "hinge", {}, {}),
    ("ipo", "ipo_avg", {}, {}),
    ("exo_pair", "exo", {"label_smoothing": 0.05}, {"label_smoothing": 0.05}),
    ("nca_pair", "nca", {}, {}),
    ("robust", "robust", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("bco_pair", "bco", {}, {}),
    ("sppo_hard", "sppo", {}, {}),
    ("apo_zero", "apo_zero", {}, {}),
    ("apo_down", "apo_down", {}, {}),
    ("discopop", "discopop", {}, {}),
    ("sigmoid_norm", "dpo_norm", {}, {}),
    *[
        ("sigmoid", "dpo", {"f_divergence_type": f}, {"f_divergence": f})
        for f in ("forward_kl", "js_divergence")
    ],
    (
        "sigmoid",
        "dpo",
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
        {"f_divergence": "alpha_divergence", "alpha": 0.6},
    ),
    ("hinge", "hinge", {"f_divergence_type": "js_divergence"}, {"f_divergence": "js_divergence"}),
    (
        "discopop",
        "discopop",
        {"f_divergence_type": "js_divergence"},
        {"f_divergence": "js_divergence"},
    ),
]


@pytest.mark.parametrize(("loss_type", "name", "settings", "options"), VARIANTS)
def test_variant(trainer, logps, loss_type, name, settings, options):
    wanted = float(theirs(trainer, loss_type, **settings))
    got = reduced(getattr(preference, name)(logps, beta=BETA, **options), logps)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_variants_are_told_apart(trainer):
    values = [
        float(theirs(trainer, loss_type, **settings)) for loss_type, _, settings, _ in VARIANTS
    ]
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-4


def test_weighted_sum(trainer, logps):
    wanted = float(theirs(trainer, ["sigmoid", "apo_zero"], loss_weights=[1.0, 0.25]))
    ours = weighted_sum(
        [
            (1.0, lambda l: preference.dpo(l, beta=BETA)),
            (0.25, lambda l: preference.apo_zero(l, beta=BETA)),
        ]
    )
    assert reduced(ours(logps), logps) == pytest.approx(wanted, rel=1e-5)


def test_trl_ipo_is_averaged_over_tokens_where_the_authors_code_sums(trainer, logps):
    assert (
        abs(reduced(preference.ipo(logps, beta=BETA), logps) - float(theirs(trainer, "ipo"))) > 0.1
    )


def test_trl_sigmoid_ignores_label_smoothing(trainer, logps):
    smoothed = float(theirs(trainer, "sigmoid", label_smoothing=0.2))
    assert smoothed == float(theirs(trainer, "sigmoid"))
    assert (
        abs(reduced(preference.cdpo(logps, beta=BETA, label_smoothing=0.2), logps) - smoothed)
        > 1e-3
    )


def test_trl_sft_averages_over_the_tokens_of_the_batch_where_rpo_averages_by_answer(trainer, logps):
    wanted = float(theirs(trainer, "sft"))
    tokens = logps.chosen_length_B.sum()
    assert float(-logps.chosen_logps_B.sum() / tokens) == pytest.approx(wanted, rel=1e-5)
    by_answer = reduced(preference.nll_chosen(logps), logps)
    assert by_answer == pytest.approx(
        float((-logps.chosen_logps_B / logps.chosen_length_B).mean()), rel=1e-6
    )
    assert abs(by_answer - wanted) > 1e-3


def test_metrics(trainer, logps):
    theirs(trainer, "sigmoid")
    logged = trainer._metrics["train"]
    ours = preference_metrics(logps, beta=BETA)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ):
        kind, _, what = name.partition("/")
        assert float(ours[f"{kind}_train/{what}"].mean()) == pytest.approx(
            logged[name][0], rel=1e-5, abs=1e-5
        ), name


def test_gradient(trainer):
    trainer.model.zero_grad()
    theirs(trainer, "sigmoid").backward()
    wanted = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    policy, batch, logps_T = forward(trainer.model)
    logps = batch.with_logps(logps_T, reference_T=forward(trainer.ref_model)[2].detach())
    (term,) = preference.dpo(logps, beta=BETA).terms
    reduce_term(term, logps, count_units(groups())).backward()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, parameter in policy.model.named_parameters():
        assert float((parameter.grad - wanted[name]).abs().max()) < 1e-5 * scale, name


def mean_logps(logps):
    return (
        logps.chosen_logps_B / logps.chosen_length_B,
        logps.rejected_logps_B / logps.rejected_length_B,
    )


def test_simpo_cpo_and_orpo(logps):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    shared = dict(
        beta=2.0,
        alpha=0.0,
        label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        simpo_gamma=0.7,
    )
    simpo, *_ = CPOTrainer.cpo_loss(
        SimpleNamespace(loss_type="simpo", **shared), *mean_logps(logps)
    )
    assert torch.allclose(
        preference.simpo(logps, beta=2.0, gamma=0.7).terms[0].items, simpo, rtol=1e-5
    )
    cpo, *_ = CPOTrainer.cpo_loss(
        SimpleNamespace(loss_type="sigmoid", **{**shared, "beta": BETA}),
        logps.chosen_logps_B,
        logps.rejected_logps_B,
    )
    assert torch.allclose(
        preference.cpo(logps, beta=BETA, nll_weight=0.0).terms[0].items, cpo, rtol=1e-5
    )
    odds, *_ = ORPOTrainer.odds_ratio_loss(
        SimpleNamespace(**{**shared, "beta": 0.1}), *mean_logps(logps)
    )
    ours = preference.orpo(logps, lambda_=0.1).terms[0].items + mean_logps(logps)[0]
    assert torch.allclose(ours, -odds, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("margin", "centering"), [(None, None), ([0.5, 0.0, 1.5], None), ([0.5, 0.0, 1.5], 0.01)]
)
def test_reward(margin, centering):
    """TRL's loss is the mean over the pairs of the batch; so is ours with pair_mean."""
    from collections import defaultdict

    from trl import RewardTrainer

    scores = torch.tensor([[1.2, 0.3], [-0.4, 0.9], [2.0, 2.5]], dtype=torch.float64)

    def model(**_):
        return SimpleNamespace(logits=scores.T.reshape(-1, 1))

    fake = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        _total_train_tokens=0,
        _metrics={"eval": defaultdict(list)},
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    )
    inputs = {} if margin is None else {"margin": torch.tensor(margin, dtype=torch.float64)}
    wanted = float(RewardTrainer.compute_loss(fake, model, inputs))
    totals = []
    for row, m in zip(scores, margin or [0.0] * 3, strict=True):
        logps = batch_of([list(row)], pairs=[Pair(chosen=0, rejected=1, margin=m)])
        totals.append(
            float(
                bradley_terry(
                    logps, margin_scale=1.0, centering=centering or 0.0, aggregation="pair_mean"
                )
                .terms[0]
                .items
            )
        )
    assert sum(totals) / 3 == pytest.approx(wanted, abs=1e-12)
