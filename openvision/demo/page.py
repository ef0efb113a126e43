"""The page: one image at the left, what each checkpoint says about it at the right, one column a checkpoint.

Nothing is asked of any server but this one: fonts are the system's, and Gradio's telemetry is off.
"""

import functools
import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from openvision.demo.checkpoint import DemoCheckpoint
from openvision.demo.collection import Collection, open_collection
from openvision.errors import OpenVisionError, require
from openvision.inference.encoder import distinct_labels
from openvision.inference.index import Hit
from openvision.untrusted import one_line

if TYPE_CHECKING:
    from openvision.demo.chat import Conversation, DemoChat

P = ParamSpec("P")
R = TypeVar("R")
TITLE = "OpenVision"
CSS = """
.gradio-container { max-width: 1200px !important }
footer { display: none !important }
.found .caption-label { inset: auto 0 0 0 !important; max-width: none !important; border-radius: 0 !important;
  white-space: normal !important; overflow-wrap: anywhere; font-size: 11px !important; padding: 2px 6px !important }
"""
LABELS = "a cat, a bus, a red balloon, a house, two flowers"
TOP = 12
# Gallery, Label and the other components are Gradio's, which has no types of its own for them.
Component = Any


def build_page(
    checkpoints: Sequence[DemoCheckpoint],
    collection: Collection | None,
    cache: Path | None = None,
    chat: "DemoChat | None" = None,
) -> Any:
    """Gradio's Blocks for one or more checkpoints; `collection` is what is searched at the start."""
    gradio = require("gradio", extra="demo")
    page = _Page(gradio, list(checkpoints), cache)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gradio.Markdown(f"# {TITLE}\n{' · '.join(html.escape(one.name) for one in checkpoints)}")
        page.state = gradio.State(collection)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                start = collection.first(1) if collection is not None else []
                page.image = page.image_input(start[0] if start else None)
            with gradio.Column(scale=3), gradio.Tabs():
                with gradio.Tab("Zero-shot", id="classify"):
                    page.classification()
                with gradio.Tab("Search", id="search"):
                    page.searching(collection)
                with gradio.Tab("Caption", id="caption"):
                    page.captioning()
                with gradio.Tab("Patches", id="patches"):
                    page.patches()
                if chat is not None:
                    with gradio.Tab("Chat", id="chat"):
                        page.chatting(chat)
    return blocks


