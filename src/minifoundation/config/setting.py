"""What every setting is made with: a field with its help text and short flag, in a frozen model that refuses unknown names."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def setting(default: Any = ..., *, help: str, flag: str | None = None, **bounds: Any) -> Any:
    """Return a pydantic field with its help text and, where it has one, its short flag."""
    return Field(default, description=help, json_schema_extra={"flag": flag} if flag else None, **bounds)


def from_home(path: str) -> str:
    """Return ``path`` with the home folder in place of ``~`` or ``~user``; as text, since a Path is none where JSON is read.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise ValueError(f"{path}: there is no such user; write the whole path") from None


def may_be_path(text: str | None) -> str | None:
    """Return ``text``, a path or something else that is known by name, with the home folder in place of ``~``.

    Raises:
        ValueError: as ``from_home``; it is empty, as an unset variable of a shell is.
    """
    if text is not None and not text.strip():
        raise ValueError("is empty; give a path, or leave it out")
    return from_home(text) if text is not None and text.startswith("~") else text


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, ``none`` spelled as a word means off, whole numbers may be written as ``2e9``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _none_word(cls, value: Any, info: ValidationInfo) -> Any:
        """``none`` on a command line is YAML's ``null`` for a setting that can be off."""
        if value == "none" and NoneType in cls._kinds(info):
            return None
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value: Any, info: ValidationInfo) -> Any:
        """A whole number in powers of ten is one; yes and no of YAML are none, which pydantic would take for 1 and 0."""
        kinds = cls._kinds(info)
        if isinstance(value, bool) and not kinds.isdisjoint({int, float}) and bool not in kinds:
            off = ", or none to turn it off" if NoneType in kinds else ""
            raise ValueError(f"{value} is not a number (YAML reads yes, no, on and off as true and false); give a number{off}")
        if isinstance(value, str) and int in kinds and re.fullmatch(r"\+?[\d_]+(\.\d+)?[eE]\+?\d{1,2}", value.strip()):
            number = float(value)
            return int(number) if number.is_integer() else value
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _path(cls, value: Any, info: ValidationInfo) -> Any:
        """``~`` is the user's home, also where no shell has read it; an empty path, as of a variable that is not set, is none."""
        if not isinstance(value, str) or Path not in cls._kinds(info):
            return value
        if not value.strip():
            raise ValueError("is empty; give a path, or leave it out")
        return from_home(value)

    @classmethod
    def _kinds(cls, info: ValidationInfo) -> set[Any]:
        """Return the types that a setting may have; of a list or a mapping that type alone."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}
