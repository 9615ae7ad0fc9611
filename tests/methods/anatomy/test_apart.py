"""Which models keep the documents of one sequence apart: tried, family by family."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from pare.methods.anatomy.apart import SEES_ACROSS, keeps_apart
from pare.methods.anatomy.describe import FAMILIES
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.contract import TrainMethod
from tests.methods.anatomy.tiny_models import CONFIGS, tiny

LENGTHS = (7, 1, 11, 5)
IDS = torch.randint(96, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(4))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


def summed(model: nn.Module, **columns: Tensor) -> Tensor:
    with torch.no_grad(), one_expert_at_a_time(model):
        return TrainMethod().loss(model, {name: column.clone() for name, column in columns.items()})[0]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_loss_of_packed_documents_is_the_sum_of_their_own_or_the_family_is_known_for_it(architecture: str) -> None:
    model = tiny(architecture)
    labels = IDS.masked_fill(POSITIONS == 0, -100)

    packed = summed(model, input_ids=IDS, labels=labels, position_ids=POSITIONS)
    own = sum(summed(model, input_ids=document) for document in IDS.split(LENGTHS, dim=1) if document.shape[1] > 1)

    is_sum = bool((packed - own).abs() < 1e-5 * packed.abs())
    assert is_sum == (architecture not in SEES_ACROSS)
    assert keeps_apart(model) == is_sum
    seen = summed(model, input_ids=IDS, labels=labels)
    assert (seen - own).abs() > 1e-4 * own.abs(), "documents that see each other have another loss"


def test_it_is_tried_for_every_family() -> None:
    assert set(CONFIGS) >= set(FAMILIES)
    assert set(SEES_ACROSS) <= set(CONFIGS)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "GPT2LMHeadModel"])
def test_rounding_to_bfloat16_is_not_taken_for_a_leak(architecture: str) -> None:
    assert keeps_apart(tiny(architecture).bfloat16())


def test_a_model_that_knows_no_positions_does_not_keep_them_apart() -> None:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=40, n_layer=2, n_head=4)
    assert not keeps_apart(transformers.BloomForCausalLM(config).eval())
