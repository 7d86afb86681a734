"""The Python of docs/scaling.md runs, and finds what it says."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[3] / "docs" / "scaling.md").read_text()


def test_python(capsys):
    code, = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(code, {})
    said = capsys.readouterr().out.splitlines()[-1]
    promised = re.search(r"# (frugal needs [\d.]+ x the compute of plain \([\d.]+ to [\d.]+\))", code)[1]
    assert said.startswith(promised)
