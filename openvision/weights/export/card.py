"""README.md of an export: what it is, how it is loaded, what is exact and what is not."""

from pathlib import Path

from openvision.models.vision import IMAGENET_MEAN, IMAGENET_STD
from openvision.weights.export.parity import Parity
from openvision.weights.load import Checkpoint
from openvision.weights.model_card import front_matter, task_of, training_sections

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
length. It reads exactly {length} ids, so the call asks for padding and truncation, as SigLIP's does:

```python
from transformers import AutoTokenizer, SiglipTextModel
tokenizer = AutoTokenizer.from_pretrained("{folder}/text")
text = SiglipTextModel.from_pretrained("{folder}/text")
ids = tokenizer(["A Photo Of A CAT"], padding="max_length", truncation=True, return_tensors="pt")
embedding = text(**ids).pooler_output
```

**Without `padding="max_length", truncation=True` transformers pads nothing, and the embedding is wrong**: pads take
part in the attention. Training put `[CLS]` into the last column, a stock tokenizer puts it before the pads. These
weights give the same embedding for both: the vector of the class token is in the last position.""",
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
import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

config = json.load(open("{folder}/onnx.json"))
side, how = config["image_size"], config["preprocessing"]
image = ImageOps.exif_transpose(Image.open("cat.jpg")).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
pixels = (np.asarray(image) * how["scale"] - how["mean"]) / how["std"]
session = onnxruntime.InferenceSession("{folder}/vision.onnx")
(embedding,) = session.run(["{first}"], {{"images": pixels.transpose(2, 0, 1)[None].astype(np.float32)}})
```
{text}
| file | input | outputs |
|---|---|---|
| `vision.onnx` | `images` float32 (batch, 3, {pixels}), NCHW | `{first}`, `patch_tokens` |
{rows}
Pixels are RGB, `(pixel / 255 - mean) / std` with mean {mean} and
std {std}. Apply EXIF orientation, put transparent images on white, scale 16 bits to 8, resize the
shorter side to {side} px (bilinear, antialiased), crop the centre. Training truncated resized pixels to integers where
Pillow rounds: a few grey levels at most. `onnx.json` says the same to a program.""",
}


_IDS = "`[bos]`, tokens, `[eos]`, `[CLS]`, padding, as `tokenizer.json` writes them"
_TEXT_USE = """
```python
import tokenizers

tokenizer = tokenizers.Tokenizer.from_file("FOLDER/tokenizer.json")
ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(["a photo of a cat", "a photo of a dog"])])
texts = onnxruntime.InferenceSession("FOLDER/text.onnx").run(None, {"ids": ids})[0]
logits = config["logit_scale"] * embedding @ texts.T
```
"""


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


def write_card(
    checkpoint: Checkpoint, target: str, folder: Path, results: list[Parity], dynamic_resolution: bool = False
) -> None:
    """Write README.md into an export."""
    config = checkpoint.vision.config
    rows, columns = config.grid()
    length = checkpoint.model.config.text.context_length if checkpoint.model is not None else 0
    prefix = "one class token" + (f" and {config.registers} registers" if config.registers else "")
    pixels = "height, width" if dynamic_resolution else f"{config.image_size}, {config.image_size}"
    use = _USE[target].format(
        folder="FOLDER",
        side=config.image_size,
        length=length,
        load="load" if checkpoint.model else "load_vision",
        first="image_embeds" if checkpoint.vision.head is not None else "pooled",
        pixels=pixels,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        text=_TEXT_USE if checkpoint.model is not None and checkpoint.tokenizer is not None else "",
        rows=f"| `text.onnx` | `ids` int64 (batch, {length}): {_IDS} | `text_embeds` |\n" if length else "",
    )
    parity = "\n".join(f"- {result}" for result in results) or "Not checked."
    source = Path(checkpoint.source)
    sections = training_sections(checkpoint.provenance, source if source.is_dir() else None)
    task = task_of(checkpoint.model is not None, checkpoint.captioner is not None)
    text = f"""{front_matter(task)}
# OpenVision encoder for {target}

Vision tower: width {config.width}, depth {config.depth}, patch {config.patch_size}, {config.image_size} px,
{rows} x {columns} patch tokens after {prefix}. Images: RGB, shorter side to {config.image_size} px (bilinear,
antialiased), centre crop, ImageNet mean and standard deviation.

{use}

{_UPRIGHT if target != "safetensors" else ""}
## Compared with the model it was made of

{parity}

{sections}"""
    (folder / "README.md").write_text(text)
