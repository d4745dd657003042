"""The entry points of ``ray job submit``, run the way users run them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.dpp.greedy import greedy_map
from raydpp.storage import Folder
from raydpp.tables import vector_array, write_table

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_every_job_explains_itself(job: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(job), "--help"], cwd=ROOT, capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert "--out OUT" in found.stdout
    assert "--config CONFIG" in found.stdout


def test_a_mistake_in_a_job_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "jobs/select_subset.py", str(tmp_path / "none"), "--out", str(tmp_path / "o"), "--size", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert found.returncode == 2
    assert "there is no folder" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.fixture
def head() -> Iterator[str]:
    """A Ray head of its own, with a dashboard; its address for ``ray job submit``."""
    port, dashboard, client, agent_http, agent_grpc, metrics = free_ports(6)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: a socket's path has at most 107 characters
        command = f"""ray start --head --block --num-cpus=2 --object-store-memory=100000000 --disable-usage-stats
            --port={port} --dashboard-port={dashboard} --ray-client-server-port={client}
            --dashboard-agent-listen-port={agent_http} --dashboard-agent-grpc-port={agent_grpc}
            --metrics-export-port={metrics} --temp-dir={folder}"""
        process = subprocess.Popen(
            command.split(), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                        break
                time.sleep(0.3)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            process.terminate()
            process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_select_by_ray_job_submit(head: str, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    ids = [f"{n:03d}" for n in range(60)]
    table = str(tmp_path / "table.parquet")
    write_table(
        Folder.at(tmp_path), "table.parquet", pa.table({"id": ids, "gradient": vector_array(vectors, pa.float32())})
    )
    out = tmp_path / "out"
    submit = f"ray job submit --address {head} --working-dir . -- python jobs/select_subset.py --size 0.2"
    done = subprocess.run(
        [*submit.split(), table, "--out", str(out)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "select: 12 of 60 examples" in done.stdout
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    expected = [ids[index] for index in greedy_map(vectors, 12, ids=ids).indices]
    assert pq.read_table(out / "selection")["id"].to_pylist() == expected
