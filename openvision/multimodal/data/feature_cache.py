"""Features of a frozen encoder, computed once: the chosen layer of every picture, in safetensors, keyed by content.

    cache/<encoder>/*.safetensors    one tensor a picture, (squares, N, D), named by its key
    cache/<encoder>/pictures.jsonl   which file had which content, so that nothing is hashed twice

`<encoder>` hashes the tower's weights, the layer, the preparation of pictures and the dtype: another encoder finds
another folder. A file is renamed when complete, so what kill -9 leaves is whole. Features are stored in the dtype the
projector reads them in, so losses are those without a cache.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from openvision.errors import OpenVisionError
from openvision.files import append_text, atomic_write_bytes, make_folder, read_json_lines
from openvision.multimodal.data.dataset import Aspect, ConversationDataset
from openvision.multimodal.data.images import ImageFile, Picture, UnreadableImageError
from openvision.multimodal.model.geometry import Geometry
from openvision.multimodal.model.stock import transformers

_FILE_BYTES = 256 * 2**20
_BATCH = 32


def encoder_key(model: Any, processor: Any, dtype: torch.dtype) -> str:
    """Hash of everything that features depend on beside the picture."""
    hasher = hashlib.sha256()
    config = model.config
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    preparation = processor.image_processor.to_dict()
    # The weights say the rest of the tower's shape.
    shape = [config.vision_config.model_type, config.vision_config.image_size, config.vision_feature_layer, str(dtype)]
    for value in (shape, preparation):
        hasher.update(json.dumps(value, sort_keys=True, default=str).encode())
    return hasher.hexdigest()[:32]


class FeatureCache:
    """Features on disk; `fill` writes what is missing, `read` maps them."""

    def __init__(self, folder: Path, encoder: str, geometry: Geometry, dtype: torch.dtype) -> None:
        self.folder = make_folder(folder / encoder)
        self.geometry = geometry
        self.dtype = dtype
        self._digests = self._read_digests()
        self._places: dict[str, tuple[str, tuple[int, int]]] = {}
        self._open: dict[str, Any] = {}
        self.scan()

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # Workers map the files themselves.
        return self.__dict__ | {"_open": {}}

    def key(self, picture: Picture, aspect: Aspect) -> str:
        """Name of a picture's features; raises UnreadableImageError."""
        if not isinstance(picture, ImageFile):
            return f"{aspect}-{picture.digest()[:40]}"
        try:
            state = picture.path.stat()
        except OSError as error:
            raise UnreadableImageError(f"{picture.path} cannot be read: {error.strerror}") from error
        stamp = f"{picture.path.resolve()}|{state.st_size}|{state.st_mtime_ns}"
        if stamp not in self._digests:
            self._digests[stamp] = picture.digest()[:40]
            append_text(
                self.folder / "pictures.jsonl", json.dumps({"file": stamp, "content": self._digests[stamp]}) + "\n"
            )
        return f"{aspect}-{self._digests[stamp]}"

    def read(self, picture: Picture, aspect: Aspect) -> tuple[Tensor, tuple[int, int]]:
        """Features (squares, N, D) and the picture's height and width; raises UnreadableImageError when it has none."""
        key = self.key(picture, aspect)
        if key not in self._places:
            raise UnreadableImageError(f"{picture} has no features in {self.folder}: it could not be read")
        name, size = self._places[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name].get_tensor(key), size

    def missing(self, pictures: Sequence[Picture], aspect: Aspect) -> list[tuple[str, Picture]]:
        """Keys and pictures without features, each content once; broken files are left to the reader."""
        found: dict[str, Picture] = {}
        for picture in pictures:
            try:
                key = self.key(picture, aspect)
            except UnreadableImageError:
                continue
            if key not in self._places:
                found.setdefault(key, picture)
        return list(found.items())

    def bytes_for(self, pictures: int) -> int:
        """Disk that features of so many pictures take at most."""
        squares = (
            max(
                (rows // self.geometry.image_size) * (columns // self.geometry.image_size) + 1
                for rows, columns in self.geometry.pinpoints
            )
            if self.geometry.pinpoints
            else 1
        )
        return pictures * squares * self.geometry.patches * self.geometry.width * self.dtype.itemsize

    def fill(
        self,
        missing: Sequence[tuple[str, Picture]],
        dataset: ConversationDataset,
        tower: Callable[[Tensor], Tensor],
        progress: Callable[[int, float], None],
    ) -> None:
        """Compute and write; `tower` maps pixels (n, 3, S, S) to (n, N, D), `progress` hears count and share."""
        needed, free = self.bytes_for(len(missing)), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OpenVisionError(
                f"features of {len(missing)} pictures need up to {needed / 1e9:.1f} GB, and {self.folder} has "
                f"{free / 1e9:.1f} GB free; set run.cache_folder to a larger disk or run.cache_features=never"
            )
        pending: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, int]] = {}
        done = 0
        for batch in _batches(missing, dataset):
            features = tower(torch.cat([pixels for _, pixels, _ in batch])).to(self.dtype).cpu()
            parts = features.split([len(pixels) for _, pixels, _ in batch])
            for (key, _, size), part in zip(batch, parts, strict=True):
                pending[key], sizes[key] = part.contiguous(), size
            done += len(batch)
            progress(done, done / len(missing))
            if sum(part.nbytes for part in pending.values()) >= _FILE_BYTES:
                self._write(pending, sizes)
                pending, sizes = {}, {}
        if pending:
            self._write(pending, sizes)

    def _write(self, features: dict[str, Tensor], sizes: dict[str, tuple[int, int]]) -> None:
        # A part of a batch is a view of it; a file holds each on its own.
        owned = {key: part.clone() for key, part in features.items()}
        # Named by what it holds: processes that share the work never take each other's names.
        name = hashlib.sha256("".join(sorted(owned)).encode()).hexdigest()[:16] + ".safetensors"
        atomic_write_bytes(self.folder / name, save(owned, metadata={"sizes": json.dumps(sizes)}))
        self._places.update({key: (name, sizes[key]) for key in features})

    def scan(self) -> None:
        """Find what is on the disk, other processes' files included."""
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    sizes = json.loads(opened.metadata()["sizes"])
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise OpenVisionError(f"{file} is damaged ({error}); delete it to compute it anew") from error
            self._places.update({key: (file.name, tuple(size)) for key, size in sizes.items()})

    def _read_digests(self) -> dict[str, str]:
        file = self.folder / "pictures.jsonl"
        return {line["file"]: line["content"] for line in read_json_lines(file)} if file.exists() else {}


