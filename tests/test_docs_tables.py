"""The tables of docs/ against the code: defaults of every loss and algorithm, options of TRL, messages
that are quoted, tests that are named."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from operator import attrgetter

import pytest
import yaml

import posttrain
from posttrain.losses import policy
from posttrain.rl.algorithms import ALGORITHMS, Algorithm
from posttrain.types import Loss, as_loss
from tests.e2e.launching import REPO
from tests.losses_for_tests import PREFERENCE


def page(name):
    return (REPO / "docs" / name).read_text()


def rows(text):
    """Cells of each line of a table, `\\|` within them resolved."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [c.strip().replace(r"\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]


def by_name(text, column):
    """{name in the first cell: the options in that column}, for rows that begin with a name."""
    found = {}
    for cells in rows(text):
        if (name := re.fullmatch(r"`(\w+)`", cells[0])) and len(cells) > column:
            parts = [p.split(" ", 1) for p in cells[column].split(", ") if p]
            found[name[1]] = {key: yaml.safe_load(value) for key, value in parts}
    return found


def options(function):
    function = getattr(function, "function", function)
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY}


def effective(algorithm):
    """What an algorithm runs with: options of credit and loss, and its fields that are set."""
    fixed = {"name", "advantages", "loss", "loss_options", "advantage_options"}
    own = {f.name: getattr(algorithm, f.name) for f in fields(Algorithm) if f.name not in fixed}
    plain = {f.name: f.default for f in fields(Algorithm)}
    return {
        **options(algorithm.credit),
        **algorithm.advantage_options,
        **options(as_loss(algorithm.loss)),
        **algorithm.loss_options,
        **{name: value for name, value in own.items() if value != plain[name]},
    }


def test_every_loss_is_in_the_table_with_its_true_defaults():
    text = page("losses.md").partition("## Distillation")[0]
    of_pages = by_name(text, 3)
    public = PREFERENCE | {name: getattr(posttrain, name) for name in ("bradley_terry", "sft")}
    assert of_pages == {name: options(loss) for name, loss in public.items()}
    of_policies = {n for n, value in vars(policy).items() if isinstance(value, Loss)}
    others = {"objective", "distillation", "loss", "as_loss"}
    losses = {n for n in posttrain.__all__ if "losses" in posttrain.HOME[n]} - others
    assert losses - of_policies == set(public)


def test_losses_without_a_reference_are_those_that_the_page_names():
    line = re.search(r"Without a reference: (.*?)\.", page("losses.md"))
    found = {name for name, loss in PREFERENCE.items() if not as_loss(loss).reference}
    assert set(re.findall(r"`(\w+)`", line[1])) == found


def test_every_algorithm_has_its_true_defaults():
    text = page("algorithms.md").partition("| | defaults |")[2].partition("\n\n")[0]
    assert by_name(text, 1) == {name: effective(a) for name, a in ALGORITHMS.items()}


def code_blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


@pytest.fixture(scope="module")
def trl():
    """TRL's configs and trainers of the methods that the page compares."""
    import trl
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    names = ("SFT", "DPO", "Reward", "GRPO", "Distillation")
    return (
        [*(getattr(trl, f"{n}Config") for n in names), GKDConfig],
        [*(getattr(trl, f"{n}Trainer") for n in names), GKDTrainer],
    )


def fields_of(configs):
    return {f.name for config in configs for f in fields(config)}


def parameters_of(trainers):
    named = {name for t in trainers for name in inspect.signature(t.__init__).parameters}
    return named - {"self", "args", "kwargs"}


def test_options_of_trl_on_the_page_exist_and_none_of_its_own_is_missing(trl):
    from transformers import TrainingArguments

    configs, trainers = trl
    text = page("from_trl.md")
    tables = text.partition("## Trainer arguments")[2].partition("## Names of losses")[0]
    listed = {n for cells in rows(tables) for n in re.findall(r"`(\w+)`", cells[0])}
    others = {"args", "model_init", "formatting_func", "reward_processing_classes"}
    known = fields_of(configs) | parameters_of(trainers) | others
    assert not listed - known
    own = fields_of(configs) - fields_of([TrainingArguments])
    assert not (own | parameters_of(trainers)) - listed


