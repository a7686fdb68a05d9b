"""Installs wheels and sdists into fresh environments, beside this one's packages, and tries what they installed.

Run: ``python tests/installed_package.py dist/*``, as ``make package`` does. Nothing is downloaded.
"""

import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src" / "flux_attention"
TRY = """
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import flux_attention

folder = Path(flux_attention.__file__).parent
assert folder.is_relative_to(sys.prefix), f"{folder} is another installation"
print(*(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), sep="\\n")
assert flux_attention.__version__ == distribution("flux-attention").version
entry, = distribution("flux-attention").entry_points.select(group="vllm.general_plugins")
assert entry.attr == "register" and find_spec(entry.module)  # which imports vLLM, and is tested where that is
from flux_attention.shipped import load_shipped

model, tokenizer, routing = load_shipped()
inputs = tokenizer("def area(width, height):", return_tensors="pt", return_token_type_ids=False)
model.generate(**inputs, max_new_tokens=2)
assert len(routing.routes.layers) == 10
"""


def files(folder: Path) -> set[str]:
    """What is in a package's folder, by its path there."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def check(archive: Path, environment: Path) -> None:
    """Install one archive, and try it from a folder that holds no sources."""
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # An editable installation of this package is not found so: its own .pth is read by this environment alone.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--root-user-action=ignore"]
    subprocess.run([*pip, *options, archive], check=True)
    tried = subprocess.run([python, "-I", "-c", TRY], cwd=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = {line for line in tried.stdout.splitlines() if "__pycache__" not in line}
    if missing := files(SOURCES) - found:
        sys.exit(f"{archive.name} lacks {sorted(missing)}")
    command = [environment / "bin" / "flux-attention", "--version"]
    said = subprocess.run(command, cwd=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"{archive.name}: {said}, {len(found)} files, runs")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(name).resolve(), Path(folder) / "env")
