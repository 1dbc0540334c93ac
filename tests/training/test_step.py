import pytest
import torch

from headway.data.loader import Batch
from headway.functional.targets import IGNORE_INDEX, shift_targets
from headway.model.config import MultiTokenConfig
from headway.training.config import TrainConfig
from headway.training.optimizers import TrainingOptimizer
from headway.training.step import optimizer_step, target_counts
from small_runs import tiny_model

ROWS, LENGTH = 8, 12


@pytest.fixture
def batch():
    """Packed rows with restarts at different places, one row with ignored labels."""
    torch.manual_seed(3)
    ids = torch.randint(0, 40, (ROWS, LENGTH))
    starts = torch.arange(ROWS)[:, None] + 2
    index = torch.arange(LENGTH)[None]
    documents = (index >= starts).long()
    labels = ids.clone()
    labels[1, 4:] = IGNORE_INDEX
    return Batch(ids, labels, index - documents * starts, documents)


def make(**fields):
    built = tiny_model().double().train()
    return built, TrainingOptimizer(built, TrainConfig(size="1M", gradient_clip=None, **fields))


def gradients_of(batches, monkeypatch):
    built, optimizer = make()
    kept = {}
    monkeypatch.setattr(
        optimizer, "step", lambda: kept.update({n: p.grad.clone() for n, p in built.named_parameters()})
    )
    outcome = optimizer_step(built, optimizer, batches, precision="float32", gradient_clip=None)
    return outcome, kept


def test_the_cut_into_micro_batches_changes_neither_loss_nor_gradients(batch, monkeypatch):
    whole, whole_gradients = gradients_of([batch], monkeypatch)
    for size in (1, 3):
        cut, gradients = gradients_of(list(batch.split(size)), monkeypatch)
        assert cut.loss == pytest.approx(whole.loss, rel=1e-12)
        assert cut.loss_per_offset == pytest.approx(whole.loss_per_offset, rel=1e-12)
        assert cut.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-9)
        for name, gradient in whole_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_mean_over_each_offset_s_targets_of_the_whole_step(batch):
    built, optimizer = make()
    with torch.no_grad():
        logits = built(**batch.model_inputs(), return_future_logits=True).future_logits
    wanted = []
    for offset in (1, 2):
        targets = shift_targets(
            batch.labels_BT,
            offset=offset,
            position_ids_BT=batch.position_ids_BT,
            document_ids_BT=batch.document_ids_BT,
        )
        wanted.append(
            torch.nn.functional.cross_entropy(
                logits[:, :, offset - 1].flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX
            ).item()
        )
    outcome = optimizer_step(built, optimizer, list(batch.split(2)), precision="float32", gradient_clip=None)
    assert outcome.loss_per_offset == pytest.approx(wanted, rel=1e-9)
    assert outcome.loss == pytest.approx(sum(wanted), rel=1e-9)


def test_targets_of_micro_batches_add_up_to_those_of_their_rows_together(batch):
    cut = target_counts(list(batch.split(3)), num_future_tokens=2)
    assert cut.shape == (3, 2)
    assert torch.equal(cut.sum(dim=0), target_counts([batch], num_future_tokens=2)[0])


def test_a_step_without_any_target_has_loss_zero_and_is_applied(batch):
    built, optimizer = make()
    empty = Batch(
        batch.input_ids_BT,
        torch.full_like(batch.labels_BT, IGNORE_INDEX),
        batch.position_ids_BT,
        batch.document_ids_BT,
    )
    outcome = optimizer_step(built, optimizer, [empty], precision="float32", gradient_clip=1.0)
    assert (outcome.loss, outcome.loss_per_offset, outcome.gradient_norm) == (0.0, (0.0, 0.0), 0.0)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_bounds_the_gradient_that_is_applied(batch, clip, monkeypatch):
    built, optimizer = make()
    seen = []
    monkeypatch.setattr(
        optimizer,
        "step",
        lambda: seen.append(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in optimizer.parameters]))),
    )
    outcome = optimizer_step(built, optimizer, [batch], precision="float32", gradient_clip=clip)
    assert float(seen[0]) == pytest.approx(min(clip, outcome.gradient_norm), rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_says_so(batch, where):
    built, optimizer = make()
    if where == "loss":
        with torch.no_grad():
            built.base.model.norm.weight[0] = float("inf")
    else:
        built.heads[0].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * float("nan"),))
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    outcome = optimizer_step(built, optimizer, [batch], precision="float32", gradient_clip=1.0)
    assert not outcome.applied
    assert outcome.gradient_norm is None
    assert (outcome.loss is None) == (where == "loss")
    assert optimizer.state_tensors() == {}
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
        assert parameter.grad is None


def test_a_stopped_step_leaves_no_gradient_and_no_update(batch):
    built, optimizer = make()
    answers = iter([False, True])
    outcome = optimizer_step(
        built,
        optimizer,
        list(batch.split(4)),
        precision="float32",
        gradient_clip=1.0,
        should_stop=lambda: next(answers),
    )
    assert outcome is None
    assert optimizer.state_tensors() == {}
    assert all(parameter.grad is None for parameter in built.parameters())


@pytest.mark.parametrize("precision", ["bfloat16", "bfloat16-residual"])
def test_bfloat16_steps_keep_float32_weights_and_come_near_float32(batch, precision):
    outcomes = {}
    for name in ("float32", precision):
        built = tiny_model().train()
        optimizer = TrainingOptimizer(built, TrainConfig(size="1M"))
        outcomes[name] = optimizer_step(built, optimizer, [batch], precision=name, gradient_clip=1.0)
        assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}
        assert not built.get_input_embeddings()._forward_hooks
    assert outcomes[precision].loss != outcomes["float32"].loss
    assert outcomes[precision].loss == pytest.approx(outcomes["float32"].loss, rel=2e-2)
    assert outcomes[precision].gradient_norm == pytest.approx(outcomes["float32"].gradient_norm, rel=5e-2)


def test_the_configuration_of_heads_reaches_the_loss(batch):
    built, optimizer = make()
    built.mtp_config = MultiTokenConfig(num_future_tokens=2, offset_weights=(1.0, 0.0))
    outcome = optimizer_step(built, optimizer, [batch], precision="float32", gradient_clip=None)
    assert outcome.loss == pytest.approx(outcome.loss_per_offset[0])


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_heads_whose_offset_has_no_weight_are_neither_trained_nor_decayed(batch, optimizer_name):
    built = tiny_model().train()
    optimizer = TrainingOptimizer(built, TrainConfig(size="1M", optimizer=optimizer_name))
    before = {name: parameter.detach().clone() for name, parameter in built.named_parameters()}
    outcome = optimizer_step(
        built, optimizer, list(batch.split(4)), precision="float32", gradient_clip=1.0, offset_weights=(1.0, 0.0)
    )
    assert outcome.loss == pytest.approx(outcome.loss_per_offset[0])
    assert outcome.loss_per_offset[1] is None
    assert outcome.accuracy_per_offset[1] is None
    for name, parameter in built.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("heads."), name
    state = optimizer.state_tensors()
    resting = [name for name in before if name.startswith("heads.")]
    assert {name for name in state if name.partition("/")[2] in resting} == {f"resting/{name}" for name in resting}
    again = TrainingOptimizer(built, TrainConfig(size="1M", optimizer=optimizer_name))
    again.load_state_tensors(state)
    restored = again.state_tensors()
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], state[name]) for name in state)
