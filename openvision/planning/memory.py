"""Memory of a training step on one device: state, activations, losses; bytes, lowest and highest estimate.

- Low is what compiled blocks keep, in half precision throughout (gradients replace activations); high is what eager
  mode keeps, plus gradients at full size, the working space of one block's backward pass and 5 % of fragmentation.
- Activations are counted per token and block from the code of `models/layers.py`; tests compare them with the tensors
  that autograd saves and with the peak of a whole step.
"""

from dataclasses import dataclass, replace
from typing import Literal

from openvision.frozen.cost import autoencoder_cost
from openvision.hardware import Range
from openvision.models.flops import AnyTower, patches_of
from openvision.models.genlip import GenLipConfig
from openvision.models.kernels.dispatch import EXPLICIT_KEYS_ON_CPU
from openvision.models.openvision2 import ModelConfig
from openvision.models.openvision3 import OpenVision3Config
from openvision.objectives.caption import CHUNK_LOGITS as CAPTION_CHUNK
from openvision.objectives.caption import CHUNK_LOGITS_ON_ACCELERATOR as CAPTION_CHUNK_ON_GPU
from openvision.objectives.contrastive import CHUNK_LOGITS as CONTRASTIVE_CHUNK
from openvision.planning.parameters import Parameters

Checkpointing = Literal["none", "selective", "full"]
Sharding = Literal["replicated", "sharded"]

FLOAT = 4
FRAGMENTATION = 1.05
FIXED: dict[bool, Range] = {True: (1.0e9, 2.5e9), False: (0.35e9, 0.7e9)}
"""Context, libraries and communication buffers of a GPU; interpreter and libraries of a CPU process."""
UNSHARDED_BLOCKS = 2
"""Blocks gathered at a time under FSDP: the current one and the prefetched one."""


@dataclass(frozen=True)
class Setting:
    """Layout of a step on a device."""

    checkpointing: Checkpointing = "none"
    sharding: Sharding = "replicated"
    bf16: bool = True
    gpu: bool = True
    devices: int = 1
    first_moment_bytes: int = 2
    average: bool = False
    """Whether an average of the parameters (EMA) is kept."""
    frozen: tuple[str, ...] = ()
    """Towers of which only the projection into the shared space is trained."""

    @property
    def item(self) -> int:
        """Bytes of an activation."""
        return 2 if self.bf16 else FLOAT


@dataclass(frozen=True)
class Beside:
    """Bytes of a step beside its model (beside.py), of one sample."""

    kept: Range
    """Until the backward pass."""
    batch: float
    """Of each sample of the whole batch, throughout the step."""
    before: Range = (0.0, 0.0)
    """Worked with before the model's own forward pass."""
    during: float = 0.0
    """Worked with at the end of it."""

    def __add__(self, other: "Beside") -> "Beside":
        """Both: what is kept adds up, of what is worked with the larger counts."""
        return Beside(
            (self.kept[0] + other.kept[0], self.kept[1] + other.kept[1]),
            self.batch + other.batch,
            (max(self.before[0], other.before[0]), max(self.before[1], other.before[1])),
            max(self.during, other.during),
        )


NOTHING = Beside((0.0, 0.0), 0.0)


