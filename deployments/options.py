"""What a deployment is told: ``serve run deployments.app:build study=runs/demo topology=split``, or so in YAML."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from mage_ray.errors import FieldError, UserError
from mage_ray.fields import Part, one_line
from mage_ray.folder import StudyFolder
from mage_ray.storage.downloads import local_path
from mage_ray.storage.store import is_url

Positive = Annotated[int, Field(ge=1)]


class Options(Part):
    """The arguments of ``build``. Numbers may be given as text, as a command line does."""

    study: str
    """A trained study's folder: a path that every node can read, or a storage's URL."""
    guide_study: str | None = None
    """A study of the same objectives whose model guides, where that is another one of the same tokenizer."""
    recipe: str | None = None
    """A recipe's file, as ``mage-ray search`` writes it: its method, constants and sampling in place of the study's."""
    topology: Literal["auto", "fused", "split"] = "auto"
    """``fused``: all rows in one worker. ``split``: guides in workers of their own. ``auto``: split where guides are
    another model's or have a GPU of their own (``guide_gpus``), else fused."""
    guides: Positive = 1
    """Workers that share the guides' rows, in a split gang: one for each value model of an ensemble, say."""
    cpus: Annotated[int, Field(ge=0)] = 0
    """Of the base's worker, which has as many threads; 0: what the largest node has, less the guides'."""
    guide_cpus: Positive = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    guide_gpus: Annotated[float, Field(ge=0)] = 0
    """Of each guide's worker. Two ranks can't share a GPU under nccl: there gloo carries the step."""
    rows: Positive = 48
    """That run at once in each worker: 16 requests of three rows."""
    length: Positive = 1024
    """Tokens of a prompt and its answer."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Of keys and values in each worker; fewer rows run where they would take more."""
    chunk: Positive | None = None
    """Tokens of prompts that are computed between two steps of those who decode: more of them serves more at once,
    with longer gaps between their tokens. Default: 128 on a CPU, 1024 on a GPU."""
    queue: Annotated[int, Field(ge=0)] = 64
    """Requests of a replica that may wait for slots; more are answered 429."""
    queue_seconds: Annotated[float, Field(gt=0)] = 60
    """How long one may wait for its first token before it is answered 503."""
    max_tokens: Positive = 512
    """Of an answer, at most."""
    default_max_tokens: Positive = 128
    choices: Positive = 8
    """``n`` at most."""
    streams_per_key: Positive | None = None
    """Answers at once for each API key, or for all who have none; more are answered 429."""
    body_bytes: Positive = 1 << 20
    """Of a request, at most."""
    patience: Annotated[float, Field(gt=0)] = 20
    """Seconds after which a worker that doesn't answer is taken for dead, and replaced."""
    guides_apart: bool = False
    """Guides on other nodes than the base, each on one of its own; else on the same one where they fit."""
    accelerator: str | None = None
    """The type of GPU of the base's node, by Ray's name for it (H100, say); ``guide_accelerator`` of the guides'."""
    guide_accelerator: str | None = None
    replicas: Positive = 1
    max_replicas: Positive | None = None
    """With it the number of replicas follows the load, from ``replicas`` up to this."""
    drain_seconds: Annotated[float, Field(gt=0)] = 120
    """How long a replica that is replaced may go on with the answers it has begun."""

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.topology == "fused" and self.guide_study is not None:
            raise FieldError("topology", "fused", "split or auto, since guide_study names another model")
        if self.split and self.gpus == 0 < self.guide_gpus:
            raise FieldError("gpus", 0, "more than 0 where the guides have GPUs")
        if self.guides_apart and not self.split:
            raise FieldError("guides_apart", True, "a split topology, in which guides have workers of their own")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise FieldError("max_replicas", self.max_replicas, f"replicas ({self.replicas}) or more")
        if self.default_max_tokens > self.max_tokens:
            raise FieldError("default_max_tokens", self.default_max_tokens, f"max_tokens ({self.max_tokens}) or fewer")
        return self

    @property
    def split(self) -> bool:
        """Whether guides have workers of their own."""
        wanted = self.guide_study is not None or self.guide_gpus > 0 or self.guides > 1
        return self.topology == "split" or (self.topology == "auto" and wanted)

    @property
    def workers(self) -> int:
        """Of a gang."""
        return 1 + self.guides if self.split else 1

    @property
    def memory(self) -> int | None:
        """Of a worker's keys and values, in bytes."""
        return None if self.memory_gib is None else int(self.memory_gib * 2**30)

    @property
    def selectors(self) -> list[dict[str, str]]:
        """What the nodes of its bundles must have, bundle by bundle."""
        types = [self.accelerator, *[self.guide_accelerator] * (self.workers - 1)]
        return [{} if name is None else {"ray.io/accelerator-type": name} for name in types]

    def bundles(self, node_cpus: int) -> list[dict[str, float]]:
        """What a replica's gang takes, worker by worker; the replica itself rides in the first."""
        guides = self.workers - 1
        cpus = self.cpus or max(1, node_cpus - guides * self.guide_cpus)
        first = {"CPU": float(cpus), "GPU": self.gpus}
        other = {"CPU": float(self.guide_cpus), "GPU": self.guide_gpus}
        return [{k: v for k, v in bundle.items() if v} for bundle in (first, *[other] * guides)]


def parse_options(arguments: Mapping[str, Any]) -> Options:
    """Options from a command line or a config file. Raises UserError, one line that names the field."""
    try:
        options = Options.model_validate(dict(arguments))
    except ValidationError as error:
        raise one_line(error, Options) from None
    for field in ("study", "guide_study"):
        folder = getattr(options, field)
        if folder is not None and not StudyFolder.open(folder).study_file.is_file():
            raise UserError(f"{field}: got {folder}, allowed: the folder of a trained study, with its study.yaml")
    if options.recipe is not None and not local_path(options.recipe).is_file():
        raise FieldError("recipe", options.recipe, "a recipe's file, as mage-ray search writes it")
    # Replicas have other working folders.
    paths = {field: getattr(options, field) for field in ("study", "guide_study", "recipe")}
    absolute = {f: p if is_url(p) else os.path.abspath(p) for f, p in paths.items() if p is not None}
    return options.model_copy(update=absolute)
