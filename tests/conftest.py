"""Strict JAX settings and eight virtual devices for every test."""

import gc
import os
from pathlib import Path

from tests.processes import COMPILE_QUICKLY

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILE_QUICKLY}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from sss_jax.process import COLLECT

gc.set_threshold(*COLLECT)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


LONGEST = ("train/test_loop.py", "train/test_step.py", "ssl/", "train/", "models/")
"""Where the tests are that take longest, longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no core waits for the others at the end."""

    def rank(item: pytest.Item) -> int:
        path = item.path.relative_to(Path(__file__).parent).as_posix()
        return next((i for i, start in enumerate(LONGEST) if path.startswith(start)), len(LONGEST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with the real volumes; the test is skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SSS_JAX_DATA", default))
    if not folder.is_dir():
        pytest.skip("real volumes not present; set SSS_JAX_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def micro():
    """A whole SSS set-up of the smallest size: (model, options, batch of eight clips a stream)."""
    import dataclasses

    import numpy as np

    from sss_jax.models.presets import preset
    from sss_jax.models.sss import SSSModel
    from sss_jax.options import ModelOptions, OptimizerOptions, Options, TrainOptions

    options = Options(
        model=ModelOptions(preset="nano", image_size=32, num_classes=2, class_token_std=0.1),
        optimizer=OptimizerOptions(rate=1e-3, encoder_rate=1e-3),
        train=TrainOptions(steps=10, labelled_batch=8, unlabelled_batch=8),
    )
    options = dataclasses.replace(options, semi=dataclasses.replace(options.semi, confidence=0.4))
    small = {"depths": (1, 1, 1, 1), "global_blocks": (2, 3), "embed_dim": 16, "width": 32}
    small |= {"memory_width": 8, "memory_layers": 1, "memory_mlp": 32, "decoder_mlp": 32}
    config = dataclasses.replace(preset("nano", 32), **small, upscale_channels=(16, 8))
    model = SSSModel(config, options.model.num_classes, options.model.class_token_std)

    rng = np.random.default_rng(0)
    image = rng.random((2, 8, 3, 32, 32, 1), np.float32)
    label = np.zeros((8, 3, 32, 32), np.int32)
    label[:, :, 4:16, 6:20], label[:, 1:, 18:28, 12:30] = 1, 2
    image[0] += 0.5 * label[..., None]
    mask = np.ones((8, 3), bool)
    mask[::3, 2] = False
    image[:, ~mask], label[~mask] = 0, 0
    clips = {"slice_mask": mask, "id": np.arange(8, dtype=np.int32)}
    labelled = {"image": np.clip(image[0] / 2, 0, 1), "label": label, **clips}
    unlabelled = {"image": image[1], **clips}
    return model, options, {"labelled": labelled, "unlabelled": unlabelled}