@dataclass(frozen=True)
class Stack:
    """The blocks of one transformer and the tokens that one sample puts through them."""

    name: str
    width: int
    mlp_dim: int
    heads: int
    depth: int
    tokens: int
    last_tokens: int
    """Tokens the last block computes in full; of the rest it keeps keys and values."""
    keys: int
    """Tokens that one attends to."""
    copied_keys: int = 0
    """Tokens whose keys and values are copied once more in each block: the decoders put prefix and queries together."""
    gated_attention: bool = False
    """GenLIP's blocks may have a gate of attention."""
    scaled: bool = False
    """GenLIP's blocks have a gated MLP, and a learned scale on both branches."""
    frozen: bool = False
    """GenLIP's blocks are not trained, though gradients of the captions pass through them."""

    def token_bytes(self, setting: Setting) -> Range:
        """What autograd keeps of one token in one block, compiled and eager."""
        size, width, mlp = setting.item, self.width, self.mlp_dim
        if setting.checkpointing == "full":
            return size * width, size * width
        if setting.checkpointing == "selective":
            # The block's input and what its matrix products and attention return.
            kept = size * (7 * width + mlp) + self._explicit_attention(setting)
            kept += size * (self.gated_attention * width + self.scaled * mlp)
            return kept, kept
        # On a GPU autocast norms a float32 copy of the stream.
        norm_input = FLOAT if setting.gpu else size
        eager = width * (2 * norm_input + 6 * size) + 2 * size * mlp + self._explicit_attention(setting)
        # What norms and the GELU read and return, q, k, v, and what attention returns.
        compiled = size * (8 * width + 2 * mlp) if setting.gpu else eager
        # What is multiplied is kept: attention and its gate, both branches and their scales, the halves of the MLP.
        products = size * (2 * (self.gated_attention + self.scaled) * width + 2 * self.scaled * mlp)
        if self.frozen:
            # What only a weight's gradient needs: inputs of matrices, and branches before their scales.
            eager -= size * (5 * width + mlp)
            compiled = min(compiled, eager)
        return compiled + products * (0.5 if setting.gpu else 1), eager + products

    def sample_bytes(self, setting: Setting) -> Range:
        """What autograd keeps of one sample in all blocks."""
        low, high = self.token_bytes(setting)
        last_only_keys = (self.tokens - self.last_tokens) * 4 * setting.item * self.width
        rows = (self.depth - 1) * self.tokens + self.last_tokens
        copies = 0
        if setting.checkpointing == "none":
            copies = self.depth * self.copied_keys * 2 * setting.item * self.width
        return rows * low + last_only_keys + copies, rows * high + last_only_keys + copies

    def work_bytes(self, setting: Setting) -> int:
        """One block of one sample while its backward pass runs: gradients of what it keeps, and under full
        checkpointing what it keeps, made again."""
        gradients = self.tokens * setting.item * (4 * self.width + (4 if self.scaled else 2) * self.mlp_dim)
        if setting.checkpointing == "none":
            return gradients
        plain = Setting(bf16=setting.bf16, gpu=setting.gpu)
        return gradients + round(self.tokens * self.token_bytes(plain)[1])

    def _explicit_attention(self, setting: Setting) -> int:
        """Attention weights of a token, and its scaled query, where attention is two products (short, on CPU)."""
        if setting.gpu or self.keys > EXPLICIT_KEYS_ON_CPU:
            return 0
        return setting.item * (self.heads * self.keys + self.width)


def stacks(config: ModelConfig, resolution: int, texts: int) -> list[Stack]:
    """The transformers of a model with the tokens of one training sample."""
    if isinstance(config, GenLipConfig):
        return [_one_transformer(config, resolution)]
    patches, decoder = patches_of(config.vision, resolution), config.decoder
    read = prefix = config.patches_read(patches)
    tokens = patches + config.vision.prefix_tokens
    found = [_stack("vision", config.vision, tokens, read if config.text is None else tokens, tokens)]
    unified = isinstance(config, OpenVision3Config)
    if config.text is not None:
        # The caption decoder of version 1 reads the first text's tokens.
        length, whole = config.text.context_length, 0 if unified or decoder is None else 1
        last = whole * length + texts - whole
        prefix += 0 if unified else length - 1
        found.append(_stack("text", config.text, texts * length, last, length))
    if decoder is not None:
        tokens = prefix + decoder.caption_length
        found.append(_stack("decoder", decoder, tokens, decoder.caption_length, tokens, tokens))
    if unified:
        found.append(_stack("reconstruction", config.reconstruction, patches, patches, patches))
    return found


def _one_transformer(config: GenLipConfig, resolution: int) -> Stack:
    ids = config.decoder.caption_length
    tokens = patches_of(config.vision, resolution) + ids
    stack = _stack("vision", config.vision, tokens, ids, tokens, tokens)
    return replace(stack, gated_attention=config.vision.gated, scaled=True)


