"""Run ``bergson build`` on tokenised rows and print how long its batches took; for an interpreter that has bergson.

``python bergson_build.py ROWS.jsonl MODEL PRECISION TOKENS_OF_A_BATCH THREADS`` prints as its last line a JSON list of
[tokens, seconds], one for every batch in the order they ran. Two of bergson's functions note the time; nothing of it is
replaced.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(rows: str, model: str, precision: str, batch_tokens: str, threads: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # datasets would take the rows of an earlier run from its cache
        import torch
        from bergson.__main__ import main as bergson
        from bergson.collector.collector import CollectorComputer
        from bergson.collector.gradient_collectors import GradientCollector

        torch.set_num_threads(int(threads))
        tokens: list[int] = []
        times: list[float] = []
        run, process = CollectorComputer.run_with_collector_hooks, GradientCollector.process_batch

        def timed_run(self: Any, *arguments: Any, **options: Any) -> None:
            lengths = list(self.data["length"])
            tokens.extend(sum(lengths[i] for i in batch) for batch in self.batches)
            times.append(time.perf_counter())
            run(self, *arguments, **options)

        def timed_process(self: Any, *arguments: Any, **options: Any) -> None:
            process(self, *arguments, **options)
            times.append(time.perf_counter())

        CollectorComputer.run_with_collector_hooks = timed_run
        GradientCollector.process_batch = timed_process
        sys.argv = ["bergson", "build", os.path.join(folder, "index"), "--model", model, "--precision", precision]
        sys.argv += ["--dataset", rows, "--projection_dim", "16", "--token_batch_size", batch_tokens]
        sys.argv += ["--loss_reduction", "mean", "--nproc_per_node", "1", "--overwrite", "true"]
        bergson()
    print(json.dumps([[n, after - before] for n, before, after in zip(tokens, times[:-1], times[1:], strict=True)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
