"""Plug-in for lmms-eval.

Its model `llava_hf` runs any folder of ours as it is, one question at a time:

    accelerate launch -m lmms_eval --model llava_hf --model_args pretrained=FOLDER --tasks mme,gqa,pope --batch_size 1

The class below does the same in batches. An entry point (group `lmms_eval.models`) registers it, so that
`--model openvision` works when both packages are installed. It is written for the interface of version 0.7; nothing
here imports lmms-eval before lmms-eval loads the plug-in.
"""

import importlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from openvision.files import JsonObject
from openvision.images.decode import to_rgb_image
from openvision.multimodal.model.generate import Assistant, Decoding, Prompt, load_assistant
from openvision.multimodal.model.llm import IMAGE_TOKEN

MODEL_ID = "openvision"
_DEFAULT_NEW_TOKENS = 1024


class Manifest(Protocol):
    """A `ModelManifest` of lmms-eval."""

    simple_class_path: str


class Request(Protocol):
    """An `Instance` of lmms-eval; `args` are (context, settings, doc_to_visual, doc_id, task, split)."""

    args: tuple[Any, ...]


def manifest() -> Manifest:
    """The entry point: a `ModelManifest` with the model's name and the path of its class."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.OpenVisionLlava")


def __getattr__(name: str) -> type:
    # Its base class is from lmms-eval, so the class is made when lmms-eval looks it up.
    if name == "OpenVisionLlava":
        return _make_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_made: list[type] = []


def _make_class() -> type:
    if not _made:
        base = importlib.import_module("lmms_eval.api.model").lmms

        class OpenVisionLlava(base):
            """A LLaVA folder that answers in batches, greedily."""

            is_simple = True

            def __init__(
                self, pretrained: str, device: str | None = None, batch_size: int | str = 1, dtype: str = "auto"
            ) -> None:
                super().__init__()
                self.assistant = load_assistant(pretrained, device, dtype)
                self.batch_size_per_gpu = int(batch_size)

            @property
            def batch_size(self) -> int:
                return self.batch_size_per_gpu

            def generate_until(self, requests: Sequence[Request]) -> list[str]:
                """Answers in the order of the requests; greedy whatever the task sets, as in the paper."""
                return answer_requests(self.assistant, self.task_dict, requests, self.batch_size_per_gpu)

            def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
                """Not supported: the paper's tasks all generate."""
                raise NotImplementedError("log-likelihoods are not supported; run tasks that generate (generate_until)")

            def generate_until_multi_round(self, requests: Sequence[Request]) -> list[str]:
                """Not supported: the paper's tasks have one round."""
                raise NotImplementedError("tasks of several rounds are not supported; use --model llava_hf")

        _made.append(OpenVisionLlava)
    return _made[0]


# Task, split and number -> document.
Documents = Mapping[str, Mapping[str, Sequence[object]]]


def answer_requests(
    assistant: Assistant, task_dict: Documents, requests: Sequence[Request], batch_size: int
) -> list[str]:
    """Answers in the order of the requests, whose documents are in `task_dict`."""
    by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    prompts = []
    for index, request in enumerate(requests):
        context, settings, doc_to_visual, document, task, split = request.args
        images = [to_rgb_image(image) for image in doc_to_visual(task_dict[task][split][document])]
        prompts.append(Prompt(context.replace(IMAGE_TOKEN, "").strip(), tuple(images)))
        by_settings[int(settings.get("max_new_tokens", _DEFAULT_NEW_TOKENS)), _stops(settings)].append(index)
    answers = [""] * len(prompts)
    for (new_tokens, stops), indices in by_settings.items():
        decoding = Decoding(max_new_tokens=new_tokens, batch_size=batch_size)
        for index, answer in zip(indices, assistant.answer([prompts[i] for i in indices], decoding), strict=True):
            answers[index] = _cut(answer, stops)
    return answers


def _stops(settings: JsonObject) -> tuple[str, ...]:
    until = settings.get("until", ())
    return (until,) if isinstance(until, str) else tuple(until)


def _cut(answer: str, stops: tuple[str, ...]) -> str:
    """The answer up to the first stop string."""
    for stop in stops:
        if stop:
            answer = answer.split(stop, 1)[0]
    return answer.strip()
