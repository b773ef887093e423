"""What the README says, done; and that links in the documentation lead somewhere."""

import re
from pathlib import Path

from fedlora_jax import aggregation, methods

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_aggregation_example_runs():
    example = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "stack(" in block
    )
    scope = {}
    exec(example, scope)
    found = aggregation.error(scope["stacked"], scope["weights"], scope["result"])
    assert 0 <= float(found) < 1
    assert scope["result"].residual is None


def test_methods_named_are_those_there_are():
    listed = re.search(r"Methods \(\[what each does\].*?: (.*?)A mistyped", README, re.S).group(1)
    assert set(re.findall(r"\w+(?=[,`.])", listed)) >= set(methods.REGISTRY)


def anchors(path):
    """The headings of a Markdown file as GitHub names them, and the names that it gives itself."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    headings = [re.sub(r"[^\w\- ]", "", line) for line in re.findall(r"^#+ (.*)$", text, re.M)]
    names = re.findall(r'<a name="([^"]*)">', text)
    return {heading.strip().lower().replace(" ", "-") for heading in headings} | set(names)


def test_relative_links_lead_somewhere():
    pages = [
        *ROOT.glob("*.md"),
        *(page for top in ("docs", "experiments") for page in ROOT.glob(f"{top}/**/*.md")),
    ]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if not target.exists() or anchor and anchor not in anchors(target):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert len(pages) > 50 and not broken


def test_extras_are_installed_from_a_checkout():
    """The package is on no index: nothing advises to install it from there."""
    pages = [
        p
        for folder in ("configs", "docs", "experiments", "fedlora_jax", "notebooks")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".py", ".md", ".ipynb")
    ]
    assert len(pages) > 200
    pages.append(ROOT / "README.md")
    assert not [page for page in pages if "install 'fedlora-jax" in page.read_text()]


def test_commands_say_where_to_write():
    """Without its directory none of these starts."""
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("experiments/**/*.md")]
    commands = [
        (page, command)
        for page in pages
        for block in re.findall(r"```\n(.*?)```", page.read_text(), re.S)
        for command in block.replace("\\\n", " ").splitlines()
        if re.search(r"python -m experiments\.(train|tune|compare|partition|linear) ", command)
    ]
    assert len(commands) > 30
    assert not [found for found in commands if "--workdir=" not in found[1]]
