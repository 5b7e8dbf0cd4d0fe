"""The mix, the exported adapter and the merged weights against the exact float64 delta, PEFT reading what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mage_ray.errors import FieldError, UserError
from mage_ray.export import export_experts
from mage_ray.merging.adapter import Adapter, load_adapter, save_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.export import soup

KINDS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {"r": 7, "lora_alpha": 3},
    {"r": 16, "lora_alpha": 16, "use_rslora": True},
    {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {
        "r": 3,
        "lora_alpha": 6,
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.v_proj": 5},
        "alpha_pattern": {"mlp.up_proj": 11},
    },
]
COEFFICIENTS = [1.75, -0.75, 0.4, -1.1, 0.6]


@pytest.fixture(scope="module")
def experts(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("experts")
    return [make_adapter(tiny_model_folder, place / f"e{i}", seed=i, **kind) for i, kind in enumerate(KINDS)]


def exact_weights(model: Path, experts: list[Path], coefficients: list[float]) -> dict[str, torch.Tensor]:
    """W + sum_i lam_i s_i B_i A_i in float64, with the scale s_i that PEFT itself computes."""
    from peft import PeftModel

    weights = {k: v.double() for k, v in AutoModelForCausalLM.from_pretrained(model).state_dict().items()}
    for expert, lam in zip(experts, coefficients, strict=True):
        peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), expert)
        for name, module in peft_model.get_base_model().named_modules():
            if hasattr(module, "lora_A"):
                a, b = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
                weights[f"{name}.weight"] += lam * module.scaling["default"] * (b @ a)
    return weights


def float64_model(model: Path, weights: dict[str, torch.Tensor]) -> Any:
    merged = AutoModelForCausalLM.from_pretrained(model).double()
    merged.load_state_dict(weights)
    return merged.eval()


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@torch.inference_mode()
def test_per_row_mix_equals_full_merge_for_every_row(tiny_model_folder: Path, experts: list[Path]) -> None:
    rows = [COEFFICIENTS, [0.0] * 5, [1.0, 0, 0, 0, 0], [0, 0, 0, -2.0, 0], [0.2] * 5]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    mix = AdapterBank([load_adapter(e) for e in experts]).install(model)
    tokens_BT = torch.randint(0, 250, (len(rows), 9), generator=torch.Generator().manual_seed(0))
    with mix.rows(torch.tensor(rows)):
        got_BTV = model(tokens_BT).logits
    for row, tokens_T, got_TV in zip(rows, tokens_BT, got_BTV, strict=True):
        exact = float64_model(tiny_model_folder, exact_weights(tiny_model_folder, experts, row))
        assert relative_error(got_TV, exact(tokens_T[None]).logits[0]) < 2e-6
    # Outside the block nothing of it is left.
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval()
    assert torch.equal(model(tokens_BT).logits, plain(tokens_BT).logits)


@torch.inference_mode()
def test_exported_adapter_is_exact_when_peft_loads_it(
    tiny_model_folder: Path, experts: list[Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    export_experts(experts, COEFFICIENTS, tmp_path / "soup", full=False)
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path / "soup")
    exact = float64_model(tiny_model_folder, exact_weights(tiny_model_folder, experts, COEFFICIENTS))
    tokens = torch.arange(12)[None]
    assert relative_error(peft_model.eval()(tokens).logits, exact(tokens).logits) < 2e-6
    deltas = exact_weights(tiny_model_folder, experts, COEFFICIENTS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    for module, factors in load_adapter(tmp_path / "soup").factors.items():
        delta = deltas[f"{module}.weight"] - base[f"{module}.weight"].double()
        assert relative_error(factors.delta(), delta) < 1e-6, module


def test_full_export_is_exact_and_transformers_loads_it(
    tiny_model_folder: Path, experts: list[Path], tmp_path: Path
) -> None:
    export_experts(experts, COEFFICIENTS, tmp_path / "full", full=True, model=str(tiny_model_folder))
    exact = exact_weights(tiny_model_folder, experts, COEFFICIENTS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    assert loaded.keys() == exact.keys()
    for name, tensor in loaded.items():
        # One rounding from the exact sum to the model's own float32.
        torch.testing.assert_close(tensor, exact[name].float(), rtol=0, atol=1e-6)
    assert sorted(p.suffix for p in (tmp_path / "full").iterdir() if "model" in p.name) == [".safetensors"]


def test_gpt2_linears_are_transposed_and_still_exact(tmp_path: Path) -> None:
    from peft import PeftModel
    from tiny import make_tiny_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    experts = [make_adapter(tmp_path / "gpt2", tmp_path / f"e{i}", seed=i, r=3 + i, **targets) for i in range(2)]
    export_experts(experts, [1.5, -0.5], tmp_path / "soup", full=False)
    export_experts(experts, [1.5, -0.5], tmp_path / "full", full=True, model=str(tmp_path / "gpt2"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    mix = AdapterBank([load_adapter(e) for e in experts]).install(model)
    tokens = torch.arange(10)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")
    with torch.inference_mode(), mix.rows(torch.tensor([[1.5, -0.5]])):
        mixed = model(tokens).logits
        full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()(tokens).logits
        from_peft = PeftModel.from_pretrained(base, tmp_path / "soup").eval()(tokens).logits
    torch.testing.assert_close(mixed, full, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed, from_peft, rtol=1e-4, atol=1e-4)


def test_soup_of_soups_and_zero_coefficients(experts: list[Path], tmp_path: Path) -> None:
    adapters = [load_adapter(e) for e in experts]
    first = soup(adapters, [1, 0, 0, 0, 0])
    assert first.factors.keys() == adapters[0].factors.keys()
    save_adapter(soup([first, adapters[1]], [2.0, -1.0]), tmp_path / "again")
    for module, factors in load_adapter(tmp_path / "again").factors.items():
        exact = 2 * adapters[0].factors[module].delta() - adapters[1].factors[module].delta()
        assert relative_error(factors.delta(), exact) < 1e-6


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weight(folder: Path, value: float) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not readable JSON"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x08" * 99), "corrupt"),
        (lambda f: edit_weight(f, float("nan")), "NaN or infinity"),
        (lambda f: edit_weight(f, float("inf")), "NaN or infinity"),
        (lambda f: edit_config(f, use_dora=True), "use_dora"),
        (lambda f: edit_config(f, bias="all"), "bias"),
        (lambda f: edit_config(f, peft_type="IA3"), "LORA"),
    ],
)
def test_unusable_adapters_are_refused_in_one_line(
    damage: Any, message: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_model_folder, tmp_path / "expert")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_adapter(folder)
    assert "\n" not in str(caught.value)


def test_a_pickled_adapter_is_not_read(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = make_adapter(tiny_model_folder, tmp_path / "expert")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_adapter(folder)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, tiny_model_folder: Path) -> None:
    wider = make_tiny_model(tmp_path / "wider", hidden_size=64)
    adapter = load_adapter(make_adapter(wider, tmp_path / "expert"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(FieldError, match="as in this base model"):
        AdapterBank([adapter]).install(model)
    same_shape = Adapter("e", adapter.factors, base_model="aaaa", tokenizer="bbbb")
    with pytest.raises(FieldError, match="another base model"):
        same_shape.check_origin("cccc", "bbbb")
    with pytest.raises(FieldError, match="another tokenizer"):
        same_shape.check_origin("aaaa", "cccc")


@pytest.mark.parametrize("coefficients", [[1.0], [float("nan"), 1.0], [0.0, 0.0], [float("inf"), 1.0]])
def test_unusable_coefficients_are_refused(experts: list[Path], coefficients: list[float]) -> None:
    with pytest.raises(FieldError, match="coefficients"):
        soup([load_adapter(e) for e in experts[:2]], coefficients)


def test_numbers_written_are_the_numbers_read(experts: list[Path], tmp_path: Path) -> None:
    adapter = load_adapter(experts[4])
    save_adapter(adapter, tmp_path / "copy")
    copy = load_adapter(tmp_path / "copy")
    for module, factors in adapter.factors.items():
        assert torch.equal(factors.down, copy.factors[module].down)
        assert np.isclose(factors.scale, copy.factors[module].scale, rtol=1e-12)
