"""Meta's code still says what `tests/models/golden.npz` holds.

After a deliberate change of the inputs: `python -m tests.parity.test_golden` writes the file anew.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sam2", reason="Meta's code is not installed; tests/parity/meta.py says how")

from tests.models import golden  # noqa: E402
from tests.parity import meta  # noqa: E402

SMALL = """
image_encoder.trunk.embed_dim=8 image_encoder.trunk.stages=[1,1,2,1]
image_encoder.trunk.global_att_blocks=[3] image_encoder.neck.d_model=32
image_encoder.neck.backbone_channel_list=[64,32,16,8]
image_encoder.neck.position_encoding.num_pos_feats=32
memory_attention.d_model=32 memory_attention.num_layers=2
memory_attention.layer.d_model=32 memory_attention.layer.dim_feedforward=64
memory_attention.layer.self_attention.embedding_dim=32
memory_attention.layer.cross_attention.embedding_dim=32
memory_attention.layer.cross_attention.kv_in_dim=8
memory_encoder.in_dim=32 memory_encoder.out_dim=8
memory_encoder.position_encoding.num_pos_feats=8
memory_encoder.mask_downsampler.embed_dim=32 memory_encoder.fuser.layer.dim=32
"""


def network():
    overrides = [f"++model.{line}" for line in SMALL.split()]
    return meta.predictor(golden.CONFIG, golden.weights(), overrides)


def outputs(model):
    """Everything that `golden` computes, by Meta's code."""
    maps = [meta.pixels(level) for level in golden.features()]
    return {
        **encoder(model),
        **decoder(model, maps),
        **memory(model, maps[2]),
        **attention(model),
    }


def encoder(model):
    levels = model.image_encoder(meta.pixels(golden.image()))["backbone_fpn"]
    return {f"features {i}": meta.channels_last(level) for i, level in enumerate(levels)}


def decoder(model, maps):
    prompts, head = model.sam_prompt_encoder, model.sam_mask_decoder
    given = torch.from_numpy(golden.BOX[0]), torch.from_numpy(golden.LABELS[0])
    sparse, dense = prompts(points=given, boxes=None, masks=None)
    embedded = prompts._embed_masks(torch.from_numpy(golden.mask_logits()))
    coarse = maps[2] + model.no_mem_embed.reshape(1, -1, 1, 1)
    skips = [head.conv_s0(maps[0]), head.conv_s1(maps[1])]
    place = prompts.get_dense_pe()
    masks, iou, _, score = head.predict_masks(coarse, place, sparse, dense, False, skips)
    inputs = {"point_coords": given[0], "point_labels": given[1]}
    pointer = model._forward_sam_heads(coarse, inputs, None, skips, True)[5]
    return {
        "prompt tokens": sparse[0],
        "mask prompt": meta.channels_last(embedded)[0],
        "positions of the grid": meta.channels_last(place)[0],
        "mask logits": masks[0],
        "estimated IoU": iou[0],
        "object score": score[0],
        "pointer": pointer[0],
    }


def memory(model, coarse):
    flat = coarse.flatten(2).permute(2, 0, 1)
    full = torch.nn.functional.interpolate(
        torch.from_numpy(golden.mask_logits()), (golden.SIDE,) * 2, mode="bilinear"
    )
    grid = [(golden.GRID, golden.GRID)]
    found, _ = model._encode_new_memory([flat], grid, full, torch.ones(1, 1), False)
    return {"memory features": found[0].flatten(1).T}


def attention(model):
    grid = (golden.GRID, golden.GRID)
    coarse = meta.pixels(golden.faint_map())
    place = model.image_encoder.neck.position_encoding(coarse)
    spots = model.memory_encoder.position_encoding(torch.zeros(1, 1, *grid))

    def kept(encoded, pointer):
        memory = np.moveaxis(encoded[0, 0].reshape(1, *grid, -1), -1, 1)
        return {
            "maskmem_features": torch.from_numpy(np.ascontiguousarray(memory)),
            "maskmem_pos_enc": [spots],
            "obj_ptr": torch.from_numpy(pointer[0]),
        }

    known = {t: kept(*pair) for t, pair in golden.remembered().items()}
    outputs = {
        "cond_frame_outputs": {t: known[t] for t in golden.PROMPTED},
        "non_cond_frame_outputs": {t: known[t] for t in golden.TRACKED},
    }
    current, places = ([x.flatten(2).permute(2, 0, 1)] for x in (coarse, place))
    seen = model._prepare_memory_conditioned_features(
        golden.INDEX, False, current, places, [grid], outputs, golden.COUNT
    )
    return {"memory attention": meta.channels_last(seen)[0]}


@torch.no_grad()
def measured():
    return {name: np.asarray(x, np.float32) for name, x in outputs(network()).items()}


def test_the_file_holds_what_metas_code_says():
    with np.load(golden.FILE) as held:
        found = measured()
        assert found.keys() == set(held)
        for name, array in found.items():
            assert golden.error(held[name], array) < 1e-5, name


if __name__ == "__main__":
    np.savez_compressed(golden.FILE, **measured())
