"""``--preset paper`` beside what its authors computed: ``PYTHONPATH=. python tests/benchmarks/paper.py CORPUS``.

The gradients of lora_B (PEFT, r = 512 on q, k, v and o, Gaussian A) of a dozen examples are formed whole by autograd,
one at a time, and projected to 4,096 by scikit-learn's SparseRandomProjection, as the authors did. Beside them stand
the features of the preset, with the same A: root mean square error of the cosines of all pairs, and Pearson's
correlation, for both against the whole gradients.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from extraction_inputs import tokenised
from printed import machine, table
from scipy.stats import pearsonr
from sklearn.random_projection import SparseRandomProjection

from raydpp.demo import demo_model
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.model import load_model
from raydpp.gradients.representations import GradientExtractor
from raydpp.presets import options_of
from tests.gradients.lora_reference import cosines, lora_b_gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="output folder of raydpp ingest")
    parser.add_argument("--model", help="a language model (the demo's)")
    parser.add_argument("--sources", nargs="+", help="only these (all)")
    parser.add_argument("--limit", type=int, default=12, help="examples (12)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of an example (512)")
    parser.add_argument("--seeds", type=int, default=3, help="projections of each kind (3)")
    options = parser.parse_args()
    options.model = options.model or demo_model()
    preset = options_of("paper", "extract")
    adapter = Adapter(targets=tuple(preset["lora_targets"]), init=preset["lora_init"])
    examples = list(tokenised(options, Masking(options.max_length), limit=options.limit).values())
    rows = []
    for seed in range(options.seeds):
        config = ExtractorConfig(
            options.model,
            adapter=adapter,
            rank=preset["lora_rank"],
            dimension=preset["dimension"],
            projection_seed=seed,
            dtype="float32",
        )
        extractor = GradientExtractor(config)
        began = time.perf_counter()
        ours = extractor(examples).features
        took = time.perf_counter() - began
        right = {name: numbers for name, numbers in extractor.projection.maps.items() if numbers is not None}
        model = load_model(options.model, torch.device("cpu"), "float32")
        began = time.perf_counter()
        whole = lora_b_gradients(model, preset["lora_targets"], right, examples)
        theirs = SparseRandomProjection(preset["dimension"], random_state=seed).fit_transform(whole)
        beside = time.perf_counter() - began
        exact = cosines(whole)
        for name, found, seconds in (("raydpp", ours, took), ("scikit-learn", np.asarray(theirs), beside)):
            error = cosines(found) - exact
            agreed = float(pearsonr(cosines(found), exact).statistic)
            cells = [f"{np.sqrt(np.mean(error**2)):.4f}", f"{error.mean():+.4f}", f"{agreed:.4f}", f"{seconds:.0f} s"]
            rows.append([f"{name}, seed {seed}", *cells])
    print(f"{machine('scikit-learn', 'peft')}\n\n{len(examples)} examples, {whole.shape[1]:,} numbers each;")
    print(f"exact cosines: mean {exact.mean():.4f}, standard deviation {exact.std():.4f}\n")
    table(["projected by", "error", "bias", "Pearson", "time"], rows)


if __name__ == "__main__":
    main()
