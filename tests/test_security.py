"""What SECURITY.md says of the code."""

import ast
import re
from pathlib import Path

from fedlora_jax import methods
from fedlora_jax.methods._base import READS_EACH_CLIENT

ROOT = Path(__file__).parents[1]
PAGE = " ".join((ROOT / "SECURITY.md").read_text().split())
SOURCES = sorted((ROOT / "fedlora_jax").rglob("*.py"))


def test_methods_whose_server_reads_each_client_are_named():
    listed = re.search(r"- ((?:`\w+`,\s+)+`\w+`): the server's step", PAGE)
    reading = [
        name
        for name in sorted(methods.REGISTRY)
        if methods.get(name)().refuses.get("privacy") == READS_EACH_CLIENT
    ]
    assert re.findall(r"`(\w+)`", listed[1]) == reading


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)", PAGE) + re.findall(r"`([\w/]+\.py)`", PAGE):
        assert (ROOT / target).is_file(), target


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords}


def test_nothing_is_unpickled():
    for path in SOURCES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        assert not names & {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}, path
        for name, options in calls(path):
            assert options.get("allow_pickle", "False") == "False", path
            assert name != "np.load" or "allow_pickle" in options, path


def test_what_a_model_wrote_is_run_by_the_guard_alone():
    running = {"exec", "eval", "os.system", "subprocess.Popen", "subprocess.run", "runpy.run_path"}
    found = {path.name for path in SOURCES for name, _ in calls(path) if name in running}
    assert found == {"_guard.py", "execution.py"}
