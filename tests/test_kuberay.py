"""Checks jobs/kuberay without a cluster: against the API's schemas, and what these do not look at."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement

from raydpp import cli
from tests.test_cluster_yaml import DEPENDENCIES, IMAGE, pins

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "jobs" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"  # KubeRay's own, which are not the project's
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())

needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason="KubeRay's schemas are not here")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here")


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


@pytest.fixture
def job() -> dict[str, Any]:
    (found,) = objects("rayjob.yaml")
    return found


@pytest.fixture
def cron() -> dict[str, Any]:
    (found,) = objects("cronjob.yaml")
    return found


@pytest.fixture
def ray_cron() -> dict[str, Any]:
    (found,) = objects("raycronjob.yaml")
    return found


def strict(schema: Any) -> Any:
    """A structural schema in which a property that it does not name is an error, where the API server prunes it."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", "properties" not in schema)
    return closed


@functools.cache
def schema_of(kind: str, version: str) -> Any:
    return strict(json.loads((SCHEMAS / f"{kind.lower()}s-{version}.schema.json").read_text()))


def check(manifest: dict[str, Any]) -> None:
    """Raise jsonschema.ValidationError where the API server would refuse or prune; CEL rules are not looked at."""
    schema = schema_of(manifest["kind"], manifest["apiVersion"].rpartition("/")[2])
    jsonschema.Draft4Validator(schema).validate(manifest)  # OpenAPI 3.0 has Draft 4's keywords
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
    kubernetes_validate.validate(metadata, kubernetes_validate.latest_version(), strict=True)


@needs_schemas
@pytest.mark.parametrize("name", ["rayjob.yaml", "raycronjob.yaml"])
def test_kuberay_takes_what_the_files_say_and_nothing_is_pruned(name: str) -> None:
    for manifest in objects(name):
        check(manifest)


@pytest.mark.parametrize("name", ["accounts.yaml", "cronjob.yaml"])
def test_kubernetes_takes_what_the_files_say_and_nothing_is_pruned(name: str) -> None:
    for manifest in objects(name):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


HEAD = ["spec", "rayClusterSpec", "headGroupSpec"]
GPU = ["spec", "rayClusterSpec", "workerGroupSpecs", 1]


@needs_schemas
@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (["spec"], "entrypiont", "python x.py"),
        (["metadata"], "label", {}),
        (["spec", "rayClusterSpec"], "enableInTreeAutoscalling", True),
        (["spec", "rayClusterSpec", "authOptions"], "mode", "tokens"),
        ([*GPU], "minReplica", 0),
        ([*GPU], "minReplicas", "0"),
        ([*HEAD, "rayStartParams"], "num-cpus", 0),
        ([*GPU, "template", "spec"], "toleration", []),
        ([*GPU, "template", "spec", "tolerations", 0], "efect", "NoSchedule"),
        ([*GPU, "template", "spec", "containers", 0], "imagePullPolciy", "Always"),
        ([*GPU, "template", "spec", "containers", 0, "resources", "limits"], "memory", ["56Gi"]),
        ([*GPU, "template", "spec", "containers", 0, "resources", "limits"], "cpu", "seven"),
        ([*HEAD, "template", "spec", "volumes", 0, "configMap", "items", 0], "keys", "refresh.yaml"),
        (["spec", "submitterPodTemplate", "spec", "securityContext"], "runAsNonroot", True),
    ],
)
def test_a_slip_of_the_pen_is_refused(path: list[Any], name: str, value: Any, job: dict[str, Any]) -> None:
    place: Any = job
    for step in path:
        place = place[step]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError, match=name):
        check(job)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (["spec"], "concurencyPolicy"),
        (["spec", "jobTemplate", "spec"], "backofLimit"),
        (["spec", "jobTemplate", "spec", "podFailurePolicy", "rules", 0], "onExitCode"),
        (["spec", "jobTemplate", "spec", "template", "spec", "containers", 0], "volumeMount"),
    ],
)
def test_a_slip_of_the_pen_in_the_cron_job_is_refused(path: list[Any], name: str, cron: dict[str, Any]) -> None:
    place: Any = cron
    for step in path:
        place = place[step]
    place[name] = "x"
    with pytest.raises(jsonschema.ValidationError, match=name):
        kubernetes_validate.validate(cron, kubernetes_validate.latest_version(), strict=True)


