"""What the decoder sees of strong views: what each is compared with, and what is pasted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sss_jax.config import load
from sss_jax.ssl import dfe
from sss_jax.ssl.pseudo_labels import PseudoLabels
from sss_jax.ssl.strong_features import enhance_views
from sss_jax.ssl.views import StrongView, UnlabelledViews

CLIPS, DIM, SIDE = 2, 4, 8
BOXES = ([[0, 0, 4, 8], [0, 0, 0, 0]], [[0, 0, 0, 0], [0, 4, 8, 8]])  # y0, x0, y1, x1 of 8 pixels


def features(seed):
    rng = np.random.default_rng(seed)
    sides = (SIDE, SIDE // 2, SIDE // 4)
    return tuple(jnp.asarray(rng.normal(size=(CLIPS, s, s, DIM)), jnp.float32) for s in sides)


def pasted(x, box):
    """The neighbouring clip's pixels within a box, drawn pixel by pixel."""
    x, out = np.asarray(x), np.array(x)
    for b, i, j in np.ndindex(x.shape[:3]):
        y, col = (i + 0.5) * SIDE / x.shape[1], (j + 0.5) * SIDE / x.shape[2]
        y0, x0, y1, x1 = box[b]
        if y0 <= y < y1 and x0 <= col < x1:
            out[b, i, j] = x[b ^ 1, i, j]
    return jnp.asarray(out)


@pytest.mark.parametrize("pair", ["strong_strong", "weak_strong"])
def test_each_strong_view_is_compared_with_its_partner(pair):
    options = load("hippocampus:sss", [f"dfe.pair={pair}", "dfe.level_4=true"])
    params = dfe.init_dfe(jax.random.key(0), DIM, options.dfe)
    weak, strong = features(0), [features(1), features(2)]
    image = jnp.zeros((CLIPS, 1, SIDE, SIDE, 1))
    boxes = [jnp.asarray(box, jnp.float32) / SIDE for box in BOXES]
    views = UnlabelledViews(
        image, jnp.ones(image.shape[:4], bool), tuple(StrongView(image, box) for box in boxes)
    )
    pseudo = PseudoLabels(weak, image, None, jnp.float32(0))
    found, lifted, similarity = enhance_views({"dfe": params}, pseudo, strong, views, options, None)
    assert lifted == []
    own = [dfe.project_levels(params, view, options.dfe) for view in strong]
    told = dfe.project_levels(params, weak, options.dfe)
    for index, box in enumerate(BOXES):
        # The weak side is projected once and pasted afterwards.
        cut = jax.tree.map(lambda x, box=box: pasted(x, box), told)
        other = cut if pair == "weak_strong" else own[1 - index]
        expected, _ = dfe.merge_levels(strong[index], own[index], other, options.dfe)
        for level, wanted in zip(found[index], expected, strict=True):
            np.testing.assert_allclose(level, wanted, rtol=1e-4, atol=1e-5)
    assert set(similarity) == {"similarity_level_4", "similarity_level_8", "similarity_level_16"}


def test_without_dfe_the_views_stay_as_they_are():
    options = load("hippocampus:sss", [])
    options = dataclasses.replace(options, dfe=dataclasses.replace(options.dfe, enabled=False))
    strong = [features(1), features(2)]
    assert enhance_views({}, None, strong, None, options, None) == (strong, [], {})
