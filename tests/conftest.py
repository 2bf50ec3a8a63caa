"""Before any test module is imported: no network. Tests that cannot run here are skipped.

Triton reads TRITON_INTERPRET when a kernel is defined, so a process either interprets all kernels
and runs the tests marked `interpret`, or compiles them and runs the others.
"""

import importlib.util
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    import torch  # here, so that the line above comes before every import of transformers

    available = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if available else (0, 0)
    here = 10 * capability[0] + capability[1]
    no_triton = importlib.util.find_spec("triton") is None
    for item in items:
        wanted = [marker.args[0] for marker in item.iter_markers("sm")]
        interpret = item.get_closest_marker("interpret") is not None
        if (wanted or item.get_closest_marker("gpu")) and not available:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif wanted and here not in wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs sm_{wanted[0]}, this is sm_{here}"))
        elif interpret and no_triton:
            item.add_marker(pytest.mark.skip(reason="needs triton"))
        elif interpret != INTERPRETED:
            runs_with = "needs" if interpret else "not run with"
            item.add_marker(pytest.mark.skip(reason=f"{runs_with} TRITON_INTERPRET=1"))
