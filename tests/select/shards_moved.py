"""Exact searches on a cluster of four nodes on this machine, two of which are removed on the way; run by test_exact."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def main(root: str, table: str, out: str, what: str) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = root
    folder = tempfile.mkdtemp(prefix="rd")  # short, for sockets; of its own, so that no other Ray finds this cluster
    os.environ["RAY_TMPDIR"] = folder
    Path(folder, "ray").mkdir()
    sys.path.insert(0, root)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("raydpp").setLevel(logging.INFO)

    import ray
    from ray.cluster_utils import Cluster

    store: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    workers = [cluster.add_node(num_cpus=1, **store) for _ in range(3)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    if what == "equal":
        equal(table, out)
    else:
        removed(table, out, cluster, workers)
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def equal(table: str, out: str) -> None:
    from raydpp.select.stage import select

    for partitions in (5, 16):
        for kernel in ("rbf", "cosine"):
            select(table, f"{out}/{kernel}-{partitions}", 150, kernel=kernel, partitions=partitions, exact=True)


def removed(table: str, out: str, cluster: Any, workers: list[Any]) -> None:
    from raydpp.errors import UserError
    from raydpp.select import shard_actors as shards
    from raydpp.select.stage import select
    from tests.faults import faulty_shard

    shards.PATIENCE = 8.0

    def remove_from(log: Path) -> None:
        """Remove a node, not the head, on which a shard is in its fourth round."""
        while True:
            lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
            here = {node for _, number, _, node in lines if int(number) >= 3}
            for worker in workers:
                if worker.node_id in here:
                    workers.remove(worker)
                    cluster.remove_node(worker, allow_graceful=False)
                    print(f"removed {worker.node_id}", flush=True)
                    return
            time.sleep(0.05)

    def run(name: str, partitions: int) -> None:
        select(table, f"{out}/{name}", 150, partitions=partitions, exact=True)

    for name, partitions in (("room", 5), ("full", 3)):  # halves of four CPUs; then all of three
        log = Path(out, f"{name}.log")
        shards._ShardActor = faulty_shard(log, seconds=0.4)  # type: ignore[misc]
        thread = threading.Thread(target=remove_from, args=[log], daemon=True)
        thread.start()
        try:
            run(name, partitions)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
        thread.join()
    cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    cluster.wait_for_nodes()
    run("full", 3)


if __name__ == "__main__":
    main(*sys.argv[1:])
