"""Files of rows to prompt groups: read, normalise, apply the chat template with an exact loss mask,
cache, mix."""

# ruff: noqa: F401 - imported from here by whoever needs rows, groups or prompts
from posttrain.data.chat import (
    ChatEncoder,
    encode_conversation,
    set_chat_template,
    stop_token_ids,
)
from posttrain.data.config import DataConfig
from posttrain.data.dataset import GroupData, GroupDataset, groups_from_rows, load_groups
from posttrain.data.layouts import read_prompt, read_sample
from posttrain.data.mixture import batch_indices
from posttrain.data.readers import Row, read_rows
from posttrain.data.report import (
    DataReport,
    SourceReport,
    check_stop_trained,
    highlight_sample,
)
from posttrain.data.row import Answer, Sample
from posttrain.data.stream import StreamedGroups
