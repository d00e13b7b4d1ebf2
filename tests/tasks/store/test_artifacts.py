"""The artifact store: whole or not at all, verified, one maker at a time, through crashes."""

import errno
import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.home import foldstack_home
from foldstack.tasks.store import manifest
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.garbage import collect_garbage, list_artifacts
from foldstack.tasks.store.manifest import MANIFEST, Facts, FileEntry

STAGE, FINGERPRINT = "compress", "ab" * 32
CONTENT = "weights, more or less"


def write_weights(folder: Path, work: Path) -> Facts:
    (folder / "model").mkdir()
    (folder / "model" / "weights.txt").write_text(CONTENT)
    return {"parameters": 7, "perplexity": float("inf")}


def must_not_run(folder: Path, work: Path) -> Facts:
    raise AssertionError("made twice")


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def artifact(store: ArtifactStore) -> Artifact:
    return store.publish(STAGE, FINGERPRINT, write_weights, label="compress a quarter")


@pytest.fixture
def start_python(store: ArtifactStore) -> Callable[[str], "subprocess.Popen[str]"]:
    """Starts a process that runs the code with `store` set; it says when to go on."""

    def start(code: str) -> "subprocess.Popen[str]":
        head = f"""
            import os, sys, time
            from pathlib import Path
            from foldstack.tasks.store.artifacts import ArtifactStore
            store = ArtifactStore(Path({str(store.root)!r}))
        """
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def test_published_artifact_is_found_with_its_manifest(
    store: ArtifactStore, artifact: Artifact
) -> None:
    assert store.find(STAGE, FINGERPRINT) == artifact
    assert store.find(STAGE, "cd" * 32) is None
    assert store.find("recover", FINGERPRINT) is None
    assert (artifact.open() / "model" / "weights.txt").read_text() == CONTENT
    known = artifact.manifest()
    assert known.facts == {"parameters": 7, "perplexity": float("inf")}
    assert known.label == "compress a quarter"
    assert [(file.name, file.size_bytes) for file in known.files] == [
        ("model/weights.txt", len(CONTENT))
    ]
    assert known.versions["torch"].partition("+")[1] == ""
    assert names(store.root / "tmp") == []


def test_publishing_again_does_not_make_it_again(store: ArtifactStore, artifact: Artifact) -> None:
    assert store.publish(STAGE, FINGERPRINT, must_not_run) == artifact


