"""The offline bundle: what is left out, archive and parts, hashes, kernel caches. No network, tiny trees."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).parents[1] / "scripts" / "offline_bundle.py"


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline_bundle", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline_bundle"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


ob = _load()
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


def _tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _names(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


FAKE_SITE = {
    "site/sglang/__init__.py": b"version = 1\n",
    "site/sglang/srt/plugins.py": b"# plugins\n" * 500,
    "site/flashinfer/data/include/page.cuh": bytes(range(256)) * 40,
    "site/run.sh": b"#!/bin/sh\n",
}


def _make_bundle(folder: Path, source: Path, part_bytes: int = 400, **changes: object) -> None:
    folder.mkdir(exist_ok=True)
    _tree(source, FAKE_SITE)
    parts = ob.split(ob.write_archive(source, "sglang-offline", folder, preset=1), part_bytes)
    values = {"kind": "bundle", "python": HERE, "packages": {"flashinfer-python": "0.6"}, **changes}
    ob.Manifest("sglang-offline", parts=parts, **values).write(folder)


class TestSelection:
    @pytest.mark.parametrize(
        "path",
        [
            "sgl_kernel/flash_ops.abi3.so",
            "sgl_kernel/sm100/common_ops.abi3.so",
            "flashinfer/data/cutlass/examples/python/CuTeDSL/a.py",
            "sglang/multimodal_gen/runtime/server.py",
            "sglang/srt/__pycache__/x.cpython-312.pyc",
            "xgrammar/lib/libxgrammar.a",
        ],
    )
    def test_default_rules_drop_what_the_target_does_not_need(self, path: str) -> None:
        assert ob.select().drops(path)

    @pytest.mark.parametrize(
        "path",
        [
            "sgl_kernel/sm90/common_ops.abi3.so",
            "sgl_kernel/flash_attn.py",
            "flashinfer/data/cutlass/include/cute/tensor.hpp",
            "flashinfer/data/cutlass/tools/util/include/cutlass/util/command_line.h",
            "flashinfer/data/cccl/libcudacxx/include/cuda/std/array",
            "sglang/testing_tools.py",
            "sglang/kernels/ops/diffusion/__init__.py",
        ],
    )
    def test_default_rules_keep_what_is_loaded_or_compiled(self, path: str) -> None:
        assert not ob.select().drops(path)

    def test_keep_wins_over_drop(self) -> None:
        selection = ob.select(drop=["sglang/lang"], keep=["sgl_kernel/flash_ops*.so", "sglang/lang/api.py"])
        assert not selection.drops("sgl_kernel/flash_ops.abi3.so")
        assert selection.drops("sglang/lang/ir.py")
        assert not selection.drops("sglang/lang/api.py")

    def test_package_overrides_are_compared_as_an_index_does(self) -> None:
        selection = ob.select(drop_packages=["Pillow_SIMD"], keep_packages=["TorchAO"])
        assert "pillow-simd" in selection.packages
        assert "torchao" not in selection.packages

    def test_misspelt_kept_package_is_an_error(self) -> None:
        with pytest.raises(ob.BundleError, match="torchoa"):
            ob.select(keep_packages=["torchoa"])

    def test_prune_deletes_matches_and_empty_folders_only(self, tmp_path: Path) -> None:
        _tree(
            tmp_path,
            {
                "sgl_kernel/flash_ops.abi3.so": b"x" * 100,
                "sgl_kernel/sm90/common_ops.abi3.so": b"y",
                "sglang/test/runners.py": b"z" * 11,
                "sglang/__init__.py": b"",
            },
        )
        assert ob.prune(tmp_path, ob.select()) == 111
        assert _names(tmp_path) == {"sgl_kernel/sm90/common_ops.abi3.so", "sglang/__init__.py"}
        assert not (tmp_path / "sglang/test").exists()

    def test_every_rule_has_a_reason_and_no_rule_appears_twice(self) -> None:
        rules = [*ob.DROP_PACKAGES, *ob.DROP_PATHS]
        assert all(rule.reason for rule in rules)
        assert len({rule.pattern for rule in rules}) == len(rules)


class TestPackages:
    COLUMNS = "Package    Version\n---------- -------\ntorch      2.11.0+cu130\nPyYAML 6.0.3\n"

    @pytest.mark.parametrize(
        "text",
        [
            COLUMNS,
            "torch==2.11.0+cu130\nPyYAML==6.0.3 ; python_version > '3'\n# note\n",
            json.dumps(
                [{"name": "torch", "version": "2.11.0+cu130"}, {"name": "PyYAML", "version": "6.0.3"}]
            ),
        ],
        ids=["list", "freeze", "json"],
    )
    def test_every_pip_format_is_read(self, text: str) -> None:
        assert ob.parse_packages(text) == {"torch": "2.11.0", "pyyaml": "6.0.3"}

    def test_text_without_packages_is_an_error(self) -> None:
        with pytest.raises(ob.BundleError, match="target-packages"):
            ob.parse_packages("command not found\n")

    def test_what_the_target_lacks_or_has_at_another_version_travels(self) -> None:
        resolved = {"fastapi": "1", "rich": "2", "transformers": "5.12.1"}
        target = {"rich": "2", "transformers": "5.17.0", "jax": "1"}
        assert ob.missing_packages(resolved, target) == {"fastapi": "1", "transformers": "5.12.1"}

    def test_torch_never_travels_and_numpy_only_if_the_target_lacks_it(self) -> None:
        selection = ob.select()
        bare = ob.excluded_names(selection, {})
        listed = ob.excluded_names(selection, {"numpy": "2.5.2"})
        assert {"torch", "triton", "flash-attn-4"} <= set(bare)
        assert "numpy" not in bare and "numpy" in listed


class TestArchive:
    def test_unpack_restores_names_bytes_and_the_executable_bit(self, tmp_path: Path) -> None:
        source = tmp_path / "source"
        _tree(source, FAKE_SITE)
        (source / "site/run.sh").chmod(0o755)
        _make_bundle(tmp_path / "bundle", source)
        assert len(list((tmp_path / "bundle").glob("*.tar.xz.*"))) > 2
        target = tmp_path / "target"
        ob.unpack(tmp_path / "bundle", target, capability="")
        for name, content in FAKE_SITE.items():
            assert (target / name).read_bytes() == content
        assert (target / "site/run.sh").stat().st_mode & 0o100
        assert not (target / "site/sglang/__init__.py").stat().st_mode & 0o100
        assert ob.verify_files(target) == len(FAKE_SITE)

    def test_the_same_tree_gives_the_same_bytes(self, tmp_path: Path) -> None:
        digests = []
        for run, seconds in (("a", 1_000_000_000), ("b", 1_700_000_000)):
            source = _tree(tmp_path / run, FAKE_SITE)
            os.utime(source / "site/run.sh", (seconds, seconds))
            output = tmp_path / f"out-{run}"
            output.mkdir()
            digests.append(ob.sha256_of(ob.write_archive(source, "same", output, preset=1)))
        assert digests[0] == digests[1]

    def test_members_are_ordered_by_suffix_and_the_hash_list_is_last(self, tmp_path: Path) -> None:
        source = _tree(
            tmp_path / "source", {"site/b.py": b"", "site/a.so": b"", "site/c.h": b"", "site/a.h": b""}
        )
        with tarfile.open(ob.write_archive(source, "ordered", tmp_path, preset=1)) as tar:
            names = tar.getnames()
        assert names == ["site/a.h", "site/c.h", "site/b.py", "site/a.so", ".manifest/ordered.sha256"]

    @given(content=st.binary(max_size=300), part_bytes=st.integers(1, 120))
    def test_split_and_join_are_inverse_and_parts_stay_below_the_limit(
        self, tmp_path_factory: pytest.TempPathFactory, content: bytes, part_bytes: int
    ) -> None:
        folder = tmp_path_factory.mktemp("split")
        archive = folder / "a.tar.xz"
        archive.write_bytes(content)
        parts = ob.split(archive, part_bytes)
        assert not archive.exists()
        assert all(0 < part.size <= part_bytes for part in parts)
        assert len(parts) == -(-len(content) // part_bytes)
        with ob.JoinedParts([folder / part.name for part in parts]) as joined:
            assert joined.read() == content

    def test_non_positive_part_size_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ob.BundleError, match="part-size"):
            ob.split(tmp_path / "a", 0)


class TestVerification:
    def test_altered_part_is_named_and_nothing_is_unpacked(self, tmp_path: Path) -> None:
        _make_bundle(tmp_path / "bundle", tmp_path / "source")
        part = sorted((tmp_path / "bundle").glob("*.tar.xz.*"))[1]
        content = bytearray(part.read_bytes())
        content[7] ^= 1
        part.write_bytes(bytes(content))
        with pytest.raises(ob.BundleError, match=part.name):
            ob.unpack(tmp_path / "bundle", tmp_path / "target", capability="")
        assert _names(tmp_path / "target") == set()

    @pytest.mark.parametrize("damage", ["missing", "short"])
    def test_missing_or_short_part_is_named(self, tmp_path: Path, damage: str) -> None:
        _make_bundle(tmp_path / "bundle", tmp_path / "source")
        part = sorted((tmp_path / "bundle").glob("*.tar.xz.*"))[-1]
        if damage == "missing":
            part.unlink()
        else:
            part.write_bytes(part.read_bytes()[:-1])
        reason = "is missing" if damage == "missing" else "bytes, expected"
        with pytest.raises(ob.BundleError, match=f"{part.name}.*{reason}"):
            ob.unpack(tmp_path / "bundle", tmp_path / "target", capability="")

    @pytest.mark.parametrize("damage", ["missing", "altered"])
    def test_damaged_file_on_the_target_is_named(self, tmp_path: Path, damage: str) -> None:
        _make_bundle(tmp_path / "bundle", tmp_path / "source")
        ob.unpack(tmp_path / "bundle", tmp_path / "target", capability="")
        victim = tmp_path / "target/site/sglang/srt/plugins.py"
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(victim.read_bytes() + b"#")
        with pytest.raises(ob.BundleError, match=r"sglang/srt/plugins\.py"):
            ob.verify_files(tmp_path / "target")

    def test_an_empty_folder_does_not_count_as_verified(self, tmp_path: Path) -> None:
        with pytest.raises(ob.BundleError, match="nothing was unpacked"):
            ob.verify_files(tmp_path)

    def test_another_python_is_refused(self, tmp_path: Path) -> None:
        _make_bundle(tmp_path / "bundle", tmp_path / "source", python="2.7")
        with pytest.raises(ob.BundleError, match=r"Python 2\.7"):
            ob.unpack(tmp_path / "bundle", tmp_path / "target", capability="")

    def test_a_folder_without_a_bundle_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ob.BundleError, match="0 bundles"):
            ob.unpack(tmp_path, tmp_path / "target", capability="")

    def test_manifest_of_another_format_is_refused(self, tmp_path: Path) -> None:
        _make_bundle(tmp_path / "bundle", tmp_path / "source")
        path = tmp_path / "bundle/sglang-offline.manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": ob.FORMAT + 1}))
        with pytest.raises(ob.BundleError, match="format"):
            ob.Manifest.read(path)

    def test_truncated_manifest_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.manifest.json"
        path.write_text('{"name": "x"')
        with pytest.raises(ob.BundleError, match="damaged"):
            ob.Manifest.read(path)

    def test_the_command_line_reports_a_problem_as_one_sentence(self, tmp_path: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "unpack", str(tmp_path), str(tmp_path / "target")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("offline_bundle: ") and "Traceback" not in done.stderr


KERNEL = "batch_decode_head_dim_128"


class TestKernelCache:
    @pytest.fixture
    def used(self, tmp_path: Path) -> Path:
        """A target on which a server ran: FlashInfer, SGLang and Triton compiled something each."""
        _make_bundle(tmp_path / "bundle", tmp_path / "source")
        target = tmp_path / "target"
        ob.unpack(tmp_path / "bundle", target, capability="")
        built = f"cache/.cache/flashinfer/0.6/90a/cached_ops/{KERNEL}"
        info = b"Metadata-Version: 2.1\nName: flashinfer_python\nVersion: 0.6\n"
        return _tree(
            target,
            {
                f"{built}/{KERNEL}.so": b"flashinfer kernel",
                f"{built}/decode.cuda.o": b"object file",
                f"{built}/build.ninja": b"absolute paths",
                "cache/tvm-ffi/rope__arch_9.0/rope.so": b"sglang kernel",
                "cache/triton/KEY/kernel.cubin": b"triton kernel",
                "site/flashinfer_python-0.6.dist-info/METADATA": info,
            },
        )

    def test_cache_comes_back_where_it_is_loaded_without_compiling(self, used: Path, tmp_path: Path) -> None:
        manifest = ob.pack_cache(used, tmp_path / "bundle", part_bytes=200, capability="9.0")
        assert manifest.packages["flashinfer-python"] == "0.6"
        fresh = tmp_path / "fresh"
        ob.unpack(tmp_path / "bundle", fresh, capability="9.0")
        prebuilt = fresh / f"site/flashinfer/data/aot/{KERNEL}/{KERNEL}.so"
        assert prebuilt.read_bytes() == b"flashinfer kernel"
        assert (fresh / "cache/tvm-ffi/rope__arch_9.0/rope.so").read_bytes() == b"sglang kernel"
        assert (fresh / "cache/triton/KEY/kernel.cubin").read_bytes() == b"triton kernel"
        assert not list(fresh.rglob("*.o")) and not list(fresh.rglob("build.ninja"))
        assert ob.verify_files(fresh) == len(FAKE_SITE) + 3

    def test_packing_again_keeps_what_an_earlier_cache_brought(self, used: Path, tmp_path: Path) -> None:
        ob.pack_cache(used, tmp_path / "bundle", part_bytes=ob.MIB, capability="9.0")
        fresh = tmp_path / "fresh"
        ob.unpack(tmp_path / "bundle", fresh, capability="9.0")
        stage = tmp_path / "stage"
        assert ob.stage_cache(fresh, stage) == 3
        assert f"site/flashinfer/data/aot/{KERNEL}/{KERNEL}.so" in _names(stage)

    def test_cache_for_another_gpu_stays_packed(
        self, used: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        ob.pack_cache(used, tmp_path / "bundle", part_bytes=ob.MIB, capability="9.0")
        ob.unpack(tmp_path / "bundle", tmp_path / "fresh", capability="10.0")
        assert not (tmp_path / "fresh/cache").exists()
        assert "compute capability 9.0, this GPU has 10.0" in capsys.readouterr().out

    def test_cache_of_another_version_does_not_fit(self) -> None:
        bundle = ob.Manifest("b", "bundle", HERE, (), packages={"flashinfer-python": "0.6"})
        same = ob.Manifest(
            "c", "cache", HERE, (), packages={"flashinfer-python": "0.6"}, compute_capability="9.0"
        )
        other = ob.Manifest(
            "c", "cache", HERE, (), packages={"flashinfer-python": "0.7"}, compute_capability="9.0"
        )
        assert ob.cache_misfit(same, bundle, "9.0") == ""
        assert "flashinfer-python 0.7" in ob.cache_misfit(other, bundle, "9.0")

    def test_nothing_compiled_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "target").mkdir()
        with pytest.raises(ob.BundleError, match="no compiled kernel"):
            ob.pack_cache(tmp_path / "target", tmp_path / "out", part_bytes=ob.MIB, capability="9.0")


class TestCheck:
    def test_failing_import_is_reported_and_others_are_tried(self, tmp_path: Path) -> None:
        _tree(tmp_path, {"site/good_one.py": b"", "site/bad_one.py": b"import not_there\n"})
        problems = ob.check_imports(tmp_path, ["bad_one", "good_one", "absent_one"])
        assert len(problems) == 2
        assert "bad_one" in problems[0] and "not_there" in problems[0]
        assert "absent_one" in problems[1]

    def test_plugin_entry_point_must_be_visible(self, tmp_path: Path) -> None:
        assert ob.check_plugin(tmp_path)
        entry = b"[sglang.srt.plugins]\nsglang_ext = sglang_ext.plugin:register\n"
        _tree(tmp_path, {"site/sglang_ext-0.1.0.dist-info/entry_points.txt": entry})
        assert ob.check_plugin(tmp_path) == []

    def test_environment_puts_the_bundle_before_a_users_path(self, tmp_path: Path) -> None:
        script = ob.write_environment(tmp_path)
        command = f'PYTHONPATH=/mine; . "{script}"; echo "$PYTHONPATH"; echo "$TRITON_CACHE_DIR"'
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [f"{tmp_path}/site:/mine", f"{tmp_path}/cache/triton"]

    def test_target_without_a_package_left_to_it_is_reported(self) -> None:
        bundle = ob.Manifest("b", "bundle", HERE, (), target={"surely-not-installed": "1.0"})
        assert any("surely-not-installed is not installed" in line for line in ob.check_target(bundle))
