from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import CHATML, make_tiny_model, make_tiny_tokenizer

from mage_ray.errors import FieldError, UserError
from mage_ray.models import (
    EMBEDDED,
    fingerprint,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
    tokenizer_fingerprint,
)


@pytest.fixture
def copy(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "copy"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Names


def test_a_local_folder_and_a_hub_id_resolve_to_themselves(tiny_model_folder: Path) -> None:
    assert resolve_model(str(tiny_model_folder)) == str(tiny_model_folder)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("name", ["", "smollm", "/no/such/folder", "./org/name", "a/b/c", "org/na me", "org/../name"])
def test_a_name_that_leads_nowhere_is_refused_with_the_ones_that_lead_somewhere(name: str) -> None:
    with pytest.raises(
        FieldError, match=r"model: got .*allowed: smollm2-135m-instruct, an existing folder, or a hub id"
    ):
        resolve_model(name)


def test_a_folder_with_only_pickled_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(FieldError, match=r"safetensors weights \(\.bin files are pickles\)$"):
        resolve_model(str(copy))
    with pytest.raises(FieldError, match="safetensors"):
        load_model(str(copy))


def test_an_adapter_folder_is_not_a_model(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    with pytest.raises(FieldError, match=r"a folder with safetensors weights$"):
        resolve_model(str(copy))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_readable_config_is_refused(copy: Path, text: str | None) -> None:
    (copy / "config.json").unlink()
    if text is not None:
        (copy / "config.json").write_text(text)
    with pytest.raises(FieldError, match=r"a folder with a model's config\.json"):
        resolve_model(str(copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "is_encoder_decoder": True},
        {"model_type": "bart", "architectures": None, "is_encoder_decoder": True},
        {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaModel"]},
        {"model_type": "my_own", "architectures": ["MyOwn"], "auto_map": {"AutoModelForCausalLM": "own.MyOwn"}},
    ],
    ids=lambda changes: f"{changes.get('model_type')}-{(changes['architectures'] or ['none'])[0]}",
)
def test_only_decoder_only_models_that_transformers_knows_are_taken(copy: Path, changes: dict[str, object]) -> None:
    edit_config(copy, **changes)
    with pytest.raises(FieldError, match="a decoder-only language model"):
        resolve_model(str(copy))


def test_an_encoder_decoder_as_transformers_saves_it_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(FieldError, match="decoder-only"):
        load_model(str(tmp_path))


# Loading


def test_a_loaded_model_is_ready_to_decode_and_loading_is_silent(
    tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    capfd.readouterr()
    model = load_model(str(tiny_model_folder))
    tokenizer = load_tokenizer(str(tiny_model_folder))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not model.training
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|pad|>")
    stored = load_file(tiny_model_folder / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_has_the_dtype_asked_for(tiny_model_folder: Path, dtype: str) -> None:
    assert load_model(str(tiny_model_folder), dtype=dtype).dtype == getattr(torch, dtype)


def test_a_dtype_that_is_none_is_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(FieldError, match="dtype: got float8, allowed: float32, bfloat16, float16"):
        load_model(str(tiny_model_folder), dtype="float8")


def test_a_truncated_weight_file_is_one_line(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load the model") as caught:
        load_model(str(copy))
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_not_filled_with_random_numbers(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(copy))


def test_a_tokenizer_without_a_padding_token_pads_with_its_end_token(copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config | {"padding_side": "right"}))
    tokenizer = load_tokenizer(str(copy))
    assert tokenizer.pad_token == "<|im_end|>"
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_a_hub_model_out_of_reach_is_one_line() -> None:
    # tests/conftest.py switches the hub off.
    with pytest.raises(UserError, match="cannot load the model nobody/nothing") as caught:
        load_model("nobody/nothing")
    assert "\n" not in str(caught.value)


# Fingerprints


def test_a_model_is_told_by_content_whatever_its_dtype_or_folder(copy: Path, tiny_model_folder: Path) -> None:
    expected = fingerprint(str(tiny_model_folder))
    assert len(expected) == 16
    assert fingerprint(str(copy)) == expected
    for dtype in ("float32", "bfloat16"):
        assert model_fingerprint(load_model(str(copy), dtype=dtype)) == expected


def test_models_that_differ_have_other_fingerprints(tmp_path: Path) -> None:
    variants = {
        "base": {},
        "other weights": {"seed": 1},
        "tied": {"tie_word_embeddings": True},
        "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        "layers": {"num_hidden_layers": 1},
    }
    prints = {name: fingerprint(str(make_tiny_model(tmp_path / name, **changes))) for name, changes in variants.items()}
    assert len(set(prints.values())) == len(variants), prints


def test_one_trained_tensor_changes_the_fingerprint(tiny_model_folder: Path) -> None:
    model = load_model(str(tiny_model_folder))
    before = model_fingerprint(model)
    with torch.no_grad():
        dict(model.named_parameters())["model.layers.0.self_attn.v_proj.weight"].mul_(1.05)
    assert model_fingerprint(model) != before


def test_a_tokenizer_is_told_by_what_it_does(tiny_model_folder: Path) -> None:
    from tokenizers import pre_tokenizers

    expected = tokenizer_fingerprint(load_tokenizer(str(tiny_model_folder)))
    same = make_tiny_tokenizer()
    same.pad_token, same.padding_side = same.eos_token, "right"
    same(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(same) == expected

    template, end, token, cut = (make_tiny_tokenizer() for _ in range(4))
    template.chat_template = CHATML + "!"
    end.eos_token = "<|endoftext|>"
    token.add_tokens(["<new>"])
    cut.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    others = [tokenizer_fingerprint(tokenizer) for tokenizer in (template, end, token, cut)]
    assert len({expected, *others}) == 5


# The embedded model. What it says and whether its weights are right: tests/test_embedded.py


@pytest.mark.slow
def test_the_embedded_model_answers_in_english_and_stops(real_model: Path) -> None:
    model, tokenizer = load_model(EMBEDDED), load_tokenizer(EMBEDDED)
    assert resolve_model(EMBEDDED) == str(real_model)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    assert tokens["input_ids"][0, 0] == tokenizer.bos_token_id  # <|im_start|> is one token, not text
    out = model.generate(**tokens, max_new_tokens=40, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert len(out) < 40 and tokenizer.decode(out[-1]) == "<|im_end|>" == tokenizer.eos_token
