"""The Q-Former against transformers' BLIP-2, its published names, and its start from a BERT."""

from __future__ import annotations

import pytest
import torch
from reference import new_connector
from torch.nn import functional as F
from transformers import BertConfig, BertForPreTraining, Blip2Config, Blip2ForConditionalGeneration
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from evlgen.common.errors import CheckpointError
from evlgen.models.connectors.qformer import QFormer
from evlgen.models.connectors.qformer_weights import own_to_qformer, qformer_to_own

SIZES = {"num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIG = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": 24,
    **NO_DROPOUT,
}


def qformer(**changes) -> QFormer:
    torch.manual_seed(0)
    given = {"vision_dim": 24, "language_dim": 40, "num_query_token": 6, **SIZES, **changes}
    return new_connector(QFormer, **given).eval()


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of transformers' `Blip2QFormerModel` under LAVIS's names."""
    return {
        "Qformer.bert."
        + key.replace("attention.attention.", "attention.self.").replace(
            "layernorm.", "embeddings.LayerNorm."
        ): v
        for key, v in state.items()
    }


def load_reference(own: QFormer, reference: Blip2QFormerModel, queries: torch.Tensor) -> None:
    state = {"query_tokens": queries, **published_names(reference.state_dict())}
    state = {k.removeprefix("connector."): v for k, v in qformer_to_own(state).items()}
    left = own.load_state_dict(state, strict=False)
    assert not left.unexpected_keys and all(k.startswith("proj_out.") for k in left.missing_keys)


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"every{n}")
def pair(request):
    """A Q-Former and transformers' with the same random weights, all of them away from their start."""
    torch.manual_seed(1)
    reference = Blip2QFormerModel(Blip2QFormerConfig(**CONFIG, cross_attention_frequency=request.param))
    own = qformer(cross_attention_freq=request.param)
    queries = torch.randn(1, 6, 32)
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (p.ndim == 1) * 0.5)
    load_reference(own, reference, queries)
    return own, reference.eval(), queries.requires_grad_()


def test_it_computes_what_transformers_does_forward_and_backward(pair):
    own, reference, queries = pair
    tokens = torch.randn(3, 17, 24)
    theirs, ours = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    wanted = F.linear(
        reference(query_embeds=queries.expand(3, -1, -1), encoder_hidden_states=theirs).last_hidden_state,
        own.proj_out.weight.detach(),
        own.proj_out.bias.detach(),
    )
    got = own(ours)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (got * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    grads = {"query_tokens": queries.grad}
    grads |= published_names({k: p.grad for k, p in reference.named_parameters()})
    for key, grad in qformer_to_own(grads).items():
        torch.testing.assert_close(
            own.get_parameter(key.removeprefix("connector.")).grad, grad, atol=1e-5, rtol=1e-4, msg=key
        )


def test_soft_prompts_are_those_of_transformers_blip2():
    torch.manual_seed(2)
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 28,
    }
    text = {"model_type": "opt", "hidden_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"ffn_dim": 40, "vocab_size": 30, "word_embed_proj_dim": 40, "max_position_embeddings": 40}
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**CONFIG, "cross_attention_frequency": 2},
        text_config=text,
        num_query_tokens=6,
    )
    reference = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        reference.query_tokens.normal_()
    own = qformer()
    load_reference(own, reference.qformer, reference.query_tokens)
    own.proj_out.load_state_dict(reference.language_projection.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        wanted = reference.get_image_features(pixels, return_dict=True)
        got = own(wanted.last_hidden_state)
    torch.testing.assert_close(got, wanted.pooler_output, atol=1e-5, rtol=1e-5)


def stage_one(num_layers: int = 3) -> dict[str, torch.Tensor]:
    """Random weights of a whole first stage under LAVIS's names, in other parts' company."""
    torch.manual_seed(3)
    layer = {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8),
        "attention.output.LayerNorm": (8,),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
        "output.LayerNorm": (8,),
        "intermediate_query.dense": (12, 8),
        "output_query.dense": (8, 12),
        "output_query.LayerNorm": (8,),
    }
    cross = {
        "crossattention.self.query": (8, 8),
        "crossattention.self.key": (8, 6),
        "crossattention.self.value": (8, 6),
        "crossattention.output.dense": (8, 8),
        "crossattention.output.LayerNorm": (8,),
    }
    shapes = {
        "Qformer.bert.embeddings.LayerNorm": (8,),
        "Qformer.cls.predictions.transform.dense": (8, 8),
        "Qformer.cls.predictions.transform.LayerNorm": (8,),
        "vision_proj": (4, 8),
        "text_proj": (4, 8),
        "itm_head": (2, 8),
        "ln_vision": (6,),
    }
    for i in range(num_layers):
        names = {**layer, **(cross if i % 2 == 0 else {})}
        shapes |= {f"Qformer.bert.encoder.layer.{i}.{k}": v for k, v in names.items()}
    state = {f"{k}.weight": torch.randn(shape) for k, shape in shapes.items()}
    state |= {f"{k}.bias": torch.randn(shape[0]) for k, shape in shapes.items()}
    words, bias = torch.randn(20, 8), torch.randn(20)
    return {
        **state,
        "query_tokens": torch.randn(1, 4, 8),
        "temp": torch.tensor(0.07),
        "visual_encoder.blocks.0.attn.qkv.weight": torch.randn(3, 3),
        "Qformer.bert.embeddings.word_embeddings.weight": words,
        "Qformer.bert.embeddings.position_embeddings.weight": torch.randn(16, 8),
        "Qformer.cls.predictions.bias": bias,
        "Qformer.cls.predictions.decoder.weight": words,
        "Qformer.cls.predictions.decoder.bias": bias,
    }


