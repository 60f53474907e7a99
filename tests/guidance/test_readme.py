"""The README's example, where nothing is installed but torch and what torch itself requires."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "packages" / "farmer-guidance"

RUN = """
import doctest, sys
sys.path += sys.argv[2:]
try:
    import einops
except ImportError:
    failed, tried = doctest.testfile(sys.argv[1], module_relative=False)
    print("tried", tried)
    sys.exit(bool(failed))
sys.exit("einops can be imported: the test would prove nothing")
"""


def required(name, seen):
    """Yield the distribution and, recursively, those it requires here."""
    key = re.sub("[-_.]+", "-", name).lower()
    if key in seen:
        return
    seen.add(key)
    try:
        found = distribution(key)
    except PackageNotFoundError:  # for another platform
        return
    yield found
    for requirement in found.requires or []:
        if "extra ==" not in requirement:
            yield from required(re.match(r"[\w.-]+", requirement)[0], seen)


def test_the_readme_runs_with_torch_alone(tmp_path):
    for found in required("torch", set()):
        for file in found.files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(Path(found.locate_file(top)))
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, PACKAGE / "README.md", PACKAGE / "src", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(run.stdout.split("tried")[1]) >= 5


def test_torch_is_all_it_declares():
    names = [re.match(r"[\w-]+", text)[0] for text in distribution("farmer-guidance").requires]
    assert names == ["torch"]
