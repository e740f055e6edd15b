"""TomeFormer: its attention, positions, starts and sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import new_connector
from transformers import BertConfig, BertModel

from evlgen.common.errors import CheckpointError, ConfigError
from evlgen.models.connectors.tomeformer import TomeFormer

SMALL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def small(**changes) -> TomeFormer:
    torch.manual_seed(0)
    return new_connector(TomeFormer, vision_dim=24, language_dim=40, **{"r": 3, **SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)
    return folder


def test_without_merging_it_is_bert(bert_folder):
    connector = new_connector(
        TomeFormer, vision_dim=32, language_dim=8, num_layers=3, r=0, init=str(bert_folder)
    ).eval()
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        connector.proj_in.weight.copy_(torch.eye(32))
        connector.proj_in.bias.zero_()
        details = connector.forward_details(x)
        expected = BertModel.from_pretrained(bert_folder)(inputs_embeds=x, output_hidden_states=True)
    for got, wanted in zip(details["hidden_states"], expected.hidden_states, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


def test_starting_from_fewer_layers_than_wanted_is_refused(bert_folder):
    with pytest.raises(CheckpointError, match="has 3 layers, fewer than model.connector.num_layers 12"):
        new_connector(TomeFormer, vision_dim=32, language_dim=8, init=str(bert_folder))


def test_starting_from_another_size_is_refused(bert_folder):
    with pytest.raises(CheckpointError, match="hidden_size is 64, but .* has 32"):
        new_connector(
            TomeFormer, vision_dim=32, language_dim=8, num_layers=2, init=str(bert_folder), hidden_size=64
        )


@pytest.mark.parametrize("r", [0, 3, 19, [4, 1], [3, 0.5]])
@pytest.mark.parametrize("tokens", [2, 16, 17, 50])
def test_the_number_of_soft_prompts_is_as_declared(r, tokens):
    connector = small(r=r)
    out = connector(torch.randn(2, tokens, 24))
    assert out.shape == (2, connector.num_soft_prompts(tokens), 40)


def test_more_tokens_than_positions_stretch_the_table_over_the_grid():
    connector = small(max_position_embeddings=17)
    table = connector._position_table(26)
    assert table.shape == (26, 32)
    own = connector.positions.weight
    assert torch.equal(table[0], own[0])
    grid = own[1:].T.view(1, 32, 4, 4)
    wanted = F.interpolate(grid, (5, 5), mode="bilinear", align_corners=True).flatten(2)[0].T
    torch.testing.assert_close(table[1:], wanted)
    assert connector(torch.randn(1, 26, 24)).shape[2] == 40


def test_and_along_the_frames_of_videos_even_where_all_patches_would_make_a_square():
    connector = small(
        max_position_embeddings=17, num_tokens=16, num_prefix_tokens=0
    )  # four frames: 64 = 8 x 8
    line = connector.positions.weight.T.unsqueeze(0)
    wanted = F.interpolate(line, 64, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(connector._position_table(4 * 16), wanted)


def test_registers_are_no_part_of_the_grid():
    connector = small(max_position_embeddings=5 + 16, num_prefix_tokens=5)
    table = connector._position_table(5 + 36)
    assert torch.equal(table[:5], connector.positions.weight[:5])
    torch.testing.assert_close(table[5], connector.positions.weight[5])
    torch.testing.assert_close(table[-1], connector.positions.weight[-1])


def test_more_tokens_than_positions_without_a_grid_are_refused():
    connector = small(max_position_embeddings=17)
    with pytest.raises(ConfigError, match="31 visual tokens are more than the 17 positions.*square grid"):
        connector(torch.randn(1, 31, 24))


def test_soft_prompts_start_at_the_scale_of_the_word_embeddings():
    connector = small(embedding_rms=0.02, hidden_size=128, num_attention_heads=4)
    rms = connector(torch.randn(8, 33, 24)).square().mean().sqrt().item()
    assert 0.015 < rms < 0.025


def test_with_a_residual_each_soft_prompt_gets_the_mean_of_the_visual_tokens_that_merged_into_it():
    connector, x = small(residual=True, embedding_rms=0.1), torch.randn(2, 17, 24)
    details = connector.forward_details(x)
    layers = connector.proj_out(details["hidden_states"][-1])
    for image in range(2):
        for prompt in range(layers.shape[1]):
            mean = x[image, details["merge_map"][image] == prompt].mean(0)
            expected = layers[image, prompt] + connector.proj_residual.weight @ mean
            torch.testing.assert_close(details["soft_prompts"][image, prompt], expected)
    assert torch.equal(connector(x), details["soft_prompts"])
    assert (
        4 < connector.proj_residual.weight.std() * 24**0.5 / (connector.proj_out.weight.std() * 32**0.5) < 6
    )


def test_a_residual_is_nothing_that_a_bert_has(bert_folder):
    connector = new_connector(
        TomeFormer, 24, 8, num_layers=2, r=2, init=str(bert_folder), residual=True, init_lr_scale=0.1
    )
    assert connector.lr_scales() == dict.fromkeys(("positions", "token_types", "input_norm", "layers"), 0.1)
    assert small(init_lr_scale=0.1).lr_scales() == {}  # nothing starts from a BERT there


def test_without_a_class_token_nothing_is_protected():
    connector = small(num_prefix_tokens=0)
    assert connector.num_protected == 0
    assert connector(torch.randn(1, 4, 24)).shape[1] == connector.num_soft_prompts(4)


def test_dropout_is_off_in_eval_mode_and_on_in_training():
    connector, x = small(), torch.randn(1, 9, 24)
    assert torch.equal(connector(x), connector(x))
    connector.train()
    assert not torch.equal(connector(x), connector(x))


def test_every_weight_that_is_used_gets_a_gradient():
    connector = small()
    connector(torch.randn(2, 17, 24)).square().sum().backward()
    assert not [name for name, p in connector.named_parameters() if p.grad is None]


def test_torch_compile_gives_the_same():
    connector, x = small(), torch.randn(2, 17, 24)
    torch._dynamo.reset()
    compiled = torch.compile(connector, backend="aot_eager")
    torch.testing.assert_close(compiled(x), connector(x))
