"""What people wrote becomes no control token, and a tokenizer's own start token is where it belongs, for
tokenizers of every kind."""

from __future__ import annotations

import io
import json

import pytest
import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from evlgen.models.connectors.qformer_text import QFormerTokenizer
from evlgen.models.language import (
    CausalLanguageModel,
    OPTLanguageModel,
    Seq2SeqLanguageModel,
    VicunaLanguageModel,
)
from evlgen.models.language.plain_text import PlainText

from .conftest import SENTENCES, bpe_tokenizer, write_model

LITERAL = "a red </s> circle <pad> <image> <|im_end|> [PAD]<s>x"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def controls(tokenizer) -> set[int]:
    """Tokens that no text may become; what is unknown is text."""
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special or str(t) == "<image>"}
    return added - {tokenizer.unk_token_id}


def unigram(folder):
    """A tokenizer of T5's kind: its control tokens are among the words it chooses from."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*SENTENCES, "x < / > [ ] | _ P A D"]),
        model_writer=model,
        model_type="unigram",
        vocab_size=80,
        hard_vocab_limit=False,
        character_coverage=1.0,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "pad_piece": "<pad>", "minloglevel": 2},
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 3}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return transformers.AutoTokenizer.from_pretrained(folder)


def word_level(_):
    words = {"</s>": 0, "<pad>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5, "<": 6, "/": 7, "s": 8, ">": 9}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def bytes_with_image(is_special):
    def build(_):
        tokenizer = bpe_tokenizer("<s>")
        tokenizer.add_tokens([AddedToken("<image>", special=is_special)])
        return tokenizer

    return build


KINDS = {
    "unigram": unigram,
    "words": word_level,
    "bytes": bytes_with_image(True),
    "bytes, not special": bytes_with_image(False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_never_a_control_token(kind, tmp_path):
    tokenizer = KINDS[kind](tmp_path)
    assert not controls(tokenizer).isdisjoint(tokenizer(LITERAL, add_special_tokens=False).input_ids)
    plain = PlainText(tokenizer)
    assert controls(tokenizer).isdisjoint(plain(LITERAL))
    if kind != "words":
        assert tokenizer.decode(plain(LITERAL)) == LITERAL
    for text in ("a red circle", "", " two blue stars"):
        assert plain(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert plain.has_control(LITERAL) and not plain.has_control("a red <circle>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model for each kind of language model, ``<image>`` among its special tokens."""
    made = {}

    def folder(kind):
        if kind in made:
            return made[kind]
        path = made[kind] = tmp_path_factory.mktemp(kind)
        if kind == "vicuna":
            settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
            settings |= {"unk_token": "<unk>", "add_eos_token": True}
            _sentencepiece(path, settings)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        elif kind == "seq2seq":
            tokenizer = unigram(path)
        else:
            tokenizer = bpe_tokenizer("<s>", chat_template=CHATML)
        tokenizer.add_tokens([AddedToken("<image>", special=True)])
        tokenizer.save_pretrained(path)
        if kind == "seq2seq":
            sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
            config = transformers.T5Config(vocab_size=len(tokenizer), **sizes)
            transformers.T5ForConditionalGeneration(config).save_pretrained(path)
        else:
            family = {"vicuna": "llama", "opt": "opt"}.get(kind, "qwen2")
            write_model(path, family, len(tokenizer))
        return path

    return folder


def _sentencepiece(path, settings):
    from .conftest import sentencepiece_model

    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("kind", "cls", "options"),
    [
        ("causal", CausalLanguageModel, {}),
        ("causal", CausalLanguageModel, {"chat_template": True}),
        ("opt", OPTLanguageModel, {}),
        ("vicuna", VicunaLanguageModel, {}),
        ("seq2seq", Seq2SeqLanguageModel, {}),
    ],
)
def test_captions_questions_and_answers_stay_text(folders, kind, cls, options):
    model = cls(str(folders(kind)), max_txt_len=400, device="meta", **options)
    tokenizer = model.tokenizer

    def count(ids):
        return sum(token in controls(tokenizer) for token in ids)

    for text_in, text_out in (([LITERAL], None), ([LITERAL], [LITERAL])):
        (sample,) = model.to_learn(text_in, text_out)
        (harmless,) = model.to_learn(["a"], text_out and ["a"])
        for part, other in zip(sample, harmless, strict=True):
            assert count(part) == count(other), "what is not the text's own, and nothing else"
        assert LITERAL in tokenizer.decode(sample.learned), "the end is where the text ends"
    (prompt,), (other,) = model.to_read([LITERAL]), model.to_read(["a"])
    assert [count(part) for part in prompt] == [count(part) for part in other]
    assert LITERAL in tokenizer.decode(prompt.read)
    (answer,) = model._answer_ids([LITERAL], "")
    assert count(answer) == count(model._answer_ids(["a"], "")[0])


def test_bert_of_the_first_stage_reads_text(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "[", "]", "se", "##p", "pad", "dec"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    tokenizer = QFormerTokenizer(str(tmp_path), 40)
    (ids,) = tokenizer(["a [SEP] a [PAD] [DEC]"]).tolist()
    assert [ids[0], ids[-1]] == [tokenizer.start, tokenizer.end]
    assert {tokenizer.start, tokenizer.begin, tokenizer.end, tokenizer.pad}.isdisjoint(ids[1:-1])
    assert tokenizer.tokenizer.decode(ids[1:-1]) == "a [ sep ] a [ pad ] [ dec ]"


@pytest.mark.parametrize("around", ["<s> $A </s>", "<s> $A", "$A </s>", "<s> <image> $A </s>", "$A"])
def test_the_start_token_is_there_whatever_ends_a_text(around, tmp_path):
    tokenizer = bpe_tokenizer("<s>")
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>", "<image>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    tokenizer.save_pretrained(tmp_path)
    write_model(tmp_path, "qwen2", len(tokenizer))
    model = CausalLanguageModel(str(tmp_path), device="meta")
    names = dict(ids)
    expected = [names[name] for name in around.split("$A")[0].split()]
    (sample,) = model.to_learn(["a red circle"])
    assert sample.before == expected
    assert sample.learned == [*model._token_ids("a red circle"), names["</s>"]]
    assert model.to_read(["a"])[0] == (expected, model._token_ids("a"), [])


@pytest.mark.parametrize("adds_end", [False, True])
def test_opt_begins_with_what_its_tokenizer_begins_with(adds_end, tmp_path):
    tokenizer = bpe_tokenizer("<s>")
    names = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<s>", "</s>")}
    around = "<s> $A </s>" if adds_end else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=around, special_tokens=list(names.items())
    )
    tokenizer.save_pretrained(tmp_path)
    write_model(tmp_path, "opt", len(tokenizer))
    model = OPTLanguageModel(str(tmp_path), max_txt_len=10, device="meta")
    (sample,) = model.to_learn(["a red circle"])
    assert sample.learned == [names["<s>"], *model._token_ids("a red circle\n")]
    question = "Question: what color is the circle that is on the hill? Short answer:"
    (asked,) = model.to_read([question])
    assert asked.read == [names["<s>"], *model._token_ids(question)[-9:]], "the words after a question stay"
