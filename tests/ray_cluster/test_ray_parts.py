"""What a rank gets and says: environment, device, room, agreement."""

from __future__ import annotations

import pytest

from sglang_ext.ray import agreement, devices, environment, placement

# Environment


def test_listed_variables_are_handed_on_and_no_others() -> None:
    given = {
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "2",
        "SGLANG_HOST_IP": "10.0.0.1",
        "HF_TOKEN": "secret",
        "HF_HOME": "/models",
        "AWS_SECRET": "x",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert set(environment.handed_on(given)) == {"NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "HF_HOME"}
    assert environment.handed_on(given, ["HF_TOKEN"])["HF_TOKEN"] == "secret"


def test_secrets_and_paths_are_not_compared() -> None:
    assert environment.compared({"PYTHONPATH": "/a", "NCCL_ALGO": "Ring", "HF_TOKEN": "s"}) == {
        "NCCL_ALGO": "Ring"
    }


# Devices


@pytest.mark.parametrize(
    ("assigned", "visible", "ordinal"),
    [("3", None, 3), ("6", "4,6", 1), ("GPU-b", "GPU-a, GPU-b", 1), ("0", "0", 0)],
)
def test_ordinal_of_an_assigned_gpu(assigned: str, visible: str | None, ordinal: int) -> None:
    assert devices.ordinal_of(assigned, visible) == ordinal


def test_gpu_that_the_process_cannot_see_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"GPU 3.*CUDA_VISIBLE_DEVICES.*'0,1'"):
        devices.ordinal_of("3", "0,1")


def test_ids_of_ray_become_ordinals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert devices.as_ordinals({"GPU": ["6"], "TPU": ["1"]}, None) == {"GPU": ["1"], "TPU": ["1"]}
    assert devices.as_ordinals({}, None)["GPU"] == []


def test_cuda_device_is_set_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    chosen: list[int] = []
    for present, expected in ((False, []), (True, [1])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        devices.set_device(chosen.append, 1)
        assert chosen == expected


# Room


def test_a_bundle_for_each_node_and_the_first_here() -> None:
    assert placement.bundles(8, 2, "cuda", "10.0.0.1") == [
        {"CPU": 1, "GPU": 4, "node:10.0.0.1": placement.NODE_SHARE},
        {"CPU": 1, "GPU": 4},
    ]


def test_cpu_nodes_need_no_gpu() -> None:
    for bundle in placement.bundles(4, 2, "cpu", "10.0.0.1"):
        assert bundle["CPU"] == 2 and "GPU" not in bundle


@pytest.mark.parametrize(
    ("specs", "device", "reason"),
    [
        ([{"GPU": 4}, {"GPU": 4}], "cuda", None),
        ([{"CPU": 8, "GPU": 8}] * 3, "cuda", None),
        ([{"GPU": 8}], "cuda", "1 bundles"),
        ([{"GPU": 4}, {"GPU": 2}], "cuda", "bundle 1 has 2 GPU and needs 4"),
        ([{"CPU": 4}, {"CPU": 4}], "cpu", None),
        ([{"CPU": 4}, {"GPU": 4}], "cpu", "bundle 1 has 0 CPU and needs 4"),
    ],
)
def test_why_a_given_placement_group_does_not_fit(
    specs: list[dict[str, float]], device: str, reason: str | None
) -> None:
    found = placement.why_not_fitting(specs, 8, 2, device)
    assert found is None if reason is None else found is not None and reason in found


# Agreement


def test_equal_reports_agree() -> None:
    report = {"packages": {"torch": "2.11.0"}, "canonical_fingerprint": "ab"}
    assert not agreement.differences({"tp0": report, "tp1": dict(report)})
    agreement.require({"tp0": report, "tp1": report}, "ranks")


def test_every_difference_is_named_with_its_sides() -> None:
    reports = {
        "tp0": {"packages": {"torch": "2.11.0", "ray": "2.60.0"}, "canonical_fingerprint": "ab"},
        "tp1": {"packages": {"torch": "2.10.0", "ray": "2.60.0"}, "canonical_fingerprint": "cd"},
        "tp2": {"packages": {"torch": "2.11.0"}, "canonical_fingerprint": "ab"},
    }
    assert agreement.differences(reports) == [
        "packages.torch: '2.11.0' on tp0 and tp2, '2.10.0' on tp1",
        "packages.ray: '2.60.0' on tp0 and tp1, absent on tp2",
        "canonical_fingerprint: 'ab' on tp0 and tp2, 'cd' on tp1",
    ]
    with pytest.raises(agreement.Disagreement, match=r"the ranks .* packages\.torch: '2\.11\.0' on tp0"):
        agreement.require(reports, "ranks")


def test_long_lists_of_differences_are_cut() -> None:
    with pytest.raises(agreement.Disagreement, match="and 12 more"):
        agreement.require({"a": {str(i): 0 for i in range(20)}, "b": {str(i): 1 for i in range(20)}}, "x")