class _Page:
    """The tabs. Every handler returns a value for each checkpoint."""

    state: Component
    image: Component

    def __init__(self, gradio: Any, checkpoints: list[DemoCheckpoint], cache: Path | None) -> None:
        self.gradio, self.checkpoints, self.cache = gradio, checkpoints, cache

    def image_input(self, value: Component) -> Component:
        """An upload that hands on the file itself: our decoder reads it, and says what is wrong with it."""

        component = self.gradio.Image(
            value, label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image", buttons=[]
        )
        # Gradio's own would open the file first. (A subclass makes Gradio write a file beside this one.)
        component.preprocess = lambda payload: payload.path if payload is not None else None
        return component

    def classification(self) -> None:
        """Zero-shot classification with editable labels."""
        labels = self.gradio.Textbox(LABELS, label="Labels, separated by commas", elem_id="labels")
        run = self.gradio.Button("Classify", variant="primary", elem_id="classify-run")
        outputs = self._columns(
            lambda name: self.gradio.Label(label=name, num_top_classes=10, elem_classes="probabilities")
        )

        def classify(image: str | None, text: str) -> list[dict[str, float]]:
            path, names = _given(image), distinct_labels(text.split(","))
            return [one.classify(path, names) for one in self.checkpoints]

        self._on([run.click, labels.submit], classify, [self.image, labels], outputs, "classify")

    def searching(self, collection: Collection | None) -> None:
        """Search by text and by the image, over a collection that can be exchanged."""
        source = str(collection.source) if collection is not None else ""
        folder = self.gradio.Textbox(source, label="Folder of images, of shards, or of vectors", elem_id="folder")
        opened = self.gradio.Markdown(_describe(collection), elem_id="opened")
        query = self.gradio.Textbox(
            label="Text to search for", placeholder="a cat next to two flowers", elem_id="query"
        )
        with self.gradio.Row():
            by_text = self.gradio.Button("Search by text", variant="primary", elem_id="search-text")
            by_image = self.gradio.Button("Search by the image", elem_id="search-image")
        outputs = self._columns(
            lambda name: self.gradio.Gallery(label=name, columns=4, height="auto", elem_classes="found", buttons=[])
        )

        def open_folder(text: str, progress: Any = self.gradio.Progress()) -> tuple[Collection, str]:  # noqa: B008
            if not text.strip():
                raise OpenVisionError("the folder is empty; give a folder of images, of shards, or of vectors")
            found = open_collection(
                Path(text.strip()).expanduser(),
                self.checkpoints,
                lambda done, total: progress((done, total), desc="encoding images"),
                self.cache,
            )
            return found, _describe(found)

        def search_text(held: Collection | None, text: str) -> list[list[tuple[Component, str]]]:
            images = _opened(held)
            return [
                _captioned(images.search(number, one.text_vector(text), TOP))
                for number, one in enumerate(self.checkpoints)
            ]

        def search_image(held: Collection | None, image: str | None) -> list[list[tuple[Component, str]]]:
            images, path = _opened(held), _given(image)
            return [
                _captioned(images.search(number, one.image_vector(path), TOP))
                for number, one in enumerate(self.checkpoints)
            ]

        self._on([folder.submit], open_folder, [folder], [self.state, opened], "open")
        self._on([by_text.click, query.submit], search_text, [self.state, query], outputs, "search_text")
        self._on([by_image.click], search_image, [self.state, self.image], outputs, "search_image")

    def captioning(self) -> None:
        """Captions, of version 1 with an alt-text."""
        alt = self.gradio.Textbox(
            label="Alt-text (OpenVision 1 reads one beside the image, OpenVision 2 does not)", elem_id="alt"
        )
        run = self.gradio.Button("Caption", variant="primary", elem_id="caption-run")
        outputs = self._columns(lambda name: self.gradio.Textbox(label=name, lines=3, elem_classes="caption"))

        def caption(image: str | None, text: str) -> list[str]:
            path = _given(image)
            return [one.caption(path, text) for one in self.checkpoints]

        self._on([run.click, alt.submit], caption, [self.image, alt], outputs, "caption")

    def patches(self) -> None:
        """Text-to-patch maps and the main components of the patches."""
        text = self.gradio.Textbox("a red balloon", label="Text to look for in the image", elem_id="patch-text")
        with self.gradio.Row():
            run = self.gradio.Button("Where is it?", variant="primary", elem_id="map-run")
            pca = self.gradio.Button("Main components (PCA)", elem_id="pca-run")
        outputs = self._columns(
            lambda name: self.gradio.Image(label=name, interactive=False, elem_classes="map", buttons=[])
        )

        def show_map(image: str | None, wanted: str) -> list[Component]:
            path = _given(image)
            return [one.text_map(path, wanted) for one in self.checkpoints]

        def show_components(image: str | None) -> list[Component]:
            path = _given(image)
            return [one.patch_pca(path) for one in self.checkpoints]

        self._on([run.click, text.submit], show_map, [self.image, text], outputs, "text_map")
        self._on([pca.click], show_components, [self.image], outputs, "patch_pca")

    def chatting(self, chat: "DemoChat") -> None:
        """A conversation about the image, whose answers grow as they are generated."""
        # As plain text: Markdown and HTML could ask other servers for images. Without Markdown, HTML is still rendered.
        said = self.gradio.Chatbot(
            label=chat.name, render_markdown=False, latex_delimiters=[], elem_id="chat", buttons=[]
        )
        question = self.gradio.Textbox(label="Question about the image", elem_id="question")
        with self.gradio.Row():
            run = self.gradio.Button("Ask", variant="primary", elem_id="chat-run")
            new = self.gradio.Button("New conversation", elem_id="chat-new")
        held = self.gradio.State(None)

        def ask(before: "Conversation | None", image: str | None, text: str) -> Iterator[tuple[Component, ...]]:
            # Emptied once, so that the next question can be typed while the answer grows.
            fields = "", self.gradio.update(interactive=False)
            with self._sentences():
                for conversation in chat.ask(before, _given(image), text):
                    messages = [
                        {"role": turn.role, "content": html.escape(turn.text, quote=False)}
                        for turn in conversation.turns
                    ]
                    yield messages, conversation, *fields
                    fields = self.gradio.skip(), self.gradio.skip()

        # One answer at a time: two would share the processor's tokenizer and the cores.
        answered = self.gradio.on(
            [run.click, question.submit],
            ask,
            [held, self.image, question],
            [said, held, question, run],
            api_name="chat",
            concurrency_limit=1,
        )
        answered.then(lambda: self.gradio.update(interactive=True), None, [run], api_visibility="private")
        new.click(lambda: ([], None), None, [said, held], api_name="new_conversation")

    def _columns(self, make: Callable[[str], Component]) -> list[Component]:
        with self.gradio.Row():
            return [make(one.name) for one in self.checkpoints]

    def _on(self, events: list[Any], run: Callable[..., Any], inputs: list[Any], outputs: list[Any], name: str) -> None:
        told = self._told(run)
        single = len(outputs) == 1

        @functools.wraps(told)
        def handler(*values: Any, **options: Any) -> Any:
            found = told(*values, **options)
            return found[0] if single else found

        self.gradio.on(events, handler, inputs, outputs, api_name=name)

    def _told(self, run: Callable[P, R]) -> Callable[P, R]:
        """`run`, whose OpenVisionError the page shows as one sentence."""

        @functools.wraps(run)
        def told(*values: P.args, **options: P.kwargs) -> R:
            with self._sentences():
                return run(*values, **options)

        return told

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        try:
            yield
        except OpenVisionError as error:
            # The page renders messages as HTML, and names of files may hold anything.
            sentence = html.escape(one_line(str(error)), quote=False)
            raise self.gradio.Error(sentence, print_exception=False) from error


def _given(image: str | None) -> Path:
    if image is None:
        raise OpenVisionError("there is no image; drop one into the field at the left")
    return Path(image)


def _opened(collection: Collection | None) -> Collection:
    if collection is None:
        raise OpenVisionError("no images are open; name a folder of images, of shards or of vectors, and press Enter")
    return collection


def _describe(collection: Collection | None) -> str:
    return "" if collection is None else f"{len(collection.images.keys):,} images"


def _captioned(found: list[tuple[Component, Hit]]) -> list[tuple[Component, str]]:
    return [(image, f"{hit.cosine:.3f}  {one_line(hit.name)}") for image, hit in found]
