"""Tiny random Hugging Face model folders, written by transformers: one function per architecture.

Each function fills `path` with config.json, model.safetensors, generation_config.json where the class has one, and
tokenizer or processor files, and returns `path`. Weights depend on `seed` only. Extra keywords go to the config.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB = 320
PAD, BOS, EOS, UNK, MASK = range(5)
CORPUS = ["the quick brown fox jumps over the lazy dog", "a model is exported once and served many times"]


def write_tokenizer(path: Path, pair: bool = False, **config: Any) -> None:
    """Byte-level BPE with VOCAB entries at most; `pair` adds BERT-like [CLS]/[SEP] around the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=names, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if pair:
        special |= {"mask_token": "<mask>", "cls_token": "<s>", "sep_token": "</s>"}
    (path / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    full = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 128, **special, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(full, indent=2))


def _save(path: Path, model: Any, dtype: str = "float32", shard: str = "5GB") -> Path:
    import torch

    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=shard)
    return path


def _seeded(seed: int) -> None:
    import torch

    torch.manual_seed(seed)


def _decoder(path: Path, name: str, seed: int, dtype: str, shard: str, over: dict[str, Any], text: str = "") -> Path:
    import transformers

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.2,
    }  # fmt: skip
    config = getattr(transformers, f"{text or name}Config")(**(settings | over))
    write_tokenizer(path, padding_side="left")
    return _save(path, getattr(transformers, f"{name}ForCausalLM")(config), dtype, shard)


def llama(path: Path, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **over: Any) -> Path:
    """LlamaForCausalLM, 2 layers, hidden 64, 4/2 heads, untied."""
    return _decoder(path, "Llama", seed, dtype, shard, over)


def qwen2(path: Path, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **over: Any) -> Path:
    """Qwen2ForCausalLM (biases on q, k, v), tied embeddings."""
    return _decoder(path, "Qwen2", seed, dtype, shard, {"tie_word_embeddings": True} | over)


def qwen3(path: Path, seed: int = 0, dtype: str = "float32", shard: str = "5GB", **over: Any) -> Path:
    """Qwen3ForCausalLM (norms on q and k), tied embeddings."""
    return _decoder(path, "Qwen3", seed, dtype, shard, {"tie_word_embeddings": True} | over)


def gpt2(path: Path, seed: int = 0) -> Path:
    """GPT2LMHeadModel: learned positions, no grouped heads; an architecture that fused builders often do not know."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _seeded(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    write_tokenizer(path, padding_side="left")
    return _save(path, GPT2LMHeadModel(config))


BERT_HEADS = {
    "feature-extraction": "Model",
    "fill-mask": "ForMaskedLM",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}


def _encoder(path: Path, name: str, task: str, seed: int, over: dict[str, Any]) -> Path:
    import transformers

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 130, "type_vocab_size": 2,
        "num_labels": 2 if task == "question-answering" else 3,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.1,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(settings | over))
    write_tokenizer(path, pair=True)
    return _save(path, getattr(transformers, name + BERT_HEADS[task])(config))


def bert(path: Path, task: str = "feature-extraction", seed: int = 0, **over: Any) -> Path:
    """Bert with the head of `task`; 3 labels for the classifiers."""
    return _encoder(path, "Bert", task, seed, over)


def roberta(path: Path, task: str = "text-classification", seed: int = 0, **over: Any) -> Path:
    """Roberta with the head of `task`: positions are counted from the padding id, no token types."""
    return _encoder(path, "Roberta", task, seed, {"type_vocab_size": 1} | over)


def distilbert(path: Path, task: str = "feature-extraction", seed: int = 0, **over: Any) -> Path:
    """DistilBert with the head of `task`; no token types."""
    import transformers

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 130,
        "num_labels": 2 if task == "question-answering" else 3, "pad_token_id": PAD, "initializer_range": 0.1,
    }  # fmt: skip
    write_tokenizer(path, pair=True)
    config = transformers.DistilBertConfig(**(settings | over))
    return _save(path, getattr(transformers, f"DistilBert{BERT_HEADS[task]}")(config))


def sentence_transformer(path: Path, pooling: str = "mean", normalize: bool = True, seed: int = 0) -> Path:
    """A sentence-transformers folder around Bert: modules.json, 1_Pooling/config.json (`mean`, `cls` or `max`)."""
    bert(path, seed=seed)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + ([("2_Normalize", "Normalize")] if normalize else [])
    listing = [
        {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
        for i, (folder, kind) in enumerate(modules)
    ]
    (path / "modules.json").write_text(json.dumps(listing, indent=2))
    (path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64, "do_lower_case": False}))
    (path / "1_Pooling").mkdir()
    settings = {
        "word_embedding_dimension": 64,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": pooling == "max",
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings, indent=2))
    return path


def t5(path: Path, seed: int = 0, **over: Any) -> Path:
    """T5ForConditionalGeneration, 2 + 2 layers."""
    from transformers import T5Config, T5ForConditionalGeneration

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS, "initializer_factor": 2.0,
    }  # fmt: skip
    write_tokenizer(path)
    return _save(path, T5ForConditionalGeneration(T5Config(**(settings | over))))


def bart(path: Path, seed: int = 0, **over: Any) -> Path:
    """BartForConditionalGeneration, 2 + 2 layers."""
    from transformers import BartConfig, BartForConditionalGeneration

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": EOS,
        "forced_eos_token_id": None, "init_std": 0.2,
    }  # fmt: skip
    write_tokenizer(path)
    return _save(path, BartForConditionalGeneration(BartConfig(**(settings | over))))


def whisper(path: Path, seed: int = 0, **over: Any) -> Path:
    """WhisperForConditionalGeneration, 2 + 2 layers, 16 mel bins, 100 frames (50 positions)."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    _seeded(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "num_mel_bins": 16, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "max_source_positions": 50, "max_target_positions": 64, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS, "decoder_start_token_id": BOS, "init_std": 0.2,
    }  # fmt: skip
    write_tokenizer(path)
    _save(path, WhisperForConditionalGeneration(WhisperConfig(**(settings | over))))
    features = {
        "feature_extractor_type": "WhisperFeatureExtractor", "processor_class": "WhisperProcessor", "feature_size": 16,
        "sampling_rate": 16000, "hop_length": 160, "chunk_length": 1, "n_fft": 400, "padding_value": 0.0,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(features, indent=2))
    return path


def vit(path: Path, seed: int = 0, **over: Any) -> Path:
    """ViTForImageClassification, 2 layers, 32x32 pixels, patches of 8, 3 labels."""
    from transformers import ViTConfig, ViTForImageClassification

    _seeded(seed)
    settings: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8, "num_labels": 3, "initializer_range": 0.1,
    }  # fmt: skip
    _save(path, ViTForImageClassification(ViTConfig(**(settings | over))))
    processor = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_resize": True, "do_normalize": True,
        "do_rescale": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return path
