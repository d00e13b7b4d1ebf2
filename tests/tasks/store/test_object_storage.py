"""Artifacts on a real S3 server (moto's, on loopback), shared by machines without a common disk."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport
from foldstack.compression.errors import InputError
from foldstack.flows.cli.command_cache import gc_command, list_command
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.preflight import check, is_stored
from foldstack.flows.running.branches import lay_out
from foldstack.flows.running.progress import Silent
from foldstack.flows.sweep import run_sweep
from foldstack.tasks.store import leases, object_leases
from foldstack.tasks.store import object_storage as storage_module
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.leases import Held, Lease
from foldstack.tasks.store.manifest import Facts, now
from foldstack.tasks.store.object_storage import ObjectStorage, object_storage

moto_server = pytest.importorskip("moto.server")
pytest.importorskip("s3fs")

pytestmark = pytest.mark.foreign_warnings

STAGE, FINGERPRINT = "compress", "ab" * 32


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of an S3 server, which the environment names."""
    patch = pytest.MonkeyPatch()
    made = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    made.start()
    host, port = made.get_host_and_port()
    address = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing-access",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    yield address
    patch.undo()
    made.stop()


@pytest.fixture
def bucket(server: str, tmp_path: Path) -> Iterator[Any]:
    """An empty bucket of its own for each test: a file system, and the address."""
    name = "b" + str(abs(hash(tmp_path)))
    files = storage_module._file_system(f"s3://{name}")[0]
    files.mkdir(name)
    yield files, f"s3://{name}/team"
    object_storage.cache_clear()


def write_weights(folder: Path, work: Path) -> Facts:
    (folder / "model").mkdir()
    (folder / "model" / "weights.txt").write_text("weights, more or less")
    (folder / "a.txt").write_text("a")
    return {"parameters": 7}


def must_not_run(folder: Path, work: Path) -> Facts:
    raise AssertionError("made twice")


def objects(files: Any, url: str, part: str) -> list[str]:
    return [name for name in files.find(url) if part in name]


