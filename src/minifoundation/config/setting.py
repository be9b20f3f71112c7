"""What every setting is made with: a field with its help text and short flag, in a frozen model that refuses unknown names."""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def setting(default: Any = ..., *, help: str, flag: str | None = None, **bounds: Any) -> Any:
    """Return a pydantic field with its help text and, where it has one, its short flag."""
    return Field(default, description=help, json_schema_extra={"flag": flag} if flag else None, **bounds)


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, ``none`` spelled as a word means off."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _none_word(cls, value: Any, info: ValidationInfo) -> Any:
        """``none`` on a command line is YAML's ``null`` for a setting that can be off."""
        if value == "none" and NoneType in get_args(cls.model_fields[str(info.field_name)].annotation):
            return None
        return value
