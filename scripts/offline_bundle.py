"""Brings sglang_ext, SGLang and what they need to a GPU machine without a network, as one pruned archive.

The build machine has a package index and `uv`; the target already has PyTorch, Triton, nvcc and ninja.

    build machine   python scripts/offline_bundle.py build --python 3.12 --target-packages list.txt -o bundle
    target          python3 bundle/offline_bundle.py unpack bundle /opt/sglang && . /opt/sglang/env.sh
    target, later   python3 bundle/offline_bundle.py pack-cache /opt/sglang -o cache

`pack-cache` collects the kernels that FlashInfer, SGLang, Triton and Inductor compiled; its files, copied
into the bundle's folder, are unpacked with it from then on. This file imports the standard library alone and
travels with the bundle. See docs/offline_bundle.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

FORMAT = 1
MIB = 1 << 20
#: Shared objects smaller than this gain too little from stripping.
STRIP_ABOVE_BYTES = MIB // 4


class BundleError(Exception):
    """A bundle that cannot be built, joined, verified or used, with what to do about it."""


# --------------------------------------------------------------------------------------------------
# What is left out, and why. Every entry can be overridden: see --keep, --keep-package, --drop.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One package name or path pattern that is left out, and the reason that --rules prints."""

    pattern: str
    reason: str


_DSL = "CuTe/tile compiler or its kernels: used on Blackwell and by models out of this package's scope"
_FOREIGN_GPU_TOOLS = "the target's own CUDA toolkit is used"
_GRPC = "gRPC server mode"
_DATA = "data sets and model hubs need a network"

#: Distributions left out together with whatever only they need.
DROP_PACKAGES: tuple[Rule, ...] = (
    Rule("cuda-tile", _DSL),
    Rule("flash-attn-4", _DSL),
    Rule("humming-kernels", _DSL),
    Rule("nvidia-cutlass-dsl", _DSL),
    Rule("quack-kernels", _DSL),
    Rule("tilelang", _DSL),
    Rule("tokenspeed-mla", _DSL),
    Rule("cuda-python", _FOREIGN_GPU_TOOLS),
    Rule("nccl4py", _FOREIGN_GPU_TOOLS),
    Rule("nvidia-cudnn-frontend", "cuDNN attention and FP4 products"),
    Rule("nvidia-mathdx", "headers for kernels of the diffusion models"),
    Rule("helion", "autotuner that SGLang uses for some MoE kernels"),
    Rule("kernels", "downloads kernels from a hub"),
    Rule("modelscope", _DATA),
    Rule("blobfile", _DATA),
    Rule("smg-grpc-servicer", _GRPC),
    Rule("jedi", "completion in notebooks; IPython itself is imported by sglang.utils"),
    Rule("py-spy", "profiler, attached by hand"),
    Rule("build", "packaging tool"),
    Rule("mistral-common", "tokenizer of Mistral checkpoints in their own format"),
    Rule("torchao", "torchao quantization"),
    Rule("torchcodec", "audio and video input"),
    Rule("timm", "vision towers"),
    Rule("outlines", "the outlines grammar backend (the default is xgrammar)"),
    Rule("llguidance", "the llguidance grammar backend (the default is xgrammar)"),
    Rule("anthropic", "client of another server"),
)

#: Paths under the site folder; `*` crosses folders, and a matching folder goes with all it holds.
DROP_PATHS: tuple[Rule, ...] = (
    Rule("sgl_kernel/flash_ops*.so", "FlashAttention-3, 1.1 GB; FlashInfer brings its own FA3 kernels"),
    Rule("sgl_kernel/infllm_ops*.so", "InfLLM-V2 sparse attention"),
    Rule("sgl_kernel/flashmla_ops*.so", "FlashMLA (DeepSeek models)"),
    Rule("sgl_kernel/sm100", "loaded on every GPU that is not Hopper; keep it for those"),
    Rule("xgrammar/lib*/*.a", "static library"),
    Rule("xgrammar/include", "headers of that library"),
    Rule("flashinfer/data/cutlass/examples", "not on any include path"),
    Rule("flashinfer/data/cutlass/test", "not on any include path"),
    Rule("flashinfer/data/cutlass/python", "not on any include path"),
    Rule("flashinfer/data/cutlass/docs", "not on any include path"),
    Rule("flashinfer/data/cutlass/media", "not on any include path"),
    Rule("flashinfer/data/cutlass/tools/profiler", "not on any include path"),
    Rule("flashinfer/data/cutlass/tools/library", "not on any include path"),
    Rule("flashinfer/data/cccl/*/test", "not on any include path"),
    Rule("flashinfer/data/cccl/*/benchmarks", "not on any include path"),
    Rule("flashinfer/data/cccl/benchmarks", "not on any include path"),
    Rule("flashinfer/data/cccl/ci", "not on any include path"),
    Rule("flashinfer/data/cccl/docs", "not on any include path"),
    Rule("flashinfer/data/cccl/python", "not on any include path"),
    Rule("sglang/multimodal_gen", "image and video generation"),
    Rule("sglang/test", "SGLang's own tests"),
    Rule("sglang/srt/server/_core*.so", "the Rust HTTP server, an opt-in"),
    Rule("sglang/srt/grpc/_core*.so", _GRPC),
    Rule("bin", "console scripts with the build machine's interpreter; use python -m"),
    Rule("*/__pycache__", "rebuilt on import"),
)

