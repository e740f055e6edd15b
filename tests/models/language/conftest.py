"""Tiny random language models of many families, with tokenizers trained on a few sentences."""

from __future__ import annotations

import io
import json

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

SENTENCES = [
    "a red circle on a hill",
    "two blue stars and a green square",
    "a photo of a small cat",
    "Question: what color is the circle? Short answer: red",
    "how many stars are there? two",
    "yes no the left right of above below",
] * 3
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**SMALL, **GATED, "head_dim": 8, "initializer_range": 0.3}
#: family -> its configuration's class and settings
FAMILIES = {
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 24, "max_position_embeddings": 64}),
    "llama": ("LlamaConfig", {**SMALL, **GATED, "max_position_embeddings": 64}),
    "qwen2": ("Qwen2Config", {**SMALL, **GATED}),
    "qwen3": ("Qwen3Config", {**SMALL, **GATED, "head_dim": 8}),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 48}),
    "gemma": ("GemmaConfig", GEMMA),
    "gemma2": ("Gemma2Config", {**GEMMA, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "sliding_window": 6, "final_logit_softcapping": 3.0}),
    "cohere": ("CohereConfig", {**SMALL, **GATED, "logit_scale": 0.3}),
    "granite": (
        "GraniteConfig",
        {**SMALL, **GATED, "logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
}

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
BART = {
    **{"encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4},
    **{"decoder_layers": 1, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
    **{"d_model": 32, "init_std": 0.3, "scale_embedding": True, "max_position_embeddings": 48},
}
ENCODER_DECODERS = {
    "t5": ("T5Config", {**T5, "tie_word_embeddings": True}),
    "flan-t5": ("T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartConfig", BART),
    "marian": ("MarianConfig", BART),
}


def bpe_tokenizer(bos: str | None = None, eos: str = "</s>", pad: str | None = "<pad>", **settings):
    """A byte-level BPE; ``bos`` is put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = list(dict.fromkeys(t for t in (pad, bos, eos, "<|im_start|>", "<|im_end|>") if t))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, **settings
    )


def sentencepiece_model() -> bytes:
    """A ``tokenizer.model`` as LLaMA's: BPE with bytes for what is unknown, <unk> 0, <s> 1, </s> 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return model.getvalue()


def write_model(folder, family: str, vocab_size: int, **changes) -> None:
    """A random model of a family."""
    name, settings = FAMILIES[family]
    settings = {"initializer_range": 0.2, **settings, "vocab_size": vocab_size, **changes}
    config = getattr(transformers, name)(**settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # weights that all equal 1 or 0 from the start would hide mistakes
        for weight in model.parameters():
            if weight.ndim == 1 and family != "mamba":
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tokenizer_of():
    return bpe_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Writes a random model and its tokenizer once for each set of arguments: ``model_folder("qwen3")``."""
    written = {}

    def write(family: str, bos: str | None = "<s>", tokenizer_settings: dict | None = None, **changes):
        key = json.dumps([family, bos, tokenizer_settings, changes], sort_keys=True)
        if key not in written:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = bpe_tokenizer(bos, **(tokenizer_settings or {}))
            tokenizer.save_pretrained(folder)
            ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            ids["pad_token_id"] = tokenizer.pad_token_id
            write_model(folder, family, len(tokenizer) + 3, **{**ids, **changes})
            written[key] = folder
        return written[key]

    return write


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A LLaMA whose tokenizer is a ``tokenizer.model`` (sentencepiece) or the ``tokenizer.json`` of it."""

    written = {}

    def write(layout: str):
        if layout not in written:
            folder = tmp_path_factory.mktemp("llama")
            (folder / "tokenizer.model").write_bytes(sentencepiece_model())
            settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
            (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))
            if layout == "tokenizer.json":
                transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
                (folder / "tokenizer.model").unlink()
            write_model(folder, "llama", 340, bos_token_id=1, eos_token_id=2)
            written[layout] = folder
        return written[layout]

    return write


@pytest.fixture(scope="session")
def seq2seq_folder(tmp_path_factory):
    """Writes a random encoder-decoder whose tokenizer ends a text with </s>, as T5's does."""
    written = {}

    def write(family: str):
        if family not in written:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = bpe_tokenizer(None)
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
            )
            tokenizer.save_pretrained(folder)
            name, settings = ENCODER_DECODERS[family]
            ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
            config = getattr(transformers, name)(
                **settings, **ids, vocab_size=len(tokenizer), decoder_start_token_id=tokenizer.pad_token_id
            )
            torch.manual_seed(0)
            transformers.AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
            written[family] = folder
        return written[family]

    return write


@pytest.fixture
def soft_prompts():
    """Makes soft prompts [B, 3, C] of about the size of a model's word embeddings."""

    def make(language, batch: int = 3):
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, 3, language.embed_dim, generator=generator) * language.embedding_rms()

    return make
