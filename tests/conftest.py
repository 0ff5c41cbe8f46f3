"""What the tests share: the command in a subprocess, a desk of its own for every test, and toy stages."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

from she_nb.book.examples import write_stages
from she_nb.book.kernels import SOCKET

ROOT = Path(__file__).resolve().parent.parent

class Desk:
    "A folder with its own work/ and reports/, in which the command runs; `start` runs what is to be killed."
    shared = {name: os.environ[name] for name in [SOCKET] if name in os.environ}   # the warm process of the tests

    def __init__(self, folder, stages=None):
        self.folder, self.work, self.reports = folder, folder / "work", folder / "reports"
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SHE_NB_", "MAKE"))}
        self.env |= {"SHE_NB_WORK": str(self.work), "SHE_NB_REPORTS": str(self.reports), "PYTHONPATH": path}
        toys = {"SHE_NB_STAGES": str(stages), "SHE_NB_WARM": "papermill,ipykernel.kernelapp"}  # they need no PyTorch
        if stages: self.env |= toys

    def words(self, *words): return [sys.executable, "-m", "she_nb.book.cli", *map(str, words)]

    def run(self, *words):
        return subprocess.run(self.words(*words), cwd=self.folder, env=self.env | self.shared, capture_output=True, text=True)

    def start(self, *words, shared=()):   # with imports of its own, unless it gets those that `run` shares
        return subprocess.Popen(self.words(*words), cwd=self.folder, env=self.env | dict(shared), stdout=subprocess.DEVNULL,
                                stderr=subprocess.DEVNULL, start_new_session=True)

    def files(self):
        "What was written: no file at all, if a command refused to start."
        return [path for top in (self.work, self.reports) for path in top.rglob("*") if path.is_file()]


@pytest.hookimpl(optionalhook=True)     # the environment of vLLM has no pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """A process runs all tests of a file, which share what they make; every notebook is a file of its own, but the two that
    measure trainers: their processes are forked from one that imports the trainers once."""
    from xdist.scheduler import LoadScopeScheduling
    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, _ = nodeid.partition("::")
            if not file.endswith("test_notebooks.py"): return file
            return "benchmark" if nodeid.endswith("benchmark]") else nodeid
    return ByFile(config, log)


def pytest_collection_modifyitems(items): items.sort(key=lambda item: item.path.stem == "test_notebooks")  # these last


@pytest.fixture
def desk(tmp_path):
    write_stages(tmp_path / "stages")
    return Desk(tmp_path, tmp_path / "stages")


def refused(done, words, code=2):
    "The command failed with one sentence that holds `words`, and no traceback."
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("she-nb: "), done.stderr
    assert words in lines[0]
    assert lines[0].endswith((".", "?"))


@pytest.fixture(scope="session")
def tokenizer():
    "The small policy's tokenizer."
    from small import make_tokenizer  # and torch with it, for those who need it
    return make_tokenizer()


@pytest.fixture(scope="session")
def policy(tokenizer, tmp_path_factory):
    "A small policy that knows the form of a response."
    from small import tuned_policy
    return tuned_policy(tokenizer, tmp_path_factory.mktemp("tuned"))
