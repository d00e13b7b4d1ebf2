"""Every script that README and deploy/README.md name starts, and says what it does."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*sorted(ROOT.glob("benchmarks/*.py")), *sorted(ROOT.glob("deploy/*.py"))]
SCRIPTS = [file for file in FILES if "__main__" in file.read_text(encoding="utf-8")]

# One process for all of them: each imports torch, transformers or Prefect, which takes seconds.
HELP = """
import contextlib, io, json, runpy, sys
from pathlib import Path
said = {}
for script in sys.argv[1:]:
    sys.path.insert(0, str(Path(script).parent))  # as Python does with a script's own folder
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            runpy.run_path(script, run_name="__main__")
            code = "did not read its arguments"
        except SystemExit as end:
            code = end.code or 0
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    said[script] = [code, output.getvalue()]
print(json.dumps(said))
"""


@pytest.mark.timeout(600)
def test_every_script_says_what_it_does() -> None:
    names = [str(file) for file in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *names], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    wrong = {Path(name).name: code for name, (code, _) in said.items() if code != 0}
    assert wrong == {}
    assert {Path(name).name for name, (_, text) in said.items() if "usage:" not in text} == set()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_script_hides_a_module_of_pythons_own(file: Path) -> None:
    """A script's folder comes first on the path: `statistics.py` was taken for Python's once."""
    assert file.stem not in sys.stdlib_module_names
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
