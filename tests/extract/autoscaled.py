"""A job on a cluster without workers that gets up to two, with a GPU each that only Ray believes; run by test_workers.

Ray's fake_multinode provider starts and ends processes of this machine as if they were machines. Prints how many
workers there were, each time that changed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def cluster_config(gcs_address: str) -> dict[str, Any]:
    """A head with a CPU, and a type of workers of which there are none to begin with."""
    worker = {"CPU": 1, "GPU": 1, "object_store_memory": 100 * 2**20}
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            "head": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "head_node_type": "head",
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{f"{name}_commands": [] for name in commands},
        **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    }


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main(root: str, corpus: str, folder: str, model: str) -> None:
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    os.environ["PYTHONPATH"] = root
    sys.path.insert(0, root)
    work, port = tempfile.mkdtemp(prefix="rd"), free_port()  # a short name, for sockets

    import ray

    from raydpp.extract import workers
    from raydpp.extract.stage import extract
    from tests.faults import faulty

    config, log, gate = Path(work, "cluster.json"), Path(folder, "log"), Path(folder, "gate")
    config.write_text(json.dumps(cluster_config(f"{ray.util.get_node_ip_address()}:{port}")))
    head = subprocess.Popen(
        [
            *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--port={port}", f"--ray-client-server-port={free_port()}", f"--temp-dir={work}/r"),
            *(f"--dashboard-agent-listen-port={free_port()}", "--include-dashboard=false", "--num-cpus=1"),
            *("--object-store-memory=100000000", f"--autoscaling-config={config}"),
        ],
        env={**os.environ, "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        | {"RAY_enable_autoscaler_v2": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    history: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            found = sum(node["Alive"] for node in ray.nodes()) - 1
            if history[-1:] != [found]:
                history.append(found)
            if found == 2:
                gate.touch()  # until then the actors wait in their first units

    def until(condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.5)

    try:
        until(lambda: _connected(port), 90)
        threading.Thread(target=watch, daemon=True).start()
        workers.FeatureActor = faulty(log, gate=gate)  # type: ignore[misc]
        print(
            extract(corpus, f"{folder}/out", model, dimension=16, rows_per_file=4, gpus_per_actor=1, actors=2).summary
        )
        until(lambda: history[-1] == 0, 120)
        print(f"workers: {history}")
    finally:
        ended.set()
        ray.shutdown()
        head.terminate()
        head.wait(60)
        shutil.rmtree(work, ignore_errors=True)


def _connected(port: int) -> bool:
    """Whether the head is up, and this process is connected to it."""
    import ray

    try:
        ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
    except ConnectionError:
        return False
    return True


if __name__ == "__main__":
    main(*sys.argv[1:])
