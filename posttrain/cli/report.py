"""`posttrain report`: one HTML file of a run, several runs, a pipeline, or what prep wrote."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path


def declare(parser: argparse.ArgumentParser) -> None:
    """Arguments."""
    add = parser.add_argument
    what = "folder of a run (several: overlaid), of a pipeline, or that `posttrain prep` wrote"
    add("folders", nargs="+", metavar="RUN", help=what)
    add("--out", metavar="FILE", help="default: report.html in the first folder")
    add("--watch", type=float, metavar="SECONDS", help="rewrite it until the run is done")


def run(arguments: argparse.Namespace) -> None:
    """Writes the page; with ``--watch`` again and again."""
    from posttrain.report.page import check_installed

    check_installed()
    folders = [Path(folder) for folder in arguments.folders]
    out = Path(arguments.out) if arguments.out else folders[0] / "report.html"
    watch = arguments.watch
    if watch is not None and watch <= 0:
        raise ValueError(f"--watch is a number of seconds above 0; got {watch:g}.")
    try:
        while not _write(folders, out, watch):
            time.sleep(watch)
    except KeyboardInterrupt:
        print()


def _write(folders: Sequence[Path], out: Path, watch: float | None) -> bool:
    """The page of these folders. Returns whether nothing will be added to it."""
    from posttrain.files import replace_text
    from posttrain.report.pipeline import PIPELINE, is_finished, pipeline_page
    from posttrain.report.prep import MANIFEST, prep_page
    from posttrain.report.run import is_done, read_runs
    from posttrain.report.runs import runs_page

    first, is_last = folders[0], watch is None
    if (first / MANIFEST).exists() and len(folders) == 1:
        is_last, text = True, prep_page(first)
    elif not (first / PIPELINE).exists():
        is_last = is_last or all(map(is_done, folders))
        text = runs_page(read_runs(folders), reload_s=None if is_last else watch)
    elif len(folders) > 1:
        raise ValueError(
            f"{first} is a pipeline; a page shows one pipeline, or several runs. Give it "
            "alone, or give the folders of its stages."
        )
    else:
        is_last = is_last or is_finished(first)
        text = pipeline_page(first, out, reload_s=None if is_last else watch)
    replace_text(out, text)
    print(f"wrote {out}", flush=True)
    return is_last
