"""Models and configurations fit the protocols (pyright checks the annotations), and say what sets them apart."""

import torch

from openvision.models.openvision import OpenVision, OpenVisionConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config, build_model
from openvision.models.protocols import CaptioningModel, ContrastiveModel, ImageEncoder
from openvision.models.variants import variant, variant2


def small() -> tuple[OpenVisionConfig, OpenVision2Config]:
    return variant("tiny", 16, 32), variant2("tiny", 16, 32)


def test_text_tells_the_two_kinds_of_models_apart():
    for config, kind in zip(small(), (OpenVision, OpenVision2), strict=True):
        with torch.device("meta"):
            model = build_model(config)
        assert type(model) is kind
        assert (model.text is None) == (config.text is None) == (config.embed_dim is None) == (kind is OpenVision2)
        assert "text" not in config.to_dict() or config.text is not None


def test_a_contrastive_model_encodes_an_image_as_its_vision_tower_does():
    model: ContrastiveModel = OpenVision(small()[0]).eval()
    tower: ImageEncoder = model.vision
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.encode_image(images), tower.encode_image(images))
    assert torch.allclose(model.encode_image(images).norm(dim=1), torch.ones(2))


def test_every_parameter_but_the_untrained_ones_gets_a_gradient():
    torch.manual_seed(0)
    contrastive, captioning = small()
    first: ContrastiveModel = OpenVision(contrastive)
    ids = torch.randint(3, 100, (2, contrastive.text.context_length))
    output = first(torch.randn(2, 3, 32, 32), ids, ids)
    assert output.caption_states is not None
    (output.image_embeds.sum() + output.text_embeds.sum() + output.caption_states.sum() + output.scale).backward()
    second: CaptioningModel = OpenVision2(captioning)
    second(torch.randn(2, 3, 32, 32), torch.randint(3, 100, (2, 5))).sum().backward()
    for model, head in ((first, {"decoder.head.weight"}), (second, {"decoder.head.weight"})):
        assert isinstance(model, torch.nn.Module)
        untrained = {id(parameter) for parameter in model.untrained_parameters()}
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert without - head == {name for name, parameter in model.named_parameters() if id(parameter) in untrained}
