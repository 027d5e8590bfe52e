"""The cluster files of docs/ray: Ray's own schema, and numbers that must fit each other."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = Path(__file__).parents[2] / "docs" / "ray"


def _ray_schema() -> dict[str, Any]:
    autoscaler = pytest.importorskip("ray.autoscaler")
    return json.loads((Path(autoscaler.__file__).parent / "ray-schema.json").read_text())


def test_the_cluster_file_follows_rays_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")  # Ray needs it
    cluster = yaml.safe_load((FILES / "cluster.yaml").read_text())
    jsonschema.validate(cluster, _ray_schema())
    misspelt = {**copy.deepcopy(cluster), "max_worker": 1}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(misspelt, _ray_schema())


def test_the_job_asks_for_as_many_ranks_as_its_cluster_has_gpus() -> None:
    job, service, policy = yaml.safe_load_all((FILES / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    groups = [cluster["headGroupSpec"]] + [workers] * workers["replicas"]
    gpus = [_container(group)["resources"]["limits"]["nvidia.com/gpu"] for group in groups]
    flags = shlex.split(shlex.split(job["spec"]["entrypoint"])[2])
    assert int(_value(flags, "--nnodes")) == len(groups)
    assert int(_value(flags, "--tp-size")) == sum(map(int, gpus))

    port = int(_value(flags, "--port"))
    head = _container(cluster["headGroupSpec"])
    assert {"name": "http", "containerPort": port} in head["ports"]
    assert [entry["targetPort"] for entry in service["spec"]["ports"]] == [port]
    # Without a sender only the HTTP port is open, and it asks for a key.
    assert [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule] == [[{"port": port}]]
    assert _value(flags, "--config").startswith(
        next(mount["mountPath"] for mount in head["volumeMounts"] if mount["name"] == "keys")
    )


def _container(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def _value(flags: list[str], name: str) -> str:
    return flags[flags.index(name) + 1]
