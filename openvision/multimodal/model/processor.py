"""The processor of a built model: pictures as its encoder wants them, text by the language model's chat template."""

from typing import Any

from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.model.llm import IMAGE_TOKEN
from openvision.multimodal.model.stock import quiet, transformers
from openvision.multimodal.model.towers import Tower

# A text-only template joins strings. Put before it, this turns contents in parts (pictures and text, as processors and
# pipelines write them) into one string, so that the template itself stays untouched.
FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set flat.messages = flat.messages + [message] -%}
  {%- else -%}
    {%- set text = namespace(value='') -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}
        {%- set text.value = text.value + '<image>\\n' -%}
      {%- elif part['type'] == 'text' -%}
        {%- set text.value = text.value + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def make_processor(tower: Tower, tokenizer: Any, geometry: Geometry) -> Any:
    """A stock `LlavaProcessor` or, where `geometry` has pinpoints, a `LlavaNextProcessor`."""
    side = geometry.image_size
    settings: dict[str, Any] = {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(tower.image_mean),
        "image_std": list(tower.image_std),
        "resample": tower.resample,
        "do_pad": True,
    }
    names = ("LlavaImageProcessor", "LlavaProcessor")
    if geometry.pinpoints:
        names = ("LlavaNextImageProcessor", "LlavaNextProcessor")
        settings["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in geometry.pinpoints]
    # Without torchvision transformers takes its Pillow form and says so each time.
    with quiet():
        image_processor = getattr(transformers(), names[0])(**settings)
    return getattr(transformers(), names[1])(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=geometry.patch_size,
        vision_feature_select_strategy="default" if geometry.prefix_tokens else "full",
        num_additional_image_tokens=geometry.prefix_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=FLATTEN + tokenizer.chat_template,
    )
