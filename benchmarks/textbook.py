"""The textbook step: the model put together from public modules the way the published code does it.

A timm ViT; transformers' BERT layers in eager attention, with gather and ``scatter_reduce`` merging between
each layer's attention and its feed-forward block; transformers' OPT in eager attention, logits at every
position and a plain cross-entropy; plain AdamW. As in LAVIS and EVLGen (``blip2_opt.py``,
``liptome_opt.py``), the frozen parts are frozen by ``requires_grad = False`` alone, the vision encoder is
in eval mode, and OPT is not: its dropout runs. Its weights have the published names, so they load into a
model of ours.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, OPTConfig, OPTForCausalLM, PreTrainedTokenizerBase
from transformers.models.bert.modeling_bert import BertEmbeddings, BertLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from reference import textbook_matching


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the three parts; the defaults are those of the CPU yardstick (OPT's are opt-125m's)."""

    vision: str = "vit_base_patch16_224"
    vision_kwargs: dict = dataclasses.field(
        default_factory=lambda: {"patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6}
    )
    image_size: int = 224
    vision_dim: int = 384
    vision_heads: int = 6
    vision_intermediate: int = 1536
    layers: int = 12
    r: int = 19
    hidden: int = 768
    heads: int = 12
    intermediate: int = 3072
    language_layers: int = 12
    language_dim: int = 768
    language_heads: int = 12
    vocabulary: int = 50272
    dropout: float = 0.1
    max_txt_len: int = 32

    def opt_config(self) -> OPTConfig:
        """OPT's configuration, without dropout of attention, as published."""
        return OPTConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.language_dim,
            word_embed_proj_dim=self.language_dim,
            ffn_dim=4 * self.language_dim,
            num_hidden_layers=self.language_layers,
            num_attention_heads=self.language_heads,
            max_position_embeddings=2048,
            dropout=self.dropout,
            attention_dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )


#: EVL_Gen as published: EVA-CLIP-g as BLIP-2 uses it, BERT-base with r = 19, OPT-2.7b.
PUBLISHED = Sizes(
    vision="eva_giant_patch14_clip_224",
    vision_kwargs={"depth": 39, "use_post_transformer_norm": False},
    vision_dim=1408,
    vision_heads=16,
    vision_intermediate=6144,
    language_layers=32,
    language_dim=2560,
    language_heads=32,
)


class TextbookConnector(nn.Module):
    """BERT with merging, as EVL_Gen's ``modeling_bert.py``: [B, N, hidden] -> [B, M, hidden]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        config = BertConfig(
            hidden_size=sizes.hidden,
            num_attention_heads=sizes.heads,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            hidden_dropout_prob=sizes.dropout,
            attention_probs_dropout_prob=sizes.dropout,
            attn_implementation="eager",
        )
        self.r, self.heads = sizes.r, sizes.heads
        self.embeddings = BertEmbeddings(config)
        del self.embeddings.word_embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config) for _ in range(sizes.layers))})

    def forward(self, x: Tensor) -> Tensor:
        # BERT has 512 positions, which begin again where an image has more tokens
        places = torch.arange(x.shape[1], device=x.device)[None] % 512
        x = self.embeddings(
            inputs_embeds=x,
            position_ids=places,
            token_type_ids=torch.zeros(x.shape[:2], dtype=torch.long, device=x.device),
        )
        for layer in self.encoder["layer"]:
            x = self._layer(layer, x)
        return x

    def _layer(self, layer: BertLayer, x: Tensor) -> Tensor:
        attention = layer.attention.self
        keys = []
        handle = attention.key.register_forward_hook(lambda module, args, out: keys.append(out))
        attended, _ = attention(x)
        handle.remove()
        x = layer.attention.output(attended, x)
        batch, num_tokens, _ = keys[0].shape
        metric = keys[0].view(batch, num_tokens, self.heads, -1).transpose(1, 2).mean(1)
        return layer.feed_forward_chunk(textbook_matching(metric, self.r)(x))


class Textbook(nn.Module):
    """Images and captions -> loss, as ``liptome_opt.py``."""

    def __init__(self, sizes: Sizes, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer, self.max_txt_len = tokenizer, sizes.max_txt_len
        self.visual_encoder = timm.create_model(
            sizes.vision, img_size=sizes.image_size, num_classes=0, **sizes.vision_kwargs
        )
        self.ln_vision = nn.LayerNorm(sizes.vision_dim)
        self.VL_proj = nn.Linear(sizes.vision_dim, sizes.hidden)
        self.VLconnector = TextbookConnector(sizes)
        self.opt_proj = nn.Linear(sizes.hidden, sizes.language_dim)
        config = sizes.opt_config()
        config._attn_implementation = "eager"
        self.opt_model = OPTForCausalLM(config)
        for frozen in (self.visual_encoder, self.opt_model):
            for parameter in frozen.parameters():
                parameter.requires_grad = False

    def train(self, mode: bool = True) -> Textbook:
        super().train(mode)
        self.visual_encoder.eval()  # the published `disabled_train`; OPT has none
        return self

    def forward(self, samples: dict) -> Tensor:
        image = samples["image"]
        tokens = self.ln_vision(self.visual_encoder.forward_features(image))
        soft_prompts = self.opt_proj(self.VLconnector(self.VL_proj(tokens)))
        tokens = self.tokenizer(
            [text + "\n" for text in samples["text_input"]],
            return_tensors="pt",
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_txt_len,
        ).to(image.device)
        targets = tokens.input_ids.masked_fill(tokens.input_ids == self.tokenizer.pad_token_id, -100)
        seen = torch.ones(soft_prompts.shape[:2], dtype=torch.long, device=image.device)
        embeds = self.opt_model.get_input_embeddings()(tokens.input_ids)
        output = self.opt_model(
            inputs_embeds=torch.cat([soft_prompts.to(embeds.dtype), embeds], dim=1),
            attention_mask=torch.cat([seen, tokens.attention_mask], dim=1),
            labels=torch.cat([torch.full_like(seen, -100), targets], dim=1),
        )
        return output.loss