def _stack(name: str, config: AnyTower, tokens: int, last: int, keys: int, copied: int = 0) -> Stack:
    return Stack(name, config.width, config.mlp_dim, config.heads, config.depth, tokens, last, keys, copied)


def state_bytes(parameters: Parameters, setting: Setting) -> dict[str, float]:
    """Bytes by kind: float32 parameters and gradients, both moments, bf16 copies of the weights, what sharing takes."""
    shards = setting.devices if setting.sharding == "sharded" else 1
    total, moment = parameters.total, setting.first_moment_bytes
    trained = total - sum(parameters.bodies[name] for name in setting.frozen)
    state = {
        "parameters": FLOAT * total / shards,
        "gradients": FLOAT * trained / shards,
        "first moment": moment * trained / shards,
        "second moment": FLOAT * trained / shards,
    }
    if parameters.frozen:
        # Teachers and averaged towers are whole on every device.
        state["frozen"] = FLOAT * sum(parameters.frozen.values())
    if setting.average:
        state["average"] = FLOAT * total / shards
    if setting.bf16:
        # Autocast casts each weight once a step and keeps the cast one for the backward pass, sharded or not.
        state["bf16 weights"] = 2 * parameters.in_blocks
    if shards > 1:
        # Parameters and gradients of a block while it is at work; tables and heads belong to no block.
        gathered = UNSHARDED_BLOCKS * parameters.largest_block + parameters.outside_blocks
        state["gathered"] = 2 * FLOAT * gathered
    elif setting.devices > 1:
        # DDP sends gradients from buffers of their size.
        state["buckets"] = FLOAT * trained
    return state


def input_bytes(config: ModelConfig, resolution: int, frozen: bool = False) -> int:
    """One sample outside the blocks: pixels as bytes and normalised, patches as the embedding reads them (float32).

    A `frozen` vision tower keeps pixels alone.
    """
    pixels = 3 * resolution**2
    if frozen:
        return pixels + FLOAT * pixels
    patches = config.vision.input_channels * config.vision.kernel**2 * patches_of(config.vision, resolution)
    embedded = 2 * FLOAT * config.vision.width * (patches_of(config.vision, resolution) + config.vision.prefix_tokens)
    # The attention pool keeps the normed tokens, and a key and a value of each.
    pooled = 3 * FLOAT * config.vision.width * patches_of(config.vision, resolution)
    return pixels + FLOAT * (pixels + patches) + embedded + (pooled if config.vision.pool == "map" else 0)


def decoder_edge_bytes(config: ModelConfig, resolution: int) -> int:
    """One sample at both ends of the decoder, float32: what its projections read, its states before and after the
    norm."""
    if config.decoder is None:
        return 0
    if isinstance(config, GenLipConfig):
        # Hidden states before and after the norm, the text's embedding, and states of the vocabulary's width.
        return 2 * FLOAT * config.decoder.caption_length * (config.vision.width + config.decoder.width)
    read = config.patches_read(patches_of(config.vision, resolution)) * config.vision.width
    if config.text is not None and not isinstance(config, OpenVision3Config):
        read += (config.text.context_length - 1) * config.text.width
    states = 4 * config.decoder.caption_length * config.decoder.width
    return FLOAT * (read + states)


def decoding_bytes(config: OpenVision3Config, resolution: int, setting: Setting) -> int:
    """What the autoencoder's decoder keeps of one image until its backward pass."""
    return setting.item * autoencoder_cost(config.vision.autoencoder, resolution).decoder_activations


@dataclass(frozen=True)
class LossMemory:
    """Bytes that the losses need beside the towers, in the plain form and as this project computes them."""

    contrastive_plain: float
    contrastive_chunked: float
    caption_plain: float
    caption_chunked: float

    @property
    def ours(self) -> float:
        """As computed here."""
        return self.contrastive_chunked + self.caption_chunked