def test_the_schedules_run_the_rayjob_of_the_one_file(
    job: dict[str, Any], cron: dict[str, Any], ray_cron: dict[str, Any]
) -> None:
    assert ray_cron["spec"]["jobTemplate"] == job["spec"]
    assert ray_cron["spec"]["schedule"] == cron["spec"]["schedule"]
    assert ray_cron["spec"]["timeZone"] == cron["spec"]["timeZone"]
    scheduler = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert mounted(scheduler) == {"/etc/raydpp/rayjob.yaml": "rayjob.yaml"}


def mounted(pod: dict[str, Any]) -> dict[str, str]:
    """By path in a pod's first container, the file of this folder that kustomize makes a ConfigMap of."""
    (kustomization,) = objects("kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    assert kustomization["generatorOptions"] == {"disableNameSuffixHash": True}
    found = {}
    for volume in pod["volumes"]:
        assert volume["configMap"]["name"] == generator["name"]
        (mount,) = (mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == volume["name"])
        for item in volume["configMap"]["items"]:
            assert item["key"] in generator["files"]
            found[f"{mount['mountPath']}/{item['path']}"] = item["key"]
    return found


def test_the_job_runs_a_script_of_the_project_with_options_that_it_knows(job: dict[str, Any]) -> None:
    python, script, flag, path = shlex.split(job["spec"]["entrypoint"])
    assert (python, script, flag) == ("python", "jobs/refresh_dataset.py", "--config")
    assert mounted(job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]) == {path: "refresh.yaml"}
    options = yaml.safe_load((FOLDER / "refresh.yaml").read_text())
    assert (ROOT / script).is_file()
    parsed = cli.parse(cli.find_stage("refresh"), ["--config", str(FOLDER / "refresh.yaml")])
    assert {name: parsed[name] for name in options} == options


