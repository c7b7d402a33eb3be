"""From overrides to one checked `Config`: Hydra composes, the schema refuses what does not fit.

Hydra's own loader reads every YAML file (PyYAML alone takes 1e-6 for text). Nothing heavy is
imported here, and hydra itself only inside `compose`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import ConfigError
from consilience.conf.fields import fields_of, key_of, read_record
from consilience.conf.overrides import CONF, group_options, normalise
from consilience.conf.rules import check_rules
from consilience.conf.schema import Config


def compose(overrides: Sequence[str] = (), config_dir: Path | str | None = None) -> Config:
    """The configuration these overrides ask for.

    `config_dir` is a folder of the user's own options (`<dir>/<group>/<option>.yaml`), searched
    after the shipped ones. ConfigError, one line, on anything that does not fit.
    """
    extra = [] if config_dir is None else [_own_folder(Path(config_dir))]
    options = group_options([CONF, *extra])
    asked = [normalise(o, options) for o in overrides]
    search = [f"hydra.searchpath=[{','.join(f'file://{p}' for p in extra)}]"] if extra else []
    return from_plain(_compose_plain([*search, *asked]))


def from_plain(raw: dict[str, Any]) -> Config:
    """A checked Config from plain data, such as a run folder's config.yaml."""
    return check_rules(read_record(Config, raw))


def load_resolved(path: Path) -> Config:
    """The Config that `to_yaml` wrote. ConfigError if the file is missing or does not fit."""
    from omegaconf import OmegaConf

    if not path.is_file():
        raise ConfigError(
            f"no configuration at '{path}'; name a run folder that exists (run.folder, run.name)"
        )
    try:
        raw = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:
        raise ConfigError(f"'{path}' cannot be read as configuration: {_first_line(error)}") from error
    return from_plain(raw)  # type: ignore[arg-type]


def to_plain(cfg: Any) -> dict[str, Any]:
    """A config record as JSON-plain data, keys as written in configuration."""
    return {key_of(f): _plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def to_yaml(cfg: Config) -> str:
    """The resolved configuration as YAML that `load_resolved` reads back equal."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_plain(cfg)))


def config_digest(cfg: Config, groups: Iterable[str]) -> str:
    """sha256 (hex) over the named groups and the run's seed: what a stage's result depends on.

    Settings marked `speed_only` are left out.
    """
    plain = {group: _what_counts(getattr(cfg, group)) for group in sorted(set(groups))}
    text = json.dumps({"groups": plain, "seed": cfg.run.seed}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(group: str) -> list[tuple[str, str, str, str]]:
    """(key, default, allowed, meaning) of every setting of a group, nested ones included."""
    from consilience.conf.fields import bounds_text, nearest

    groups = fields_of(Config)
    if group not in groups:
        raise ConfigError(f"unknown group '{group}'; {nearest(group, groups)}")
    return list(_rows(groups[group][1], group, bounds_text))


def _rows(cls: type, prefix: str, bounds_text: Any) -> Iterable[tuple[str, str, str, str]]:
    for key, (field, hint) in fields_of(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _rows(hint, f"{prefix}.{key}", bounds_text)  # type: ignore[arg-type]
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        allowed = " ".join(t for t in (bounds_text(field.metadata), field.metadata["unit"]) if t)
        shown = "null" if default is None else json.dumps(_plain(default))
        yield f"{prefix}.{key}", shown, allowed, field.metadata["doc"]


def _compose_plain(overrides: list[str]) -> dict[str, Any]:
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = hydra.compose(config_name="config", overrides=overrides)
            return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except Exception as error:  # Hydra's and OmegaConf's errors share no base
        raise ConfigError(f"the configuration does not compose: {_first_line(error)}") from error


def _own_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(f"--config-dir is '{path}', but no such folder exists")
    return path.resolve()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _what_counts(record: Any) -> dict[str, Any]:
    kept = (f for f in dataclasses.fields(record) if not f.metadata["speed_only"])
    return {key_of(f): _plain(getattr(record, f.name)) for f in kept}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value
