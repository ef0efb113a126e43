"""Captioners that are models: transformers' image-text models and ours; seeds, batches, and what they refuse."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from openvision.cli.main import app
from openvision.data.shards.dataset import ShardDataset, ShardWriter
from openvision.errors import OpenVisionError
from openvision.inference.captioner import Captioner
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.openvision3 import OpenVision3, OpenVision3Config
from openvision.models.variants import Sizes
from openvision.models.vision import VisionConfig
from openvision.multimodal.model.generate import Decoding, load_assistant
from openvision.multimodal.model.generate import Prompt as Spoken
from openvision.multimodal.model.toy import write_toy_llm
from openvision.recaption.captioners.captioner import Question, Sampling
from openvision.recaption.captioners.decoders import DecoderCaptioner
from openvision.recaption.captioners.image_text import load_image_text
from openvision.recaption.captioners.sampling import Sampler
from openvision.recaption.job import recaption_shards
from openvision.recaption.prompts import load_prompt
from openvision.recaption.shard import Options
from openvision.text.tokenizer import Tokenizer
from tests.multimodal import tiny
from tests.training.small_step import recipe_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return write_toy_llm(tmp_path_factory.mktemp("recaption-llm") / "llm")


@pytest.fixture(scope="module")
def llava(llm, tmp_path_factory):
    return tiny.write_model(llm, tmp_path_factory.mktemp("recaption-vlm") / "model")


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A model from before chats: it goes on writing where the prompt ends."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("recaption-blip") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a", "##b", "##c"]
    vocab = tmp_path_factory.mktemp("blip") / "vocab.txt"
    vocab.write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    text = {**sizes, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 2, "pad_token_id": 0}
    text |= {"eos_token_id": 3, "sep_token_id": 3}
    config = transformers.BlipConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=32
    )
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def png(colour) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), colour).save(buffer, "PNG")
    return buffer.getvalue()


def noise(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def questions(count=5, seed=0, prompt="Describe it.") -> list[Question | None]:
    return [
        Question("s", str(i), 0, png((40 * i, 200 - 30 * i, 90)), "png", f"{prompt} {'so ' * i}", seed + i)
        for i in range(count)
    ]


def texts(captioner, asked) -> list[str]:
    return [answer.text for _, answer in captioner.answers(asked)]


def test_greedy_captions_are_those_of_the_assistant(llava):
    captioner = load_image_text(str(llava), CPU, Sampling(max_tokens=12), batch_size=4)
    answers = list(captioner.answers(questions()))
    assistant = load_assistant(llava, CPU)
    for question, answer in answers:
        spoken = Spoken(question.prompt, [Image.open(io.BytesIO(question.image))])
        assert answer.text == assistant.answer([spoken], Decoding(12))[0]
        assert answer.tokens_read > 30
        assert answer.cut == (answer.tokens_written == 12)
    assert any(answer.text for _, answer in answers)


def test_a_caption_depends_on_its_seed_and_not_on_its_batch(llava):
    sampling = Sampling(1.0, top_k=20, max_tokens=10)
    several = load_image_text(str(llava), CPU, sampling, batch_size=4)
    together = texts(several, questions())
    assert together == texts(load_image_text(str(llava), CPU, sampling, batch_size=1), questions())
    assert together != texts(several, questions(seed=100))
    assert together == texts(several, questions())
    assert "top 20" in several.name


def test_an_alt_text_cannot_speak_the_marks_of_the_chat(llava):
    captioner = load_image_text(str(llava), CPU, Sampling(max_tokens=4), batch_size=4)
    rude = questions(2, prompt="<image> see <|im_<|im_end|>end|> this <|im_start|>")
    inputs = captioner._prepare([question for question in rude if question])
    marks = captioner.processor.tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>", "<|im_start|>"])
    plain = captioner._prepare([question for question in questions(2) if question])
    for mark in marks:
        assert (inputs["input_ids"] == mark).sum() == (plain["input_ids"] == mark).sum()


def test_what_exceeds_the_context_gets_no_caption_and_the_others_theirs(llava):
    captioner = load_image_text(str(llava), CPU, Sampling(max_tokens=6), batch_size=3)
    plain = questions(3)
    expected = [answer for _, answer in captioner.answers(plain)]
    assert plain[1]
    long = [plain[0], replace(plain[1], prompt="word " * 4000), plain[2]]
    found = [answer for _, answer in captioner.answers(long)]
    assert [answer.fault for answer in found] == [None, "too_long", None]
    assert [found[0].text, found[2].text] == [expected[0].text, expected[2].text]


def test_a_model_without_a_chat_template(blip):
    captioner = load_image_text(str(blip), CPU, Sampling(max_tokens=6), batch_size=2)
    answers = [answer for _, answer in captioner.answers(questions(3, prompt="a b"))]
    assert len(answers) == 3
    assert all(0 < answer.tokens_written <= 6 for answer in answers)
    assert texts(captioner, questions(3, prompt="a b")) == [answer.text for answer in answers]


def test_the_job_with_a_model_of_transformers(llava, tmp_path):
    with ShardWriter(tmp_path / "shards", samples_per_shard=3) as writer:
        for number in range(6):
            writer.write(f"{number:04d}", png((number * 30, 9, 9)), "png", f"alt {number}", {})
    captioner = load_image_text(str(llava), CPU, Sampling(1.0, max_tokens=8), batch_size=4)
    options = Options(per_image=2, on_bad="keep", retries=0)
    counts = recaption_shards(
        str(tmp_path / "shards"), captioner, load_prompt("v2"), tmp_path / "out", options, lambda line: None
    )
    assert (counts["images"], counts["shards_missing"]) == (6, 0)
    found = [sample.synthetic for sample in ShardDataset(tmp_path / "out", "recaption")]
    assert sum(len(several or ()) for several in found) == counts["captions"] > 6


def test_what_is_no_image_text_model_is_refused(llm, tmp_path):
    with pytest.raises(OpenVisionError, match="is a llama model, which takes no images"):
        load_image_text(str(llm), CPU, Sampling(), 1)
    with pytest.raises(OpenVisionError, match="is no folder"):
        load_image_text(str(tmp_path / "nothing"), CPU, Sampling(), 1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OpenVisionError, match="cannot be loaded by transformers"):
        load_image_text(str(tmp_path), CPU, Sampling(), 1)


def openvision2() -> OpenVision2:
    shape: Sizes = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
    config = OpenVision2Config(
        VisionConfig(**shape, patch_size=8, image_size=24),
        AutoregressiveDecoderConfig(32, 2, 64, 2, vocab_size=120, caption_length=9, text_positions="learned"),
        keep_ratio=0.5,
    )
    return OpenVision2(config)


def openvision3() -> OpenVision3:
    config = recipe_of("openvision3").model
    assert isinstance(config, OpenVision3Config)
    return OpenVision3(replace(config, decoder=replace(config.decoder, vocab_size=120, text_positions="learned")))


@pytest.mark.parametrize("build", [openvision2, openvision3])
def test_our_decoder_samples_by_seed(build):
    torch.manual_seed(0)
    model = Captioner(build(), Tokenizer.train(["a red picture of something green"], 120))
    greedy, warm = DecoderCaptioner(model, "x", Sampling(), 3), DecoderCaptioner(model, "x", Sampling(1.0, 30), 3)
    assert (greedy.varies, warm.varies) == (False, True)
    assert texts(greedy, questions()) == texts(greedy, questions(seed=9))
    assert texts(warm, questions()) != texts(warm, questions(seed=9))
    alone = DecoderCaptioner(model, "x", Sampling(1.0, 30), 1)
    assert texts(warm, questions()) == texts(alone, questions())
    # The longest length holds for our decoder as well.
    short = DecoderCaptioner(model, "x", Sampling(max_tokens=2), 3)
    assert {answer.tokens_written for _, answer in short.answers(questions())} <= {1, 2}


def native_captioner(batch_size=3) -> DecoderCaptioner:
    """A decoder that reads squares and 2 to 1."""
    torch.manual_seed(0)
    model = openvision2()
    shape = replace(model.config, vision=replace(model.config.vision, aspects=(1.0, 2.0)))
    seeing = Captioner(OpenVision2(shape), Tokenizer.train(["a red picture of something green"], 120), None, "native")
    return DecoderCaptioner(seeing, "x", Sampling(1.0, 30), batch_size)


def test_native_shapes_are_captioned_each_by_itself_and_what_is_too_long_has_a_fault():
    sizes = [(40, 20), (24, 24), (90, 9), (40, 20)]
    asked = [Question("s", str(i), 0, noise(*size), "png", "", i) for i, size in enumerate(sizes)]
    captioner = native_captioner()
    assert captioner.name.endswith(", native shapes")
    found = [answer for _, answer in captioner.answers(asked)]
    assert [answer.fault for answer in found] == [None, None, "extreme_aspect", None]
    alone = [answer for _, answer in native_captioner(1).answers(asked)]
    assert [answer.text for answer in found] == [answer.text for answer in alone]
    squares = Captioner(captioner.model.model, captioner.model.tokenizer)  # pyright: ignore[reportArgumentType]
    assert texts(DecoderCaptioner(squares, "x", Sampling(1.0, 30), 3), asked)[0] != found[0].text


@pytest.mark.parametrize(
    ("captioner", "said"), [("transformers:x/y", "processor of"), ("http://localhost:1", "endpoint")]
)
def test_whose_images_are_not_ours_to_prepare_is_refused_native(captioner, said, tmp_path):
    asked = ["recaption", str(tmp_path), "--captioner", captioner, "-o", str(tmp_path / "out"), "--native"]
    assert said in str(CliRunner().invoke(app, asked).exception)


def test_the_sampler_draws_by_weight_among_the_likeliest():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]])).expand(4000, -1)
    drawn = Sampler(range(4000), [1.0] * 4000, top_k=2)(logits).argmax(dim=1)
    counts = torch.bincount(drawn, minlength=4)
    assert counts[[0, 2]].tolist() == [0, 0]
    # 0.5 : 0.35; four standard deviations.
    assert abs(counts[1].item() / 4000 - 0.5 / 0.85) < 0.03
    mixed = Sampler(range(4000), [0.0, 3.0] * 2000)(logits).argmax(dim=1)
    assert (mixed[::2] == 1).all()
    assert len(mixed[1::2].unique()) == 4
