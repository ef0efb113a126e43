"""lmms-eval runs our models.

Their `llava_hf` takes any folder of ours as it is, a question at a time:

    accelerate launch -m lmms_eval --model llava_hf --model_args pretrained=FOLDER --tasks mme,gqa,pope --batch_size 1

The class below does the same in batches. An entry point tells lmms-eval of it (group `lmms_eval.models`), so that
`--model openvision` works wherever both packages are installed. Written for the interface of version 0.7; nothing here
imports lmms-eval before it is asked for.
"""

import importlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from openvision.multimodal.model.generate import Decoding, Question, load_assistant
from openvision.multimodal.model.llm import IMAGE_TOKEN

MODEL_ID = "openvision"
_DEFAULT_NEW_TOKENS = 1024


def manifest() -> Any:
    """What the entry point loads: the model's name and where its class is."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.OpenVisionLlava")


def __getattr__(name: str) -> Any:
    # The class needs its base from lmms-eval, so it is made when lmms-eval looks it up.
    if name == "OpenVisionLlava":
        return _make_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_made: list[type] = []


def _make_class() -> type:
    if not _made:
        base = importlib.import_module("lmms_eval.api.model").lmms

        class OpenVisionLlava(base):
            """A LLaVA folder of ours, asked in batches, greedily."""

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

            def generate_until(self, requests: Sequence[Any]) -> list[str]:
                """One answer a request, in their order; greedy whatever the task asks, as the paper evaluates."""
                return answer_requests(self.assistant, self.task_dict, requests, self.batch_size_per_gpu)

            def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
                """Not offered: the paper's tasks all generate."""
                raise NotImplementedError("the paper's tasks generate answers; run tasks of output_type generate_until")

            def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
                """Not offered: the paper's tasks have one round."""
                raise NotImplementedError("tasks of several rounds are not supported; use --model llava_hf")

        _made.append(OpenVisionLlava)
    return _made[0]


def answer_requests(assistant: Any, task_dict: Any, requests: Sequence[Any], batch_size: int) -> list[str]:
    """Answers to requests whose `args` are (context, settings, doc_to_visual, doc_id, task, split)."""
    by_settings: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
    questions = []
    for index, request in enumerate(requests):
        context, settings, doc_to_visual, document, task, split = request.args
        images = [image.convert("RGB") for image in doc_to_visual(task_dict[task][split][document])]
        questions.append(Question(context.replace(IMAGE_TOKEN, "").strip(), tuple(images)))
        by_settings[int(settings.get("max_new_tokens", _DEFAULT_NEW_TOKENS)), _stops(settings)].append(index)
    answers = [""] * len(questions)
    for (new_tokens, stops), indices in by_settings.items():
        decoding = Decoding(max_new_tokens=new_tokens, batch_size=batch_size)
        for index, answer in zip(indices, assistant.answer([questions[i] for i in indices], decoding), strict=True):
            answers[index] = _cut(answer, stops)
    return answers


def _stops(settings: dict[str, Any]) -> tuple[str, ...]:
    until = settings.get("until", ())
    return (until,) if isinstance(until, str) else tuple(until)


def _cut(answer: str, stops: tuple[str, ...]) -> str:
    """The answer up to the first stopping text."""
    for stop in stops:
        if stop:
            answer = answer.split(stop, 1)[0]
    return answer.strip()
