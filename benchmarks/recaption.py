"""Captions a second on this CPU: batches with kept keys and values against one by one without, the time around the
captioner, and an endpoint of which a fifth of the requests fails.

    .venv/bin/python benchmarks/recaption.py -o benchmarks/results/recaption.json
    .venv/bin/python benchmarks/recaption.py --parts endpoint --turns 7 -o benchmarks/results/recaption_endpoint.json

Captioners have random weights, so that every caption has its full length. Speeds are captions per second of processor
time of one thread, rivals in turns; the endpoint is a server on this machine whose answers take half a second, and its
images a second are those of the wall.
"""

import argparse
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))

from openvision.data.shards.dataset import ShardWriter
from openvision.files import JsonObject, atomic_write_text
from openvision.inference.captioner import Captioner
from openvision.models.decoders.autoregressive import AutoregressiveDecoderConfig
from openvision.models.openvision2 import OpenVision2, OpenVision2Config
from openvision.models.vision import VisionConfig
from openvision.multimodal.model.huggingface import transformers
from openvision.multimodal.model.toy import toy_tokenizer
from openvision.provenance import git_state, library_versions, processor_name
from openvision.recaption.captioners.captioner import Answer, Question, Sampling
from openvision.recaption.captioners.decoders import DecoderCaptioner
from openvision.recaption.captioners.endpoint import Endpoint
from openvision.recaption.captioners.image_text import ImageTextCaptioner
from openvision.recaption.job import recaption_shards
from openvision.recaption.prompts import load_prompt
from openvision.recaption.shard import Options
from openvision.text.tokenizer import Tokenizer
from tests.recaption.server import serving

_TOKENS, _BATCH = 64, 32
_PARTS = ("decoding", "around", "endpoint")
_WORDS = ["a red picture of something green and blue on a table behind the house"]


