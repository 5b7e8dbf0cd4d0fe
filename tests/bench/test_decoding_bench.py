"""The decoding benchmark on a tiny model: what it writes, and that it refuses arms whose tokens are wrong."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "jobs" / "bench"
sys.path.insert(0, str(BENCH))

import decoding  # noqa: E402
import llama  # noqa: E402
import results  # noqa: E402
import rivals  # noqa: E402
import tradeoffs  # noqa: E402
from arms import Arm, make_arms, ours  # noqa: E402
from naive import NaiveReference  # noqa: E402
from setting import PREFERENCES, BenchError, Prompt, Prompts, guided, load, random_experts, unguided  # noqa: E402
from timing import Timing  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from mage_ray.decoding.engine import Engine  # noqa: E402
from mage_ray.decoding.plan import Plan, Row  # noqa: E402
from mage_ray.decoding.runner import RowRunner  # noqa: E402
from mage_ray.merging.adapter import Adapter  # noqa: E402
from mage_ray.merging.bank import AdapterBank  # noqa: E402

RATIOS = {
    "unguided_vs_generate_b1",
    "unguided_vs_generate_b8",
    "guided_vs_generate_b1",
    "guided_vs_generate_b8",
    "guided_vs_unguided_b1",
    "guided_vs_unguided_b8",
    "guided_vs_rival_b1",
    "guided_vs_rival_b8",
    "mixed8_vs_rival",
    "mixed8_vs_equal8",
    "new_preference_ttft",
    "guided_memory",
    "explicit_q_vs_unguided",
    "explicit_q_vs_unguided_k6",
    "value_v20_vs_q",
}
NO_BAR = {"explicit_q_vs_unguided_k6"}
VALUE_RATIOS = {"explicit_q_vs_unguided", "explicit_q_vs_unguided_k6", "value_v20_vs_q"}
SMALL = ["--model", "tiny", "--threads", "1", "--prompt-tokens", "6", "--new-tokens", "8"]
NEW = 10


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return load("tiny")


@pytest.fixture(scope="module")
def experts(reference: PreTrainedModel) -> list[Adapter]:
    # Stronger than the benchmark's own: on so small a model those change few tokens.
    return random_experts(reference, 3, relative=0.5)


@pytest.fixture(scope="module")
def models(reference: PreTrainedModel, experts: list[Adapter]) -> rivals.MergedModels:
    return rivals.MergedModels(reference, experts)


@pytest.fixture(scope="module")
def engine(experts: list[Adapter]) -> Engine:
    return Engine(RowRunner(load("tiny"), AdapterBank(experts), rows=24, length=32), stop=[])


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The benchmark in a process of its own."""
    command = [sys.executable, str(BENCH / "decoding.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@torch.inference_mode()
def token_by_token(models: rivals.MergedModels, plan: Plan, prompt: Prompt, new: int) -> list[int]:
    """The plainest decoder there is: every model runs the whole sequence again for every token, in float64."""
    tokens = list(prompt)
    doubles = [rivals.copy.deepcopy(models.of(row)).double() for row in plan.rows]
    for _ in range(new):
        rows = [model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1) for model in doubles]
        kept = range(len(rows[0])) if plan.candidates is None else rows[0].topk(plan.candidates).indices.tolist()
        scores = {a: sum(w * float(row[a]) for w, row in zip(plan.weights, rows, strict=True)) for a in kept}
        tokens.append(max(scores, key=scores.__getitem__))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_a_run_times_and_checks_every_arm_and_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", *decoding.ARMS, "ttft", "llama_server"]
    assert decoding.main(["--out", str(tmp_path / "r.json"), "--rounds", "2", *only, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "round 2 of 2" in shown and "mixed8_rival" in shown
    written = json.loads((tmp_path / "r.json").read_text())

    arms = {f"{arm['name']}_b{arm['batch']}": arm for arm in written["arms"]}
    both = {f"{name}_b{batch}" for name in ("generate", "unguided", "guided", "rival") for batch in (1, 8)}
    assert set(arms) == both | {"mixed8_b8", "equal8_b8", "mixed8_rival_b8"}
    for arm in arms.values():
        assert arm["rounds"] == len(arm["seconds"]) == 2
        assert arm["seconds_min"] == min(arm["seconds"]) > 0
        assert arm["seconds_median"] == statistics.median(arm["seconds"])
        assert arm["tokens_per_s_best"] == pytest.approx(arm["batch"] * 8 / arm["seconds_min"])
        assert arm["tokens_per_s_median"] == pytest.approx(arm["batch"] * 8 / arm["seconds_median"])

    assert set(written["ratios"]) == set(written["bars"]) == RATIOS - VALUE_RATIOS - {"guided_memory"}
    speed = {key: arm["tokens_per_s_median"] for key, arm in arms.items()}
    for batch in (1, 8):
        for mine, other in (("unguided", "generate"), ("guided", "unguided"), ("guided", "rival")):
            ratio = written["ratios"][f"{mine}_vs_{other}_b{batch}"]
            assert ratio == pytest.approx(speed[f"{mine}_b{batch}"] / speed[f"{other}_b{batch}"])
    assert written["ratios"]["mixed8_vs_rival"] == pytest.approx(speed["mixed8_b8"] / speed["mixed8_rival_b8"])
    seconds = {kind: written["first_token"][kind]["seconds"] for kind in ("new", "seen")}
    assert {len(s) for s in seconds.values()} == {20}
    late = statistics.median(seconds["new"]) / statistics.median(seconds["seen"])
    assert written["ratios"]["new_preference_ttft"] == pytest.approx(late)

    assert set(written["checks"]["arms"]) == set(arms)
    for key, check in written["checks"]["arms"].items():
        assert check["tokens"] == 3 * arms[key]["batch"] * 8  # the untimed round and both timed ones
        assert check["shortfall"] <= written["checks"]["tolerance_nats"] <= 1e-3
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"] == torch.__version__
    assert written["setting"]["stops"] == "ignored"
    assert written["llama_server"] is None and "llama-server" in written["llama_server_reason"]


@pytest.mark.slow
def test_a_whole_run_has_every_ratio_and_bar(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "r.json", "--rounds", "1", *SMALL)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "r.json").read_text())
    assert set(written["ratios"]) == RATIOS and set(written["bars"]) == RATIOS - NO_BAR
    assert set(written["ratios_of_minima"]) == RATIOS - {"guided_memory", "new_preference_ttft"}
    memory = written["memory"]
    assert 50e6 < memory["unguided"]["process"] < 50e9
    peak = {kind: memory[kind][memory["statistic"]] for kind in ("guided", "unguided")}
    assert written["ratios"]["guided_memory"] == pytest.approx(peak["guided"] / peak["unguided"])


def test_all_arms_decode_what_the_plainest_loop_decodes(engine: Engine, models: rivals.MergedModels) -> None:
    prompts = Prompts.random(160).take(8, 6)
    expected: dict[Plan, list[list[int]]] = {}
    arms = make_arms(engine, models, NEW, (1, 8), decoding.ARMS)
    assert [arm.name for arm in arms] == [*decoding.ARMS[:4], *decoding.ARMS]
    for arm in arms:
        asked = prompts[: len(arm.plans)]
        for plan in arm.plans:
            if plan not in expected:
                expected[plan] = [token_by_token(models, plan, prompt, NEW) for prompt in prompts]
        made = arm.run(asked)
        assert made == [expected[plan][i] for i, plan in enumerate(arm.plans)], arm.key
        assert NaiveReference(models).check(arm.key, arm.plans, asked, made, NEW).others == 0
    # Else all this would hold for experts that do nothing.
    reference = Plan.of([((0.0, 0.0, 0.0), 1.0)])
    plain = [token_by_token(models, reference, prompt, NEW) for prompt in prompts]
    base, steered = unguided(PREFERENCES[0]), guided(PREFERENCES[0])
    assert plain != expected[base] != expected[steered]
    assert len({str(expected[guided(p)]) for p in PREFERENCES}) > 1


def test_the_guided_plan_has_three_distinct_rows_and_uses_all_experts() -> None:
    for preference in PREFERENCES:
        base, guide, reference = guided(preference).rows
        assert base != guide and reference == Row((0.0, 0.0, 0.0))
        assert unguided(preference).rows == (base,)
        assert all(base.coefficients) or any(c < 0 for c in base.coefficients)
        assert guided(preference).weights == (1.0, 1.0, -1.0) and guided(preference).candidates == 50


def test_a_single_wrong_token_or_a_wrong_plan_is_refused(engine: Engine, models: rivals.MergedModels) -> None:
    prompts = Prompts.random(160).take(4, 6)
    plan = guided(PREFERENCES[0])
    naive = NaiveReference(models)
    made = ours("guided", engine, [plan] * 4, NEW).run(prompts)
    assert naive.check("guided", [plan] * 4, prompts, made, NEW).tokens == 4 * NEW
    for request, token in ((0, 0), (2, 5), (3, NEW - 1)):
        wrong = [list(tokens) for tokens in made]
        wrong[request][token] = (wrong[request][token] + 1) % 160
        with pytest.raises(BenchError, match=f"arm: token {token} of request {request} is"):
            naive.check("arm", [plan] * 4, prompts, wrong, NEW)
        told = NaiveReference(models, exact=False).check("arm", [plan] * 4, prompts, wrong, NEW)
        assert told.others >= 1 and told.shortfall > 1e-3
    weaker = Plan.of([(row.coefficients, w / 2) for row, w in zip(plan.rows, plan.weights, strict=True)], 2)
    with pytest.raises(BenchError):
        naive.check("arm", [plan] * 4, prompts, ours("arm", engine, [weaker] * 4, NEW).run(prompts), NEW)
    with pytest.raises(BenchError, match="made"):
        naive.check("arm", [plan] * 4, prompts, [tokens[:-1] for tokens in made], NEW)


def test_a_token_that_ties_with_the_best_one_is_counted_and_let_through(models: rivals.MergedModels) -> None:
    plan = Plan.of([((0.0, 0.0, 0.0), 1.0)])
    twin = rivals.MergedModels(rivals.copy.deepcopy(models.reference), [])
    [prompt] = Prompts.random(160).take(1, 6)
    [best] = token_by_token(twin, plan, prompt, 1)
    other = (best + 1) % 160
    with torch.no_grad():
        head = twin.reference.get_output_embeddings().weight
        head[other] = head[best] * (1 + 1e-7)
    agreement = NaiveReference(twin).check("arm", [plan], [prompt], [[other]], 1)
    both = agreement + NaiveReference(twin).check("arm", [plan], [prompt], [[best]], 1)
    assert both.tokens == 2 and both.others <= 1 and both.shortfall <= 1e-3
    with pytest.raises(BenchError):
        NaiveReference(twin).check("arm", [plan], [prompt], [[(best + 2) % 160]], 1)


def test_a_run_with_a_wrong_rival_aborts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "STRENGTH", -40.0)
    out = tmp_path / "r.json"
    assert decoding.main(["--out", str(out), "--rounds", "1", "--only", "generate", "rival", *SMALL]) == 1
    assert "error: rival_b" in capsys.readouterr().err
    assert not out.exists()


