"""For people at home in transformers: a model and its experts behind the ``generate`` that they know.

Legend: B prompts, T their padded length, N new tokens.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.generation import BaseStreamer, GenerateDecoderOnlyOutput

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.decoding.runner import RowRunner
from mage_ray.decoding.seeds import derived_seed
from mage_ray.errors import FieldError
from mage_ray.merging.adapter import Adapter
from mage_ray.merging.bank import AdapterBank


class GuidedModel:
    """A model with experts built in, whose ``generate`` takes a plan and else does as ``model.generate``.

    ``rows`` rows of the plans run at once, each of up to ``length`` tokens (or as many as the model can hold), prompt
    and answer; more wait their turn.
    The model is this object's from here on (AdapterBank.install); a plan with coefficients of 0 is what it was. Raises
    FieldError as RowRunner does. One call runs at a time; others, from other threads, wait.
    """

    def __init__(
        self, model: PreTrainedModel, experts: Sequence[Adapter] = (), *, rows: int = 32, length: int = 1024
    ) -> None:
        self.model = model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._runner = RowRunner(model, AdapterBank(experts), rows, min(length, limit or length))
        self._lock = threading.Lock()

    def generate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        plan: Plan | Sequence[Plan],
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | torch.Generator = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        streamer: BaseStreamer | None = None,
        return_dict_in_generate: bool = False,
        **unknown: object,
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """The prompts [B, T], left-padded, and what follows them, right-padded, [B, T + N] on their device.

        ``plan`` is one for all prompts or one for each. Without ``do_sample`` decoding is greedy, whatever
        ``temperature`` and ``top_p`` say; a plan's ``candidates`` are what ``top_k`` is elsewhere. Prompt i is sampled
        with ``derived_seed(seed, 0, i)``, or with the i-th number of a generator, so that its answer depends on nothing
        else in the batch. Of the model's generation_config only its tokens count: ``eos_token_id`` and
        ``pad_token_id`` are taken from there where they are None; where there is no padding, the first end token pads.
        Without an ``attention_mask`` pad tokens are masked, unless they are end tokens, too. ``streamer`` is handed a
        single prompt, then its tokens one by one, on the CPU. ``return_dict_in_generate`` gives an output object with
        ``sequences`` alone.

        Raises FieldError: an argument that isn't one of these or whose value isn't allowed, a prompt that can't run,
        or a row whose plan left no token any probability.
        """
        if unknown:
            name, value = next(iter(unknown.items()))
            raise FieldError(name, value, f"no such argument; there are {', '.join(_ARGUMENTS)}")
        if not (isinstance(input_ids, torch.Tensor) and input_ids.ndim == 2 and input_ids.numel()):
            raise FieldError("input_ids", getattr(input_ids, "shape", input_ids), "a tensor [batch, length]")
        if do_sample and temperature == 0:
            raise FieldError("temperature", temperature, "above 0 where do_sample is set")
        if streamer is not None and len(input_ids) > 1:
            raise FieldError("streamer", f"{len(input_ids)} prompts", "a single prompt")
        config = self.model.generation_config
        stop = _token_ids(config.eos_token_id if eos_token_id is None else eos_token_id)
        pad = config.pad_token_id if pad_token_id is None else pad_token_id
        if attention_mask is None:
            known = pad is not None and pad not in stop
            attention_mask = input_ids.ne(pad) if known else torch.ones_like(input_ids)
        plans = [plan] * len(input_ids) if isinstance(plan, Plan) else list(plan)
        if len(plans) != len(input_ids):
            raise FieldError("plan", f"{len(plans)} plans", f"one, or one for each of {len(input_ids)} prompts")

        prompts = _unpadded(input_ids, attention_mask)
        how = Sampling(max_new_tokens, temperature, top_p) if do_sample else Sampling(max_new_tokens, 0.0)
        seeds = _seeds(seed, len(prompts))
        requests = [
            Request(prompt, own, replace(how, seed=number))
            for prompt, own, number in zip(prompts, plans, seeds, strict=True)
        ]
        with self._lock:
            answers = self._answers(Engine(self._runner, stop), requests, streamer, input_ids)
        longest = max(map(len, answers))
        filler = pad if pad is not None else next(iter(stop), 0)
        padded = [[*answer, *[filler] * (longest - len(answer))] for answer in answers]
        new_BN = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
        sequences = torch.cat([input_ids, new_BN], dim=1)
        if return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences

    def _answers(
        self, engine: Engine, requests: Sequence[Request], streamer: BaseStreamer | None, input_ids: torch.Tensor
    ) -> list[tuple[int, ...]]:
        for i, request in enumerate(requests):
            try:
                engine.check(request)
            except FieldError as error:
                raise _of_prompt(i, error) from None
        tokens: list[list[Token]] = [[] for _ in requests]
        try:
            if streamer is not None:
                streamer.put(input_ids.cpu())
            with closing(engine.events(requests)) as events:  # type: ignore[type-var]
                for i, token in events:
                    tokens[i].append(token)
                    if streamer is not None and token.id >= 0:
                        streamer.put(torch.tensor([token.id]))
        finally:
            # Also when it fails: whoever reads a streamer in another thread waits for its end.
            if streamer is not None:
                streamer.end()
        answers = list(map(Generation.of, tokens))
        for i, answer in enumerate(answers):
            if isinstance(answer.error, FieldError):
                raise _of_prompt(i, answer.error)
            answer.require()
            if answer.finished == "vetoed":
                raise FieldError(
                    f"prompts.{i}.plan", "rows that veto every candidate", "rows that leave some token possible"
                )
        return [answer.ids for answer in answers]


_ARGUMENTS = [name for name in inspect.signature(GuidedModel.generate).parameters if name not in ("self", "unknown")]


def _of_prompt(i: int, error: FieldError) -> FieldError:
    return FieldError(f"prompts.{i}.{error.field}", error.value, error.allowed)


def _token_ids(given: int | Sequence[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, int) else tuple(given)


def _seeds(seed: int | torch.Generator, count: int) -> list[int]:
    if isinstance(seed, torch.Generator):
        numbers = torch.randint(2**63 - 1, (count,), generator=seed, device=seed.device)
        return [int(number) for number in numbers]
    return [derived_seed(seed, 0, i) for i in range(count)]


def _unpadded(input_BT: torch.Tensor, mask_BT: torch.Tensor) -> list[tuple[int, ...]]:
    """Each prompt's own tokens. Raises FieldError for a mask of another shape, or with a 0 behind a 1."""
    if not isinstance(mask_BT, torch.Tensor) or mask_BT.shape != input_BT.shape:
        raise FieldError("attention_mask", getattr(mask_BT, "shape", mask_BT), f"a tensor {list(input_BT.shape)}")
    prompts = []
    for i, (ids, seen) in enumerate(zip(input_BT.tolist(), mask_BT.bool().tolist(), strict=True)):
        if seen != sorted(seen):
            raise FieldError(f"prompts.{i}.attention_mask", "a 0 behind a 1", "left padding: 0s, then 1s")
        prompts.append(tuple(token for token, own in zip(ids, seen, strict=True) if own))
    return prompts
