"""A job, and then exact rounds, on four nodes of this machine that are killed all the time; run by test_workers.

Every few seconds a node goes and another one comes, or the process of an actor is killed. Prints how many were.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

EVERY = 15.0
"""Seconds from one death to the next."""


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
    from raydpp.select import shard_actors
    from raydpp.select.stage import select
    from tests.faults import faulty, faulty_shard

    store: dict[str, Any] = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **store})
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(3)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    draw = random.Random(0)

    def under_fire(work: Callable[[], Any], log: Path) -> None:
        """Work in a thread, since only the main one may start nodes; meanwhile something dies every few seconds.

        The last word of a line of the log is the process of an actor.
        """
        deaths: Counter[str] = Counter()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(work)
            while not wait([running], EVERY).done:
                lines = log.read_text().split("\n")[:-1] if log.exists() else []
                if draw.random() < 0.5 and lines:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(lines[-1].split()[-1]), signal.SIGKILL)
                        deaths["actors"] += 1
                else:
                    cluster.remove_node(nodes.pop(draw.randrange(len(nodes))), allow_graceful=False)
                    nodes.append(cluster.add_node(num_cpus=1, **store))
                    deaths["nodes"] += 1
            print(running.result().summary)
        print(f"deaths: {json.dumps(deaths)}")

    log = Path(folder, "log")
    workers.FeatureActor = faulty(log, seconds=0.5)  # type: ignore[misc]
    options: dict[str, Any] = {"dimension": 16, "rows_per_file": 32, "actors": 3}
    under_fire(lambda: extract(corpus, f"{folder}/out", model, **options), log.with_suffix(".at"))
    shard_actors.PATIENCE = 120.0
    shard_actors._ShardActor = faulty_shard(Path(folder, "rounds"), seconds=1.0)  # type: ignore[misc]
    options = {"partitions": 4, "exact": True, "redundancy": "never"}
    under_fire(lambda: select(f"{folder}/out", f"{folder}/subset", 200, **options), Path(folder, "rounds.at"))
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(sockets, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