#: Always the target's own: a second copy would not match the torch, driver or compiler that is there.
TARGET_OWNED_ALWAYS = ("torch", "torchaudio", "torchvision", "triton", "cuda-bindings", "cuda-toolkit")
#: The target's own where it lists them, at whatever version: compiled against each other there.
TARGET_OWNED_IF_LISTED = (
    "llvmlite",
    "ml-dtypes",
    "ninja",
    "numba",
    "numpy",
    "nvidia-ml-py",
    "pandas",
    "pillow",
    "pip",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "setuptools",
)

#: SGLang imports these, but only packages that are left out require them.
UNDECLARED = ("dill", "jsonschema")

#: Modules that `check` imports, each in an interpreter that sees the bundle as a user's would.
CHECK_IMPORTS = (
    "sglang_ext.plugin",
    "sglang",
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.llama",
    "flashinfer",
    "xgrammar",
    "transformers",
)
#: Need a GPU: they load code for the card they find.
CHECK_IMPORTS_GPU = ("sgl_kernel", "deep_gemm", "sglang.srt.layers.attention.flashinfer_backend")


@dataclass(frozen=True)
class Selection:
    """Which packages and paths go: the default rules with the user's overrides applied."""

    packages: frozenset[str]
    drop_paths: tuple[str, ...]
    keep_paths: tuple[str, ...] = ()

    def drops(self, path: str) -> bool:
        """Whether `path` (POSIX, relative to the site folder) is left out. Keeping wins over dropping."""
        return _matches(path, self.drop_paths) and not _matches(path, self.keep_paths)


