"""Checks cluster.yaml without a cloud: Ray's own validation, and what that validation does not look at."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "cluster.yaml").read_text()
IMAGE = re.compile(r"rayproject/ray:(?P<ray>\d+\.\d+\.\d+)-py(?P<python>\d+)-(?P<platform>cpu|cu\d+)")
DEPENDENCIES = [
    Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
]


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(TEXT)


def validate(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def images(config: dict[str, Any]) -> dict[str, str]:
    """The image of every node type: its own, or the cluster's."""
    common = config["docker"]["image"]
    types = config["available_node_types"]
    return {name: kind.get("docker", {}).get("worker_image", common) for name, kind in types.items()}


def pins(commands: list[str]) -> dict[str, Requirement]:
    """The packages that `pip install` commands name, by name."""
    words = [word for command in commands if command.startswith("pip install") for word in shlex.split(command)[2:]]
    found = [Requirement(word) for word in words if re.match(r"[a-z0-9]+[\w.\-\[\],]*==", word, re.IGNORECASE)]
    return {requirement.name: requirement for requirement in found}


def test_ray_accepts_the_file(config: dict[str, Any]) -> None:
    prepared = validate(config)
    assert prepared["head_node_type"] == "head"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


def test_ray_refuses_an_unknown_key(config: dict[str, Any]) -> None:
    config["idle_timeout_minuets"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        validate(config)


def test_ray_refuses_more_minimum_than_maximum_workers(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["min_workers"] = config["max_workers"] + 1
    with pytest.raises(ValueError, match="smaller than the sum of `min_workers`"):
        validate(config)


def test_images_have_the_ray_version_of_the_project(config: dict[str, Any]) -> None:
    (ray,) = (requirement for requirement in DEPENDENCIES if requirement.name == "ray")
    found = {name: IMAGE.fullmatch(image) for name, image in images(config).items()}
    assert all(found.values()), "an image is not rayproject/ray:VERSION-pyXY-PLATFORM"
    versions = {match["ray"] for match in found.values() if match}
    assert len(versions) == 1
    assert ray.specifier.contains(versions.pop())
    assert len({match["python"] for match in found.values() if match}) == 1
    assert {name: match["platform"][:2] for name, match in found.items() if match} == {
        "head": "cp",
        "cpu": "cp",
        "gpu": "cu",
    }


def test_the_usage_note_installs_the_same_ray(config: dict[str, Any]) -> None:
    image = IMAGE.fullmatch(config["docker"]["image"])
    assert image
    assert set(re.findall(r"ray\[[a-z,]+\]==([\d.]+)", TEXT)) == {image["ray"]}


def test_every_node_installs_every_dependency_pinned(config: dict[str, Any]) -> None:
    prepared = validate(config)
    common = prepared["worker_setup_commands"]
    by_node = {name: kind.get("worker_setup_commands", common) for name, kind in workers(prepared).items()}
    by_node["head"] = prepared["head_setup_commands"]
    for name, commands in by_node.items():
        installed = pins(commands)
        assert installed.keys() == {requirement.name for requirement in DEPENDENCIES}, name
        for requirement in DEPENDENCIES:
            pin = installed[requirement.name]
            (version,) = pin.specifier
            assert version.operator == "=="
            assert requirement.specifier.contains(version.version), requirement
            assert requirement.extras <= pin.extras, requirement


def test_no_nightly_ray_is_installed(config: dict[str, Any]) -> None:
    assert config["setup_commands"], "Ray fills an absent section with a nightly wheel"
    prepared = validate(config)
    commands = " ".join(
        prepared["setup_commands"] + prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    )
    assert not re.search(r"nightly|ray-wheels|\.dev|\.whl", commands)


def test_nothing_is_left_running(config: dict[str, Any]) -> None:
    assert all(kind["min_workers"] == 0 for kind in workers(config).values())
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False
    disks = [
        disk for kind in config["available_node_types"].values() for disk in kind["node_config"]["BlockDeviceMappings"]
    ]
    assert all(disk["Ebs"]["DeleteOnTermination"] for disk in disks)


def test_every_worker_type_can_reach_its_maximum(config: dict[str, Any]) -> None:
    assert all(0 < kind["max_workers"] <= config["max_workers"] for kind in workers(config).values())


def test_the_head_runs_no_work_and_cannot_be_taken_away(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]


def test_workers_are_on_spot(config: dict[str, Any]) -> None:
    for kind in workers(config).values():
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert kind["resources"]["CPU"] > 0


def test_gpu_workers_offer_and_check_their_gpu(config: dict[str, Any]) -> None:
    gpu = config["available_node_types"]["gpu"]
    assert gpu["resources"]["GPU"] == 1
    assert gpu["worker_setup_commands"][0] == "nvidia-smi"
    assert not any("whl/cpu" in command for command in gpu["worker_setup_commands"])
    assert "GPU" not in config["available_node_types"]["cpu"]["resources"]


def test_every_node_has_a_machine_image_a_profile_and_a_disk(config: dict[str, Any]) -> None:
    # without ImageId Ray takes an image whose driver (CUDA 11.2) is too old for the GPUs
    for kind in config["available_node_types"].values():
        node = kind["node_config"]
        assert re.match(r"ami-|resolve:ssm:/", node["ImageId"])
        assert node["IamInstanceProfile"].keys() in ({"Name"}, {"Arn"})
        assert node["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100


def test_zones_belong_to_the_region(config: dict[str, Any]) -> None:
    provider = config["provider"]
    zones = provider["availability_zone"].split(",")
    assert all(re.fullmatch(re.escape(provider["region"]) + "[a-z]", zone.strip()) for zone in zones)


def test_the_dashboard_is_not_open_to_the_network(config: dict[str, Any]) -> None:
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
