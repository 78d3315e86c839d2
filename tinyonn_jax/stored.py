"""A configuration as a run folder keeps it: as JSON, and what another one has otherwise."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tinyonn_jax.config import Config, ConfigError

FREE_FIELDS = ("mesh", "eval")
"""Sections that a resumed or evaluated run may change: they do not alter what is trained."""


def to_json(config: Config) -> str:
    """The whole configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The configuration that `to_json` wrote.

    Raises:
        ConfigError: not JSON, a field that this version does not know, or a value that cannot be.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long, brackets too deep
        raise ConfigError(f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError("must hold one JSON object")
    parts: dict[str, Any] = {}
    known = {f.name: f.default_factory for f in dataclasses.fields(Config)}
    for name, values in data.items():
        if name not in known or not isinstance(values, dict):
            raise ConfigError(f"unknown section {name!r}")
        default = known[name]()  # pyright: ignore[reportCallIssue]
        fields = {f.name for f in dataclasses.fields(default)}
        for key in values:
            if key not in fields:
                raise ConfigError(f"unknown field {name}.{key}; it was written by another version")
        parts[name] = type(default)(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return Config(**parts)


def plain(config: Config) -> dict[str, dict[str, Any]]:
    """The whole configuration by section and field, in values that JSON has."""
    return json.loads(to_json(config))


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The fields in which two `plain` configurations differ, as lines `section.field: a -> b`. `FREE_FIELDS` are passed over, and
    so is what only one of them has, by another version."""
    return [
        f"{section}.{name}: {value} -> {b[section][name]}"
        for section, values in a.items()
        if section not in FREE_FIELDS and section in b
        for name, value in values.items()
        if name in b[section] and value != b[section][name]
    ]
