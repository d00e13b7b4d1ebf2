"""Tracks that come with foldstack, and what a config changes of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldstack.flows.config.config_errors import did_you_mean
from foldstack.flows.config.config_file import read_config

PRESETS = Path(__file__).parents[1] / "tracks"


def presets() -> dict[str, Path]:
    """The presets by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def with_preset(section: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation section with the tracks that its preset names, and changed as it says.

    What a track sets takes the place of the preset's; null leaves a track out.

    Raises:
        ValueError: there is no such preset.
    """
    data = dict(section)
    name = data.pop("preset", None)
    own = data.get("tracks") or {}
    if name is None or not isinstance(own, Mapping):
        return data
    if name not in presets():
        known = ", ".join(presets())
        raise ValueError(f"no preset {name}: there are {known}{did_you_mean(str(name), presets())}")
    tracks = read_config(presets()[name])
    for track, settings in own.items():
        if settings is None:
            tracks.pop(track, None)
        elif isinstance(settings, Mapping):
            tracks[track] = {**tracks.get(track, {}), **settings}
        else:
            tracks[track] = settings  # which the schema refuses
    return data | {"tracks": tracks}
