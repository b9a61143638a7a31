"""Files of rows to prompt groups: read, normalise, apply the chat template with an exact loss mask, cache, mix."""

from posttrain.data.chat import (
    ChatEncoder,
    encode_conversation,
    set_chat_template,
    stop_token_ids,
)
from posttrain.data.config import DataConfig
from posttrain.data.dataset import GroupData, GroupDataset, groups_from_rows, load_groups
from posttrain.data.mixture import batch_indices
from posttrain.data.readers import Row, read_rows
from posttrain.data.report import DataReport, SourceReport
from posttrain.data.samples import check_stop_trained, highlight_sample
from posttrain.data.schema import Conversation, detect_format, normalise

__all__ = [
    "ChatEncoder",
    "Conversation",
    "DataConfig",
    "DataReport",
    "GroupDataset",
    "Row",
    "GroupData",
    "SourceReport",
    "batch_indices",
    "check_stop_trained",
    "detect_format",
    "encode_conversation",
    "groups_from_rows",
    "highlight_sample",
    "load_groups",
    "normalise",
    "read_rows",
    "set_chat_template",
    "stop_token_ids",
]
