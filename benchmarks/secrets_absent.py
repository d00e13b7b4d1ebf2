"""Plants secrets, runs sweeps that succeed and that fail, and searches everything for them.

Searched are: what the commands print, Prefect's home with its database and logs, MLflow's database
and files, the store with its artifacts and manifests, reports and resolved configs. Each secret is
looked for as it is, percent-encoded and in base64.

    python benchmarks/secrets_absent.py [--json]
"""

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

SMALL = (
    "calibration.num_windows=4", "calibration.window_tokens=32", "methods=[{name: shortgpt}]",
    "sparsities=[0.15]", "recovery.steps=0", "evaluation.benchmarks=[]", "evaluation.limit=null",
    "evaluation.perplexity.protocol={window_tokens: 64, max_tokens: 256}", "speed.enabled=false",
)  # fmt: skip


def planted(port: int) -> tuple[dict[str, str], dict[str, str]]:
    """Environment, and the secrets in it by name; nothing listens on `port`."""
    secrets = {
        name: f"planted+{name.lower()}/9f3b"
        for name in (
            "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY",
            "PREFECT_API_AUTH_STRING",
        )
    }  # fmt: skip
    in_address = {"tracking address": "plantedtracking77", "hub address": "plantedhub8842"}
    environment = secrets | {
        "MLFLOW_TRACKING_URI": f"http://bob:{in_address['tracking address']}@127.0.0.1:{port}",
        "MLFLOW_TRACKING_USERNAME": "bob",
        "HF_ENDPOINT": f"http://bob:{in_address['hub address']}@127.0.0.1:{port}",
        "HF_HUB_OFFLINE": "0",
    }
    return environment, secrets | in_address


def commands(home: Path, port: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What is run, and what changes in its environment."""
    there = [f"output.home={home}"]
    file = {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}
    return {
        "MLflow is away": (["run", "demo", *SMALL, *there], {}),
        "tracked in a file": (["run", "demo", *SMALL, "seeds=[1]", *there], file),
        "the hub is away": (["run", "demo", *SMALL, "model.name=no/such-model", *there], file),
        "the text is away": (
            ["run", "demo", *SMALL, "calibration.source={corpus: no/such-text}", *there], file,
        ),
        "a password in the config": (
            ["run", "demo", *SMALL, f"tracking.uri=http://bob:plantedconfig55@127.0.0.1:{port}"],
            {},
        ),
    }  # fmt: skip


def forms(secret: str) -> Iterator[bytes]:
    yield secret.encode()
    yield urllib.parse.quote(secret, safe="").encode()
    yield base64.b64encode(secret.encode())
    yield base64.b64encode(f"bob:{secret}".encode())


def search(folder: Path, secrets: dict[str, str]) -> dict[str, list[str]]:
    """The files in which each secret is found."""
    found: dict[str, list[str]] = {name: [] for name in secrets}
    for file in folder.rglob("*"):
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        for name, secret in secrets.items():
            if any(form in content for form in forms(secret)):
                found[name].append(str(file.relative_to(folder)))
    return found


def measure() -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="foldstack-secrets-") as temporary:
        folder = Path(temporary)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = int(unused.getsockname()[1])
        environment, secrets = planted(port)
        secrets["password in the config"] = "plantedconfig55"
        codes = {}
        for name, (arguments, changes) in commands(folder / "home", port).items():
            done = subprocess.run(
                [sys.executable, "-m", "foldstack.flows.cli.app", *arguments],
                cwd=folder, capture_output=True,
                env=os.environ | environment | changes | {"PREFECT_HOME": str(folder / "prefect")},
            )  # fmt: skip
            codes[name] = done.returncode
            (folder / f"{name}.printed").write_bytes(done.stdout + done.stderr)
        found = search(folder, secrets)
        searched = [file for file in folder.rglob("*") if file.is_file()]
        return {
            "planted": len(secrets),
            "absent": sum(not files for files in found.values()),
            "found": {name: files for name, files in found.items() if files},
            "exit_codes": codes,
            "files_searched": len(searched),
            "bytes_searched": sum(file.stat().st_size for file in searched),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    figures = measure()
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<16} {value}")
    sys.exit(0 if figures["planted"] == figures["absent"] else 1)


if __name__ == "__main__":
    main()
