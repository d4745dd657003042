"""A job on a cluster of three nodes on this machine, one of which is removed while it works; run by test_passes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def main(root: str, corpus: str, out: str, model: str, log: str) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = root
    folder = tempfile.mkdtemp(prefix="rd")  # short, for sockets; of its own, so that no other Ray finds this cluster
    os.environ["RAY_TMPDIR"] = folder
    Path(folder, "ray").mkdir()
    sys.path.insert(0, root)

    import ray
    from ray.cluster_utils import Cluster

    from raydpp.extract import workers as passes
    from raydpp.extract.stage import extract
    from tests.faults import faulty

    store: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    workers = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)

    def remove_one() -> None:
        while len(list(Path(out, "gradients").glob("*.parquet"))) < 2:
            time.sleep(0.05)
        cluster.remove_node(workers[0], allow_graceful=False)
        print("node removed", flush=True)

    threading.Thread(target=remove_one, daemon=True).start()
    passes.FeatureActor = faulty(Path(log), seconds=1.0)  # type: ignore[misc]
    print(extract(corpus, out, model, dimension=16, rows_per_file=4).summary)
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
