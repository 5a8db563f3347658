"""A tiny BERT checkpoint in Hugging Face's layout, with its tokenizer."""

import json
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = "[PAD] [UNK] [CLS] [SEP] a small sentence is another one here ? ##s".split()
SIZES = {
    "vocab_size": len(WORDS),
    "max_position_embeddings": 12,
    "type_vocab_size": 2,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
CONFIG = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, **SIZES}


def shapes():
    """Name the tensors of a BertModel, with PyTorch's shapes."""
    width, hidden = SIZES["hidden_size"], SIZES["intermediate_size"]
    found = {
        "embeddings.word_embeddings.weight": (len(WORDS), width),
        "embeddings.position_embeddings.weight": (12, width),
        "embeddings.token_type_embeddings.weight": (2, width),
    }
    dense, norms = {"pooler.dense": (width, width)}, ["embeddings.LayerNorm"]
    for number in range(SIZES["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense[f"{layer}.attention.{part}"] = (width, width)
        dense[f"{layer}.intermediate.dense"] = (hidden, width)
        dense[f"{layer}.output.dense"] = (width, hidden)
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in dense.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found | {f"{name}.{leaf}": (width,) for name in norms for leaf in ("weight", "bias")}


def tensors() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes().items()}


def write(folder, tensors, words=WORDS, **changes):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    vocabulary = {word: number for number, word in enumerate(words)}
    splitter = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    splitter.normalizer = normalizers.BertNormalizer()
    splitter.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    splitter.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    splitter.save(str(folder / "tokenizer.json"))
    return folder
