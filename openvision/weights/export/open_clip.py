"""A folder that stock open_clip loads: `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

The tokenizer goes along in the form open_clip's mode "clips" reads; folding of rare letters follows ours.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from openvision.errors import require
from openvision.models.layers import unit
from openvision.text.tokenizer import FILE_NAME
from openvision.weights.export.parity import Parity, compare, example_images, text_model
from openvision.weights.export.text import EXAMPLE_TEXTS, example_ids, write_tokenizer
from openvision.weights.load import Checkpoint
from openvision.weights.open_clip import CONFIG_FILE, WEIGHT_FILES, config_to_open_clip, to_open_clip


def write_open_clip(checkpoint: Checkpoint, folder: Path) -> None:
    """Write weights, configuration and tokenizer; the caption decoder has no place there."""
    model = text_model(checkpoint)
    state = {name: tensor.contiguous() for name, tensor in to_open_clip(model.state_dict(), model.config).items()}
    save_file(state, folder / WEIGHT_FILES[0], metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config_to_open_clip(model.config), indent=2) + "\n")
    if checkpoint.tokenizer is not None:
        write_tokenizer(checkpoint.tokenizer, folder, model.config.text.context_length)


def check_open_clip(checkpoint: Checkpoint, folder: Path) -> list[Parity]:
    """Load the folder with stock open_clip and compare image and text features, and the ids of its tokenizer."""
    open_clip = require("open_clip", extra="open-clip")
    model = text_model(checkpoint)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs.eval()
    images, ids = example_images(checkpoint.vision), example_ids(checkpoint)
    with torch.inference_mode():
        results = [
            compare("image features", model.encode_image(images), unit(theirs.encode_image(images))),
            compare("text features", model.encode_text(ids), unit(theirs.encode_text(ids))),
        ]
    if checkpoint.tokenizer is not None and (folder / FILE_NAME).is_file():
        found = open_clip.get_tokenizer(f"local-dir:{folder}")(list(EXAMPLE_TEXTS))
        results.append(compare("ids", ids, found, 0))
    return results
