"""README.md of an export: what it is, how it is loaded, what is exact and what is not."""

from pathlib import Path

from openvision.weights.export.parity import Parity
from openvision.weights.load import Checkpoint

_USE = {
    "safetensors": """```python
import openvision
encoder = openvision.{load}("{folder}")
```""",
    "open_clip": """```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder}")
```

open_clip's preprocessing rounds where training truncated, and its resize differs in the last grey levels. The caption
decoder is not part of this format.""",
    "timm": """```python
import timm
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
```

`model(images)` is the image embedding before it is scaled to unit length. Positions are those of {side} px: for another
resolution export again with `--resolution`.""",
    "transformers": """```python
from transformers import ViTModel
tower = ViTModel.from_pretrained("{folder}", add_pooling_layer=False)
tokens = tower(pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
```

`hidden_states[i]` are exact. **`last_hidden_state` and `pooler_output` are not OpenVision's pooled embedding**: this
class norms each token, OpenVision norms the mean. The embedding is, with the tensors of `projection.safetensors`,
`layer_norm(hidden_states[-1][:, 1:].mean(1), fc_norm, eps=1e-6) @ head.T`, then unit length. The export `beit` has a
pooled output that is exact.

`text/` (where the model has a text tower) is a `SiglipTextModel`: `pooler_output` is the text embedding before unit
length. It reads exactly {length} ids: `[bos]`, tokens, `[eos]`, pads, and `[CLS]` in the last column, which no stock
tokenizer puts there; pad to {length} - 1 ids and append it, and give no attention mask.""",
    "beit": """```python
from transformers import BeitModel
tower = BeitModel.from_pretrained("{folder}")
pooled = tower(pixel_values).pooler_output
```

Hidden states and `pooler_output` are exact; `pooler_output @ head.T` with `projection.safetensors` is the embedding
before it is scaled to unit length. (A key bias adds one number to all scores of a query, so this class needs none.)""",
    "siglip": """```python
from transformers import SiglipVisionModel
tower = SiglipVisionModel.from_pretrained("{folder}")
```

**Not the same encoder**: this class has no class token, which takes part in OpenVision's attention. The differences
below are what that does to the tokens. Take `transformers` or `beit` where the stack allows it.""",
    "onnx": """```python
import onnxruntime
session = onnxruntime.InferenceSession("{folder}/vision.onnx")
image_embeds, patch_tokens = session.run(None, {{"images": pixels}})
```

Inputs and sizes are in `onnx.json`.""",
}


# What a stock library does not do to an image before it resizes; tests run this block.
_UPRIGHT = """## Images

OpenVision turns an image upright by its EXIF orientation, composites transparency on white and scales 16 bits to 8.
Other libraries do not: none turns an image or scales 16 bits, and open_clip and timm show the colours that transparency
hides. That changes the embedding, so do it first:

```python
import numpy as np
from PIL import Image, ImageOps

def upright_rgb(image):
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
```
"""


def write_card(checkpoint: Checkpoint, target: str, folder: Path, results: list[Parity]) -> None:
    """Write README.md into an export."""
    config = checkpoint.vision.config
    rows, columns = config.grid()
    length = checkpoint.model.config.text.context_length if checkpoint.model is not None else 0
    use = _USE[target].format(
        folder="FOLDER", side=config.image_size, length=length, load="load" if checkpoint.model else "load_vision"
    )
    parity = "\n".join(f"- {result}" for result in results) or "Not checked."
    text = f"""# OpenVision encoder for {target}

Vision tower: width {config.width}, depth {config.depth}, patch {config.patch_size}, {config.image_size} px,
{rows} x {columns} patch tokens after one class token. Images: RGB, shorter side to {config.image_size} px (bilinear,
antialiased), centre crop, ImageNet mean and standard deviation.

{use}

{_UPRIGHT if target != "safetensors" else ""}
## Compared with the model it was made of

{parity}
"""
    (folder / "README.md").write_text(text)
