"""A job on a cluster that claims two GPUs beside its two CPUs, which only Ray believes; run by test_workers."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path


def main(root: str, corpus: str, folder: str, model: str) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = root
    sockets = tempfile.mkdtemp(prefix="rd")  # a short name; of its own, so that no other Ray finds this cluster
    os.environ["RAY_TMPDIR"] = sockets
    Path(sockets, "ray").mkdir()
    sys.path.insert(0, root)

    import ray

    from raydpp.extract import workers
    from raydpp.extract.stage import extract
    from tests.faults import faulty

    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    workers.FeatureActor = faulty(Path(folder, "log"))  # type: ignore[misc]
    print(extract(corpus, f"{folder}/out", model, dimension=16, rows_per_file=8, actors=2).summary)
    ray.shutdown()
    shutil.rmtree(sockets, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