def loss_memory(
    config: ModelConfig, local_batch: int, global_batch: int, texts: int, micro_batch: int, gpu: bool = True
) -> LossMemory:
    """Memory of the losses on one device.

    Args:
        config: of the model.
        local_batch: samples of a device whose embeddings are contrasted with all `global_batch` texts of each kind.
        global_batch: samples of all devices together.
        texts: kinds of texts contrasted with an image.
        micro_batch: samples whose captions are predicted at a time.
        gpu: whether the device is one.
    """
    plain = chunked = 0.0
    if config.embed_dim is not None:
        square = FLOAT * local_batch * global_batch
        # Log-probabilities both ways for each kind stay until backward; two squares are at work.
        plain = (2 * texts + 2) * square
        features = FLOAT * config.embed_dim * (local_batch + texts * (local_batch + global_batch))
        chunked = min(plain, 2 * FLOAT * CONTRASTIVE_CHUNK) + 2 * features
        plain += 2 * features
    decoder = config.decoder
    if decoder is None:
        return LossMemory(plain, chunked, 0.0, 0.0)
    rows, gradient = micro_batch * decoder.caption_length, FLOAT * decoder.vocab_size * decoder.width
    logits = FLOAT * rows * decoder.vocab_size
    valid = 3 * FLOAT * rows * decoder.width
    caption_chunked = min(3 * logits, 3 * FLOAT * (CAPTION_CHUNK_ON_GPU if gpu else CAPTION_CHUNK)) + gradient + valid
    return LossMemory(plain, chunked, 3 * logits + gradient, caption_chunked)


def activation_bytes(config: ModelConfig, resolution: int, texts: int, setting: Setting) -> Range:
    """Activations of one sample that stay until the backward pass, all towers; frozen ones keep none
    (but of GenLIP's captions)."""
    rest = input_bytes(config, resolution, "vision" in setting.frozen) + decoder_edge_bytes(config, resolution)
    if isinstance(config, OpenVision3Config) and config.reconstruction.decoded_at_once is None:
        rest += decoding_bytes(config, resolution, setting) / config.reconstruction.pixels_of
    trained = [stack for stack in stacks(config, resolution, texts) if stack.name not in setting.frozen]
    if isinstance(config, GenLipConfig) and not trained:
        # Gradients of the caption's ids pass through the frozen blocks, those of patches do not.
        stack = _one_transformer(config, resolution)
        trained = [replace(stack, tokens=stack.last_tokens, frozen=True)]
    kept = [stack.sample_bytes(setting) for stack in trained]
    return sum(low for low, _ in kept) + rest, sum(high for _, high in kept) + rest


def peak_bytes(
    config: ModelConfig,
    parameters: Parameters,
    resolution: int,
    texts: int,
    setting: Setting,
    micro_batch: int,
    local_batch: int,
    beside: Beside = NOTHING,
) -> Range:
    """Peak of one training step on one device whose batch of `local_batch` runs `micro_batch` samples at a time.

    `parameters` are those of the run, `beside` what it keeps beside the model.
    """
    state = state_bytes(parameters, setting)
    whole = sum(state.values()) + local_batch * beside.batch
    low, high = (
        micro_batch * (value + kept)
        for value, kept in zip(activation_bytes(config, resolution, texts, setting), beside.kept, strict=True)
    )
    work = micro_batch * max(beside.during, *(stack.work_bytes(setting) for stack in stacks(config, resolution, texts)))
    loss = loss_memory(config, local_batch, local_batch * setting.devices, texts, micro_batch, setting.gpu).ours
    if isinstance(config, OpenVision3Config) and (at_once := config.reconstruction.decoded_at_once) is not None:
        decoded = min(at_once, -(-micro_batch // config.reconstruction.pixels_of))
        loss += decoded * decoding_bytes(config, resolution, setting)
    fixed = FIXED[setting.gpu]
    # In one batch, gradients replace activations during backward; with micro-batches they are there all along.
    growing = state["gradients"] if micro_batch == local_batch else 0.0
    before = (micro_batch * beside.before[0] - state["gradients"], micro_batch * beside.before[1])
    lowest = whole + max(low + loss - growing, before[0], 0.0) + fixed[0]
    return lowest, (whole + max(high + work + loss, before[1])) * FRAGMENTATION + fixed[1]
