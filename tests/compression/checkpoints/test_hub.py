"""Of the hub one copy of a model comes, and pickles become safetensors without being run."""

import hashlib
import json
import pickle
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from foldstack.compression.checkpoints import hub
from foldstack.compression.checkpoints.checkpoint import load_model
from foldstack.compression.checkpoints.pickled_weights import convert, tensors_in
from foldstack.compression.errors import InputError

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    repositories: ClassVar[dict[str, dict[str, bytes]]]
    sent: ClassVar[list[str]]

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = next((name for name in self.repositories if f"/{name}/" in f"{path}/"), None)
        if name is None:
            self.send_error(404)
            return
        files, headers = self.repositories[name], {"X-Repo-Commit": COMMIT}
        if path.startswith("/api/") and "/tree/" in path:
            entries = [
                {"type": "file", "path": f, "size": len(b), "oid": hashlib.sha1(b).hexdigest()}
                for f, b in files.items()
            ]
            body = json.dumps(entries).encode()
        elif path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in files]
            body = json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode()
        else:
            file = path.split("/resolve/")[1].split("/", 1)[1]
            body = files[file]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
            if self.command == "GET":
                self.sent.append(file)
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    import huggingface_hub
    from huggingface_hub import constants

    handler = type("FreshHub", (Hub,), {"repositories": {}, "sent": []})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert huggingface_hub.HfApi().endpoint == address
        yield handler
        server.shutdown()


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_one_copy_of_the_weights_comes(served, model_folder):
    files = files_of(model_folder("llama"))
    other = dict.fromkeys(
        ["consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "x.onnx"],
        b"another copy",
    )
    served.repositories["own/both"] = files | other | {"original/params.json": b"{}"}
    folder = hub.download("own/both", None)
    assert sorted(served.sent) == sorted(files)
    assert load_model(folder).num_parameters() > 0


def test_pickles_become_safetensors_once(served, model_folder, tmp_path):
    source = model_folder("llama_tied")
    model, files = load_model(source), files_of(source)
    torch.save(model.state_dict(), tmp_path / "weights.bin")  # head and embedding are one tensor
    del files["model.safetensors"]
    served.repositories["own/pickle"] = files | {
        "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()
    }
    folder = hub.download("own/pickle", None)
    again = load_model(folder)
    assert again.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert not list(folder.rglob("*.bin"))
    assert hub.download("own/pickle", None) == folder


def test_parts_of_pickles_are_parts_again(model_folder, tmp_path):
    source, held = model_folder("llama"), load_file(model_folder("llama") / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(held)
    halves = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, some in halves.items():
        torch.save({name: held[name] for name in some}, source / file)
    (tmp_path / "out").mkdir()
    convert(source, [source / "a.bin", source / "b.bin"], tmp_path / "out")
    for name, tensor in load_model(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, held[name])


class Malice:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("content", [pickle.dumps(Malice()), b"damaged", pickle.dumps([1, 2])])
def test_a_pickle_of_anything_else_is_refused(content, tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        tensors_in(tmp_path / "pytorch_model.bin")
    assert capsys.readouterr().out == ""


def test_a_repository_without_weights_that_can_be_read(served):
    served.repositories["own/flax"] = {"config.json": b"{}", "flax_model.msgpack": b"x"}
    with pytest.raises(InputError, match=r"its weights are flax_model\.msgpack"):
        hub.download("own/flax", None)


def test_of_many_gguf_files_none_comes_unasked(served):
    names = ["q4.gguf", "q8.gguf"]
    served.repositories["own/gguf"] = dict.fromkeys(["config.json", *names], b"{}")
    with pytest.raises(InputError, match=r"holds 2 GGUF files; download one, like q4\.gguf"):
        hub.download("own/gguf", None)
    assert not served.sent


def test_a_repository_that_is_not_there(served):
    with pytest.raises(InputError, match="own/nothing cannot be fetched from the hub"):
        hub.download("own/nothing", None)