def test_versions_are_those_of_the_project_and_of_cluster_yaml(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    (ray,) = (requirement for requirement in DEPENDENCIES if requirement.name == "ray")
    assert ray.specifier.contains(cluster["rayVersion"])
    images = [pod["spec"]["containers"][0]["image"] for pod in pods(job)]
    assert {match["ray"] for image in images if (match := IMAGE.fullmatch(image))} == {cluster["rayVersion"]}
    cpu, gpu = CLUSTER["docker"]["image"], CLUSTER["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert images == [cpu, cpu, cpu, gpu]
    wanted = pins(CLUSTER["setup_commands"])
    del wanted["ray"]  # that of the image: another in the job's environment could not talk to the cluster
    given = [Requirement(line) for line in yaml.safe_load(job["spec"]["runtimeEnvYAML"])["pip"]]
    assert {one.name: one for one in given} == wanted


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a RayJob: submitter, head, workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_nothing_is_left_running_and_the_head_runs_no_work(job: dict[str, Any]) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert 0 < spec["activeDeadlineSeconds"] < 24 * 3600
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    types = CLUSTER["available_node_types"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] == group["replicas"] == 0
        assert group["maxReplicas"] == types[group["groupName"]]["max_workers"]
    gpus = [pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for pod in pods(job)]
    assert gpus == [None, None, None, 1]


def test_pods_have_limits_and_no_more_rights_than_they_need(job: dict[str, Any], cron: dict[str, Any]) -> None:
    scheduler = cron["spec"]["jobTemplate"]["spec"]["template"]
    for pod in (*pods(job), scheduler):
        user, container = pod["spec"]["securityContext"], pod["spec"]["containers"][0]
        assert user["runAsNonRoot"]
        assert user["runAsUser"] > 0
        assert user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert {"cpu", "memory"} <= limits.keys() <= requests.keys()
        assert "restartPolicy" not in pod["spec"] or pod["spec"]["restartPolicy"] == "Never"  # as autoscaler v2 wants
    # the head has the autoscaler beside it, and nobody else needs the API server
    assert [pod["spec"].get("automountServiceAccountToken") for pod in pods(job)] == [False, None, False, False]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job["spec"]["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    accounts = {(one["kind"], one["metadata"]["name"]): one for one in objects("accounts.yaml")}
    for pod in (*pods(job)[1:], scheduler):
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in accounts
    (rule,) = accounts["Role", scheduler["spec"]["serviceAccountName"]]["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}


def test_one_refresh_at_a_time(cron: dict[str, Any]) -> None:
    spec = cron["spec"]["jobTemplate"]["spec"]
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert "activeDeadlineSeconds" not in spec  # it would end the waiting for a RayJob that goes on
    assert "ttlSecondsAfterFinished" not in spec  # the RayJob goes with the Job
    # NAME-MINUTES-ray; KubeRay refuses longer ones, and Kubernetes a CronJob's name of more than 52
    assert len(f"{cron['metadata']['name']}-29999999-ray") <= 47


KUBECTL = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  patch*) echo "$*" ;;
  create*) cat > created ;;
  *name) if [ -e created ]; then echo rayjob.ray.io/x; fi ;;
  *message*) echo reason ;;
  get*) state=$(head -n 1 states); sed -i 1d states; [ "$state" != down ] || exit 1; echo "$state" ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["x::", "x:Initializing:", "x:Running:RUNNING", "x:Complete:SUCCEEDED"], 0),
        (["x:Running:RUNNING", "down", "x:Retrying:FAILED", "x:Complete:SUCCEEDED"], 0),
        (["x:Running:RUNNING", "x:Failed:FAILED"], 2),
        (["x:Complete:STOPPED"], 2),
        (["x:ValidationFailed:"], 2),
        (["x:Running:RUNNING", ""], 2),  # somebody deleted it
    ],
)
@pytest.mark.parametrize("again", [False, True])
def test_the_cron_job_lasts_as_long_as_its_rayjob(
    states: list[str], code: int, again: bool, cron: dict[str, Any], tmp_path: Path
) -> None:
    container = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    for name, text in {"kubectl": KUBECTL, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    if again:  # a pod that was lost made it
        (tmp_path / "created").write_text("by another pod")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB": "nightly-1", "JOB_UID": "u"}
    ended = subprocess.run(
        [*container["command"], *container["args"]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    assert (tmp_path / "states").read_text().strip() == ""
    created, calls = (tmp_path / "created").read_text(), (tmp_path / "calls").read_text()
    assert created == "by another pod" if again else '"name": "nightly-1-ray"' in created
    # KubeRay names the Job that submits after the RayJob: were it this one's name, nothing would be submitted
    assert all("nightly-1-ray" in call for call in calls.splitlines() if call.startswith("get"))


@needs_kubectl
def test_kubectl_makes_the_rayjob_that_belongs_to_the_job(tmp_path: Path, job: dict[str, Any]) -> None:
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "nightly-1", "uid": "u"}
    change = {"metadata": {"name": "nightly-1-ray", "ownerReferences": [owner]}}
    words = ["kubectl", "patch", "--local", "-f", str(FOLDER / "rayjob.yaml"), "--type", "merge", "-o", "yaml"]
    made = yaml.safe_load(subprocess.run([*words, "-p", json.dumps(change)], capture_output=True, check=True).stdout)
    assert made["spec"] == job["spec"]
    assert made["metadata"] == job["metadata"] | change["metadata"]


@needs_kubectl
def test_kustomize_puts_the_files_where_the_pods_look_for_them() -> None:
    made = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, check=True).stdout
    found = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(made)}
    assert {kind for kind, _ in found} == {"ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob"}
    assert found["ConfigMap", "raydpp-refresh"]["data"] == {
        name: (FOLDER / name).read_text() for name in ("rayjob.yaml", "refresh.yaml")
    }
    (subject,) = found["RoleBinding", "raydpp-scheduler"]["subjects"]
    assert subject["namespace"] == found["CronJob", "raydpp-refresh"]["metadata"]["namespace"]
