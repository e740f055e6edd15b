"""EVA-CLIP-g at its published size, without allocating its billion weights."""

from __future__ import annotations

import torch

from evlgen.common.registry import registry


def test_it_has_the_published_shape_and_names():
    with torch.device("meta"):
        encoder = registry.get_vision_encoder_class("eva_clip_g")("eva_clip_g", pretrained=False)
    assert (encoder.embed_dim, encoder.num_tokens, encoder.num_prefix_tokens) == (1408, 257, 1)
    assert [round(m, 4) for m in encoder.image_mean] == [0.4815, 0.4578, 0.4082]
    assert [round(s, 4) for s in encoder.image_std] == [0.2686, 0.2613, 0.2758]
    state = encoder.trunk.state_dict()
    blocks = {int(k.split(".")[1]) for k in state if k.startswith("blocks.")}
    assert blocks == set(range(39))
    assert {k for k in state if not k.startswith("blocks.")} == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert state["blocks.0.mlp.fc1.weight"].shape == (6144, 1408)
    assert sum(v.numel() for v in state.values()) == 985_894_528


def test_at_364_pixels_it_has_677_tokens():
    with torch.device("meta"):
        encoder = registry.get_vision_encoder_class("eva_clip_g")(
            "eva_clip_g", image_size=364, pretrained=False
        )
    assert encoder.num_tokens == 677
