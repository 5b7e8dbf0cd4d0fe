"""Steps of fixed shape: a handful of batch sizes and reaches, each captured once as a CUDA graph.

Legend: R rows, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mage_ray.decoding.outputs import Raw

_REACH = 512
"""Reaches double from here: a graph attends to that many positions, whatever its rows have come to."""


class StepGraphs:
    """Runs one-token steps of the rows in the first slots at the next larger captured shape.

    ``run(slots, place_B, input_B1, position_B1, written_B1, visible, keep)`` is the forward to capture. Without CUDA
    the same fixed-shape step runs uncaptured.
    """

    def __init__(self, run: Callable[..., Raw], rows: int, length: int, device: torch.device) -> None:
        self._run, self._rows, self._length, self._device = run, rows, length, device
        self._place_R = torch.arange(rows, device=device)
        self._token_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._position_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._written_R1 = torch.full((rows, 1), length, dtype=torch.long, device=device)
        self._captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Raw]] = {}

    def run(self, tokens: Sequence[int], starts: Sequence[int]) -> Raw:
        """What the model gives after feeding ``tokens[b]`` to the row in slot b, which holds ``starts[b]`` tokens.

        It is valid until the next run.
        """
        count = len(tokens)
        rows = self._bucket(count, 1, self._rows)
        reach = self._bucket(max(starts) + 1, _REACH, self._length)
        idle = rows - count
        # An idle row looks at position 0 and writes where nobody looks.
        inputs = torch.tensor([[*tokens, *[0] * idle], [*starts, *[0] * idle], [*starts, *[self._length] * idle]])
        inputs = inputs.to(self._device, non_blocking=True)
        self._token_R1[:rows, 0], self._position_R1[:rows, 0], self._written_R1[:rows, 0] = inputs
        if self._device.type != "cuda":
            return self._step(rows, reach).first(count)
        if (rows, reach) not in self._captured:
            self._captured[rows, reach] = self._capture(rows, reach)
        graph, raw = self._captured[rows, reach]
        graph.replay()
        return raw.first(count)

    @staticmethod
    def _bucket(needed: int, smallest: int, largest: int) -> int:
        size = smallest
        while size < needed:
            size *= 2
        return min(size, largest)

    def _step(self, rows: int, reach: int) -> Raw:
        return self._run(
            slice(0, rows),
            self._place_R[:rows],
            self._token_R1[:rows],
            self._position_R1[:rows],
            self._written_R1[:rows],
            reach,
            1,
        )

    def _capture(self, rows: int, reach: int) -> tuple[torch.cuda.CUDAGraph, Raw]:
        # A step writes the same keys and values however often it runs, so the warm-up does no harm.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._step(rows, reach)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            raw = self._step(rows, reach)
        return graph, raw
