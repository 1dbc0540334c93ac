import pytest
import torch

from headway.errors import CheckpointError
from headway.training.config import TrainConfig
from headway.training.muon import BatchedMuon
from headway.training.optimizers import TrainingOptimizer, parameter_kinds
from small_runs import tiny_model


def config(**fields):
    return TrainConfig(size="1M", **fields)


def fill_gradients(built, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def snapshot(built):
    return {name: parameter.detach().clone() for name, parameter in built.named_parameters()}


@pytest.mark.parametrize("gpt2", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_has_exactly_one_kind(tied, gpt2):
    built = tiny_model(tied=tied, gpt2=gpt2)
    kinds = parameter_kinds(built)
    assert kinds.keys() == dict(built.named_parameters()).keys()
    for name, kind in kinds.items():
        parameter = dict(built.named_parameters())[name]
        if any(part in name for part in ("embed_tokens", "lm_head", "wte", "wpe")):
            assert kind == "embedding", name
        else:
            assert kind == ("matrix" if parameter.ndim == 2 else "vector"), name


def test_adamw_is_torch_adamw_with_decay_on_matrices_only():
    built, reference = tiny_model(), tiny_model()
    optimizer = TrainingOptimizer(built, config(learning_rate=1e-2))
    decayed = [parameter for parameter in reference.parameters() if parameter.ndim == 2]
    plain = [parameter for parameter in reference.parameters() if parameter.ndim < 2]
    wanted = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2, betas=(0.9, 0.95)
    )
    for seed in range(3):
        fill_gradients(built, seed)
        fill_gradients(reference, seed)
        optimizer.step()
        wanted.step()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(snapshot(built)[name], parameter.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_batched_muon_does_what_torch_muon_does(shape):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    batched = BatchedMuon(ours, lr=0.02, weight_decay=0.1, momentum=0.95)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(shape)
            other.grad = own.grad.clone()
        before = [parameter.detach().clone() for parameter in theirs]
        batched.step()
        reference.step()
        for own, other, start in zip(ours, theirs, before, strict=True):
            step = (other - start).norm()
            # Newton-Schulz runs in bfloat16: rounding, of the order of 2^-8, is all that may differ.
            assert (own - other).norm() <= 0.03 * step
            other.data.copy_(own.data)


def test_muon_trains_matrices_and_adamw_the_rest_each_at_its_own_rate():
    built = tiny_model()
    before = snapshot(built)
    optimizer = TrainingOptimizer(
        built, config(optimizer="muon", learning_rate=1e-2, adamw_learning_rate=1e-3, weight_decay=0.0)
    )
    fill_gradients(built, 0)
    optimizer.step()
    for name, kind in parameter_kinds(built).items():
        change = (snapshot(built)[name] - before[name]).square().mean().sqrt()
        # match_rms_adamw: about 0.2 x the rate; AdamW's first step: the rate itself.
        wanted = 0.2 * 1e-2 if kind == "matrix" else 1e-3
        assert change == pytest.approx(wanted, rel=0.25), name


def test_the_factor_scales_every_group_from_its_own_peak():
    optimizer = TrainingOptimizer(tiny_model(), config(optimizer="muon", learning_rate=1e-2, adamw_learning_rate=1e-3))
    optimizer.set_learning_rate_factor(0.5)
    optimizer.set_learning_rate_factor(0.25)
    rates = sorted(group["lr"] for part in optimizer._optimizers for group in part.param_groups)
    assert rates == pytest.approx([0.25e-3, 0.25e-3, 0.25e-2])
    assert optimizer.learning_rate == pytest.approx(0.25e-2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_restored_state_continues_bit_for_bit(name, tied):
    straight, resumed = tiny_model(tied=tied), tiny_model(tied=tied)
    first = TrainingOptimizer(straight, config(optimizer=name))
    for seed in range(2):
        fill_gradients(straight, seed)
        first.step()
    saved = {key: value.clone() for key, value in first.state_tensors().items()}
    second = TrainingOptimizer(resumed, config(optimizer=name))
    resumed.load_state_dict(straight.state_dict())
    second.load_state_tensors(saved)
    for built, optimizer in ((straight, first), (resumed, second)):
        fill_gradients(built, 9)
        optimizer.step()
    for key, value in snapshot(straight).items():
        assert torch.equal(value, snapshot(resumed)[key]), key


def test_the_state_names_a_tied_matrix_once():
    built = tiny_model(tied=True)
    optimizer = TrainingOptimizer(built, config())
    fill_gradients(built, 0)
    optimizer.step()
    embeddings = [key for key in optimizer.state_tensors() if "embed_tokens" in key or "lm_head" in key]
    assert sorted(embeddings) == [
        f"{moment}/base.model.embed_tokens.weight" for moment in ("exp_avg", "exp_avg_sq", "step")
    ]


def test_a_state_of_another_model_is_refused():
    built = tiny_model()
    optimizer = TrainingOptimizer(built, config())
    fill_gradients(built, 0)
    optimizer.step()
    state = optimizer.state_tensors()
    with pytest.raises(CheckpointError, match="trains no parameter"):
        optimizer.load_state_tensors(state | {"exp_avg/absent": torch.zeros(2)})
    name = "exp_avg/base.model.norm.weight"
    with pytest.raises(CheckpointError, match="shape"):
        optimizer.load_state_tensors(state | {name: torch.zeros(3)})
    some = {key: value for key, value in state.items() if not key.endswith("base.model.norm.weight")}
    with pytest.raises(CheckpointError, match=r"lacks the parameter base\.model\.norm\.weight"):
        optimizer.load_state_tensors(some)
