"""`foldstack cache ls | explain | gc`."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.errors import InputError
from foldstack.flows.cli.held_models import HeldModel, held_models, upload_held
from foldstack.tasks.environment.home import store_url
from foldstack.tasks.running.explanation import Explanation, explain
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import (
    Removal,
    collect_garbage,
    list_artifacts,
    list_object_storage,
)

if TYPE_CHECKING:
    from foldstack.flows.config.run_config import RunConfig


def store_of(home: Path | None) -> ArtifactStore:
    """The store in a home, or in the default one."""
    return ArtifactStore.default() if home is None else ArtifactStore(home / "store", store_url())


def list_command(home: Path | None, as_json: bool) -> str:
    """What the store holds, the last used first: a table, or JSON."""
    store = store_of(home)
    listed = list_object_storage(store) if store.url else list_artifacts(store)
    place = store.url or str(store.root)
    rows: list[dict[str, Any]] = [
        {
            "stage": row.artifact.stage,
            "fingerprint": row.artifact.fingerprint,
            "label": row.manifest.label if row.manifest else "unreadable",
            "size_bytes": row.size_bytes,
            "seconds": row.manifest.seconds if row.manifest else None,
            "last_used": row.last_used.isoformat(timespec="seconds"),
        }
        for row in listed
    ]
    total = sum(row["size_bytes"] for row in rows)
    if as_json:
        return json.dumps({"store": place, "bytes": total, "artifacts": rows}, indent=1)
    heads = f"{'last used (UTC)':<19}  {'size':>13}  {'made in':>10}  {'fingerprint':<12}  stage"
    lines = [heads] if rows else []
    lines += [
        f"{row['last_used'][:19].replace('T', ' ')}  {row['size_bytes'] / 2**20:9.1f} MiB  "
        f"{row['seconds'] or 0:8.1f} s  {row['fingerprint'][:12]}  {row['label']}"
        for row in rows
    ]
    lines.append(f"{len(rows)} artifacts, {total / 2**20:.1f} MiB in {place}")
    if rows:
        lines.append(f"made in {_seconds_by_stage(rows)}")
    return "\n".join(lines)


def _seconds_by_stage(rows: list[dict[str, Any]]) -> str:
    """The kinds of stages with the time that their artifacts took, the dearest first."""
    seconds: Counter[str] = Counter()
    for row in rows:
        seconds[row["stage"]] += row["seconds"] or 0
    return ", ".join(f"{stage} {took:.1f} s" for stage, took in seconds.most_common())


def gc_command(
    home: Path | None,
    *,
    keep_days: float,
    keep: Sequence[str],
    max_gib: float | None,
    dry_run: bool,
    as_json: bool,
    upload: bool = False,
    without_mlflow: bool = False,
) -> str:
    """Clean the store; says what went, or would go, and how full the disk is then.

    Raises:
        InputError: `keep` names nothing in the home, or MLflow does not answer.
    """
    store = store_of(home)
    rule: dict[str, Any] = {
        "keep_days": keep_days,
        "keep": [name for what in keep for name in _fingerprints(store, what)],
        "max_bytes": None if max_gib is None else int(max_gib * 2**30),
    }
    held = [] if without_mlflow else held_models(store.root.parent)
    names = {model.fingerprint for model in held}
    would_go = collect_garbage(store, dry_run=True, **rule) if held else []
    stays = [each for each in would_go if each.path.name in names]
    if upload and not dry_run and stays:
        upload_held(store, held, list_artifacts(store))
        names, stays = set(), []
    removals = collect_garbage(store, held=names, dry_run=dry_run, **rule)
    total = sum(removal.size_bytes for removal in removals)
    left = sum(row.size_bytes for row in list_artifacts(store))
    free = shutil.disk_usage(_existing(store.root)).free
    if as_json:
        entries = [
            {"kind": r.kind, "path": str(r.path), "size_bytes": r.size_bytes, "label": r.label}
            for r in removals
        ]
        report: dict[str, Any] = {
            "dry_run": dry_run, "bytes": total, "bytes_left": left, "bytes_free": free,
            "removed": entries, "held": [_held_entry(each, held) for each in stays],
        }  # fmt: skip
        return json.dumps(report, indent=1)
    lines = [f"{r.kind:<9} {r.size_bytes / 2**20:9.1f} MiB  {r.label}" for r in removals]
    lines += [
        f"{'stays':<9} {each.size_bytes / 2**20:9.1f} MiB  {each.label}: "
        + ", ".join(_held_entry(each, held)["aliases"])
        for each in stays
    ]
    if stays:
        lines.append(
            "what stays is the only copy of what these aliases of MLflow's point to; "
            "`foldstack cache gc --upload` hands the weights to MLflow first"
        )
    verb = "would go" if dry_run else "removed"
    holds = f"artifacts take {left / 2**20:.1f} MiB, {free / 2**30:.1f} GiB of the disk are free"
    return "\n".join([*lines, f"{len(removals)} things {verb}, {total / 2**20:.1f} MiB; {holds}"])


def _held_entry(removal: Removal, held: Sequence[HeldModel]) -> dict[str, Any]:
    """What must stay, and the aliases for whose sake."""
    aliases = [str(model.entry) for model in held if model.fingerprint == removal.path.name]
    return {"fingerprint": removal.path.name, "label": removal.label, "aliases": aliases}


def _fingerprints(store: ArtifactStore, what: str) -> list[str]:
    """What `--keep` names: a sweep in the home, or the beginning of a fingerprint.

    Raises:
        InputError: there is neither.
    """
    from foldstack.flows.comparison.files import load

    sweeps = store.root.parent / "sweeps"
    if what in {folder.name for folder in sweeps.glob("*")}:
        return [name for row in load(sweeps / what).rows for name in row.fingerprints.values()]
    names = [row.artifact.fingerprint for row in list_artifacts(store)]
    if what and any(name.startswith(what) for name in names):
        return [what]
    raise InputError(
        f"keep must name a sweep (a folder in {sweeps}) or begin the fingerprint of an artifact "
        f"(`foldstack cache ls`), and {what!r} does neither"
    )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


@dataclass(frozen=True)
class Explained:
    """One stage of a run, and why it hits or misses."""

    explanation: Explanation
    is_input_missing: bool
    """True when a stage before it has to run: then it runs too, for that reason alone."""

    def __str__(self) -> str:
        if self.is_input_missing and not self.explanation.is_hit:
            return f"{self.explanation.label}: miss, because a stage that it depends on has to run"
        return str(self.explanation)

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        entry = self.explanation
        changes = [{"name": c.name, "before": c.before, "now": c.now} for c in entry.changes]
        return {
            "label": entry.label,
            "stage": entry.artifact.stage,
            "fingerprint": entry.artifact.fingerprint,
            "is_hit": entry.is_hit,
            "is_input_missing": self.is_input_missing,
            "damage": entry.damage,
            "changes": changes,
        }


def told_of(explained: Sequence[Explained]) -> str:
    """What misses, one by one; what hits, by its kind: there is nothing to explain."""
    hits = Counter(each.explanation.artifact.stage for each in explained if each.explanation.is_hit)
    lines = [str(each) for each in explained if not each.explanation.is_hit]
    if hits:
        kinds = ", ".join(f"{number} {stage}" for stage, number in hits.items())
        lines.append(f"{hits.total()} of {len(explained)} stages hit: {kinds}")
    else:
        lines.append(f"none of {len(explained)} stages hits")
    return "\n".join(lines)


def explain_command(config: "RunConfig") -> list[Explained]:
    """Every stage of a run, and why it hits or misses."""
    from foldstack.flows.running.branches import lay_out

    layout = lay_out(config)
    missing: set[str] = set()
    explained = []
    for stage in layout.stages:
        entry = explain(stage, layout.store)
        names = {reference.rpartition("/")[2] for reference in stage.inputs()}
        explained.append(Explained(entry, bool(names & missing)))
        if not entry.is_hit:
            missing.add(entry.artifact.fingerprint)
    return explained
