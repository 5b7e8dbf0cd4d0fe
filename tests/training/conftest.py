"""The Ray that the tests of training jobs share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cluster whose workers find the locks that a killed build leaves behind: whoever builds would wait for ever.

    Yields the folder of the builds.
    """
    import ray

    builds = tmp_path_factory.mktemp("torch_extensions")
    for op in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils"):
        (builds / op).mkdir()
        (builds / op / "lock").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(builds))
        ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
        yield builds
        ray.shutdown()