def test_published_names_go_there_and_back_exactly():
    published = stage_one()
    own = qformer_to_own({**published, "Qformer.bert.embeddings.position_ids": torch.arange(16)[None]})
    again = own_to_qformer(own)
    assert again.keys() == published.keys()
    assert all(torch.equal(again[k], v) for k, v in published.items())
    unknown = {"visual_encoder.blocks.0.attn.qkv.weight", "ln_vision.weight", "ln_vision.bias", "temp"}
    assert unknown <= own.keys() and not [k for k in own if "Qformer" in k]
    assert qformer_to_own(own) == own


def test_own_names_are_those_of_the_modules():
    own = {k.removeprefix("connector."): v for k, v in qformer_to_own(stage_one()).items()}
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_layers": 3}
    connector = new_connector(QFormer, vision_dim=6, language_dim=0, num_query_token=4, **sizes)
    expected = connector.state_dict()
    assert {k: v.shape for k, v in own.items() if k in expected} == {k: v.shape for k, v in expected.items()}


def test_keys_without_their_values_are_named():
    state = stage_one()
    del state["Qformer.bert.encoder.layer.0.crossattention.self.value.weight"]
    with pytest.raises(CheckpointError, match="layer.0.crossattention.self.key.weight has not all of"):
        qformer_to_own(state)


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    BertForPreTraining(config).save_pretrained(folder)
    return folder


def test_it_starts_from_a_bert_with_its_feed_forward_blocks_for_the_queries(bert_folder):
    own = new_connector(QFormer, 24, 40, init=str(bert_folder), num_layers=2, num_query_token=6)
    bert = BertForPreTraining.from_pretrained(bert_folder).bert
    layer = bert.encoder.layer[1]
    projections = layer.attention.self
    assert own.sizes.hidden_size == 32
    assert torch.equal(
        own.layers[1].qkv.weight,
        torch.cat([projections.query.weight, projections.key.weight, projections.value.weight]),
    )
    assert torch.equal(own.layers[1].up.weight, layer.intermediate.dense.weight)
    assert torch.equal(own.layers[1].out_norm.bias, layer.output.LayerNorm.bias)
    assert torch.equal(own.input_norm.weight, bert.embeddings.LayerNorm.weight)
    assert 0.015 < own.layers[0].cross_key_value.weight.std() < 0.025
    assert 0.01 < own.query_tokens.std() < 0.03


def test_a_bert_of_other_sizes_is_refused(bert_folder):
    with pytest.raises(CheckpointError, match="has 3 layers, fewer than model.connector.num_layers 12"):
        new_connector(QFormer, 24, 40, init=str(bert_folder))
    with pytest.raises(CheckpointError, match="hidden_size is 64, but .* has 32"):
        new_connector(QFormer, 24, 40, init=str(bert_folder), num_layers=2, hidden_size=64)


def test_soft_prompts_start_at_the_scale_of_the_word_embeddings():
    rms = qformer(embedding_rms=0.03, hidden_size=128)(torch.randn(4, 17, 24)).square().mean().sqrt().item()
    assert 0.025 < rms < 0.035


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    own, x = qformer(), torch.randn(1, 9, 24)
    assert torch.equal(own(x), own(x))
    own.train()
    assert not torch.equal(own(x), own(x))


def test_torch_compile_gives_the_same():
    own, x = qformer(num_layers=2), torch.randn(2, 17, 24)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(own, backend="aot_eager")(x), own(x))