def test_the_setting_named_for_an_option_of_trl_is_that_of_the_page(trl):
    from posttrain.resolve import TRL_OPTIONS

    tables = page("from_trl.md").partition("## Settings of every trainer")[2]
    pairs = {
        (theirs, ours)
        for cells in rows(tables.partition("## Names of losses")[0])
        for theirs in re.findall(r"`(\w+)`", cells[0])
        for ours in re.findall(r"`([\w.]+)`", cells[1])
    }
    named_elsewhere = {("model_name_or_path", "model.name")}
    assert set(TRL_OPTIONS.items()) - pairs == named_elsewhere
    for path in set(TRL_OPTIONS.values()):
        attrgetter(path)(posttrain.RLConfig())


def test_names_of_losses_are_trls(trl):
    text = page("from_trl.md").partition("## Names of losses")[2].partition("## Command lines")[0]
    dpo, grpo = text.split("| TRL, GRPO |")
    for part, trainer in ((dpo, trl[1][1]), (grpo, trl[1][3])):
        source = inspect.getsource(inspect.getmodule(trainer))
        listed = {n for cells in rows(part) for n in re.findall(r"`(\w+)`", cells[0])}
        compared = re.findall(r"loss_type (?:==|in) (\[.*?\]|\".*?\")", source)
        known = {n for found in compared for n in re.findall(r'"(\w+)"', found)}
        assert listed == known


def test_the_scripts_of_trl_use_its_options_and_the_same_rewards(trl):
    configs, trainers = trl
    known = fields_of(configs) | parameters_of(trainers) | {"args"}
    ours, theirs = {}, {}
    for block in code_blocks(page("from_trl.md"), "python"):
        tree = ast.parse(block)
        functions = {f.name: ast.dump(f) for f in tree.body if isinstance(f, ast.FunctionDef)}
        if "from trl" not in block:
            ours |= functions
            continue
        theirs |= functions
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            name = getattr(call.func, "id", "")
            if name.endswith(("Config", "Trainer")):
                assert {k.arg for k in call.keywords} <= known
    assert theirs["right"] == ours["right"]


def test_the_settings_file_beside_trls_is_read(tmp_path):
    from posttrain.training.config import parse_config

    _, block = code_blocks(page("from_trl.md"), "yaml")
    (tmp_path / "sft.yaml").write_text(block)
    config = parse_config(
        posttrain.SFTConfig, ["--config", str(tmp_path / "sft.yaml")], description=""
    )
    assert (config.model.lora.rank, config.train.batch_size) == (16, 32)


def texts_of_the_program():
    """Every string of the package but docstrings; what is filled in is a mark."""
    for path in (REPO / "posttrain").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and id(node) not in docstrings:
                yield str(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                yield "".join(parts)


def test_quoted_messages_are_those_of_the_program():
    messages = re.findall(r"\*\*`(.*?)`\*\*", page("troubleshooting.md").replace("\n", " "))
    assert len(messages) > 50
    known = list(texts_of_the_program())
    for message in messages:
        fixed = [part.strip(" .;") for part in message.split("…")]
        assert max(map(len, fixed)) >= 8, message
        pattern = re.compile(".*".join(re.escape(part) for part in fixed), flags=re.S)
        assert any(pattern.search(text) for text in known), message


def test_named_tests_exist():
    named = re.findall(r"pytest (tests/[\w/]+\.py)::(\w+)", page("cannot_happen.md"))
    assert len(named) > 40
    for path, name in named:
        tree = ast.parse((REPO / path).read_text())
        tests = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
        assert name in tests, f"{path}::{name}"


def test_themes_have_one_verdict_and_a_test():
    text = page("cannot_happen.md")
    themes = re.split(r"^## \d+\. ", text, flags=re.M)[1:]
    verdicts = [cells[1] for cells in rows(text) if cells[0].startswith("[")]
    assert len(themes) == len(verdicts) == 13
    for theme, verdict in zip(themes, verdicts, strict=True):
        limited = re.search(r"\*Here\.\* \*\*(Can happen|Does not exist|In part|Do not)", theme)
        assert bool(limited) == (verdict != "cannot happen"), theme.splitlines()[0]
        assert "pytest tests/" in theme
