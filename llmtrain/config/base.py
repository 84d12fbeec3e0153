"""The base of every config class, and the choice between several of them."""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Union, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    PlainSerializer,
    PlainValidator,
    SerializationInfo,
    Tag,
    ValidationInfo,
    field_validator,
)

TARGET = "_target_"
TARGET_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


class Config(BaseModel):
    """A frozen, typed piece of configuration that stands beside the thing it configures and builds it.

    Subclasses have no defaults for keys that conf/ sets: the YAML is the one owner of a default value.
    Unknown keys, NaN and infinities are errors. A number is accepted where text is expected (`name=7`), a
    truth value where a number is expected is not.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        validate_default=True,
        coerce_numbers_to_str=True,
    )

    @classmethod
    def complete(cls, value: Mapping[str, Any], given: Mapping[str, str]) -> Mapping[str, Any]:
        """What other files add to the composed keys, before validation.

        `given`: keys and groups of the command line, and the text that each was given.
        """
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts `True` as 1, so `max_steps=true` would train one step."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        accepted = {annotation, *get_args(annotation)}
        if isinstance(value, bool) and accepted & {int, float} and bool not in accepted:
            raise ValueError("must be a number")
        return value


def choice(base: type[Config], *kinds: type[Config]) -> Any:
    """Type of a field that holds one of `kinds`, told apart by their `kind` key, or a third party's subclass.

    `{kind: rope, theta: 10000}` builds the class among `kinds` whose `kind` literal is "rope".
    `{_target_: their_pkg.TheirConfig, ...}` imports that name and accepts it only as a subclass of `base`:
    nothing is called before that is known. `model_dump` gives the `_target_` back. One class without a
    `kind` takes every mapping that has no `_target_`; without `kinds` every mapping has to have one.
    """
    theirs: Any = Annotated[base, PlainValidator(lambda value: _load_target(base, value)), Tag(TARGET)]
    members: list[Any] = [*(Annotated[cls, Tag(kind_of(cls))] for cls in kinds), theirs]

    def tag(value: Any) -> str | None:
        if isinstance(value, Mapping):
            return TARGET if TARGET in value else value.get("kind") if "" not in tags else ""
        return kind_of(type(value)) if type(value) in kinds else TARGET

    def dump(value: Config, info: SerializationInfo) -> dict[str, Any]:
        fields = value.model_dump(mode=info.mode)
        cls = type(value)
        return fields if cls in kinds else {TARGET: f"{cls.__module__}.{cls.__qualname__}", **fields}

    tags = [kind_of(cls) for cls in kinds]
    if not kinds:
        return Annotated[theirs, PlainSerializer(dump)]
    return Annotated[Union[tuple(members)], Discriminator(tag), PlainSerializer(dump)]  # noqa: UP007


def kind_of(cls: type[Config]) -> str:
    """The one value of a config class's `kind` literal; nothing where it has none."""
    field = cls.model_fields.get("kind")
    return "" if field is None else field.annotation.__args__[0]  # type: ignore[union-attr]


def label(config: Config) -> str:
    """The `kind` that was chosen; of a third party's, which has none, the name of the class."""
    return getattr(config, "kind", type(config).__name__)


def target_class(base: type[Config], target: str) -> type[Config]:
    """The subclass of `base` that `target`, a dotted import path, names; ValueError if it names none.

    The module is imported, so what stands at its top level runs: a `_target_` is trusted like an installed
    package. Nothing of the standard library is imported for it (`antigravity` opens a browser), and no path.
    """
    if not TARGET_NAME.fullmatch(target) or target.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{TARGET} {target!r} is not the name of a config class: package.module.Class")
    try:
        cls = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{TARGET} {target!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(f"{TARGET} {target!r} is not a subclass of {base.__module__}.{base.__qualname__}")
    return cls


def _load_target(base: type[Config], value: Any) -> Config:
    if isinstance(value, base):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping with `kind` or `{TARGET}`")
    if TARGET not in value:
        raise ValueError(f"must be a class of yours: {{{TARGET}: package.module.Class, ...}}")
    fields = dict(value)
    return target_class(base, str(fields.pop(TARGET))).model_validate(fields)
