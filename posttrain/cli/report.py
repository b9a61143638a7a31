"""`posttrain report`: one HTML file of a run, several runs, a pipeline, or what prep wrote."""

from __future__ import annotations

import argparse
import time
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
    from posttrain.report.write import is_finished, write_report

    check_installed()
    folders = [Path(folder) for folder in arguments.folders]
    out = Path(arguments.out) if arguments.out else folders[0] / "report.html"
    watch = arguments.watch
    if watch is not None and watch <= 0:
        raise ValueError(f"--watch is a number of seconds above 0; got {watch:g}.")
    try:
        done = False
        while not done:
            done = watch is None or is_finished(folders)
            write_report(folders, out, reload_s=0 if done else watch)
            print(f"wrote {out}", flush=True)
            if not done:
                time.sleep(watch)
    except KeyboardInterrupt:
        print()
