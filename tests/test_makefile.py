"""What the Makefile does before any test can run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# As Debian's without the package python3-venv: it leaves an environment without pip.
WITHOUT_VENV = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin" && touch "$3/bin/python" && exit 1
"""

# As one that says in place of an environment whether it would keep what it compiles.
KEEPS = """#!/bin/sh
[ "$2" = venv ] && exec {python} -c "import sys; print(f'keeps: {{not sys.dont_write_bytecode}}')"
exit 0
"""


def make(*arguments):
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_an_environment_that_failed_does_not_stay(tmp_path):
    python, environment = tmp_path / "python", tmp_path / "environment"
    python.write_text(WITHOUT_VENV)
    python.chmod(0o755)
    made = make(f"{environment}/bin/python", f"VENV={environment}", f"PYTHON={python}")
    assert made.returncode != 0 and "python3-venv" in made.stderr
    assert not environment.exists()


def test_what_python_compiles_is_kept(tmp_path, monkeypatch):
    """Whoever says no: pip compiles nothing, and each process would compile JAX anew."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    python, environment = tmp_path / "python", tmp_path / "environment"
    python.write_text(KEEPS.format(python=sys.executable))
    python.chmod(0o755)
    made = make(f"{environment}/bin/python", f"VENV={environment}", f"PYTHON={python}")
    assert "keeps: True\n" in made.stdout, made.stdout + made.stderr


def test_the_demo_installs_what_an_accelerator_needs(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    (tmp_path / ".core").touch()  # set up before, without
    made = make("--dry-run", "demo", f"VENV={tmp_path}", "EXTRAS=cuda").stdout
    assert "--editable '.[cuda]'\n" in made and f"touch {tmp_path}/.core " in made
    assert "--editable" not in make("--dry-run", "demo", f"VENV={tmp_path}", "EXTRAS=").stdout
    (tmp_path / ".core").unlink()
    assert "--editable '.'\n" in make("--dry-run", "demo", f"VENV={tmp_path}", "EXTRAS=").stdout
