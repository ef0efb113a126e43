"""Every kind of model, small."""

# One block but for images: of two the second may drop branches and compute other rows.
TOWER = {"width": 32, "depth": 1, "mlp_dim": 48, "heads": 2}
DECODER = {**TOWER, "vocab_size": 400, "caption_length": 24}
VISION = {**TOWER, "depth": 2, "patch_size": 8, "image_size": 32}
CLIP = {"embed_dim": 16, "vision": VISION, "text": {**TOWER, "vocab_size": 400, "context_length": 16}}
# Model and loss of a recipe.
MODELS: dict[str, tuple[dict, dict]] = {
    "openvision": ({**CLIP, "decoder": DECODER}, {}),
    "clip": (CLIP, {"caption": 0, "texts": ["alt"]}),
    "sigmoid": (CLIP, {"caption": 0, "kind": "sigmoid", "logit_scales": "per_text", "equal_texts": "positives"}),
    "joint": (CLIP, {"caption": 0, "captions": "joint", "logit_scales": "per_text"}),
    "openvision3": (
        {
            **CLIP,
            "kind": "openvision3",
            "vision": {**VISION, "autoencoder": {"kind": "pixels", "channels": 48, "factor": 4, "scale": 1.0}},
            "decoder": DECODER,
            "reconstruction": {**TOWER, "pixels_of": 2, "decoded_at_once": 2},
        },
        {"caption": 1, "texts": ["sentence"], "reconstruction": {}},
    ),
    "genlip": (
        {"kind": "genlip", "vision": VISION, "decoder": {"width": 24, "vocab_size": 400, "caption_length": 24}},
        {"contrastive": 0, "texts": []},
    ),
    "openvision2": ({"kind": "openvision2", "vision": VISION, "decoder": DECODER}, {"contrastive": 0, "texts": []}),
}