def test_store_can_be_moved_and_its_artifacts_stay_good(
    store: ArtifactStore, artifact: Artifact
) -> None:
    moved = ArtifactStore(store.root.rename(store.root.with_name("moved")))
    found = moved.find(STAGE, FINGERPRINT)
    assert found is not None
    assert found.open().is_relative_to(moved.root)
    assert artifact != found


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(lambda file: file.write_text("shorter"), id="other size"),
        pytest.param(lambda file: file.write_text(CONTENT.upper()), id="same size, other bytes"),
        pytest.param(lambda file: file.unlink(), id="file gone"),
        pytest.param(
            # A link is as long as the name it holds.
            lambda file: (
                file.rename(file.with_name("x" * len(CONTENT))).parent
                and file.symlink_to("x" * len(CONTENT))
            ),
            id="link",
        ),
        pytest.param(
            lambda file: (file.parent.parent / MANIFEST).write_text("{"), id="torn manifest"
        ),
        pytest.param(lambda file: (file.parent.parent / MANIFEST).unlink(), id="no manifest"),
        pytest.param(
            lambda file: (file.parent.parent / MANIFEST).write_text(
                (file.parent.parent / MANIFEST).read_text().replace("model/weights", "../weights")
            ),
            id="manifest that points outside",
        ),
    ],
)
def test_damaged_artifact_is_set_aside_and_made_anew(
    store: ArtifactStore,
    artifact: Artifact,
    break_it: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    artifact.open()
    break_it(artifact.folder / "model" / "weights.txt")
    with caplog.at_level(logging.WARNING):
        assert store.find(STAGE, FINGERPRINT) is None
    assert str(artifact) in caplog.text
    assert len(names(store.root / "damaged")) == 1
    again = store.publish(STAGE, FINGERPRINT, write_weights)
    assert (again.open() / "model" / "weights.txt").read_text() == CONTENT


def test_publishing_over_a_damaged_artifact_replaces_it(
    store: ArtifactStore, artifact: Artifact
) -> None:
    (artifact.folder / "model" / "weights.txt").write_text("shorter")
    store.publish(STAGE, FINGERPRINT, write_weights)
    assert (artifact.open() / "model" / "weights.txt").read_text() == CONTENT


def test_opening_a_damaged_artifact_says_what_to_do_and_sets_it_aside(
    store: ArtifactStore, artifact: Artifact
) -> None:
    (artifact.folder / "model" / "weights.txt").write_text(CONTENT.upper())
    with pytest.raises(
        InputError, match=r"weights\.txt has other contents .* run the same command"
    ):
        artifact.open()
    assert not artifact.folder.exists()
    with pytest.raises(InputError, match="not in the store"):
        artifact.open()


@pytest.fixture
def big_file(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the artifact that counts as big, and as not yet seen by this process."""
    monkeypatch.setattr(manifest, "CHECKED_AT_ONCE_BYTES", 4)
    monkeypatch.setattr(manifest, "_intact", set())
    return artifact.folder / "model" / "weights.txt"


def overwrite(file: Path, text: str, days_later: float = 0) -> None:
    moment = file.stat().st_mtime + 86400 * days_later
    file.write_text(text)
    os.utime(file, (moment, moment))


def test_big_untouched_file_is_hashed_only_when_read(
    store: ArtifactStore, artifact: Artifact, big_file: Path
) -> None:
    overwrite(big_file, CONTENT.upper())
    assert store.find(STAGE, FINGERPRINT) == artifact
    with pytest.raises(InputError, match="other contents"):
        artifact.open()


@pytest.mark.usefixtures("artifact")
def test_big_file_of_another_size_or_date_is_noticed_at_once(
    store: ArtifactStore, big_file: Path
) -> None:
    overwrite(big_file, CONTENT + "!")
    assert store.find(STAGE, FINGERPRINT) is None
    store.publish(STAGE, FINGERPRINT, write_weights)
    overwrite(big_file, CONTENT.upper(), days_later=1)
    assert store.find(STAGE, FINGERPRINT) is None


def test_each_file_is_hashed_once_per_process(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact.open()

    def refuse(file: Path) -> str:
        raise AssertionError(f"{file} is hashed again")

    monkeypatch.setattr(manifest, "digest_file", refuse)
    artifact.open()


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\\b", "C:x", ".", "", "a//b"]
)
def test_file_names_that_leave_the_artifact_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        FileEntry(name=name, size_bytes=0, sha256="0" * 64)


@pytest.mark.parametrize(
    ("stage", "fingerprint"), [("..", "ab" * 32), ("a/b", "ab" * 32), ("compress", "../" * 8)]
)
def test_artifacts_outside_the_store_cannot_be_named(
    store: ArtifactStore, stage: str, fingerprint: str
) -> None:
    with pytest.raises(ValidationError):
        store.artifact(stage, fingerprint)


def reseal(text: str) -> str:
    """What a hostile maker can do as well: a seal that fits."""
    plain = re.sub(r'(?<="seal": ")[0-9a-f]{64}', manifest.UNSEALED, text)
    return plain.replace(manifest.UNSEALED, hashlib.sha256(plain.encode()).hexdigest())


def names_as_well(name: str) -> tuple[str, str]:
    entry = f'{{"name": "{name}", "size_bytes": 1, "sha256": "{"1" * 64}"}}'
    return '"files": [', f'"files": [{entry}, '


@pytest.mark.parametrize(
    "change, reason",
    [
        pytest.param(('"size_bytes": 21', '"size_bytes": NaN'), "finite", id="size NaN"),
        pytest.param(('"size_bytes": 21', '"size_bytes": 1e999'), "finite", id="size infinite"),
        pytest.param(('"size_bytes": 21', '"size_bytes": -1'), "greater", id="size negative"),
        pytest.param(('"size_bytes": 21', f'"size_bytes": {1 << 63}'), "less than", id="size huge"),
        pytest.param(
            ('"size_bytes": 21', f'"size_bytes": {"9" * 5000}'), "digits", id="size endless"
        ),
        pytest.param(('"seconds": ', '"seconds": NaN, "x": '), "finite", id="duration NaN"),
        pytest.param(
            ('"parameters": 7', '"parameters": 7, "parameters": 8'),
            "key 'parameters' stands there twice",
            id="key twice",
        ),
        pytest.param(
            ('"ingredients": {}', f'"ingredients": {"[" * 100_000}{"]" * 100_000}'),
            "nested too deeply",
            id="deep",
        ),
        pytest.param(('"label": "', '"label": "\\ud800'), "surrogates", id="half a character"),
        pytest.param(('"version": 1', '"version": 2'), "version: ", id="of another version"),
        pytest.param(('"stage": "compress"', '"stage": "recover"'), "recover/", id="another's"),
        pytest.param(names_as_well("../../x"), "inside its folder", id="parent folder"),
        pytest.param(names_as_well("/etc/passwd"), "inside its folder", id="absolute path"),
        pytest.param(names_as_well("x\\u0000y"), "inside its folder", id="NUL"),
        pytest.param(names_as_well("model/pytorch_model.bin"), "like a pickle", id="pickle"),
        pytest.param(names_as_well("model/weights.txt"), "named once", id="file twice"),
        pytest.param(names_as_well(MANIFEST), "named once", id="itself"),
        pytest.param(names_as_well("x" * 300), "is missing", id="name too long"),
    ],
)
def test_hostile_manifest_is_refused_in_a_sentence(
    artifact: Artifact, change: tuple[str, str], reason: str
) -> None:
    file = artifact.folder / MANIFEST
    changed = file.read_text().replace(*change, 1)
    assert changed != file.read_text()
    file.write_text(reseal(changed))
    with pytest.raises(InputError, match=re.escape(reason)) as refused:
        artifact.open()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [('"perplexity": Infinity', '"perplexity": 7'), ("a quarter", "a third"), ("}", "} ")],
)
def test_a_changed_bit_of_the_manifest_is_noticed(
    artifact: Artifact, change: tuple[str, str]
) -> None:
    file = artifact.folder / MANIFEST
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(InputError, match="other contents than when it was written"):
        artifact.open()


def link_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).rename(folder.parent / "elsewhere")
    (folder / MANIFEST).symlink_to(folder.parent / "elsewhere")


def make_the_manifest_a_pipe(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


def make_the_manifest_endless(folder: Path) -> None:
    os.truncate(folder / MANIFEST, manifest.MANIFEST_BYTES + 1)


def link_a_folder(folder: Path) -> None:
    (folder / "model").rename(folder.parent / "elsewhere")
    (folder / "model").symlink_to(folder.parent / "elsewhere")


def add_a_file(folder: Path) -> None:
    (folder / "model" / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    "change, reason",
    [
        (link_the_manifest, "Too many levels"),
        (make_the_manifest_a_pipe, "plain file of at most 16 MiB"),
        (make_the_manifest_endless, "plain file of at most 16 MiB"),
        (link_a_folder, "model is not a plain file"),
        (add_a_file, "model/adapter_config.json is not in its manifest"),
    ],
)
def test_what_is_no_plain_file_of_the_manifest_is_refused(
    artifact: Artifact, change: Callable[[Path], None], reason: str
) -> None:
    change(artifact.folder)
    with pytest.raises(InputError, match=reason):
        artifact.open()


def test_failed_production_leaves_nothing_and_passes_its_error_on(store: ArtifactStore) -> None:
    def fail(folder: Path, work: Path) -> Facts:
        (folder / "half").write_text("half")
        raise FileNotFoundError(errno.ENOENT, "no such text", "input.txt")

    with pytest.raises(FileNotFoundError, match=r"input\.txt"):
        store.publish(STAGE, FINGERPRINT, fail)
    assert store.find(STAGE, FINGERPRINT) is None
    assert names(store.root / "tmp") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_is_one_sentence_and_leaves_nothing(store: ArtifactStore) -> None:
    def fill(folder: Path, work: Path) -> Facts:
        with open("/dev/full", "w") as stream:
            stream.write("x")
        return {}

    with pytest.raises(InputError, match=f"no space is left on the disk of {store.root}"):
        store.publish(STAGE, FINGERPRINT, fill)
    assert names(store.root / "tmp") == []
    assert store.find(STAGE, FINGERPRINT) is None


def test_full_disk_in_the_words_of_a_library_is_recognised(store: ArtifactStore) -> None:
    def fill(folder: Path, work: Path) -> Facts:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (28)")

    with pytest.raises(InputError, match="no space is left"):
        store.publish(STAGE, FINGERPRINT, fill)


def test_store_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = ArtifactStore(tmp_path / "file" / "store")
    with pytest.raises(InputError, match=r"written to.*FOLDSTACK_HOME"):
        store.publish(STAGE, FINGERPRINT, must_not_run)
    assert store.find(STAGE, FINGERPRINT) is None


def test_home_is_the_environments_or_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLDSTACK_HOME", str(tmp_path / "home"))
    assert foldstack_home() == tmp_path / "home"
    monkeypatch.delenv("FOLDSTACK_HOME")
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore.default().root == tmp_path / "runs" / "store"


def test_threads_that_want_the_same_make_it_once(store: ArtifactStore) -> None:
    times_made = []

    def make(folder: Path, work: Path) -> Facts:
        times_made.append(folder)
        time.sleep(0.3)
        return write_weights(folder, work)

    threads = [
        threading.Thread(target=store.publish, args=(STAGE, FINGERPRINT, make)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times_made) == 1
    assert store.find(STAGE, FINGERPRINT) is not None


MAKER = f"""
def make(folder, work):
    (folder / "half").write_text("half")
    (work / "step").write_text("41")
    print("started", flush=True)
    time.sleep(WAIT)
    return {{"pid": os.getpid()}}
store.publish({STAGE!r}, {FINGERPRINT!r}, make)
"""


def test_two_processes_that_want_the_same_make_it_once(
    store: ArtifactStore, start_python: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    other = start_python(f"WAIT = 1.0\n{MAKER}")
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "started\n"
        assert store.find(STAGE, FINGERPRINT) is None, "seen before it was whole"
        found = store.publish(STAGE, FINGERPRINT, must_not_run)
    assert found.manifest().facts == {"pid": other.pid}
    assert found.open()


def test_killed_process_frees_the_lock_and_leaves_its_work_to_resume_from(
    store: ArtifactStore, start_python: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    with start_python(f"WAIT = 600\n{MAKER}") as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert len(names(store.root / "tmp")) == 1
        other.send_signal(signal.SIGKILL)
    assert store.find(STAGE, FINGERPRINT) is None

    def resume(folder: Path, work: Path) -> Facts:
        return write_weights(folder, work) | {"step": (work / "step").read_text()}

    made = store.publish(STAGE, FINGERPRINT, resume)
    assert made.manifest().facts["step"] == "41"
    assert names(made.open()) == [MANIFEST, "model"]
    assert names(store.root / "tmp") == []
    assert names(store.root / "work" / STAGE) == []


def test_sweeping_leaves_alone_what_a_living_process_builds(
    store: ArtifactStore, start_python: Callable[[str], "subprocess.Popen[str]"]
) -> None:
    dead = store.root / "tmp" / f"recover-{'cd' * 32}-123-456"
    dead.mkdir(parents=True)
    with start_python(f"WAIT = 600\n{MAKER}") as other:
        assert other.stdout is not None
        other.stdout.readline()
        building = set(names(store.root / "tmp"))
        store.publish("recover", "ef" * 32, write_weights)
        would_go = collect_garbage(store, keep_days=-1, dry_run=True)
        assert [removal.kind for removal in would_go] == ["artifact"]
        collect_garbage(store, keep_days=-1)
        assert set(names(store.root / "tmp")) == building - {dead.name}
        assert names(store.root / "work" / STAGE) == [FINGERPRINT]
        other.kill()


def age(path: Path, days: float) -> None:
    then = (datetime.now(UTC) - timedelta(days=days)).timestamp()
    os.utime(path, (then, then))


def test_list_has_the_last_used_first(store: ArtifactStore, artifact: Artifact) -> None:
    other = store.publish("recover", "cd" * 32, write_weights)
    age(artifact.folder / MANIFEST, 3)
    age(other.folder / MANIFEST, 5)
    assert [row.artifact for row in list_artifacts(store)] == [artifact, other]
    store.find(other.stage, other.fingerprint)
    rows = list_artifacts(store)
    assert [row.artifact for row in rows] == [other, artifact]
    assert rows[1].manifest == artifact.manifest()
    assert rows[1].size_bytes > len(CONTENT)


def test_garbage_is_what_was_not_used_for_long(store: ArtifactStore, artifact: Artifact) -> None:
    old = store.publish("recover", "cd" * 32, write_weights)
    kept = store.publish("recover", "ef" * 32, write_weights)
    record = store.root / "records" / "recover" / f"{'cd' * 32}.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    error_of_a_failed_task = store.root / "records" / "0123"
    error_of_a_failed_task.touch()
    age(error_of_a_failed_task, 40)
    young_work, old_work = (store.root / "work" / "recover" / (name * 32) for name in ("01", "02"))
    for folder in (young_work, old_work):
        folder.mkdir(parents=True)
    for path in (old.folder / MANIFEST, kept.folder / MANIFEST, old_work):
        age(path, 40)
    (store.root / "damaged" / "x").mkdir(parents=True)

    would_go = collect_garbage(store, keep_days=30, keep=["efef"], dry_run=True)
    assert old.folder.exists()
    assert record.exists()
    went = collect_garbage(store, keep_days=30, keep=["efef"])
    assert went == would_go
    assert [removal.kind for removal in went] == ["artifact", "work", "damaged", "record", "record"]
    assert went[0].size_bytes > len(CONTENT)
    assert not any(path.exists() for path in (old.folder, old_work, record, error_of_a_failed_task))
    assert young_work.exists()
    assert {row.artifact for row in list_artifacts(store)} == {artifact, kept}
    assert names(store.root / "tmp") == names(store.root / "damaged") == []


def publish_chain(store: ArtifactStore, days: float, *names: str) -> list[Artifact]:
    """Artifacts each made from the one before, all used so many days ago."""
    inputs: tuple[str, ...] = ()
    made = []
    for name in names:
        made.append(store.publish(STAGE, name * 32, write_weights, inputs=inputs))
        age(made[-1].folder / MANIFEST, days)
        inputs = (f"{STAGE}/{name * 32}",)
    return made


def test_garbage_leaves_what_a_kept_artifact_was_made_from(store: ArtifactStore) -> None:
    kept = publish_chain(store, 40, "01", "02", "03")
    publish_chain(store, 40, "04")
    collect_garbage(store, keep=["0303"])
    assert {row.artifact for row in list_artifacts(store)} == set(kept)


def test_a_store_that_is_too_big_loses_what_was_not_used_for_longest(store: ArtifactStore) -> None:
    (oldest,) = publish_chain(store, 9, "01")
    (kept,) = publish_chain(store, 8, "02")
    (old,) = publish_chain(store, 7, "03")
    (young,) = publish_chain(store, 6, "04")
    (in_use,) = publish_chain(store, 0.5, "05")
    sizes = {row.artifact: row.size_bytes for row in list_artifacts(store)}
    limit = sizes[kept] + sizes[young] + sizes[in_use]
    went = collect_garbage(store, keep=["0202"], max_bytes=limit)
    assert [removal.path for removal in went] == [oldest.folder, old.folder]
    collect_garbage(store, max_bytes=0)
    assert [row.artifact for row in list_artifacts(store)] == [in_use]


def test_garbage_has_the_locks_of_older_versions_in_it(store: ArtifactStore) -> None:
    (store.root / "locks").mkdir(parents=True)
    (store.root / "locks" / "compress-abab.lock").touch()
    assert [removal.kind for removal in collect_garbage(store)] == ["leftover"]
    assert not (store.root / "locks").exists()
