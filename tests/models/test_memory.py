"""Large frozen parts are read memory-mapped: their weights never stand in RAM twice."""

from __future__ import annotations

import json
import sys

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("reads /proc/self/status", allow_module_level=True)

# Loads in a process of its own and prints the peak growth of private memory and the size of the weights, in
# MB.
MEASURE = """
import json, sys, threading, time
from evlgen.models.language.opt import OPTLanguageModel
from evlgen.models.vision.timm_encoder import TimmEncoder
import torch

def private():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024

def watch():
    while not done:
        peak[0] = max(peak[0], private())
        time.sleep(0.002)

kind, path, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
torch.set_num_threads(1)
done, start = False, private()
peak = [start]
thread = threading.Thread(target=watch, daemon=True); thread.start()
if kind == "language":
    part = OPTLanguageModel(path, dtype=dtype)
else:
    part = TimmEncoder("vit_base_patch16_224", image_size=32, pretrained=path, dtype=dtype)
done = True; thread.join()
weights = sum(p.numel() * p.element_size() for p in part.parameters()) / 2**20
print(json.dumps({"growth": peak[0] - start, "weights": weights}))
"""


@pytest.fixture
def measure(forks, tmp_path):
    def measure(kind, path, dtype):
        program = tmp_path / "measure.py"
        program.write_text(MEASURE)
        code, shown = forks.run(program, kind, path, dtype, shown=tmp_path / "shown.txt")
        assert code == 0, shown
        return json.loads(shown.splitlines()[-1])

    return measure


@pytest.fixture(scope="module")
def opt_folder(tmp_path_factory, request):
    import shutil
    from pathlib import Path

    from transformers import OPTConfig, OPTForCausalLM

    folder = tmp_path_factory.mktemp("opt")
    golden = Path(__file__).resolve().parents[1] / "golden" / "evlgen_opt" / "language"
    shutil.copytree(golden, folder, dirs_exist_ok=True)
    config = OPTConfig(
        vocab_size=400,
        hidden_size=1024,
        word_embed_proj_dim=1024,
        ffn_dim=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model.to_empty(device="cpu").to(torch.float16)
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)  # whatever stood in memory need not be a number
    model.save_pretrained(folder)  # 206 MB
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_language_model_stands_in_ram_once(measure, opt_folder, dtype):
    found = measure("language", opt_folder, dtype)
    assert found["weights"] > 180
    assert found["growth"] < 1.3 * found["weights"] + 60


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_vision_encoder_stands_in_ram_once(measure, tmp_path, dtype):
    import timm

    state = timm.create_model("vit_base_patch16_224", img_size=32, num_classes=0).half().state_dict()
    torch.save({"model": state}, tmp_path / "vit.pth")  # 164 MB
    found = measure("vision", tmp_path / "vit.pth", dtype)
    assert found["weights"] > 150
    assert found["growth"] < 1.3 * found["weights"] + 60
