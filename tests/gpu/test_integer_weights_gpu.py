"""IntegerModule integers on a CUDA device; run by name: pytest -m gpu tests/gpu."""

import pytest
import torch

from glmtune.models.loading import load_base_model
from glmtune.ops.integers import dequantise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
IDS = torch.tensor([[5, 17, 900, 1001, 1004, 42, 7]])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_is_the_weight_that_it_is_on_a_cpu(bits, dtype):
    packed = torch.arange(-128, 128).to(torch.int8)[None]
    scale = torch.tensor([0.0371], dtype=torch.float16)
    on_gpu = dequantise(packed.cuda(), scale.cuda(), bits, dtype)
    assert torch.equal(on_gpu.cpu(), dequantise(packed, scale, bits, dtype))


@torch.no_grad()
def test_packed_and_dequantised_give_the_same_bits(tiny_folder, write_quantised, tmp_path):
    folder = str(write_quantised(tiny_folder, tmp_path / "int4-qe", 4, True))
    packed = load_base_model(folder, device="cuda", keep_integers=True)
    plain = load_base_model(folder, device="cuda")
    assert packed.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(packed(IDS.cuda()).logits, plain(IDS.cuda()).logits)
