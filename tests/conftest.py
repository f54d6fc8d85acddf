"""The files under test lie one folder up; they are imported as a reader runs them, without
installation."""
import os
import sys
from pathlib import Path

import pytest

# Tensors here are too small to share between threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some images round fp32 products to ten bits; the tests' tolerances do not.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    for marker in ("core: the mathematics of one function (tests/test_losses.py)",
                   "care: what real batches need besides: padding, dtypes, errors in words, stats"):
        config.addinivalue_line("markers", marker)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """A test that takes this runs on every kind of device that is there."""
    import torch                                       # after OMP_NUM_THREADS is set
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return request.param
