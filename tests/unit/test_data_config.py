import subprocess
import sys

import pytest

from posttrain.data import DataConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "rows.jsonl"},
            r"data\.train is a list of sources; got the string 'rows\.jsonl'",
        ),
        ({"train": ["a", "b"], "weights": [1.0]}, "got 1 weights for 2 sources"),
        (
            {"train": ["a", "b"], "weights": [1.0, 0.0]},
            "finite and > 0; got 0.0.*remove it from data.train",
        ),
        ({"train": ["a"], "weights": [float("nan")]}, "finite and > 0; got nan"),
        ({"eval_fraction": 1.0}, r"in \[0, 1\); got 1.0"),
        ({"eval": ["e.jsonl"], "eval_fraction": 0.1}, "eval_fraction=0.1 would be ignored"),
        ({"format": "chatml"}, "DataConfig.format is one of auto, messages, .*got 'chatml'"),
        ({"overlong": "split"}, "DataConfig.overlong is one of truncate, drop, error; got 'split'"),
        ({"max_length": 1}, "data.max_length .* got 1"),
        ({"num_proc": 0}, "data.num_proc .* got 0"),
        ({"columns": {"ask": "prompt"}}, r"\['ask'\] belong to no format.*prompt: question"),
    ],
)
def test_a_wrong_option_says_what_was_got_and_what_is_wanted(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_importing_the_package_imports_no_heavy_library():
    code = (
        "import sys, posttrain.data;"
        "print([m for m in ('torch', 'transformers', 'datasets', 'trl', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
