"""The entry points of ``ray job submit``, run the way users run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from ray.job_submission import JobDetails, JobSubmissionClient

from raydpp.dpp.greedy import greedy_map
from raydpp.ingest.stage import ingest
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


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A Ray head of its own, with a dashboard; its address for ``ray job submit``."""
    port, dashboard, client, agent_http, agent_grpc, metrics = free_ports(6)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: a socket's path has at most 107 characters
        command = f"""ray start --head --block --num-cpus=2 --object-store-memory=100000000 --disable-usage-stats
            --node-ip-address=127.0.0.1 --port={port} --dashboard-port={dashboard} --ray-client-server-port={client}
            --dashboard-agent-listen-port={agent_http} --dashboard-agent-grpc-port={agent_grpc}
            --metrics-export-port={metrics} --temp-dir={folder}"""
        # without PYTHONPATH, in which jobs would find these sources, whatever was submitted
        found = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
        found["RAY_raylet_start_wait_time_s"] = "120"
        process = subprocess.Popen(command.split(), env=found, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        address, ends = f"http://127.0.0.1:{dashboard}", time.monotonic() + 200
        try:
            while True:  # it takes jobs some time after it has started
                try:
                    JobSubmissionClient(address).submit_job(entrypoint="true")
                    break
                except (ConnectionError, RuntimeError):
                    if time.monotonic() > ends or process.poll() is not None:
                        raise
                    time.sleep(0.5)
            yield address
        finally:
            with suppress(psutil.NoSuchProcess):
                started = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                _, left = psutil.wait_procs([psutil.Process(process.pid), *started], 60)
                for one in left:  # a head that did not come up does not go down
                    one.kill()
            process.wait()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository would have, uncommitted changes included."""
    folder = tmp_path_factory.mktemp("clone")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("these sources are no git repository")
    for name in filter(lambda name: (ROOT / name).is_file(), found.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


class Submission:
    """A job that was submitted from a clone and is followed; ``info`` says how it ended."""

    def __init__(self, head: str, clone: Path, command: list[str], options: Sequence[str] = ()) -> None:
        self.id = f"test-{uuid.uuid4().hex[:8]}"
        self._client = JobSubmissionClient(head)
        submit = ["ray", "job", "submit", "--address", head, "--working-dir", ".", "--submission-id", self.id]
        self._process = subprocess.Popen(
            [*submit, *options, "--", *command],
            cwd=clone, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait(self) -> int:
        """The exit code of ``ray job submit``; ``said`` is then what it has shown."""
        self.said, _ = self._process.communicate(timeout=400)
        return self._process.returncode

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def info(self) -> JobDetails:
        return self._client.get_job_info(self.id)

    def stop(self) -> None:
        """As ``ray job stop`` does, without the seconds that its start takes."""
        assert self._client.stop_job(self.id)


ORIGIN = """
import sys, importlib.metadata, raydpp
print("code", raydpp.__file__)
for one in importlib.metadata.distributions(name="raydpp"):
    print("installed", one.locate_file("raydpp"))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job_installs_the_project_and_is_followed_to_its_end(
    head: str, clone: Path, tmp_path: Path
) -> None:
    vectors = np.random.default_rng(0).standard_normal((60, 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors.astype(np.float32)
    ids = [f"{n:03d}" for n in range(60)]
    table = str(tmp_path / "table.parquet")
    write_table(
        Folder.at(tmp_path), "table.parquet", pa.table({"id": ids, "gradient": vector_array(vectors, pa.float32())})
    )
    out = tmp_path / "out"
    (packages,) = yaml.safe_load((clone / "jobs" / "runtime_env.yaml").read_text()).values()
    offline = ["--no-deps", "--no-build-isolation"]  # all that the project needs is here
    (tmp_path / "env.yaml").write_text(yaml.dump({"pip": {"packages": packages, "pip_install_options": offline}}))
    script = f"python -c '{ORIGIN}' && python jobs/select_subset.py {table} --size 0.2 --out {out}"
    job = Submission(head, clone, ["sh", "-c", script], ["--runtime-env", str(tmp_path / "env.yaml")])
    assert job.wait() == 0, job.said
    assert (job.info.status, job.info.driver_exit_code) == ("SUCCEEDED", 0)
    assert re.search(r"^code .*/working_dir_files/.*/raydpp/__init__.py$", job.said, re.MULTILINE)
    assert re.search(r"^installed .*/runtime_resources/pip/.*/raydpp$", job.said, re.MULTILINE)
    assert "select: 12/12 picks" in job.said
    assert "\r" not in job.said
    assert "select: 12 of 60 examples" in job.said
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    expected = [ids[index] for index in greedy_map(vectors, 12, ids=ids).indices]
    assert pq.read_table(out / "selection")["id"].to_pylist() == expected


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_mistake_in_a_submitted_job_fails_it_with_a_sentence(head: str, clone: Path, tmp_path: Path) -> None:
    command = ["python", "jobs/select_subset.py", str(tmp_path / "none"), "--out", str(tmp_path / "o"), "--size", "3"]
    job = Submission(head, clone, command)
    assert job.wait() == 1  # of every job that fails
    assert (job.info.status, job.info.driver_exit_code) == ("FAILED", 2)
    assert f"raydpp select: there is no folder {tmp_path / 'none'}" in job.said
    assert "Traceback" not in job.said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_job_that_is_stopped_goes_on_when_it_is_submitted_again(
    head: str, clone: Path, tiny_model: str, tmp_path: Path
) -> None:
    rows = [{"prompt": f"what is {n}", "completion": "a b c red blue sky " * 20} for n in range(480)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = ingest([str(tmp_path / "raw.jsonl")], str(tmp_path / "corpus"), files=1).out
    out = tmp_path / "out"
    command = ["python", "jobs/extract_gradients.py", corpus, "--out", str(out), "--model", tiny_model]
    command += ["--dimension", "64", "--rows-per-file", "8", "--log-format", "json"]

    def events(said: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    job = Submission(head, clone, command)
    while len(list(out.glob("gradients/*.parquet"))) < 3:
        assert job.running, job.wait() or job.said
        time.sleep(0.1)
    job.stop()
    assert job.wait() == 0  # of every job that is stopped
    assert (job.info.status, job.info.driver_exit_code) == ("STOPPED", None)  # Ray does not ask for it
    last = events(job.said)[-1]
    assert (last["event"], last["code"]) == ("error", 143)
    assert last["message"] == "raydpp extract: ended by SIGTERM; the same command again resumes"
    assert "Traceback" not in job.said
    assert not (out / "_SUCCESS").exists()
    time.sleep(1)  # a unit that was being written
    done = pq.read_table(out / "gradients").num_rows
    assert 24 <= done < 480

    again = Submission(head, clone, command)
    assert again.wait() == 0, again.said
    assert (again.info.status, again.info.driver_exit_code) == ("SUCCEEDED", 0)
    progress = [event for event in events(again.said) if event["event"] == "progress"]
    assert progress[0]["done"] >= done
    assert (progress[-1]["done"], progress[-1]["total"]) == (480, 480)
    last = events(again.said)[-1]
    assert (last["event"], last["code"], last["counts"]["rows"]) == ("summary", 0, 480)
    ids = pq.read_table(out / "gradients")["id"].to_pylist()
    assert sorted(ids) == sorted(pq.read_table(f"{corpus}/corpus")["id"].to_pylist())
