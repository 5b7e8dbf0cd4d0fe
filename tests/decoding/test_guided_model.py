"""GuidedModel against ``model.generate`` of models merged apart, and against the loop that people write today."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from engines import BASE, GUIDE, ZERO, Tiny, guided, ids
from tiny import make_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopPLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from mage_ray.decoding.guided_model import GuidedModel
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.seeds import derived_seed
from mage_ray.errors import FieldError

PROMPTS = ["hello there, world", "abc", "z", "a somewhat longer prompt than the others"]
TOKENIZER = make_tiny_tokenizer()
END, PAD = 258, 259
SOUP = Plan.of([(BASE, 1.0)])


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("guided_model"))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> GuidedModel:
    plain = AutoModelForCausalLM.from_pretrained(tiny.folder)
    return GuidedModel(plain, tiny.adapters, rows=12, length=128)


def batch(prompts: Sequence[str] = PROMPTS) -> BatchEncoding:
    return TOKENIZER(list(prompts), padding=True, return_tensors="pt")


def merged(tiny: Tiny, coefficients: Sequence[float]) -> PreTrainedModel:
    """The model with experts merged into its weights apart, rounded to float32."""
    return copy.deepcopy(tiny.merged(Row(tuple(coefficients)))).float()


class Guide(LogitsProcessor):
    """Guided decoding as it is written today: two more models run over everything at each step."""

    def __init__(self, guide: PreTrainedModel, reference: PreTrainedModel, mask: torch.Tensor, plan: Plan) -> None:
        self.guide, self.reference, self.mask, self.plan = guide, reference, mask, plan

    @torch.inference_mode()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        new = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(input_ids), new)], dim=1)
        position = (mask.cumsum(-1) - 1).clamp_min(0)
        said = [
            m(input_ids, attention_mask=mask, position_ids=position).logits[:, -1].log_softmax(-1)
            for m in (self.guide, self.reference)
        ]
        _, up, down = self.plan.weights
        total = scores.log_softmax(-1) + up * said[0] + down * said[1]
        assert self.plan.candidates is not None
        allowed = scores.topk(self.plan.candidates, dim=-1).indices
        return torch.full_like(total, -torch.inf).scatter(-1, allowed, total.gather(-1, allowed))  # type: ignore[return-value]


@pytest.mark.parametrize("coefficients", [ZERO, BASE, (1.75, -0.75, 0.0, 0.0)])
def test_greedy_is_generate_of_the_merged_model(tiny: Tiny, model: GuidedModel, coefficients: tuple) -> None:
    inputs = batch()
    assert inputs.attention_mask.min() == 0
    expected = merged(tiny, coefficients).generate(**inputs, max_new_tokens=30, do_sample=False)
    got = model.generate(**inputs, plan=Plan.of([(coefficients, 1.0)]), max_new_tokens=30)
    assert got.dtype == expected.dtype
    assert got.tolist() == expected.tolist()


def test_rows_that_end_early_are_padded_as_generate_does(tiny: Tiny, model: GuidedModel) -> None:
    inputs = batch()
    ends = list(range(0, 260, 9))
    plain = merged(tiny, BASE)
    for pad in (None, 7):
        options = {"max_new_tokens": 25, "eos_token_id": ends} | ({} if pad is None else {"pad_token_id": pad})
        expected = plain.generate(**inputs, do_sample=False, **options)
        got = model.generate(**inputs, plan=SOUP, **options)
        assert got.tolist() == expected.tolist()
        lengths = {(row != (PAD if pad is None else pad)).sum().item() for row in got[:, inputs.input_ids.shape[1] :]}
        assert len(lengths) > 1
    first = model.generate(**inputs, plan=SOUP, max_new_tokens=25, eos_token_id=ends[1])
    assert first.tolist() == plain.generate(**inputs, do_sample=False, max_new_tokens=25, eos_token_id=ends[1]).tolist()


def test_a_guided_plan_is_the_loop_with_two_more_models(tiny: Tiny, model: GuidedModel) -> None:
    inputs, plan = batch(), guided(1.3, 12)
    rivals = Guide(merged(tiny, GUIDE), merged(tiny, ZERO), inputs.attention_mask, plan)
    expected = merged(tiny, BASE).generate(
        **inputs, max_new_tokens=25, do_sample=False, logits_processor=LogitsProcessorList([rivals])
    )
    got = model.generate(**inputs, plan=plan, max_new_tokens=25)
    assert got.tolist() == expected.tolist()
    assert got.tolist() != model.generate(**inputs, plan=SOUP, max_new_tokens=25).tolist()


def test_each_prompt_may_have_its_own_plan(model: GuidedModel) -> None:
    plans = [SOUP, guided(1.3), guided(0.5), Plan.of([(ZERO, 1.0)])]
    start = batch().input_ids.shape[1]
    together = model.generate(**batch(), plan=plans, max_new_tokens=15)
    for i, plan in enumerate(plans):
        alone = model.generate(**batch(PROMPTS[i : i + 1]), plan=plan, max_new_tokens=15)
        answer = alone[0, len(ids(PROMPTS[i])) :].tolist()
        assert together[i, start : start + len(answer)].tolist() == answer


def test_without_a_mask_padding_is_told_by_its_token_as_in_generate(tiny: Tiny, model: GuidedModel) -> None:
    inputs = batch()
    for end in (END, PAD):  # a pad token that ends answers, too, says nothing
        expected = merged(tiny, BASE).generate(inputs.input_ids, max_new_tokens=12, do_sample=False, eos_token_id=end)
        got = model.generate(inputs.input_ids, plan=SOUP, max_new_tokens=12, eos_token_id=end)
        assert got.tolist() == expected.tolist()


def test_samples_are_the_engines_with_the_documented_seeds(tiny: Tiny, model: GuidedModel) -> None:
    how = {"max_new_tokens": 15, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    got = model.generate(**batch(), plan=guided(), **how)
    start = batch().input_ids.shape[1]
    for i, prompt in enumerate(PROMPTS):
        sampling = Sampling(15, 0.8, 0.9, seed=derived_seed(5, 0, i))
        [expected] = tiny.engine().generate([Request(ids(prompt), guided(), sampling)])
        assert got[i, start : start + len(expected.ids)].tolist() == list(expected.ids)


def test_sampling_is_reproducible_and_prompts_independent(model: GuidedModel) -> None:
    how = {"plan": guided(), "max_new_tokens": 15, "do_sample": True}
    same = batch(["abc"] * 3)
    first = model.generate(**same, seed=3, **how)
    assert model.generate(**same, seed=3, **how).tolist() == first.tolist()
    assert model.generate(**same, seed=4, **how).tolist() != first.tolist()
    assert len({tuple(row) for row in first.tolist()}) == 3
    others = model.generate(**batch(["zzz", "abc", "yyy"]), seed=3, **how)
    assert others[1].tolist()[: first.shape[1]] == first[1].tolist()[: others.shape[1]]
    dice = [torch.Generator().manual_seed(1) for _ in range(2)]
    drawn = [model.generate(**same, seed=one, **how).tolist() for one in (dice[0], dice[1], dice[0])]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampled_tokens_have_the_distribution_of_transformers_warpers(tiny: Tiny, model: GuidedModel) -> None:
    count, inputs = 1500, batch(["abc"])
    got = model.generate(
        inputs.input_ids.expand(count, -1), plan=SOUP, max_new_tokens=1, do_sample=True, temperature=0.6, top_p=0.8
    )
    share = got[:, -1].bincount(minlength=260) / count
    with torch.inference_mode():
        logits = merged(tiny, BASE)(**inputs).logits[:, -1]
    warped = TopPLogitsWarper(0.8)(inputs.input_ids, TemperatureLogitsWarper(0.6)(inputs.input_ids, logits))
    expected = warped.softmax(-1)[0]
    assert 3 < (expected > 0).sum() < 100
    assert (share[expected == 0] == 0).all()
    # Five standard errors of a share, for each of the tokens that remain.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt()).all()


def test_the_output_object_holds_the_sequences(model: GuidedModel) -> None:
    out = model.generate(**batch(), plan=SOUP, max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(out, GenerateDecoderOnlyOutput)
    assert out.sequences.tolist() == model.generate(**batch(), plan=SOUP, max_new_tokens=5).tolist()
    assert out.scores is None


@pytest.mark.parametrize("skip_prompt", [True, False])
def test_a_streamer_gets_what_generate_gives_it(
    tiny: Tiny, model: GuidedModel, skip_prompt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = batch(PROMPTS[:1])
    shown = []
    for run in (merged(tiny, BASE).generate, lambda **how: model.generate(plan=SOUP, **how)):
        out = run(**inputs, max_new_tokens=20, streamer=TextStreamer(TOKENIZER, skip_prompt=skip_prompt))
        shown.append(capsys.readouterr().out)
        assert shown[-1].startswith(PROMPTS[0]) != skip_prompt
    assert shown[0] == shown[1]
    assert TOKENIZER.decode(out[0, inputs.input_ids.shape[1] :]) in shown[1]


def test_an_iterator_of_text_ends_when_the_call_fails(model: GuidedModel) -> None:
    class Failing(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 1:
                raise RuntimeError("full")
            super().put(value)

    streamer = Failing(TOKENIZER, timeout=20)
    with pytest.raises(RuntimeError, match="full"):
        model.generate(**batch(["abc"]), plan=SOUP, streamer=streamer)
    assert "".join(streamer) == "abc"
    # Nothing of it is left behind: twelve rows are there for the next call.
    twelve = Plan.of([((float(i), 0.0, 0.0, 0.0), 1.0) for i in range(12)])
    assert model.generate(**batch(["abc"]), plan=twelve, max_new_tokens=2).shape == (1, 5)


def test_calls_from_several_threads_wait_for_each_other(model: GuidedModel) -> None:
    how = {"plan": guided(), "max_new_tokens": 20, "do_sample": True}
    expected = [model.generate(**batch(), seed=s, **how).tolist() for s in range(4)]
    got: dict[int, list] = {}

    def call(seed: int) -> None:
        got[seed] = model.generate(**batch(), seed=seed, **how).tolist()

    threads = [threading.Thread(target=call, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[s] for s in range(4)] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 4}, r"num_beams: got 4, allowed: no such argument; there are input_ids, attention_mask, plan"),
        ({"top_k": 50}, "top_k"),
        ({"plan": [SOUP] * 3}, "plan: got 3 plans, allowed: one, or one for each of 4"),
        ({"plan": Plan.of([((1.0,), 1.0)])}, r"prompts\.0\.coefficients"),
        ({"max_new_tokens": 100}, r"prompts\.3\.prompt: got 40 tokens and 100 new ones, allowed: at most 128"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, "top_p"),
        ({"do_sample": True, "seed": -1}, "seed"),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids"),
        ({"input_ids": torch.full((4, 40), 400)}, r"prompts\.0\.prompt: got unknown tokens"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask"),
        ({"attention_mask": torch.zeros(4, 40)}, r"prompts\.0\.prompt: got no tokens"),
        ({"attention_mask": torch.ones(4, 40).index_fill(1, torch.tensor([39]), 0)}, "left padding"),
        ({"streamer": TextStreamer(TOKENIZER)}, "streamer: got 4 prompts"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(model: GuidedModel, change: dict, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        model.generate(**({**batch(), "plan": SOUP} | change))


def test_a_plan_that_breaks_down_is_an_error(model: GuidedModel) -> None:
    broken = Plan.of([((1e30, 0.0, 0.0, 0.0), 1.0)])
    with pytest.raises(FieldError, match=r"prompts\.1\.plan: got logits that are not finite"):
        model.generate(**batch(["abc", "abd"]), plan=[SOUP, broken])
    assert model.generate(**batch(["abc"]), plan=SOUP, max_new_tokens=3).shape == (1, 6)
