"Every notebook runs from its first cell to its last, as `nbdev-test` runs it."
import os

import pytest
from conftest import ROOT

from she_nb.book.kernels import SOCKET

FOLDER = ROOT / "nbs"
NOTEBOOKS = [path.relative_to(FOLDER) for path in sorted(FOLDER.rglob("*.ipynb"))]


def hidden(path): return any(part.startswith((".", "_")) for part in path.parts)


@pytest.mark.parametrize("notebook", [path for path in NOTEBOOKS if not hidden(path)], ids=lambda path: str(path.with_suffix("")))
def test_it_runs(notebook):
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook  # its traceback goes to standard error
    warm = os.environ.get(SOCKET)
    passed, seconds = run_notebook(FOLDER / notebook, get_config(FOLDER).tst_flags.split(), basepath=ROOT)
    assert passed and os.environ.get(SOCKET) == warm   # the next one finds the warm process as well
