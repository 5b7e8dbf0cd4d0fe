"""Arms that answer with texts, over HTTP, and what their texts are held against: the engine's own."""

from __future__ import annotations

from collections.abc import Sequence

from arms import Arm
from load import ask
from naive import TOLERANCE, Agreement, NaiveReference
from rivals import MergedModels
from served import METHOD, MIXED, questions
from setting import BenchError, Prompt, load

from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts

_UNFINISHED = "�"
_FURTHER_BACK = 3
"""Tokens before two texts' first difference at which they may have parted: one token's text can begin another's."""


def over_http(name: str, url: str, plans: Sequence[Plan], new_tokens: int) -> Arm:
    """The mixed preferences' requests over HTTP, all at once. Its answers are bytes of text: no tokens are told."""

    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        answers = ask(url, questions(prompts, MIXED, new_tokens))
        if any(answer.tokens != new_tokens for answer in answers):
            counts = [answer.tokens for answer in answers]
            raise BenchError(f"{name}: made {counts} tokens, {new_tokens} each were asked for")
        return [list(answer.text.encode()) for answer in answers]

    return Arm(name, tuple(plans), run)


def in_process(generator: Generator, plans: Sequence[Plan], new_tokens: int) -> Arm:
    """The same requests in one batch of the engine, nothing around it; bytes of text, too."""

    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [list(answer.text.encode()) for answer in _answers(generator, plans, prompts, new_tokens)]

    return Arm("engine", tuple(plans), run)


def mixed_plans(generator: Generator) -> list[Plan]:
    """The plan of each of the mixed preferences."""
    return [generator.plan(preference, METHOD) for preference in MIXED]


def _answers(
    generator: Generator, plans: Sequence[Plan], prompts: Sequence[Prompt], new_tokens: int
) -> list[Generation]:
    sampling = Sampling(new_tokens, temperature=0.0)
    return generator.run([Request(prompt, plan, sampling) for prompt, plan in zip(prompts, plans, strict=True)])


class EngineTexts(NaiveReference):
    """Judges bytes of text by the engine's text for the same request, which the decoding benchmark checks.

    Where they part, float32 may have decided: then the token that leads on to the other text must be as good as the
    best one, by the naive reference, and what follows is not looked at.
    """

    def __init__(self, generator: Generator, models: MergedModels) -> None:
        super().__init__(models)
        self._generator = generator

    @classmethod
    def of(cls, generator: Generator, folder: StudyFolder) -> EngineTexts:
        """With the model and experts of the folder that ``generator`` was opened from."""
        study = folder.study
        experts = [expert for members in load_experts(folder, study).values() for expert in members]
        return cls(generator, MergedModels(load(study.model), experts))

    def check(
        self, arm: str, plans: Sequence[Plan], prompts: Sequence[Prompt], made: Sequence[Sequence[int]], length: int
    ) -> Agreement:
        """Raises BenchError for a text that isn't the engine's. Its answers that part from that count as ``others``."""
        total = Agreement()
        for i, answer in enumerate(_answers(self._generator, plans, prompts, length)):
            text = bytes(made[i]).decode()
            short = 0.0 if text == answer.text else self._parting(plans[i], prompts[i], answer.ids, text)
            if short > TOLERANCE:
                raise BenchError(
                    f"{arm}: the text of request {i} is not the engine's, and where they part it falls short of the "
                    f"best token by {short:.3g} nats (ties within {TOLERANCE} are allowed)"
                )
            total += Agreement(length, int(text != answer.text), short)
        return total

    def _parting(self, plan: Plan, prompt: Prompt, ids: Sequence[int], text: str) -> float:
        """By how much the best token that leads from some of ``ids`` to ``text`` falls short; infinite without one."""
        decode, vocabulary = self._generator.chat.decode, len(self._generator.chat.tokenizer)
        heads = [decode(ids[:t]).rstrip(_UNFINISHED) for t in range(len(ids))]
        same = max(t for t, head in enumerate(heads) if text.startswith(head))
        least = float("inf")
        for t in range(max(0, same - _FURTHER_BACK), same + 1):
            # A token's text depends on few before it; whole prefixes would take minutes.
            context = list(ids[max(0, t - 4) : t])
            begin, rest = len(decode(context)), text[len(heads[t]) :]
            pieces = ((c, decode([*context, c])[begin:].rstrip(_UNFINISHED)) for c in range(vocabulary) if c != ids[t])
            others = [[*ids[:t], c] for c, piece in pieces if piece and rest.startswith(piece)]
            if others:
                least = min(least, float(self.shortfall(plan, [prompt] * len(others), others)[:, -1].min()))
        return least
