"""Where tests of Triton kernels run: by Triton's interpreter on a CPU (see conftest), compiled on a GPU."""

import pytest
import torch

#: Triton's interpreter is on for the whole process or off.
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, as there is a GPU")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
