"""What `foldstack run` leaves for people to find, also when the home gets another place."""

import json

from foldstack.flows.cli.command_run import link_models
from foldstack.flows.comparison.files import load
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.config.run_config import parse_config


def sweep(home, *fingerprints):
    """The config and the comparison of a sweep that made a model for each fingerprint."""
    rows = []
    for fingerprint in fingerprints:
        folder = home / "store/artifacts/compress_model" / fingerprint / "model"
        folder.mkdir(parents=True)
        rows.append(Row(label=fingerprint, method="m", sparsity=0.2, folder=str(folder)))
    config = parse_config(
        {"methods": ["shortgpt"], "model": {"name": "m"}, "output": {"home": str(home)}}
    )
    return config, Comparison(title="t", sweep="s", model="m", rows=tuple(rows))


def test_links_go_where_the_home_goes(tmp_path):
    link_models(*sweep(tmp_path / "home", "one"))
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/models/m-one").is_dir()


def test_links_of_earlier_sweeps_are_mended(tmp_path):
    home = tmp_path / "home"
    config, comparison = sweep(home, "one")
    (home / "models").mkdir()
    old = "/somewhere/else/store/artifacts/compress_model/one/model"
    (home / "models/m-old").symlink_to(old)
    (home / "models/m-gone").symlink_to(old.replace("one", "two"))
    link_models(config, comparison)
    assert (home / "models/m-old").resolve() == home / "store/artifacts/compress_model/one/model"
    assert not (home / "models/m-gone").exists()


def test_a_comparison_names_its_models_where_they_are(tmp_path):
    _, comparison = sweep(tmp_path / "home", "one")
    folder = tmp_path / "home/sweeps/m-s"
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps(comparison.model_dump(mode="json")))
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    (row,) = load(tmp_path / "elsewhere/sweeps/m-s").rows
    assert row.folder == str(tmp_path / "elsewhere/store/artifacts/compress_model/one/model")