def _batches(
    missing: Sequence[tuple[str, Picture]], dataset: ConversationDataset
) -> Iterator[list[tuple[str, Tensor, tuple[int, int]]]]:
    batch: list[tuple[str, Tensor, tuple[int, int]]] = []
    for key, picture in missing:
        try:
            image = picture.open()
        except UnreadableImageError:
            continue
        batch.append((key, dataset.pixels(image), (image.height, image.width)))
        if sum(len(pixels) for _, pixels, _ in batch) >= _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def patch_features(model: Any, pixels: Tensor) -> Tensor:
    """What the projector would read: the chosen layer without prefix tokens, (n, N, D)."""
    layer = model.config.vision_feature_layer
    with torch.inference_mode():
        states = model.model.vision_tower(pixels.to(model.device, model.dtype), output_hidden_states=True).hidden_states
    skip = 1 if model.config.vision_feature_select_strategy == "default" else 0
    return states[layer][:, skip:]


class CachedTower(nn.Module):
    """Stands in for a frozen tower and returns the features it is given as the hidden state that is asked for."""

    def __init__(self, prefix_tokens: int, depth: int) -> None:
        super().__init__()
        self.prefix_tokens = prefix_tokens
        self.states = depth + 1

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """(n, 1, N, D), laid out as pixels are, -> every hidden state (n, prefix + N, D), prefix tokens zero."""
        features = pixel_values[:, 0]
        prefix = features.new_zeros(len(features), self.prefix_tokens, features.shape[-1])
        tokens = torch.cat([prefix, features], dim=1)
        output = transformers().modeling_outputs.BaseModelOutputWithPooling
        return output(last_hidden_state=tokens, hidden_states=(tokens,) * self.states)
