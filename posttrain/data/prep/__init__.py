"""Raw preference data to training rows: read -> sample -> group by prompt -> pair -> clean -> split
-> write, with a report."""

from posttrain.data.config import PrepConfig
from posttrain.data.prep.pipeline import prepare

__all__ = ["PrepConfig", "prepare"]
