"""From the bytes of a request to a typed body, or a 400 that names the field at fault. Knows no field but by tables handed in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, FailFast, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, from_json

from .errors import ApiError, shown

BodyT = TypeVar("BodyT", bound="Body")
ItemT = TypeVar("ItemT")

_NEUTRAL: tuple[object, ...] = (None, False, "", [], {})  # what says "not wanted" for any option
_MAX_PARAM = 60
MAX_ITEMS = 1 << 20  # of a list
_MAX_NESTING = 200  # of the JSON reader
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# In our words, what was wanted where a value is of the wrong type.
_TYPES: Mapping[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a JSON object",
    "model_type": "a JSON object",
}


class Body(BaseModel):
    """A JSON request body. Types are strict: "0.5" is no number, true is no integer.

    A subclass may list `unsupported` (fields of known meaning that would change the answer: refused, with a remedy, unless
    the value is neutral or one of `harmless`), `ignored` (fields that cannot change the answer: accepted) and
    `expected` (in words, what a field with several allowed types wants).
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    _num_bytes: int = PrivateAttr(0)

    @property
    def num_bytes(self) -> int:
        """Of the request: how much work it may make."""
        return self._num_bytes

    unsupported: ClassVar[Mapping[str, str]] = {}
    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()
    expected: ClassVar[Mapping[str, str]] = {}


class _FirstFault(FailFast):
    """Pydantic's, which unions of types want hashable."""

    def __hash__(self) -> int:
        return id(self)


List = Annotated[list[ItemT], _FirstFault()]  # the first wrong item is told, and the others are not collected


def parse_body(model: type[BodyT], raw: bytes) -> BodyT:
    """Read `raw` as JSON and check it against `model`. Raises ApiError 400."""
    if not raw.strip():
        raise ApiError("the request has no body; send a JSON object")
    try:
        data = from_json(raw)
    except ValueError as error:
        raise ApiError(f"the body {_json_fault(raw, str(error))}", code="invalid_json") from None
    body = check_body(model, data)
    body._num_bytes = len(raw)
    return body


def _json_fault(raw: bytes, error: str) -> str:
    """What is wrong with a body that the JSON reader refused for `error`, which ends in "at line 1 column 2"."""
    try:
        raw.decode()
    except UnicodeDecodeError as undecodable:
        return f"is not UTF-8: byte {undecodable.start} is 0x{raw[undecodable.start]:02x}"
    where = error[error.rfind(" at line ") :]
    if "recursion limit" in error:
        return f"is nested too deeply{where}: at most {_MAX_NESTING} levels are read"
    if "hex escape" in error and _SURROGATE.search(raw):
        return f"has half of a surrogate pair (such as \\ud83d alone){where}, which is no character: send both halves, or the text itself"
    return f"is not valid JSON: {error}"


def check_body(model: type[BodyT], data: object, *, where: str = "") -> BodyT:
    """Check decoded JSON against `model`; `where` prefixes the names of fields in errors. Raises ApiError 400."""
    if not isinstance(data, dict):
        raise ApiError(f"{where or 'the body'} must be a JSON object, not {_kind(data)}", param=where or None)
    fields = {}
    for name, value in data.items():
        if name in model.model_fields:
            if value is not None or _takes_null(model.model_fields[name]):
                fields[name] = value
        else:
            _judge_stranger(model, name, value, where)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) > MAX_ITEMS:
            param = _join(where, name)
            raise ApiError(f"{param} has {len(value)} entries: send at most {MAX_ITEMS} at once", param=param, code="too_many_items")
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _refusal(model, error.errors(include_url=False)[0], fields, where) from None


def _takes_null(field: FieldInfo) -> bool:
    """False for an option whose type has no null: there, null says "as if not sent"."""
    return field.is_required() or type(None) in get_args(field.annotation)


def _judge_stranger(model: type[Body], name: str, value: object, where: str) -> None:
    """Pass over a field that cannot change the answer; refuse any other by name."""
    if value is None or name in model.ignored:
        return
    param = _join(where, name)
    if name in model.unsupported:
        if any(value == neutral for neutral in _NEUTRAL + model.harmless.get(name, ())):
            return
        raise ApiError(f"{param} is not supported: {model.unsupported[name]}", param=param, code="unsupported_parameter")
    near = difflib.get_close_matches(name[:_MAX_PARAM], model.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it"
    raise ApiError(f"unknown field {shown(param)}: {hint}", param=param[:_MAX_PARAM], code="unknown_parameter")


def _refusal(model: type[Body], error: ErrorDetails, data: Mapping[str, Any], where: str) -> ApiError:
    name, *inner = (str(part) for part in error["loc"]) if error["loc"] else ("",)
    in_words = model.expected.get(name)
    param = _join(where, name if in_words else ".".join((name, *inner)))
    if error["type"] == "missing":
        what = f"{param} is required: it must be {in_words}" if in_words else f"{param} is required"
        return ApiError(what, param=param, code="missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return ApiError(f"unknown field {shown(param)}: remove it", param=param, code="unknown_parameter")
    value = data[name] if in_words else error["input"]
    rule = in_words or _TYPES.get(error["type"], "of another type")
    return ApiError(f"{param}={shown(value)} is not valid: it must be {rule}", param=param, code="invalid_type")


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _kind(value: object) -> str:
    kinds: dict[type, str] = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def as_list(value: Any) -> list[Any]:
    """A field that takes one or many, as many. None is none."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