def drawing(number: int, side: int = 96) -> bytes:
    """A PNG of a few circles."""
    rng = random.Random(number)
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        x, y, size = (rng.randrange(side) for _ in range(3))
        pen.ellipse((x, y, x + size, y + size), fill=tuple(rng.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def questions(count: int) -> list[Question]:
    """Questions with the paper's prompt."""
    prompt = load_prompt("v1").fill("")
    return [Question("s", f"{n:04d}", 0, drawing(n), "png", prompt, n) for n in range(count)]


def our_captioner(batch_size: int = _BATCH) -> DecoderCaptioner:
    """OpenVision 2 of the quickstart's size with random weights that never write [eos]."""
    torch.manual_seed(0)
    vision = VisionConfig(width=128, depth=4, mlp_dim=512, heads=2, patch_size=8, image_size=64)
    decoder = AutoregressiveDecoderConfig(96, 2, 384, 2, vocab_size=200, caption_length=_TOKENS)
    tokenizer = Tokenizer.train(_WORDS, 200)
    model = OpenVision2(OpenVision2Config(vision, decoder, keep_ratio=0.35))
    # Captions that never end have equal lengths.
    setattr(model.decoder, "logits", without(model.decoder.logits, tokenizer.eos_id))  # noqa: B010
    return DecoderCaptioner(Captioner(model, tokenizer), "random", Sampling(max_tokens=_TOKENS), batch_size)


def without(logits: Callable[[torch.Tensor], torch.Tensor], token: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits of which `token` is never the largest."""

    def changed(states: torch.Tensor) -> torch.Tensor:
        found = logits(states)
        found[..., token] = -torch.inf
        return found

    return changed


def one_by_one(captioner: DecoderCaptioner, asked: Sequence[Question]) -> None:
    """Every token by a pass over the image and all tokens before it."""
    assert isinstance(captioner.model, Captioner)
    model = captioner.model.model
    for question in asked:
        image = captioner.model.preprocess_all([Image.open(io.BytesIO(question.image))])
        ids = torch.tensor([[captioner.model.tokenizer.bos_id]])
        with torch.inference_mode():
            for _ in range(_TOKENS):
                ids = torch.cat([ids, model.caption_logits(image, ids)[:, -1:].argmax(dim=-1)], dim=1)


def llava(batch_size: int = _BATCH) -> ImageTextCaptioner:
    """A LLaVA of stock transformers classes, 64 image tokens, a language model of 8 layers 256 wide, random weights."""
    library = transformers()
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    vision = library.CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=2, image_size=64, patch_size=8
    )
    text = library.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    config = library.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image_token, vision_feature_select_strategy="default"
    )
    torch.manual_seed(0)
    model = library.LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    images = library.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = library.LlavaProcessor(
        *(images, tokenizer),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return ImageTextCaptioner(model, processor, "random", Sampling(max_tokens=_TOKENS), batch_size)


def llava_one_by_one(captioner: ImageTextCaptioner, asked: Sequence[Question]) -> None:
    """`generate` for one image without kept keys and values."""
    for question in asked:
        inputs = captioner._prepare([question])
        with torch.inference_mode():
            captioner.model.generate(**inputs, max_new_tokens=_TOKENS, do_sample=False, use_cache=False)


def rate(act: Callable[[], object], count: int) -> float:
    """Captions per second of processor time."""
    begin = time.process_time()
    act()
    return count / (time.process_time() - begin)


def decoding(turns: int) -> list[JsonObject]:
    """Both captioners, batched with kept keys and values, and one by one without."""
    ours, stock = our_captioner(), llava()
    few, many = questions(3), questions(2 * _BATCH)
    rivals: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "OpenVision 2": (lambda: list(ours.answers(many)), lambda: one_by_one(ours, few)),
        "LLaVA of transformers": (lambda: list(stock.answers(many)), lambda: llava_one_by_one(stock, few)),
    }
    rows = []
    for name, (batched, single) in rivals.items():
        found = [(rate(batched, len(many)), rate(single, len(few))) for _ in range(turns)]
        fast, slow = (sorted(column)[turns // 2] for column in zip(*found, strict=True))
        rows.append({"captioner": name, "batched": round(fast, 2), "one_by_one": round(slow, 2)})
        rows[-1]["times"] = round(fast / slow, 2)
        print(rows[-1], flush=True)
    return rows


class _Timed(DecoderCaptioner):
    seconds = 0.0

    def caption(self, questions: Sequence[Question], sampling: Sampling) -> list[Answer]:
        begin = time.process_time()
        try:
            return super().caption(questions, sampling)
        finally:
            self.seconds += time.process_time() - begin


def around(folder: Path, images: int) -> JsonObject:
    """Share of a job's processor time that is outside the captioner: reading, checking, judging, writing."""
    write_shards(folder / "shards", images, 96)
    plain = our_captioner()
    captioner = _Timed(plain.model, "random", plain.sampling, _BATCH)
    options = Options(on_bad="keep", retries=0, language=None)
    begin = time.process_time()
    recaption_shards(str(folder / "shards"), captioner, load_prompt("v1"), folder / "out", options, lambda line: None)
    whole = time.process_time() - begin
    row = {"images": images, "seconds": round(whole, 2), "outside": round(1 - captioner.seconds / whole, 4)}
    print(row, flush=True)
    return row


def write_shards(folder: Path, images: int, side: int) -> None:
    """Drawings in three shards."""
    with ShardWriter(folder, samples_per_shard=-(-images // 3)) as writer:
        for number in range(images):
            writer.write(f"{number:05d}", drawing(number, side), "png", "an alt-text", {})


class _Faults:
    """A share of 429s and cut connections, for ever; every other answer takes half a second."""

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.rng = share, random.Random(seed)

    def __bool__(self) -> bool:
        return True

    def popleft(self) -> str:
        return self.rng.choice(["429", "cut"]) if self.rng.random() < self.share else "half"


def endpoint(folder: Path, images: int, turns: int) -> JsonObject:
    """Images a second of a sound endpoint, and of one that fails for a fifth of the requests, in turns."""
    write_shards(folder / "shards", images, 64)
    found = [endpoint_turn(folder, images, turn) for turn in range(turns)]
    kept = sorted(one["kept"] for one in found)
    row: JsonObject = {"images": images, "parallel": 16, "answer_seconds": 0.5}
    row |= {"kept": {"median": kept[turns // 2], "least": kept[0], "most": kept[-1]}, "turns": found}
    print(row, flush=True)
    return row


def endpoint_turn(folder: Path, images: int, turn: int) -> JsonObject:
    """One pair of jobs; which requests fail is another lot in every turn."""
    row: JsonObject = {}
    for share in (0.0, 0.2):
        with serving() as server:
            server.faults = _Faults(share, turn)  # pyright: ignore[reportAttributeAccessIssue]
            captioner = Endpoint(server.url, parallel=16)
            begin = time.perf_counter()
            counts = recaption_shards(
                *(str(folder / "shards"), captioner, load_prompt("v1"), folder / f"out{turn}-{share}", Options()),
                lambda line: None,
            )
            took = time.perf_counter() - begin
        row[f"failing_{share:g}"] = {
            "images_per_second": round(images / took, 2),
            "captions": counts["captions"],
            "requests": len(server.bodies),
        }
    row["kept"] = round(row["failing_0.2"]["images_per_second"] / row["failing_0"]["images_per_second"], 3)
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=list(_PARTS))
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="openvision-recaption-") as name:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": processor_name(),
            "git": git_state(),
            "libraries": library_versions() | {"transformers": transformers().__version__},
            "batch_size": _BATCH,
            "tokens": _TOKENS,
            "turns": chosen.turns,
        }
        measured: dict[str, Callable[[], object]] = {
            "decoding": lambda: decoding(chosen.turns),
            "around": lambda: around(Path(name) / "around", chosen.images),
            # Nothing follows the last answers of a job, which may be late: a longer one says more.
            "endpoint": lambda: [
                endpoint(Path(name) / f"endpoint{count}", count, chosen.turns)
                for count in (chosen.images, 3 * chosen.images)
            ],
        }
        content |= {part: measured[part]() for part in chosen.parts}
    atomic_write_text(chosen.output, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
