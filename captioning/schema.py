"""What values from a file must look like, written down and checked: for all readers of untrusted files.

    schema = {"name": str, "sizes": [Number(1, 100)], "split?": Choice("train", "val")}
    find_mismatch({"name": "a", "sizes": [0]}, schema)
    # 'sizes[0] is 0: expected a whole number from 1 to 100'

A schema is a type; `[schema]`, a list of such; `{"key": schema}`, a dictionary with these keys (a key that
ends in "?" may be missing, others may be there too); `{str: schema}`, a dictionary of such under any text; or
an object with `describe()` and `accepts(value)`, as those below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "a dictionary"}


@dataclass(frozen=True)
class Number:
    """A finite number in a range, both ends included."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = True

    def describe(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if math.isfinite(self.high):
            return f"{kind} from {self.low} to {self.high}"
        return f"{kind} of at least {self.low}" if math.isfinite(self.low) else kind

    def accepts(self, value: object) -> bool:
        if not _is(value, int if self.whole else float) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high


class Choice:
    """One of several values."""

    def __init__(self, *values: object):
        self.values = values

    def describe(self) -> str:
        return f"one of {', '.join(map(repr, self.values))}"

    def accepts(self, value: object) -> bool:
        return any(value is known or (type(value) is type(known) and value == known) for known in self.values)


class AnyOf:
    """What one of several schemas accepts; None accepts itself."""

    def __init__(self, *schemas: object):
        self.schemas = schemas

    def describe(self) -> str:
        return " or ".join("null" if schema is None else _describe(schema) for schema in self.schemas)

    def accepts(self, value: object) -> bool:
        if value is None:
            return None in self.schemas
        return any(schema is not None and find_mismatch(value, schema) is None for schema in self.schemas)


def find_mismatch(value: object, schema: object, name: str = "") -> str | None:
    """Where the value first differs from the schema, such as "images[3].id is missing"; None where it does
    not."""
    return next(_mismatches(value, schema, name), None)


def _mismatches(value: object, schema: object, name: str) -> Iterator[str]:
    kind = type(schema) if isinstance(schema, (list, dict)) else schema
    if hasattr(schema, "accepts") or isinstance(kind, type):
        good = schema.accepts(value) if hasattr(schema, "accepts") else _is(value, kind)
        if not good:
            yield f"{name or 'it'} is {_shorten(value)}: expected {_describe(schema)}"
            return
    if isinstance(schema, list):
        (inner,) = schema
        if isinstance(inner, type) and all(type(item) is inner for item in value):
            return  # the quick way for long lists
        for index, item in enumerate(value):
            yield from _mismatches(item, inner, f"{name}[{index}]")
    elif isinstance(schema, dict):
        for key, inner in schema.items():
            if (
                key is str
                and isinstance(inner, type)
                and all(type(own) is str and type(item) is inner for own, item in value.items())
            ):
                continue  # the quick way for long dictionaries
            if key is str:
                for own, item in value.items():
                    yield from _mismatches(own, str, f"a key of {name or 'it'}")
                    yield from _mismatches(item, inner, f"{name}[{_shorten(own)}]")
            elif key.removesuffix("?") in value:
                key = key.removesuffix("?")
                yield from _mismatches(value[key], inner, f"{name}.{key}" if name else key)
            elif not key.endswith("?"):
                yield f"{name}.{key} is missing" if name else f"{key} is missing"


def _is(value: object, kind: type) -> bool:
    """isinstance, but that True is no number and that every whole number is a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _describe(schema: object) -> str:
    if hasattr(schema, "describe"):
        return schema.describe()
    kind = type(schema) if isinstance(schema, (list, dict)) else schema
    return NAMES.get(kind, kind.__name__)


def _shorten(value: object) -> str:
    if isinstance(value, (str, int, float, bool, type(None))):
        text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
        return text if len(text) <= 40 else f"{text[:37]}..."
    return NAMES.get(type(value), type(value).__name__)
