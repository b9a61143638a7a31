"""Files of rows to prompt groups: read, normalise, apply the chat template with an exact loss mask,
cache, mix."""

from posttrain.data.batches import StreamedGroups, batch_indices
from posttrain.data.chat import (
    ChatEncoder,
    encode_conversation,
    set_chat_template,
    stop_token_ids,
)
from posttrain.data.config import DataConfig
from posttrain.data.dataset import GroupData, GroupDataset, groups_from_rows, load_groups
from posttrain.data.layouts import read_prompt, read_sample
from posttrain.data.readers import Row, read_rows
from posttrain.data.report import (
    DataReport,
    SourceReport,
    check_stop_trained,
    highlight_sample,
)
from posttrain.data.row import Answer, Sample

__all__ = [
    "Answer",
    "ChatEncoder",
    "Sample",
    "DataConfig",
    "DataReport",
    "GroupDataset",
    "Row",
    "GroupData",
    "SourceReport",
    "StreamedGroups",
    "batch_indices",
    "check_stop_trained",
    "encode_conversation",
    "groups_from_rows",
    "highlight_sample",
    "load_groups",
    "read_prompt",
    "read_rows",
    "read_sample",
    "set_chat_template",
    "stop_token_ids",
]
