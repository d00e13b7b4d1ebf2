"""Why a stage is found in the store, or has to run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from foldstack.tasks.stage import Stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.garbage import list_artifacts
from foldstack.tasks.store.manifest import Manifest

ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """One ingredient that is not what it was."""

    name: str
    """Where it stands, e.g. "parameters.method.sparsity" or "code.foldstack.compression.size"."""
    before: Any
    now: Any

    def __str__(self) -> str:
        if len(str(self.before)) == len(str(self.now)) == 64:
            return f"{self.name} changed"  # two digests tell a person nothing
        return f"{self.name}: {self.before} -> {self.now}"


@dataclass(frozen=True)
class Explanation:
    """Whether a stage hits, and if not, how it differs from the nearest thing that is there."""

    label: str
    artifact: Artifact
    is_hit: bool
    damage: str | None
    """What is wrong with the artifact that is there; it would be made anew."""
    nearest: Manifest | None
    changes: tuple[Change, ...]

    def __str__(self) -> str:
        if self.is_hit:
            return f"{self.label}: hit, {self.artifact}"
        if self.damage:
            return f"{self.label}: miss, {self.artifact} is damaged: {self.damage}"
        if self.nearest is None:
            return f"{self.label}: miss, the store holds no {self.artifact.stage} at all"
        near = f"{self.nearest.label} ({self.nearest.stage}/{self.nearest.fingerprint[:12]})"
        changes = "\n".join(f"    {change}" for change in self.changes)
        return f"{self.label}: miss; nearest is {near}, and since then\n{changes}"


def explain(stage: Stage, store: ArtifactStore) -> Explanation:
    """Compare the stage with what the store holds, changing nothing."""
    artifact, ingredients = stage.artifact(store), stage.ingredients()
    damage = artifact.damage(thorough=False)
    if damage is None:
        return Explanation(stage.label, artifact, True, None, artifact.manifest(), ())
    if store.holds(artifact):
        return Explanation(stage.label, artifact, True, None, None, ())
    if artifact.folder.exists():
        return Explanation(stage.label, artifact, False, damage, None, ())
    rows = (row.manifest for row in list_artifacts(store) if row.artifact.stage == stage.stage)
    others = [manifest for manifest in rows if manifest is not None]
    if not others:
        return Explanation(stage.label, artifact, False, None, None, ())

    def nearness(other: Manifest) -> tuple[bool, int, float]:
        num_changes = len(list(_changes(other.ingredients, ingredients)))
        return other.label == stage.label, -num_changes, other.created.timestamp()

    nearest = max(others, key=nearness)
    changes = tuple(_changes(nearest.ingredients, ingredients))
    return Explanation(stage.label, artifact, False, None, nearest, changes)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    old, new = dict(_leaves(before)), dict(_leaves(now))
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new or _text(old[name]) != _text(new[name]):
            yield Change(name, old.get(name, ABSENT), new.get(name, ABSENT))


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
