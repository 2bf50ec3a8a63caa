"""Before any test module is imported: no network; tests that need a GPU are skipped without one."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items):
    import torch  # here, so that the line above comes before every import of transformers

    available = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if available else (0, 0)
    here = 10 * capability[0] + capability[1]
    for item in items:
        wanted = [marker.args[0] for marker in item.iter_markers("sm")]
        if (wanted or item.get_closest_marker("gpu")) and not available:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif wanted and here not in wanted:
            item.add_marker(pytest.mark.skip(reason=f"needs sm_{wanted[0]}, this is sm_{here}"))
