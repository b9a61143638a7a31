"""Has imported what a run imports, and runs commands in forks of itself: importing takes longer
than most runs of a test.

Requests come as lines of JSON on stdin, answers go to stdout; it ends with its stdin. See
``launching.Run``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import runpy
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

MODULES = """
torch torch.distributed torch._dynamo numpy accelerate accelerate.data_loader datasets jsonargparse peft deepspeed psutil pyarrow.parquet
safetensors.torch transformers transformers.models.auto.modeling_auto transformers.models.llama.modeling_llama
transformers.models.llama.tokenization_llama transformers.generation.utils transformers.trainer_callback rich.console rich.table rich.progress
trl.chat_template_utils docstring_parser posttrain.trainers.sft posttrain.trainers.dpo posttrain.trainers.reward posttrain.trainers.rl posttrain.cli.main
"""


def serve(answers: TextIO) -> dict[str, Any] | None:
    """Answers requests. In a fork: what it has to run; when there is no more to answer: None."""
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                return request
        print(json.dumps(answer), file=answers, flush=True)
    return None


def become(request: dict[str, Any]) -> None:
    """This process is as a new one would be, but for what it has imported, and runs the script or
    module to its end."""
    for stream, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY),
        (2, request["stderr"], os.O_WRONLY),
    ):
        file = os.open(path, flags | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed()
    importlib.import_module("numpy").random.seed()
    script, *arguments = request["command"]
    if script == "-m":
        sys.argv, sys.path[0] = arguments, os.getcwd()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = request["command"], str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    to_client = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some packages print when they are imported
    for name in MODULES.split():
        if importlib.util.find_spec(name.split(".")[0]):
            importlib.import_module(name)
    assert threading.active_count() == 1, "a fork has only the thread that forked"
    gc.collect()
    gc.freeze()  # a fork that collects or ends would copy every page: 2 s
    to_run = serve(to_client)
    if to_run is not None:
        become(to_run)