def test_what_one_machine_makes_another_one_finds(bucket: Any, tmp_path: Path) -> None:
    _, url = bucket
    here, there = ArtifactStore(tmp_path / "here", url), ArtifactStore(tmp_path / "there", url)
    assert there.find(STAGE, FINGERPRINT) is None
    made = here.publish(STAGE, FINGERPRINT, write_weights, label="a quarter")
    assert there.holds(there.artifact(STAGE, FINGERPRINT))
    found = there.find(STAGE, FINGERPRINT)
    assert found is not None
    assert found.folder != made.folder
    assert (found.open() / "model" / "weights.txt").read_text() == "weights, more or less"
    assert found.manifest() == made.manifest()
    third = ArtifactStore(tmp_path / "third", url)
    assert third.publish(STAGE, FINGERPRINT, must_not_run).manifest() == made.manifest()
    assert list((third.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("part", ["weights.txt", "manifest.json"])
def test_a_damaged_object_is_set_aside_named_and_made_anew(
    bucket: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    files, url = bucket
    ArtifactStore(tmp_path / "here", url).publish(STAGE, FINGERPRINT, write_weights)
    (name,) = objects(files, url, part)
    content = bytearray(files.cat_file(name))
    content[len(content) // 2] ^= 4
    files.pipe_file(name, bytes(content))
    there = ArtifactStore(tmp_path / "there", url)
    with caplog.at_level(logging.WARNING):
        assert there.find(STAGE, FINGERPRINT) is None
    assert f"{STAGE}/{FINGERPRINT[:12]} is damaged in {url}" in caplog.text
    assert part.partition(".")[0] in caplog.text
    assert len(objects(files, url, "/damaged/")) == 1
    there.publish(STAGE, FINGERPRINT, write_weights)
    found = ArtifactStore(tmp_path / "third", url).find(STAGE, FINGERPRINT)
    assert found is not None
    assert (found.open() / "model" / "weights.txt").read_text() == "weights, more or less"


def test_an_object_that_is_gone_is_named(
    bucket: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, url = bucket
    ArtifactStore(tmp_path / "here", url).publish(STAGE, FINGERPRINT, write_weights)
    files.rm_file(objects(files, url, "weights.txt")[0])
    assert ArtifactStore(tmp_path / "there", url).find(STAGE, FINGERPRINT) is None
    assert "model/weights.txt is missing" in caplog.text


def test_damage_on_the_disk_is_healed_from_the_storage(bucket: Any, tmp_path: Path) -> None:
    _, url = bucket
    store = ArtifactStore(tmp_path / "here", url)
    made = store.publish(STAGE, FINGERPRINT, write_weights)
    (made.folder / "a.txt").write_text("b")
    found = store.find(STAGE, FINGERPRINT)
    assert found is not None
    assert (found.open() / "a.txt").read_text() == "a"


def test_an_upload_that_broke_off_shows_nothing_and_is_made_good(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, url = bucket
    store = ArtifactStore(tmp_path / "here", url)
    put = files.put_file

    def break_off(source: str, target: str, **settings: Any) -> None:
        if target.endswith("weights.txt"):
            raise ConnectionError("the line is dead")
        put(source, target, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(object_storage(url)._files, "put_file", break_off)
        with pytest.raises(InputError, match=r"cannot be used .*the line is dead"):
            store.publish(STAGE, FINGERPRINT, write_weights)
    assert objects(files, url, "a.txt")
    there = ArtifactStore(tmp_path / "there", url)
    assert there.find(STAGE, FINGERPRINT) is None
    assert store.find(STAGE, FINGERPRINT) is not None, "it is whole here"
    assert there.find(STAGE, FINGERPRINT) is not None, "and there since"


def test_ls_and_gc_are_of_the_storage(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, url = bucket
    monkeypatch.setenv("FOLDSTACK_STORE", url)
    ArtifactStore(tmp_path / "here" / "store", url).publish(
        STAGE, FINGERPRINT, write_weights, label="a quarter"
    )
    files.pipe_file(f"{url}/artifacts/{STAGE}/{FINGERPRINT}/{'0' * 32}/rest.txt", b"rest")
    home = tmp_path / "there"
    listed = json.loads(list_command(home, as_json=True))
    assert listed["store"] == url
    assert [row["label"] for row in listed["artifacts"]] == ["a quarter"]

    def collect(days: float) -> list[str]:
        said = gc_command(home, keep_days=days, keep=[], max_gib=None, dry_run=False, as_json=True)
        return [removal["kind"] for removal in json.loads(said)["removed"]]

    assert collect(1) == []
    assert objects(files, url, "rest.txt"), "it may be on its way"
    monkeypatch.setattr(storage_module, "UPLOAD_LASTS", timedelta(0))
    assert collect(1) == []
    assert not objects(files, url, "rest.txt")
    assert objects(files, url, "weights.txt")
    assert collect(0) == ["artifact"]
    assert not objects(files, url, "artifacts")


def test_use_renews_the_date(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, url = bucket
    store = ArtifactStore(tmp_path / "here", url)
    store.publish(STAGE, FINGERPRINT, write_weights)
    put: list[str] = []
    storage = object_storage(url)
    monkeypatch.setattr(storage._files, "pipe_file", lambda place, _content: put.append(place))
    store.find(STAGE, FINGERPRINT)
    assert put == []
    monkeypatch.setattr(storage_module, "TOUCH_AFTER", timedelta(0))
    store.find(STAGE, FINGERPRINT)
    assert [place.rpartition("/")[2] for place in put] == ["manifest.json"]


def test_a_storage_that_does_not_work_is_a_sentence(server: str) -> None:
    with pytest.raises(InputError, match=r"store at s3://nowhere-at-all/x cannot be used .*bucket"):
        ObjectStorage("s3://nowhere-at-all/x").check()
    with pytest.raises(InputError, match=r"cannot be used .*Protocol not known: gopher"):
        ObjectStorage("gopher://x/y")


MACHINE = f"""
import sys, time
from pathlib import Path
from foldstack.tasks.store import leases
from foldstack.tasks.store import object_leases
from foldstack.tasks.store.artifacts import ArtifactStore

home, url, made, pause, *names = sys.argv[1:]
leases._machine = lambda: home  # as if on another one: nobody sees whether its processes live
leases.BEAT_SECONDS, object_leases.STALE_SECONDS = 0.5, 3.0

def make(folder, work):
    with open(made, "a") as log:
        log.write(home + chr(10))
    time.sleep(float(pause))
    (folder / "weights.txt").write_text("the same everywhere")
    return {{}}

print("begun", flush=True)
for name in names:
    found = ArtifactStore(Path(home), url).publish({STAGE!r}, name * 32, make)
    assert (found.open() / "weights.txt").read_text() == "the same everywhere"
"""


def machine(home: Path, url: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", MACHINE, str(home), url, str(home.parent / "made"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_two_machines_make_each_artifact_once(bucket: Any, tmp_path: Path) -> None:
    files, url = bucket
    names = ["a1", "b2", "c3", "d4"]
    with (
        machine(tmp_path / "one", url, "1", *names) as one,
        machine(tmp_path / "two", url, "1", *names) as two,
    ):
        assert (one.wait(120), two.wait(120)) == (0, 0)
    made = (tmp_path / "made").read_text().splitlines()
    assert len(made) == len(names)
    left = objects(files, url, "/leases/")
    assert len(left) == len(names)
    assert all(name.endswith(".free") for name in left)


def test_a_machine_that_died_is_taken_over_by_another(bucket: Any, tmp_path: Path) -> None:
    files, url = bucket
    with machine(tmp_path / "dead", url, "600", "ab") as dead:
        while not objects(files, url, "/leases/"):
            time.sleep(0.1)
        dead.kill()
    (lease,) = objects(files, url, "/leases/")
    started = time.monotonic()
    with machine(tmp_path / "heir", url, "0", "ab") as heir:
        assert heir.wait(60) == 0
    assert time.monotonic() - started > 3
    assert objects(files, url, "/leases/") == [lease.replace("/1", "/2.free")]
    assert (tmp_path / "made").read_text().splitlines()[-1] == str(tmp_path / "heir")


def test_a_paused_machine_sees_that_it_lost_its_lease(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = bucket
    monkeypatch.setattr(leases, "_machine", lambda: "")  # which cannot say that we are alive
    place = object_storage(url).leases("compress-ab")
    lease = Lease.take(place)
    other = object_storage(url).leases("compress-ab")
    with pytest.raises(Held, match=rf":{os.getpid()}$"):
        Lease.take(other)
    monkeypatch.setattr(object_leases, "STALE_SECONDS", -1.0)
    heir = Lease.take(other)
    assert lease.is_lost()
    with pytest.raises(FileNotFoundError):
        place.touch("1")
    lease.release()
    assert (place.names(), heir.is_lost()) == (["2"], False)
    heir.release()
    assert place.names() == ["2.free"]


def test_old_leases_go_with_what_they_were_for(bucket: Any, tmp_path: Path) -> None:
    files, url = bucket
    store = ArtifactStore(tmp_path / "here", url)
    store.publish(STAGE, FINGERPRINT, write_weights)
    Lease.take(object_storage(url).leases(f"{STAGE}-{'cd' * 32}")).release()
    assert len(objects(files, url, "/leases/")) == 2
    object_storage(url).remove_old_leases(now() - timedelta(days=1))
    assert len(objects(files, url, "/leases/")) == 2
    object_storage(url).remove_old_leases(now() + timedelta(days=1))
    assert [FINGERPRINT in name for name in objects(files, url, "/leases/")] == [True]


@pytest.mark.usefixtures("prefect_server")
def test_a_sweep_on_another_machine_finds_everything(
    bucket: Any,
    tmp_path: Path,
    model_folder: Callable[..., Path],
    text_lines: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "LlamaForCausalLM", 0.0)
    monkeypatch.setattr(checkpoint, "check_reload", lambda model, folder, **_: seen)
    files, url = bucket
    text = tmp_path / "lines.txt"
    text.write_text("\n\n".join(text_lines))
    source = {"corpus": str(text), "separator": "\n\n"}
    protocol = {"window_tokens": 32, "max_tokens": 200}
    data: dict[str, Any] = {
        "model": {"name": str(model_folder("llama")), "device": "cpu"},
        "calibration": {"source": source, "num_windows": 4, "window_tokens": 16, "bos": "none"},
        "methods": ["svd_llm"],
        "evaluation": {"perplexity": {"source": source, "protocol": protocol}},
        "speed": {"enabled": False},
        "tracking": {"enabled": False},
        "workers": 2,
    }

    def run(machine: str) -> Any:
        output = {"home": str(tmp_path / machine), "store": url}
        layout = lay_out(parse_config(data | {"output": output}))
        check(layout)
        return layout, run_sweep(layout, Silent())

    layout, first = run("one")
    assert first.num_cached == 0
    layout, second = run("two")
    assert second.num_cached == second.num_stages
    assert second.rows[1].after == first.rows[1].after
    assert second.rows[1].before == first.rows[1].before

    (name,) = objects(files, url, f"{layout.statistics.fingerprint}/manifest.json")
    files.pipe_file(name, files.cat_file(name)[:-30])
    layout, third = run("three")
    assert third.num_cached == third.num_stages - 1
    assert f"gather_statistics/{layout.statistics.fingerprint[:12]} is damaged in" in caplog.text
    assert all(is_stored(stage, layout) for stage in layout.stages)
    assert "testing-secret" not in caplog.text