def select(
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    drop_packages: Sequence[str] = (),
    keep_packages: Sequence[str] = (),
) -> Selection:
    """The default rules, widened by `drop*` and narrowed by `keep*`.

    Raises BundleError for a kept package that no rule drops: a misspelt override would pass unseen.
    """
    packages = {rule.pattern for rule in DROP_PACKAGES} | {normalize(name) for name in drop_packages}
    kept = {normalize(name) for name in keep_packages}
    unknown = sorted(kept - packages)
    if unknown:
        raise BundleError(f"--keep-package {unknown[0]}: no rule drops it (see the `rules` command)")
    paths = (*(rule.pattern for rule in DROP_PATHS), *drop)
    return Selection(frozenset(packages - kept), paths, tuple(keep))


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}/*") for pattern in patterns)


def prune(site: Path, selection: Selection) -> int:
    """Deletes from `site` what `selection` drops, then empty folders. Returns the bytes freed."""
    freed = 0
    for path in sorted(site.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
            continue
        if selection.drops(path.relative_to(site).as_posix()):
            freed += path.lstat().st_size
            path.unlink()
    return freed


def strip_shared_objects(site: Path) -> int:
    """Removes symbols and debug data from large shared objects; returns the bytes freed.

    Libraries that a wheel carries in `*.libs` or `.so.N` form are left alone: they were rewritten by
    auditwheel, and `strip` is known to break some of those. A file that grows no smaller or that `strip`
    refuses stays as it was.
    """
    strip = shutil.which("strip")
    if strip is None:
        raise BundleError("`strip` (binutils) is not on the PATH; install it or pass --no-strip")
    freed = 0
    for path in sorted(site.rglob("*.so")):
        before = path.stat().st_size
        if before < STRIP_ABOVE_BYTES or any(part.endswith(".libs") for part in path.parts):
            continue
        with tempfile.TemporaryDirectory(dir=site.parent) as folder:
            stripped = Path(folder) / path.name
            done = subprocess.run([strip, "--strip-unneeded", "-o", stripped, path], capture_output=True)
            if done.returncode == 0 and stripped.stat().st_size < before:
                freed += before - stripped.stat().st_size
                shutil.copymode(path, stripped)
                stripped.replace(path)
    return freed


# --------------------------------------------------------------------------------------------------
# Which packages: resolved for the target's Python, with the target's versions preferred.
# --------------------------------------------------------------------------------------------------


def normalize(name: str) -> str:
    """A distribution name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse_packages(text: str) -> dict[str, str]:
    """Name to version from `pip list`, `pip freeze` or `pip list --format=json` output.

    Local version labels (`+cu130`) are cut: an index does not know them.
    Raises BundleError when no line can be read.
    """
    packages: dict[str, str] = {}
    if text.lstrip().startswith("["):
        pairs = [(entry["name"], entry["version"]) for entry in json.loads(text)]
    else:
        pairs = re.findall(r"^([A-Za-z0-9][\w.-]*)(?:==|\s+)(\d[^\s;]*)", text, flags=re.MULTILINE)
    for name, version in pairs:
        packages[normalize(name)] = version.split("+")[0]
    if not packages:
        raise BundleError("--target-packages: no package found; give the output of `pip list` on the target")
    return packages


def excluded_names(selection: Selection, target: dict[str, str]) -> list[str]:
    """Names that the resolver must not follow: dropped, or the target's own at any version."""
    owned = {name for name in TARGET_OWNED_IF_LISTED if name in target}
    return sorted(selection.packages | owned | set(TARGET_OWNED_ALWAYS))


def missing_packages(resolved: dict[str, str], target: dict[str, str]) -> dict[str, str]:
    """What must travel: resolved packages that the target lacks or has at another version."""
    return {name: version for name, version in resolved.items() if target.get(name) != version}


def resolve(
    requirements: Sequence[str],
    selection: Selection,
    target: dict[str, str],
    python: str,
    platform: str,
    work: Path,
) -> dict[str, str]:
    """Resolves `requirements` for the target with `uv`; the target's versions win where they fit.

    A package is excluded by an override with a marker that never holds, so that what only it needs goes too.
    """
    (work / "requirements.in").write_text("".join(f"{line}\n" for line in requirements))
    overrides = [f"{name} ; python_version < '0'\n" for name in excluded_names(selection, target)]
    (work / "overrides.txt").write_text("".join(overrides))
    lock = work / "lock.txt"
    # uv takes versions in an existing output file as preferences.
    lock.write_text("".join(f"{name}=={version}\n" for name, version in sorted(target.items())))
    arguments = ["pip", "compile", "requirements.in", "--override", "overrides.txt", "-o", lock.name]
    arguments += ["--no-header", "--no-annotate", "--python-version", python, "--python-platform", platform]
    _uv(arguments, work)
    return parse_packages(lock.read_text())


def install(
    packages: dict[str, str], wheel: Path, site: Path, python: str, platform: str, work: Path
) -> None:
    """Unpacks the target's wheels of `packages`, and `wheel`, into `site`; nothing is compiled here."""
    (work / "install.txt").write_text(
        "".join(f"{name}=={version}\n" for name, version in sorted(packages.items()))
    )
    arguments = ["pip", "install", "--target", str(site), "--no-deps", "--only-binary", ":all:"]
    arguments += ["--python-version", python, "--python-platform", platform, "--link-mode", "copy"]
    _uv([*arguments, "-r", "install.txt", str(wheel)], work)


def build_wheel(project: Path, work: Path) -> Path:
    """This package as a wheel: its metadata carries the entry point that makes SGLang load the plugin."""
    _uv(["build", "--wheel", "--out-dir", str(work / "wheel"), str(project)], work)
    (wheel,) = (work / "wheel").glob("*.whl")
    return wheel


def _uv(arguments: Sequence[str], cwd: Path) -> None:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise BundleError("`uv` is not on the PATH; run `pip install uv` on the build machine")
    done = subprocess.run([uv, "--quiet", *arguments], cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        raise BundleError(f"`uv {' '.join(arguments[:2])}` failed:\n{done.stderr.strip()}")


# --------------------------------------------------------------------------------------------------
# The archive: a reproducible tar.xz with a list of hashes inside, cut into parts with hashes outside.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One piece of an archive: file name, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What an archive is and what it needs; stored as `<name>.manifest.json` beside the parts."""

    name: str
    kind: str
    python: str
    parts: tuple[Part, ...]
    #: Distributions inside ("bundle"), or those that the compiled kernels belong to ("cache").
    packages: dict[str, str] = field(default_factory=dict)
    #: Distributions that the target must have itself, at these versions.
    target: dict[str, str] = field(default_factory=dict)
    #: Of the GPU that the kernels were compiled for, "9.0" for Hopper; empty for a bundle.
    compute_capability: str = ""
    format: int = FORMAT

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise BundleError(f"{self.name}: format {self.format}, this script reads {FORMAT}")
        if self.kind not in ("bundle", "cache"):
            raise BundleError(f"{self.name}: unknown kind {self.kind!r}")

    def write(self, folder: Path) -> None:
        """Stores the manifest in `folder`."""
        path = folder / f"{self.name}.manifest.json"
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Loads a manifest; raises BundleError when it is damaged or of another format."""
        try:
            values = json.loads(path.read_text())
            values["parts"] = tuple(Part(**part) for part in values["parts"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path.name} is damaged: {error}") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_archive(root: Path, name: str, output: Path, preset: int = 9) -> Path:
    """Packs the files of `root` as `<output>/<name>.tar.xz`, the same bytes for the same tree.

    The archive's last member, `.manifest/<name>.sha256`, lists every file in `sha256sum` format. Members are
    sorted by suffix first, so that like compresses with like (headers that two packages both carry).
    """
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    files.sort(key=lambda path: (path.suffix, path.name, path.as_posix()))
    listing = "".join(f"{sha256_of(path)}  {path.relative_to(root).as_posix()}\n" for path in files).encode()
    archive = output / f"{name}.tar.xz"
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": preset}]
    with (
        lzma.open(archive, "wb", filters=filters) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in files:
            with path.open("rb") as content:
                tar.addfile(_member(path.relative_to(root).as_posix(), path.stat()), content)
        tar.addfile(_member(f".manifest/{name}.sha256", None, len(listing)), io.BytesIO(listing))
    return archive


def _member(name: str, stat: os.stat_result | None, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size if stat is None else stat.st_size
    member.mode = 0o755 if stat is not None and stat.st_mode & 0o100 else 0o644
    return member


def split(archive: Path, part_bytes: int) -> tuple[Part, ...]:
    """Cuts `archive` into `<archive>.000`, `.001`, … of at most `part_bytes` each and deletes it."""
    if part_bytes <= 0:
        raise BundleError("--part-size must be positive")
    parts: list[Part] = []
    with archive.open("rb") as stream:
        while True:
            path = archive.with_name(f"{archive.name}.{len(parts):03d}")
            written = _copy_at_most(stream, path, part_bytes)
            if written == 0:
                path.unlink()
                break
            parts.append(Part(path.name, written, sha256_of(path)))
    archive.unlink()
    return tuple(parts)


def _copy_at_most(stream: io.BufferedIOBase, path: Path, limit: int) -> int:
    written = 0
    with path.open("wb") as part:
        while written < limit and (block := stream.read(min(MIB, limit - written))):
            written += part.write(block)
    return written


def verify_parts(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError naming the first part that is missing, cut short or altered."""
    for part in manifest.parts:
        path = folder / part.name
        if not path.is_file():
            raise BundleError(f"{part.name} is missing in {folder}")
        if path.stat().st_size != part.size:
            raise BundleError(f"{part.name}: {path.stat().st_size} bytes, expected {part.size}")
        if sha256_of(path) != part.sha256:
            raise BundleError(f"{part.name}: wrong SHA-256; copy it again")


class JoinedParts(io.RawIOBase):
    """Read-only stream over the parts of an archive, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._streams: Iterator[io.BufferedReader] = (path.open("rb") for path in paths)
        self._current: io.BufferedReader | None = next(self._streams, None)

    def readable(self) -> bool:
        """Always true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from the current part; 0 at the end of the last one."""
        while self._current is not None:
            count = self._current.readinto(buffer)
            if count:
                return count
            self._current.close()
            self._current = next(self._streams, None)
        return 0


def extract(folder: Path, manifest: Manifest, destination: Path) -> None:
    """Verifies and joins the parts of one archive and unpacks it; members cannot leave `destination`."""
    verify_parts(folder, manifest)
    joined = io.BufferedReader(JoinedParts([folder / part.name for part in manifest.parts]), MIB)
    with lzma.open(joined) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(destination, filter="data")


def verify_files(destination: Path) -> int:
    """Compares every unpacked file with its recorded hash and returns how many there are.

    Raises BundleError naming the first file that is missing or altered, or when nothing was unpacked.
    """
    lists = sorted((destination / ".manifest").glob("*.sha256"))
    count = 0
    for line in (line for path in lists for line in path.read_text().splitlines()):
        digest, name = line.split("  ", 1)
        path = destination / name
        if not path.is_file():
            raise BundleError(f"{name} is missing in {destination}")
        if sha256_of(path) != digest:
            raise BundleError(f"{name} is not what was packed; unpack again")
        count += 1
    if count == 0:
        raise BundleError(f"nothing was unpacked into {destination}")
    return count


# --------------------------------------------------------------------------------------------------
# On the target.
# --------------------------------------------------------------------------------------------------


def environment(destination: Path) -> dict[str, str]:
    """Variables that put the bundle first and keep every compiled kernel under `destination/cache`."""
    cache = destination / "cache"
    return {
        "FLASHINFER_WORKSPACE_BASE": str(cache),
        "TVM_FFI_CACHE_DIR": str(cache / "tvm-ffi"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "SGLANG_DG_CACHE_DIR": str(cache / "deep-gemm"),
        "SGLANG_CACHE_DIR": str(cache / "sglang"),
        "HF_HUB_OFFLINE": "1",
    }


def write_environment(destination: Path) -> Path:
    """Writes `env.sh`, to be sourced by a POSIX shell; a PYTHONPATH that is set comes after the bundle."""
    lines = [f'export {name}="{value}"' for name, value in environment(destination).items()]
    lines.append(f'export PYTHONPATH="{destination / "site"}${{PYTHONPATH:+:$PYTHONPATH}}"')
    path = destination / "env.sh"
    path.write_text("\n".join(lines) + "\n")
    return path


def compute_capability() -> str:
    """The first GPU's, such as "9.0", or "" where the driver's tool finds none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def cache_misfit(cache: Manifest, bundle: Manifest, capability: str) -> str:
    """Why compiled kernels cannot be used here, as a sentence; "" when they can."""
    if cache.compute_capability != capability:
        return (
            f"compiled for compute capability {cache.compute_capability}, this GPU has {capability or 'none'}"
        )
    for name, version in cache.packages.items():
        here = bundle.packages.get(name) or _version(name)
        if here != version:
            return f"compiled with {name} {version}, here is {here or 'none'}"
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def unpack(folder: Path, destination: Path, capability: str | None = None) -> Manifest:
    """Unpacks the bundle in `folder` and the kernel caches that fit this machine, and verifies every file.

    `capability` overrides what the GPU's driver says. Raises BundleError; returns the bundle's manifest.
    """
    manifests = [Manifest.read(path) for path in sorted(folder.glob("*.manifest.json"))]
    bundles = [manifest for manifest in manifests if manifest.kind == "bundle"]
    if len(bundles) != 1:
        raise BundleError(f"{folder} holds {len(bundles)} bundles, expected one")
    bundle = bundles[0]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if bundle.python != here:
        raise BundleError(f"{bundle.name} is for Python {bundle.python}, this is {here}")
    destination = destination.resolve()
    destination.mkdir(parents=True, exist_ok=True)
    extract(folder, bundle, destination)
    found = compute_capability() if capability is None else capability
    for cache in (manifest for manifest in manifests if manifest.kind == "cache"):
        misfit = cache_misfit(cache, bundle, found)
        if misfit:
            print(f"{cache.name}: left packed, {misfit}", flush=True)
            continue
        extract(folder, cache, destination)
    write_environment(destination)
    print(f"{verify_files(destination)} files unpacked and verified in {destination}", flush=True)
    return bundle


def check_target(bundle: Manifest) -> list[str]:
    """What the target lacks: tools, and packages that the bundle leaves to it. One sentence each."""
    problems = [f"`{tool}` is not on the PATH" for tool in ("nvcc", "ninja", "c++") if not shutil.which(tool)]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        problems.append("Python.h is missing: FlashInfer's kernels include it")
    for name, version in bundle.target.items():
        here = _version(name)
        if not here:
            problems.append(f"{name} is not installed (the bundle was built for a machine with {version})")
        elif name in ("torch", "triton") and here != version:
            problems.append(f"{name} is {here}, the bundle was built for {version}")
    return problems


#: argv: modules. Prints one line for each that cannot be imported.
IMPORT_PROGRAM = """
import importlib, sys
for module in sys.argv[1:]:
    try:
        importlib.import_module(module)
    except Exception as error:
        print(f"OFFLINE-IMPORT {module}: {type(error).__name__}: {error}".replace(chr(10), " "), flush=True)
"""


def check_imports(destination: Path, modules: Sequence[str]) -> list[str]:
    """Imports the modules in a fresh interpreter that sees the bundle as a user's; returns the failures."""
    command = [sys.executable, "-c", IMPORT_PROGRAM, *modules]
    done = subprocess.run(command, env=_child_environment(destination), capture_output=True, text=True)
    problems = re.findall(r"^OFFLINE-IMPORT (.*)$", done.stdout, flags=re.MULTILINE)
    if done.returncode != 0:
        problems.append(f"imports ended with status {done.returncode}: {done.stderr.strip()[-400:]}")
    return [f"import {problem}" for problem in problems]


def check_plugin(destination: Path) -> list[str]:
    """SGLang finds sglang_ext through its entry point: without it the plugin is silently not loaded."""
    group = "sglang.srt.plugins"
    search = [str(destination / "site")]
    found = [
        entry.name
        for distribution in importlib.metadata.distributions(path=search)
        for entry in distribution.entry_points
        if entry.group == group
    ]
    return [] if "sglang_ext" in found else [f"entry point group {group} has {found}, not sglang_ext"]


def _child_environment(destination: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(destination / "site"), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, **environment(destination), "PYTHONPATH": path}


#: Runs in an interpreter of its own: argv is the model folder, the attention backend and the token count.
#: Few graph sizes: what is tried is that everything loads and compiles, not the speed.
SMOKE_PROGRAM = """
import json, sys, time
import sglang

def main() -> None:
    started = time.perf_counter()
    engine = sglang.Engine(
        model_path=sys.argv[1], attention_backend=sys.argv[2], load_format="dummy", skip_tokenizer_init=True,
        mem_fraction_static=0.3, cuda_graph_max_bs_decode=4, cuda_graph_max_bs_prefill=64, random_seed=1,
    )
    ready = time.perf_counter()
    count = int(sys.argv[3])
    sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
    outputs = engine.generate(input_ids=[[1, 2, 3, 4, 5], [7] * 40], sampling_params=sampling)
    done = time.perf_counter()
    lengths = [len(output["output_ids"]) for output in outputs]
    engine.shutdown()
    assert lengths == [count, count], lengths
    print(json.dumps({"start_s": round(ready - started, 1), "generate_s": round(done - ready, 2)}))

if __name__ == "__main__":
    main()
"""

#: A small Llama with FlashInfer's usual head size; random weights, so nothing need be downloaded.
SMOKE_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def smoke(destination: Path, attention_backend: str, head_dim: int = 128, tokens: int = 8) -> int:
    """Starts stock SGLang on a random two-layer Llama, generates, prints the times; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        model, program = Path(folder, "model"), Path(folder, "smoke.py")
        model.mkdir()
        (model / "config.json").write_text(json.dumps({**SMOKE_MODEL, "head_dim": head_dim}))
        program.write_text(SMOKE_PROGRAM)
        command = [sys.executable, str(program), str(model), attention_backend, str(tokens)]
        return subprocess.run(command, env=_child_environment(destination)).returncode


#: Distributions whose version decides whether a compiled kernel may be loaded.
CACHE_OWNERS = ("flashinfer-python", "apache-tvm-ffi", "sglang", "torch", "triton")


def stage_cache(destination: Path, stage: Path) -> int:
    """Copies compiled kernels from `destination` to `stage`, in the places where they are loaded unbuilt.

    FlashInfer loads `flashinfer/data/aot/<name>/<name>.so` without running ninja, whose build files name
    absolute paths and whose time stamps do not survive a copy; SGLang's own kernels are keyed by content;
    Triton's and Inductor's caches are keyed by source, version and GPU. Returns the number of files.
    """
    cache, count = destination / "cache", 0
    for built in sorted(cache.glob(".cache/flashinfer/*/*/cached_ops/*/*.so")):
        if built.stem == built.parent.name:
            count += _copy_into(built, stage / "site/flashinfer/data/aot" / built.stem / built.name)
    for built in sorted((destination / "site/flashinfer/data/aot").glob("*/*.so")):
        count += _copy_into(built, stage / built.relative_to(destination))
    for built in sorted((cache / "tvm-ffi").glob("*/*.so")):
        count += _copy_into(built, stage / built.relative_to(destination))
    for folder in ("triton", "inductor", "deep-gemm"):
        for path in sorted((cache / folder).rglob("*")):
            if path.is_file() and not path.name.endswith(".lock"):
                count += _copy_into(path, stage / path.relative_to(destination))
    return count


