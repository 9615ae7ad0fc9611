"""What the method card of distillation says must hold; teachers are small random models, or what was stored of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from pare.methods.anatomy.views import weight_of
from pare.methods.contract import Context, Teacher
from pare.methods.distill.distillation import Distill, DistillLora, final_hidden
from pare.methods.ops.heads import Head, as_stored
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.masked import Kept, Masked
from pare.methods.settings import SettingsError

CPU = torch.device("cpu")
IDS = torch.randint(96, (8, 12), generator=torch.Generator().manual_seed(4))
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(5)) < 0.3, -100)


def llama(layers: int = 2, seed: int = 0, width: int = 64, vocabulary: int = 96) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def teacher_of(model: nn.Module, column: str = "teacher.0", weight: float = 1.0) -> Teacher:
    """Its head, in tensors of its own, as the worker hands it over."""
    head = model.get_output_embeddings().weight.detach().clone()
    return Teacher(column, Head(as_stored(head), model.config.to_dict()), weight)


@torch.no_grad()
def taught(**teachers: nn.Module) -> dict[str, Tensor]:
    """The training data with the hidden states of each teacher."""
    return {"input_ids": IDS} | {column: final_hidden(model, {"input_ids": IDS}) for column, model in teachers.items()}


def prepared(method: Any, student: nn.Module, *teachers: Teacher, **context: Any) -> nn.Module:
    module: nn.Module = method.prepare(student, Context(CPU, teachers=teachers, **context))
    return module


def log_p(model: nn.Module, temperature: float = 1.0) -> Tensor:
    """Logits of the predicted tokens, as a plain pass makes them."""
    logits: Tensor = model(input_ids=IDS).logits[:, :-1].float()
    return logits.flatten(0, 1) / temperature


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("method", [Distill, DistillLora])
def test_who_learns_from_himself_has_nothing_to_learn(method: Any, divergence: str) -> None:
    student = llama()
    data = taught(**{"teacher.0": student})
    method = method(divergence=divergence, w_hidden=1.0)
    module = prepared(method, student, teacher_of(student))

    total, tokens = method.loss(module.train(), data)
    total.backward()

    assert tokens == 8 * 11
    assert abs(total) / tokens < 1e-6
    for name, gradient in gradients(module).items():
        assert gradient.abs().max() < 1e-5, name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_loss_and_its_gradients_are_those_of_torch_distributions(divergence: str, temperature: float) -> None:
    student, teacher = llama(), llama(seed=1)
    p, q = Categorical(logits=log_p(teacher, temperature).detach()), Categorical(logits=log_p(student, temperature))
    expected = (kl_divergence(p, q) if divergence == "forward_kl" else kl_divergence(q, p)).sum()
    wanted = dict(zip(dict(student.named_parameters()), torch.autograd.grad(expected, list(student.parameters())), strict=True))
    method = Distill(divergence=divergence, temperature=temperature)
    module = prepared(method, student, teacher_of(teacher))

    total, _ = method.loss(module, taught(**{"teacher.0": teacher}))
    total.backward()

    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    assert gradients(module).keys() == wanted.keys()
    for name, gradient in gradients(module).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4)


def test_terms_are_added_with_their_weights() -> None:
    student, teacher, data = llama(), llama(seed=1), taught(**{"teacher.0": llama(seed=1)})

    def loss(**settings: Any) -> float:
        method = Distill(**settings)
        return method.loss(prepared(method, llama(), teacher_of(teacher)), data)[0].item()

    plain = nn.functional.cross_entropy(log_p(student), IDS[:, 1:].flatten(), reduction="sum").item()
    h, h_t = final_hidden(student, {"input_ids": IDS})[:, :-1], data["teacher.0"][:, :-1]
    hidden = ((h - h_t).square().sum(-1) / h_t.square().sum(-1)).sum().item()
    assert loss(w_ce=0.5) - loss() == pytest.approx(0.5 * plain, rel=1e-4)
    assert loss(w_ce=0.5, temperature=2) - loss(temperature=2) == pytest.approx(0.5 * plain, rel=1e-4)
    assert loss(w_hidden=3.0) - loss() == pytest.approx(3 * hidden, rel=1e-4)


def test_of_several_teachers_the_weighted_mean_is_learnt() -> None:
    one, two = llama(seed=1), llama(seed=2)
    data = taught(**{"teacher.0": one, "teacher.1": two})

    def loss(*teachers: Teacher) -> Tensor:
        method = Distill()
        return method.loss(prepared(method, llama(), *teachers), data)[0]

    both = loss(teacher_of(one, "teacher.0", 0.25), teacher_of(two, "teacher.1", 0.75))

    torch.testing.assert_close(both, 0.25 * loss(teacher_of(one)) + 0.75 * loss(teacher_of(two, "teacher.1")))


@pytest.mark.parametrize("chunk", [1, 5, 32, 10_000])
def test_pieces_of_any_size_give_the_same_loss_and_gradients(chunk: int) -> None:
    data = taught(**{"teacher.0": llama(seed=1)}) | {"labels": LABELS}
    results = []
    for size in (chunk, 88):
        method = Distill(chunk=size, w_ce=0.3, divergence="jsd")
        module = prepared(method, llama(), teacher_of(llama(seed=1)))
        total, _ = method.loss(module, data)
        total.backward()
        results.append((total.detach(), gradients(module)))

    (total, found), (whole, wanted) = results
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5)


def test_logits_exist_for_a_piece_of_the_tokens_at_a_time() -> None:
    seen: list[tuple[int, ...]] = []
    teacher = llama(seed=1)
    method = Distill(chunk=5)
    student = llama()
    module = prepared(method, student, teacher_of(teacher))
    student.lm_head.register_forward_hook(lambda head, x, logits: seen.append(tuple(logits.shape)))

    total, _ = method.loss(module, taught(**{"teacher.0": teacher}))
    total.backward()

    kept, *pieces = seen
    assert kept == (8, 1, 96), "of its own accord the model makes those of the last token"
    assert pieces == [(5, 96)] * 17 + [(3, 96)], "88 tokens, none of them twice"


def test_masked_tokens_contribute_nothing() -> None:
    data = taught(**{"teacher.0": llama(seed=1)}) | {"labels": LABELS}
    method = Distill(w_ce=0.5, w_hidden=0.5)
    module = prepared(method, llama(), teacher_of(llama(seed=1)))
    behind = torch.nn.functional.pad(LABELS[:, 1:], (0, 1), value=-1) < 0  # what stands here predicts nothing
    spoilt = data | {"teacher.0": data["teacher.0"].masked_fill(behind[..., None], 1e4)}

    (total, tokens), (same, _), (every, _) = (method.loss(module, d) for d in (data, spoilt, {**data, "labels": IDS}))

    assert tokens == (LABELS[:, 1:] >= 0).sum()
    assert torch.equal(total, same)
    assert total < every


@pytest.mark.parametrize("pieces", [2, 8])
def test_a_batch_in_pieces_gives_the_gradients_of_the_whole(pieces: int) -> None:
    data = taught(**{"teacher.0": llama(seed=1)}) | {"labels": LABELS}
    method = Distill(w_ce=0.5, w_hidden=0.5)
    found = []
    for n in (1, pieces):
        module = prepared(method, llama(), teacher_of(llama(seed=1)))
        parts = [{name: column.chunk(n)[i] for name, column in data.items()} for i in range(n)]
        losses = [method.loss(module, part) for part in parts]
        sum(total for total, _ in losses).backward()  # type: ignore[union-attr]
        found.append((sum(total.item() for total, _ in losses), sum(int(n) for _, n in losses), gradients(module)))

    (total, tokens, whole), (total_in_pieces, tokens_in_pieces, in_pieces) = found
    assert total_in_pieces == pytest.approx(total, rel=1e-5)
    assert tokens_in_pieces == tokens
    for name, gradient in in_pieces.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)


def test_stored_states_give_the_loss_of_a_teacher_that_runs_along() -> None:
    """The states come from whole windows and the head from tensors of its own."""
    teacher, data = llama(seed=1, layers=3), taught(**{"teacher.0": llama(seed=1, layers=3)})
    method = Distill(divergence="jsd", beta=0.3)
    module = prepared(method, llama(), teacher_of(teacher))
    rows = slice(2, 5)

    stored, _ = method.loss(module, {name: column[rows] for name, column in data.items()})

    with torch.no_grad():
        p = teacher(input_ids=IDS[rows]).logits[:, :-1].log_softmax(-1)
        q = llama()(input_ids=IDS[rows]).logits[:, :-1].log_softmax(-1)
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()
    running = (0.3 * p.exp() * (p - m) + 0.7 * q.exp() * (q - m)).sum()
    torch.testing.assert_close(stored.detach(), running, rtol=1e-5, atol=1e-5)


def take_steps(method: Any, module: nn.Module, data: Mapping[str, Tensor], steps: int, rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        total, tokens = method.loss(module.train(), data)
        optimizer.zero_grad()
        (total / tokens).backward()
        optimizer.step()
        losses.append((total / tokens).item())
    return losses


def test_a_student_of_half_the_depth_can_learn_a_batch_by_heart_and_the_teacher_stays_as_it_was(tmp_path: Path) -> None:
    teacher = llama(layers=4, seed=1)
    handed = teacher_of(teacher)
    data = taught(**{"teacher.0": teacher})
    before = {name: p.clone() for name, p in [*teacher.state_dict().items(), *data.items()]}
    method = Distill()
    module = prepared(method, llama(layers=2, seed=0), handed)

    losses = take_steps(method, module, data, steps=60, rate=1e-2)

    assert losses[-1] < 0.1 * losses[0]
    assert all(p.grad is None for p in teacher.parameters())
    after = teacher.state_dict() | data
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not handed.head.project.keywords["weight"].requires_grad  # type: ignore[attr-defined]
    assert method.finish(module, tmp_path).keys() == dict(module.named_parameters()).keys()


def test_a_sparse_student_keeps_its_zeros(tmp_path: Path) -> None:
    student, formulas = llama(), {}
    for name, parameter in student.named_parameters():
        weight = torch.atleast_2d(parameter.detach()).clone()
        keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        pruned = "_proj" in name
        formulas[name] = Formula([Masked.of(keep, weight[keep]) if pruned else Dense(weight)])
        value = weight_of(student, name).data
        value.copy_(formulas[name].materialise().view(value.shape))
    method = Distill(w_hidden=1.0)
    module = prepared(method, student, teacher_of(llama()), formulas=formulas)

    losses = take_steps(method, module, taught(**{"teacher.0": llama()}), steps=20, rate=3e-3)
    result = method.finish(module, tmp_path)

    assert losses[-1] < 0.5 * losses[0]
    for name, formula in formulas.items():
        if isinstance(formula.parts[0], Kept):
            gone = formula.materialise() == 0
            assert (student.get_parameter(name)[gone] == 0).all()
            assert torch.equal(result[name].parts[0].keep(), formula.parts[0].keep())  # type: ignore[attr-defined]
            assert result[name].nbytes == formula.nbytes


def test_adapters_learn_and_the_student_beneath_stays_as_it_was(tmp_path: Path) -> None:
    student = llama()
    method = DistillLora(rank=4)
    module = prepared(method, student, teacher_of(llama(seed=1)))

    losses = take_steps(method, module, taught(**{"teacher.0": llama(seed=1)}), steps=10, rate=1e-2)
    formulas = method.finish(module, tmp_path)

    assert losses[-1] < losses[0]
    assert len(formulas) == 14
    assert all(formula.op == "add" for formula in formulas.values())
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    base = dict(llama().named_parameters())
    for name, parameter in module.unload().named_parameters():
        assert torch.equal(parameter, base[name]), name


def test_documents_of_a_row_stay_apart() -> None:
    """With positions that begin anew the loss is that of the documents by themselves, if the teacher has seen them so, too."""
    student, teacher = llama(), llama(seed=1)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).repeat(8, 1)
    labels = IDS.clone()
    labels[:, [0, 5]] = -100
    row = {"input_ids": IDS, "position_ids": positions, "labels": labels}
    pieces = [{"input_ids": IDS[:, where], "labels": labels[:, where]} for where in (slice(0, 5), slice(5, 12))]
    method = Distill()
    module = prepared(method, student, teacher_of(teacher))

    with torch.no_grad():
        whole, *alone = (method.loss(module, data | {"teacher.0": final_hidden(teacher, data)})[0] for data in (row, *pieces))

    torch.testing.assert_close(whole, alone[0] + alone[1], rtol=1e-4, atol=1e-4)


def test_caps_and_factors_of_a_head_are_part_of_it() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, final_logit_softcapping=2.0, initializer_range=0.5, attn_implementation="eager",
    )  # fmt: skip
    student, teacher = Gemma2ForCausalLM(config).eval(), Gemma2ForCausalLM(config).eval()
    p, q = Categorical(logits=log_p(teacher).detach()), Categorical(logits=log_p(student))
    expected = kl_divergence(p, q).sum()
    wanted = torch.autograd.grad(expected, student.get_input_embeddings().weight)[0]
    method = Distill()
    module = prepared(method, student, teacher_of(teacher))

    total, _ = method.loss(module, taught(**{"teacher.0": teacher}))
    total.backward()

    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(student.get_input_embeddings().weight.grad, wanted, rtol=1e-3, atol=1e-4)


def test_in_bfloat16_logits_are_compared_in_float32() -> None:
    teacher = llama(seed=1)
    data = {name: c.bfloat16() if c.is_floating_point() else c for name, c in taught(**{"teacher.0": teacher}).items()}
    head = Head(as_stored(teacher.get_output_embeddings().weight.detach().bfloat16()), teacher.config.to_dict())
    method = Distill(w_ce=0.1)
    module = prepared(method, llama().bfloat16(), replace(teacher_of(teacher), head=head))
    exact = Distill(w_ce=0.1)
    expected, _ = exact.loss(prepared(exact, llama(), teacher_of(teacher)), taught(**{"teacher.0": teacher}))

    with torch.autocast("cpu", torch.bfloat16):
        total, tokens = method.loss(module, data)
    total.backward()

    assert total.dtype == torch.float32
    assert (total / tokens).item() == pytest.approx((expected / tokens).item(), rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_a_teacher_that_does_not_fit_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"distill learns from teachers, and was given none"):
        prepared(Distill(), llama())
    with pytest.raises(ValueError, match=r"teacher\.0 predicts 100 tokens and the student 96"):
        prepared(Distill(), llama(), teacher_of(llama(vocabulary=100)))
    wider = llama(width=128, seed=1)
    plain, hidden = Distill(), Distill(w_hidden=1.0)
    data = taught(**{"teacher.0": wider})
    assert plain.loss(prepared(plain, llama(), teacher_of(wider)), data)[0] > 0
    with pytest.raises(SettingsError, match=r"w_hidden must be 0 for teacher\.0 of width 128: the student's is 64, got 1\.0"):
        hidden.loss(prepared(hidden, llama(), teacher_of(wider)), data)


def test_settings_out_of_range_are_refused_by_name() -> None:
    for setting, value, message in [
        ("divergence", "kl", "one of forward_kl, reverse_kl, jsd"),
        ("beta", 1.0, r"in \(0, 1\)"),
        ("temperature", 0.0, r"in \(0, inf\)"),
        ("w_ce", -0.1, r"in \[0, inf\)"),
        ("w_hidden", -1.0, r"in \[0, inf\)"),
        ("chunk", 0, r"in \[1, inf\)"),
    ]:
        for method in (Distill, DistillLora):
            with pytest.raises(SettingsError, match=rf"{method.name}\.{setting} must be {message}"):
                method(**{setting: value})
