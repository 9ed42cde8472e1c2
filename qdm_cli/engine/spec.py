"""Base class and parsed types of everything that a recipe can hold. Imports neither torch nor diffusers."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

_BYTES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class Spec(BaseModel):
    """A frozen part of a recipe: unknown keys are errors, every field carries its one description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def parse_bytes(value: Any) -> int:
    """`64GiB`, `450MB` or a whole number of bytes -> bytes.

    Raises:
        ValueError: not a size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    if match is None or match[2].upper() not in _BYTES:
        raise ValueError(f"must be a size such as 64GiB or 450MB (got {value!r})")
    return int(float(match[1]) * _BYTES[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str)]
