"""Fields of what users write, checked by pydantic, whose errors become one line."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mage_ray.errors import FieldError, UserError


class Part(BaseModel):
    """A mapping of known fields alone."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def one_line(error: ValidationError, model: type[BaseModel], source: str = "") -> UserError:
    """The first error in a text for ``model`` from ``source``, and how many more there are."""
    errors = error.errors(include_url=False)
    stems = [_split(one["loc"])[0] for one in errors]
    # Where several kinds of value are allowed each one's error is there: that of the kind that was given says most.
    first = min((one for one, stem in zip(errors, stems, strict=True) if stem == stems[0]), key=_of_another_kind)
    place = f"{source}: " if source else ""
    path = sum(_split(first["loc"]), ())
    field = ".".join(path) or model.__name__.lower()
    rest = f" (and {len(set(stems)) - 1} more)" if len(set(stems)) > 1 else ""
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return FieldError(place + ".".join((*path, cause.field)), cause.value, cause.allowed + rest)
    if first["type"] == "extra_forbidden":
        owner = ", ".join(_fields_at(model, first["loc"][:-1]))
        return FieldError(place + field, first["input"], f"fields here: {owner}{rest}")
    value = "nothing" if first["type"] == "missing" else first["input"]
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return FieldError(place + field, value, reason + rest)


_KIND = re.compile(r"[\w-]+\[.*\]|constrained-\w+|float|int|str|bool|\w+Spec")
"""What pydantic calls the kinds of value that a field may have, in an error's place."""


def _split(location: tuple[int | str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields of an error's place: those up to where kinds of value are told apart, and those after it."""
    parts = [str(part) for part in location]
    kinds = [i for i, part in enumerate(parts) if isinstance(location[i], str) and _KIND.fullmatch(part)]
    if not kinds:
        return tuple(parts), ()
    return tuple(parts[: kinds[0]]), tuple(parts[i] for i in range(kinds[0], len(parts)) if i not in kinds)


def _of_another_kind(error: Any) -> bool:
    """Whether an error says only that a value isn't of this kind."""
    return error["type"].endswith(("_type", "_parsing")) and not _split(error["loc"])[1]


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at a place in another one, to name them in an error."""
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            arguments = [annotation, *getattr(annotation, "__args__", ())]
            found = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
            model = found[0] if found else model
    return list(model.model_fields)
