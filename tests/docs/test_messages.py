"""Messages that docs/troubleshooting.md explains: a failure means that the package no longer prints one of them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def text_of(node: ast.AST) -> str:
    """A string's text, "..." in place of each value that is formatted into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


CODE = "\n".join(
    text_of(node) for path in (ROOT / "minitron_mcore").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))
)
QUOTED = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


def test_the_page_quotes_messages():
    assert len(QUOTED) > 6


@pytest.mark.parametrize("message", QUOTED)
def test_the_package_has_the_message(message):
    for part in filter(None, (part.strip() for part in message.split("..."))):
        assert part in CODE, part