def test_some_arms_alone_give_their_ratios_alone(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert decoding.main(["--out", str(out), "--rounds", "1", "--only", "generate", "unguided", *SMALL]) == 0
    written = json.loads(out.read_text())
    assert set(written["ratios"]) == {"unguided_vs_generate_b1", "unguided_vs_generate_b8"} == set(written["bars"])
    assert "memory" not in written and "first_token" not in written


@pytest.mark.parametrize("wrong", [["--only", "nobody"], ["--rounds", "0"], ["--growth", "--device", "cpu"]])
def test_wrong_options_end_at_once(wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        decoding.parse(["--out", str(tmp_path / "r.json"), *wrong])
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_ratios_are_of_tokens_per_second_and_bars_look_the_right_way() -> None:
    def timing(name: str, batch: int, seconds: list[float]) -> Timing:
        arm = Arm(name, (unguided(PREFERENCES[0]),) * batch, lambda prompts: [])
        return Timing(arm, batch * 64, seconds)

    timings = [timing("guided", 8, [2.0, 4.0, 3.0]), timing("rival", 8, [9.0, 8.0, 30.0])]
    assert results.throughput_ratios(timings, statistics.median) == {"guided_vs_rival_b8": 3.0}
    assert results.throughput_ratios(timings, min) == {"guided_vs_rival_b8": 4.0}
    bars = results.bars({"guided_vs_rival_b8": 2.8, "guided_vs_rival_b1": 2.9, "guided_memory": 1.3})
    assert {name: bar["pass"] for name, bar in bars.items()} == {
        "guided_vs_rival_b8": True,
        "guided_vs_rival_b1": False,
        "guided_memory": False,
    }
    assert results.bars({"new_preference_ttft": 1.05})["new_preference_ttft"]["pass"]


def test_merged_models_are_the_sum_of_deltas_and_leave_the_reference_alone(
    reference: PreTrainedModel, experts: list[Adapter]
) -> None:
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    models = rivals.MergedModels(reference, experts)
    coefficients = (0.7, -0.4, 0.7)
    merged = models.of(Row(coefficients))
    changed = 0
    for name, weight in merged.named_parameters():
        assert torch.equal(reference.get_parameter(name), before[name])
        module = name.removesuffix(".weight")
        expected = before[name].numpy().astype(np.float64)
        for expert, coefficient in zip(experts, coefficients, strict=True):
            if module in expert.factors:
                f = expert.factors[module]
                expected = expected + coefficient * f.scale * (f.up.numpy() @ f.down.numpy())
                changed += 1
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    assert changed == 3 * 7 * 2  # experts, linears a layer, layers: all but the head
    assert merged.get_input_embeddings().weight is reference.get_input_embeddings().weight
    assert models.of(Row((0.0, 0.0, 0.0))) is reference and models.of(Row(coefficients)) is merged


def test_prompts_are_never_repeated() -> None:
    prompts = Prompts.random(160)
    taken = [p for _ in range(50) for p in prompts.take(8, 12)]
    assert len(set(taken)) == 400 and {len(p) for p in taken} == {12}
    assert Prompts([1, 2, 3]).take(1, 7)[0][3:6] == Prompts([1, 2, 3]).take(1, 7)[0][:3]


FAKE_SERVER = '''#!{python}
"""Answers as llama-server's documentation says; it does so only once {together} questions wait."""
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

options = sys.argv[1:]
if options.count("--lora") != 3 or "--lora-init-without-apply" not in options:
    sys.exit("wrong adapters")
waiting = threading.Barrier({together})

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply({{"status": "ok"}})

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        waiting.wait(20)
        scales = sorted((one["id"], one["scale"]) for one in question["lora"])
        right = question["cache_prompt"] is False and question["ignore_eos"] is True and question["temperature"] == 0
        first = round(1000 * sum(scale for _, scale in scales)) if right and question["return_tokens"] else -1
        self.reply({{"tokens": [first, question["prompt"][0]] * (question["n_predict"] // 2)}})

    def reply(self, what):
        body = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *what):
        pass

ThreadingHTTPServer(("127.0.0.1", int(options[options.index("--port") + 1])), Answer).serve_forever()
'''


def put_on_path(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "llama-server"
    program.write_text(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_llama_server_is_started_asked_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = [tmp_path / f"{i}.gguf" for i in range(3)]
    put_on_path(FAKE_SERVER.format(python=sys.executable, together=8), tmp_path, monkeypatch)
    assert llama.why_not(tmp_path / "m.gguf", loras, 3) is None
    with llama.server(tmp_path / "m.gguf", loras, threads=1, slots=8, length=64) as address:
        _, batch, mixed = llama.make_llama_arms(address, new_tokens=4)
        prompts: list[Prompt] = [(i, 9) for i in range(8)]
        # A Bone Soup's coefficients add up to 1.
        assert batch.run(prompts) == mixed.run(prompts) == [[1000, i] * 2 for i in range(8)]
        assert len(set(batch.plans)) == 1 and len(set(mixed.plans)) == 8
    with pytest.raises(BenchError, match="llama-server"):
        llama.complete(address, mixed.plans[0], (1, 2), 4)


def test_llama_server_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "PATH" in str(llama.why_not(tmp_path / "m.gguf", [tmp_path] * 3, 3))
    put_on_path("#!/bin/sh\necho loading\necho cannot load m.gguf\nexit 3\n", tmp_path, monkeypatch)
    assert "--llama-lora" in str(llama.why_not(tmp_path / "m.gguf", [], 3))
    with (
        pytest.raises(BenchError, match="ended with 3; its last line: cannot load m"),
        llama.server(tmp_path / "m.gguf", [], threads=1, slots=8, length=64),
    ):
        pass


def test_experts_are_saved_as_adapters_that_peft_loads(tmp_path: Path, reference: PreTrainedModel) -> None:
    from peft import PeftModel

    arguments = ["--out", str(tmp_path / "r.json"), "--model", "tiny", "--save-experts", str(tmp_path / "e")]
    assert decoding.main(arguments) == 0
    [expert, *_] = random_experts(reference, 3)
    loaded = PeftModel.from_pretrained(load("tiny"), tmp_path / "e" / "expert-0").merge_and_unload()
    name = "model.layers.1.mlp.down_proj"
    expected = reference.get_parameter(f"{name}.weight").double() + expert.factors[name].delta()
    torch.testing.assert_close(loaded.get_parameter(f"{name}.weight").double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_growth_gives_three_curves_and_a_picture(tmp_path: Path) -> None:
    done = run("--out", tmp_path / "g.json", "--growth", "--rounds", "1", *SMALL)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "g.json").read_text())
    curves: dict[str, list[dict[str, Any]]] = written["growth"]
    assert {(p["kind"], p["batch"]) for p in curves["batch"]} == {
        (kind, batch) for kind in ("unguided", "guided") for batch in (1, 2, 4, 8, 16, 32)
    }
    assert [p["experts"] for p in curves["experts"]] == [1, 2, 4, 8, 16]
    # The tiny model holds 256 positions.
    assert {(p["batch"], p["tokens"]) for p in curves["context"]} == {(1, 128), (1, 256), (4, 128), (4, 256)}
    assert "256" in written["notes"][0] and "4096" in written["notes"][0]
    assert all(p["tokens_per_s_median"] > 0 for points in curves.values() for p in points)
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_table_for_a_gpu_needs_torch_transformers_numpy_and_safetensors_alone(tmp_path: Path) -> None:
    out = tmp_path / "d.json"
    code = f"""
import sys
for name in ("ray", "peft", "trl", "deepspeed", "pydantic", "rich", "matplotlib", "pandas", "datasets", "accelerate"):
    sys.modules[name] = None  # as if it were not installed
sys.path.insert(0, {str(BENCH)!r})
import decoding
status = decoding.main({["--out", str(out), "--device", "cpu", "--rounds", "2", *SMALL]!r})
print("STATUS", status)
print("LOADED", *(m for m in sys.modules if m.startswith("mage_ray.")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "STATUS 0" in done.stdout, done.stderr
    loaded = done.stdout.split("LOADED", 1)[1].split()
    assert {name.split(".")[1] for name in loaded} == {"merging", "decoding", "preference", "errors", "files", "native"}
    written = json.loads(out.read_text())
    names = ("unguided_vs_generate", "guided_vs_unguided", "guided_vs_rival")
    assert set(written["ratios"]) == {f"{name}_b{batch}" for name in names for batch in (1, 32)}
    step = written["step"]
    assert step["floor_seconds"] == pytest.approx(step["weight_bytes"] / step["read_bytes_per_s"])
    assert step["floor_over_step"] == pytest.approx(step["floor_seconds"] / step["seconds_median"])
    # 2 layers of q, k, v, o, gate, up, down and 4 norms, the last norm, the head; bfloat16. Qwen3 has norms in q and k.
    layer = 48 * (64 + 32 + 32) + 64 * 48 + 3 * 48 * 96 + 2 * 48 + 2 * 16
    assert step["weight_bytes"] == 2 * (2 * layer + 48 + 160 * 48)
    assert written["setting"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_tradeoffs_are_measured_and_add_up(tmp_path: Path) -> None:
    file = tmp_path / "tradeoffs.json"
    assert tradeoffs.main(["--out", str(file), "--model", "tiny", "--rounds", "2", "--threads", "1"]) == 0
    made = json.loads(file.read_text())
    by_arm = {point["arm"]: point for point in made["cadences"]}
    assert by_arm["unguided"]["control"] == 0 and by_arm["every token"]["control"] == 1
    assert by_arm["unguided"]["guide_score"] < by_arm["every token"]["low"]
    assert by_arm["every 8"]["guided_share"] == pytest.approx(1 / 8)
    assert by_arm["speculate 4"]["guided_share"] == 1
    assert all(point["tokens_per_s_b1"] > 0 and point["low"] <= point["guide_score"] for point in by_arm.values())
    [point] = made["changes"]  # the tiny model holds 256 positions
    assert point["context"] == 64
    assert all(point[f"kl_{n}"] > 0 and point[f"kl_{n}_low"] <= point[f"kl_{n}_high"] for n in (0, 1, 32, "unchanged"))
    assert point["keep_s"] > 0 and point["recompute_s"] > 0
