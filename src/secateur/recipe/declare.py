"""How an option is declared: once, as a field of a frozen pydantic dataclass.

    @options
    class BlockRefit:
        rate: Number = Field(0.025, gt=0, lt=1, description="Peak learning rate.")

From that field follow the recipe file, its JSON schema, the flags, the checks of the Python API and the docs page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

from pydantic import AllowInfNan, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from secateur.errors import SecateurError, nearest

__all__ = ["Field", "Number", "RecipeError", "Switch", "Whole", "fields_of", "options", "plain", "validated"]

Number = Annotated[float, Strict(), AllowInfNan(False)]
Whole = Annotated[int, Strict()]
Switch = Annotated[bool, Strict()]

T = TypeVar("T")


class RecipeError(SecateurError):
    """A recipe or an option of it is wrong.

    Attributes:
        location: keys from the recipe to the option, such as `("refit", "rate")`.
    """

    def __init__(self, message: str, location: tuple[str | int, ...] = ()) -> None:
        """Say what is wrong, and where."""
        super().__init__(message)
        self.location = location


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def options(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass whose fields are checked against their declarations.

    Raises, when an instance is made:
        RecipeError: an unknown option, a wrong type, or a value out of range.
    """
    made = pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid"))(cls)
    init = made.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **values: Any) -> None:
        try:
            init(self, *args, **values)
        except ValidationError as error:
            raise explained(error, made) from None

    made.__init__ = checked  # pyright: ignore[reportAttributeAccessIssue]
    return made  # pyright: ignore[reportReturnType]


def validated(kind: type[T], values: Mapping[str, Any]) -> T:
    """An options dataclass from plain data.

    Raises:
        RecipeError: as `options` says, with the location of the option.
    """
    try:
        return TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        raise explained(error, kind) from None


def plain(value: Any) -> Any:
    """An options dataclass as plain data: dictionaries, lists, numbers and text."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def fields_of(kind: Any) -> dict[str, Any]:
    """Declarations of an options dataclass by name: pydantic's `FieldInfo`."""
    return dict(kind.__pydantic_fields__)


def explained(error: ValidationError, kind: type) -> RecipeError:
    """What is wrong first, in one sentence: the option, its value, and what was expected."""
    found = error.errors(include_url=False)
    first, location = found[0], _location(found[0])
    same_place = [each for each in found if _location(each) == location]  # the members of a union
    name, value = ".".join(map(str, location)), first["input"]
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, SecateurError):
        deeper = cause.location if isinstance(cause, RecipeError) else ()
        return RecipeError(cause.raw, location + deeper)
    if first["type"] == "unexpected_keyword_argument":
        unknown = str(first["loc"][-1])  # any text, so `_location` may have left it out
        location = (*(location[:-1] if location[-1:] == (unknown,) else location), unknown)
        return RecipeError(unknown_option(unknown, ".".join(map(str, location[:-1])), kind, location), location)
    if first["type"] in ("missing", "missing_argument"):
        return RecipeError(f"{name} is missing", location)
    if first["type"] in ("dataclass_type", "dataclass_exact_type"):
        return RecipeError(f"{name or 'the recipe'} is {value!r}: it must be a mapping of options", location)
    expected = " or ".join(dict.fromkeys(_expected(each["msg"]) for each in same_place))
    return RecipeError(f"{name} is {value!r}: it must {expected}", location)


def unknown_option(name: str, section: str, kind: type, location: tuple[str | int, ...]) -> str:
    """The message for an option that a section does not have, with the nearest name."""
    known = list(fields_of(_kind_at(kind, location[:-1])))
    where = f"{section} has" if section else "the recipe has"
    return f"{where} no option {name!r}: its options are {', '.join(known) or 'none'}{nearest(name, known)}"


def _kind_at(kind: Any, location: tuple[str | int, ...]) -> Any:
    """The options dataclass at a location below another."""
    for part in location:
        if isinstance(part, str):
            kind = _options_in(fields_of(kind)[part].annotation)
    return kind


def _options_in(annotation: Any) -> Any:
    """The options dataclass in an annotation such as `BlockRefit | None`."""
    if hasattr(annotation, "__pydantic_fields__"):
        return annotation
    found = (_options_in(part) for part in get_args(annotation))
    return next((each for each in found if each is not None), None)


def _location(error: Any) -> tuple[str | int, ...]:
    """Keys to the option; pydantic adds names of union members, which no user wrote."""
    return tuple(part for part in error["loc"] if not isinstance(part, str) or _is_option(part))


def _is_option(part: str) -> bool:
    return part.isidentifier() and part not in ("int", "float", "str", "bool", "literal")


def _expected(message: str) -> str:
    """Pydantic's sentence without its subject."""
    message = re.sub(r"^(Input|String|Tuple|Value) should ", "", message)
    plainly = {"a valid integer": "a whole number", "a valid number": "a number", "a valid tuple": "a list"}
    for theirs, ours in plainly.items():
        message = message.replace(theirs, ours)
    return message
