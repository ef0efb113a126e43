"""Cached features of a frozen encoder: one layer's patch tokens for every image, in safetensors, keyed by content.

    cache/<encoder>/*.safetensors    one tensor for each image, (squares, N, D), named by its key
    cache/<encoder>/images.jsonl     content hashes of files, so that no file is hashed twice

`<encoder>` is a hash of the tower's weights, the layer, the image preprocessing and the dtype. Files are renamed when
they are complete, so kill -9 leaves none damaged. Features have the dtype in which the projector reads them, so losses
are the same as without a cache.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import append_lines, atomic_write_bytes, make_folder, read_json_lines
from openvision.images.native import rows_by_shape
from openvision.multimodal.data.images import PIXEL_RULES, ImageFile, ImageSource, ImageSourceError
from openvision.multimodal.model.geometry import Aspect, Geometry
from openvision.multimodal.model.huggingface import Llava, Processor, transformers

if TYPE_CHECKING:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

_FILE_BYTES = 256 * 2**20
_BATCH = 32
# Caches that were written before December 2026 have the old name, which is read and no longer written.
_DIGESTS, _OLD_DIGESTS = "images.jsonl", "pictures.jsonl"


class _OpenFile(Protocol):
    """A safetensors file that is open for reading."""

    def get_tensor(self, name: str) -> Tensor: ...


def encoder_key(model: Llava, processor: Processor, dtype: torch.dtype) -> str:
    """Hash of everything but the image that features depend on: weights, layer, preprocessing, dtype."""
    hasher = hashlib.sha256()
    config = model.config
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    preparation = processor.image_processor.to_dict()
    # The rest of the tower's shape follows from the weights.
    shape = [config.vision_config.model_type, config.vision_config.image_size, config.vision_feature_layer, str(dtype)]
    # The budget of native shapes; keys of squares stay what they were.
    shape += [native] if (native := getattr(config.vision_config, "native", None)) else []
    for value in (shape, preparation, PIXEL_RULES):
        hasher.update(json.dumps(value, sort_keys=True, default=str).encode())
    return hasher.hexdigest()[:32]


class FeatureCache:
    """Features on disk: `fill` computes missing ones, `read` returns them memory-mapped."""

    def __init__(self, folder: Path, encoder: str, geometry: Geometry, dtype: torch.dtype) -> None:
        self.folder = make_folder(folder / encoder)
        self.geometry = geometry
        self.dtype = dtype
        self._digests: dict[str, str] = {}
        self._places: dict[str, tuple[str, tuple[int, int]]] = {}
        self._open: dict[str, _OpenFile] = {}
        self.scan()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> Mapping[str, object]:
        # Every worker opens the files itself.
        return self.__dict__ | {"_open": {}}

    def key(self, image: ImageSource, aspect: Aspect) -> str:
        """Key of an image's features; raises ImageSourceError."""
        if not isinstance(image, ImageFile):
            return f"{aspect}-{image.digest()[:40]}"
        try:
            state = image.path.stat()
        except OSError as error:
            raise ImageSourceError(f"{image.path} cannot be read: {error.strerror}") from error
        stamp = f"{image.path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        if stamp not in self._digests:
            self._digests[stamp] = image.digest()[:40]
            append_lines(self.folder / _DIGESTS, json.dumps({"file": stamp, "content": self._digests[stamp]}) + "\n")
        return f"{aspect}-{self._digests[stamp]}"

    def read(self, image: ImageSource, aspect: Aspect) -> tuple[Tensor, tuple[int, int]]:
        """Features (squares, N, D) and the image's height and width; raises ImageSourceError when it has none."""
        key = self.key(image, aspect)
        if key not in self._places:
            raise ImageSourceError(f"{image} has no features in {self.folder}: it could not be read")
        name, size = self._places[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name].get_tensor(key), size

    def missing(self, images: Sequence[ImageSource], aspect: Aspect) -> list[tuple[str, int]]:
        """Key and row in `images` of those without features, each content once; skips unreadable files."""
        found: dict[str, int] = {}
        for row, image in enumerate(images):
            try:
                key = self.key(image, aspect)
            except ImageSourceError:
                continue
            if key not in self._places:
                found.setdefault(key, row)
        return list(found.items())

    def bytes_for(self, images: int) -> int:
        """Upper bound on the bytes that features of `images` images take."""
        squares = (
            max(
                (rows // self.geometry.image_size) * (columns // self.geometry.image_size) + 1
                for rows, columns in self.geometry.pinpoints
            )
            if self.geometry.pinpoints
            else 1
        )
        return images * squares * self.geometry.most_patches * self.geometry.width * self.dtype.itemsize

    def fill(
        self,
        missing: Sequence[tuple[str, ImageSource]],
        pixels_of: Callable[[Image.Image], Tensor],
        tower: Callable[[Tensor], Tensor],
        progress: Callable[[int, float], None],
    ) -> None:
        """Compute and write features.

        `pixels_of` maps an image to pixels (squares, 3, S, S), `tower` pixels (n, 3, S, S) to features (n, N, D);
        `progress` is called with the number of images done and their share. Raises OpenVisionError when the disk is too
        small.
        """
        needed, free = self.bytes_for(len(missing)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OpenVisionError(
                f"features of {len(missing)} images need up to {needed / 1e9:.1f} GB, and {self.folder} has "
                f"{free / 1e9:.1f} GB free; set run.cache_folder to a larger disk or run.cache_features=never"
            )
        pending: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, int]] = {}
        done = 0
        for batch in _batches(missing, pixels_of):
            parts = self._encoded([pixels for _, pixels, _ in batch], tower)
            for (key, _, size), part in zip(batch, parts, strict=True):
                pending[key], sizes[key] = part.contiguous(), size
            done += len(batch)
            progress(done, done / len(missing))
            if sum(part.nbytes for part in pending.values()) >= _FILE_BYTES:
                self._write(pending, sizes)
                pending, sizes = {}, {}
        if pending:
            self._write(pending, sizes)

    def _encoded(self, images: Sequence[Tensor], tower: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Features of each image; those of one shape are computed together."""
        found: dict[int, Tensor] = {}
        for rows in rows_by_shape([(image.shape[-2], image.shape[-1]) for image in images]).values():
            features = tower(torch.cat([images[row] for row in rows])).to(self.dtype).cpu()
            found |= dict(zip(rows, features.split([len(images[row]) for row in rows]), strict=True))
        return [found[row] for row in range(len(images))]

    def _write(self, features: dict[str, Tensor], sizes: dict[str, tuple[int, int]]) -> None:
        # safetensors does not store views of one tensor.
        owned = {key: part.clone() for key, part in features.items()}
        # Named by its keys, so that processes never write the same file.
        name = hashlib.sha256("".join(sorted(owned)).encode()).hexdigest()[:16] + ".safetensors"
        atomic_write_bytes(self.folder / name, save(owned, metadata={"sizes": json.dumps(sizes)}))
        self._places.update({key: (name, sizes[key]) for key in features})

    def scan(self) -> None:
        """Index the files on disk, including those of other processes; raises OpenVisionError for a damaged one."""
        self._digests = self._read_digests()
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    sizes = json.loads(opened.metadata()["sizes"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise OpenVisionError(f"{file} is damaged ({error}); delete it, and it is computed again") from error
            self._places.update({key: (file.name, tuple(size)) for key, size in sizes.items()})

    def _read_digests(self) -> dict[str, str]:
        files = [self.folder / name for name in (_OLD_DIGESTS, _DIGESTS)]
        lines = [line for file in files if file.exists() for line in read_json_lines(file)]
        return {line["file"]: line["content"] for line in lines}


def _batches(
    missing: Sequence[tuple[str, ImageSource]], pixels_of: Callable[[Image.Image], Tensor]
) -> Iterator[list[tuple[str, Tensor, tuple[int, int]]]]:
    batch: list[tuple[str, Tensor, tuple[int, int]]] = []
    for key, source in missing:
        try:
            image = source.open()
        except ImageSourceError:
            continue
        try:
            pixels = pixels_of(image)
        except ImageSourceError:
            continue
        batch.append((key, pixels, (image.height, image.width)))
        if sum(len(pixels) for _, pixels, _ in batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def patch_features(model: Llava, pixels: Tensor) -> Tensor:
    """The projector's input for pixels (n, 3, S, S): the chosen layer without prefix tokens, (n, N, D)."""
    layer = model.config.vision_feature_layer
    with torch.inference_mode():
        states = model.model.vision_tower(pixels.to(model.device, model.dtype), output_hidden_states=True).hidden_states
    skip = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return states[layer][:, skip:]


class CachedTower(nn.Module):
    """Replaces a frozen tower: takes cached features as pixels and returns them as every hidden state."""

    def __init__(self, prefix_tokens: int, depth: int, patch_size: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.states = depth + 1
        self.patch_size = patch_size

    def forward(
        self, pixel_values: Tensor, image_sizes: Tensor | None = None, **_: object
    ) -> "BaseModelOutputWithPooling":
        """Features (n, 1, N, D) -> hidden states (n, prefix + N, D), with zeros as prefix tokens.

        With `image_sizes`, int64 (n, 2) in pixels, an image has the first of its N rows, and the states are those of
        all images one behind the other, (1, sum, D), as `own_tower` returns them.
        """
        features = pixel_values[:, 0]
        if image_sizes is not None:
            counts = (image_sizes // self.patch_size).prod(dim=-1).tolist()
            features = torch.cat([row[:count] for row, count in zip(features, counts, strict=True)])[None]
        prefix = features.new_zeros(len(features), self.prefix_tokens, features.shape[-1])
        tokens = torch.cat([prefix, features], dim=1)
        output = transformers().modeling_outputs.BaseModelOutputWithPooling
        return output(last_hidden_state=tokens, hidden_states=(tokens,) * self.states)
