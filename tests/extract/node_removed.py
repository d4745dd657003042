"""A job on a cluster of three nodes on this machine, one of which is removed while it works; run by test_workers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def main(root: str, corpus: str, folder: str, model: str) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = root
    sockets = tempfile.mkdtemp(prefix="rd")  # a short name; of its own, so that no other Ray finds this cluster
    os.environ["RAY_TMPDIR"] = sockets
    Path(sockets, "ray").mkdir()
    sys.path.insert(0, root)

    import ray
    from ray.cluster_utils import Cluster

    from raydpp.extract import workers
    from raydpp.extract.stage import extract
    from tests.faults import faulty

    store: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    removable = {node.node_id: node for node in [cluster.add_node(num_cpus=1, **store) for _ in range(2)]}
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    log, gate = Path(folder, "log"), Path(folder, "gate")

    def remove_one() -> None:
        """Remove a node whose actor has done a unit and is at work on the next one."""
        waiting: dict[str, int] = {}  # the processes at work on nodes that can be removed
        while not waiting:
            time.sleep(0.05)
            if log.with_suffix(".waiting").exists():
                lines = [line.split() for line in log.with_suffix(".waiting").read_text().splitlines()]
                waiting = {node: int(process) for node, process in lines if node in removable}
        node, process = waiting.popitem()
        cluster.remove_node(removable[node], allow_graceful=False)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)  # Ray ends the node's scheduler, which its processes may outlive a little
        print("node removed", flush=True)
        gate.touch()

    threading.Thread(target=remove_one, daemon=True).start()
    workers.FeatureActor = faulty(log, gate=gate, free=1)  # type: ignore[misc]
    print(extract(corpus, f"{folder}/out", model, dimension=16, rows_per_file=4).summary)
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(sockets, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
