"""Docstrings out of Python files; what they are together is tested with the demo."""

from gemmascope.activations.python_docs import docstrings


def test_docstrings(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        '"""Module."""\nclass A:\n    """Class."""\n    async def f(self):\n        """Method."""\nx = "no"\n'
    )
    assert list(docstrings(path)) == ["Module.", "Class.", "Method."]
    path.write_text("def broken(:\n")
    assert list(docstrings(path)) == []
