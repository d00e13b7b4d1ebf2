"""An MLflow database whose tables exist, a copy of it for each test: making them takes seconds."""

from pathlib import Path

import pytest
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def uri(database: bytes, tmp_path: Path) -> str:
    copy = tmp_path / "mlflow.db"
    copy.write_bytes(database)
    return f"sqlite:///{copy}"