def _copy_into(source: Path, target: Path) -> int:
    if target.exists():
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
    return 1


def pack_cache(
    destination: Path, output: Path, part_bytes: int, preset: int = 6, capability: str | None = None
) -> Manifest:
    """Packs what was compiled under `destination` into `output`; raises BundleError if there is nothing."""
    found = compute_capability() if capability is None else capability
    output.mkdir(parents=True, exist_ok=True)
    name = f"kernel-cache-sm{found.replace('.', '')}"
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        if stage_cache(destination.resolve(), stage) == 0:
            raise BundleError(
                f"no compiled kernel under {destination}: run the server once with env.sh sourced"
            )
        parts = split(write_archive(stage, name, output, preset), part_bytes)
    inside = {
        normalize(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions(path=[str(destination / "site")])
    }
    versions = {owner: inside.get(owner) or _version(owner) for owner in CACHE_OWNERS}
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = {owner: version for owner, version in versions.items() if version}
    manifest = Manifest(name, "cache", here, parts, packages=packages, compute_capability=found)
    manifest.write(output)
    return manifest


# --------------------------------------------------------------------------------------------------
# Commands.
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuildOptions:
    """What `build` was asked for; sizes in bytes."""

    project: Path
    output: Path
    python: str
    platform: str
    part_bytes: int
    selection: Selection
    target: dict[str, str]
    strip: bool = True
    preset: int = 9


def build(options: BuildOptions) -> Manifest:
    """Resolves, downloads, prunes, packs and splits; leaves a folder that `unpack` reads by itself."""
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob("sglang-offline*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = build_wheel(options.project, work)
        requirements = [f"sglang-ext @ {wheel.as_uri()}", *UNDECLARED]
        resolved = resolve(
            requirements, options.selection, options.target, options.python, options.platform, work
        )
        missing = missing_packages(resolved, options.target)
        stage = work / "stage"
        site = stage / "site"
        _say(f"{len(resolved)} packages resolved, {len(missing)} of them travel")
        install(missing, wheel, site, options.python, options.platform, work)
        _say(f"{prune(site, options.selection) / MIB:.0f} MiB pruned")
        if options.strip:
            _say(f"{strip_shared_objects(site) / MIB:.0f} MiB stripped")
        name = "sglang-offline"
        archive = write_archive(stage, name, options.output, options.preset)
        _say(f"{archive.name}: {archive.stat().st_size / MIB:.1f} MiB")
        parts = split(archive, options.part_bytes)
    left_to_target = {name: version for name, version in resolved.items() if name not in missing}
    owned = {*TARGET_OWNED_ALWAYS, *TARGET_OWNED_IF_LISTED}
    left_to_target |= {name: version for name, version in options.target.items() if name in owned}
    manifest = Manifest(name, "bundle", options.python, parts, missing, left_to_target)
    manifest.write(options.output)
    shutil.copyfile(__file__, options.output / Path(__file__).name)
    return manifest


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*(MiB|KiB|B|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 15MiB")
    return int(match[1]) * {"MiB": MIB, "KiB": 1 << 10}.get(match[2], 1)


def _build_command(arguments: argparse.Namespace) -> int:
    target = parse_packages(arguments.target_packages.read_text()) if arguments.target_packages else {}
    selection = select(arguments.drop, arguments.keep, arguments.drop_package, arguments.keep_package)
    options = BuildOptions(
        project=arguments.project.resolve(),
        output=arguments.output.resolve(),
        python=arguments.python,
        platform=arguments.platform,
        part_bytes=arguments.part_size,
        selection=selection,
        target=target,
        strip=not arguments.no_strip,
        preset=arguments.preset,
    )
    manifest = build(options)
    print("\n".join(f"{part.sha256}  {part.name}" for part in manifest.parts))
    return 0


def _unpack_command(arguments: argparse.Namespace) -> int:
    bundle = unpack(arguments.folder, arguments.destination)
    bundle.write(arguments.destination / ".manifest")
    if arguments.no_check:
        return 0
    return _report(_problems(arguments.destination.resolve(), bundle))


def _check_command(arguments: argparse.Namespace) -> int:
    destination = arguments.destination.resolve()
    bundle = Manifest.read(destination / ".manifest" / "sglang-offline.manifest.json")
    print(f"{verify_files(destination)} files verified")
    code = _report(_problems(destination, bundle))
    if code == 0 and arguments.smoke:
        return smoke(destination, arguments.smoke, arguments.head_dim)
    return code


def _problems(destination: Path, bundle: Manifest) -> list[str]:
    modules = (*CHECK_IMPORTS, *CHECK_IMPORTS_GPU) if compute_capability() else CHECK_IMPORTS
    return [*check_target(bundle), *check_plugin(destination), *check_imports(destination, modules)]


def _report(problems: Sequence[str]) -> int:
    for problem in problems:
        print(f"PROBLEM: {problem}", flush=True)
    if not problems:
        print("check passed", flush=True)
    return 1 if problems else 0


def _pack_cache_command(arguments: argparse.Namespace) -> int:
    manifest = pack_cache(arguments.destination, arguments.output, arguments.part_size)
    print("\n".join(f"{part.sha256}  {part.name}" for part in manifest.parts))
    return 0


def _rules_command(arguments: argparse.Namespace) -> int:
    for title, rules in (("packages", DROP_PACKAGES), ("paths", DROP_PATHS)):
        print(f"{title}:")
        for rule in rules:
            print(f"  {rule.pattern:<40} {rule.reason}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("build", help="on a machine with a package index: make the bundle")
    command.add_argument("-o", "--output", type=Path, required=True, help="folder for the parts")
    command.add_argument("--python", required=True, metavar="X.Y", help="the target's Python, such as 3.12")
    command.add_argument("--platform", default="x86_64-manylinux_2_35", help="as `uv --python-platform`")
    command.add_argument("--target-packages", type=Path, help="output of `pip list` on the target")
    command.add_argument("--project", type=Path, default=Path(__file__).parents[1], help="this repository")
    command.add_argument("--part-size", type=_size, default=_size("15MiB"), help="largest part (15MiB)")
    command.add_argument("--preset", type=int, choices=range(10), default=9, help="xz preset (9)")
    command.add_argument("--no-strip", action="store_true", help="keep symbols of shared objects")
    for option, thing in (("drop", "path pattern"), ("keep", "path pattern")):
        command.add_argument(f"--{option}", action="append", default=[], metavar="PATTERN", help=thing)
        command.add_argument(f"--{option}-package", action="append", default=[], metavar="NAME")
    command.set_defaults(run=_build_command)

    command = commands.add_parser("unpack", help="on the target: verify, unpack and check")
    command.add_argument("folder", type=Path, help="the folder that `build` made")
    command.add_argument("destination", type=Path)
    command.add_argument("--no-check", action="store_true", help="verify hashes alone")
    command.set_defaults(run=_unpack_command)

    command = commands.add_parser("check", help="on the target: hashes, tools, imports, engine")
    command.add_argument("destination", type=Path)
    command.add_argument("--smoke", metavar="ATTENTION_BACKEND", help="also start SGLang and generate")
    command.add_argument("--head-dim", type=int, default=128, help="of the model that --smoke makes (128)")
    command.set_defaults(run=_check_command)

    command = commands.add_parser("pack-cache", help="on the target: pack the kernels compiled so far")
    command.add_argument("destination", type=Path)
    command.add_argument("-o", "--output", type=Path, required=True)
    command.add_argument("--part-size", type=_size, default=_size("15MiB"))
    command.set_defaults(run=_pack_cache_command)

    command = commands.add_parser("rules", help="what is left out by default, and why")
    command.set_defaults(run=_rules_command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 for a problem that is printed as one sentence."""
    arguments = _parser().parse_args(argv)
    run = cast("Callable[[argparse.Namespace], int]", arguments.run)
    try:
        return run(arguments)
    except BundleError as error:
        print(f"offline_bundle: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
