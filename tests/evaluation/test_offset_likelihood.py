import math

import pytest
import torch

from headway.data.loader import Batch
from headway.errors import ConfigError, DataError
from headway.evaluation.likelihood import evaluate_likelihood
from headway.evaluation.offset_logits import offset_logit_chunks


def packed_batches(count=2, rows=3, length=40):
    """Rows of three documents each, some labels ignored."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(count):
        ids = torch.randint(0, 256, (rows, length), generator=generator)
        labels = ids.clone()
        labels[:, 5 + index] = -100
        document_ids = torch.zeros(rows, length, dtype=torch.long)
        position_ids = torch.arange(length).expand(rows, length).clone()
        for row in range(rows):
            for number, start in enumerate((10 + 3 * row, 27 + row), start=1):
                document_ids[row, start:] = number
                position_ids[row, start:] = torch.arange(length - start)
        batches.append(
            Batch(
                input_ids_BT=ids,
                labels_BT=labels,
                position_ids_BT=position_ids,
                document_ids_BT=document_ids,
            )
        )
    return batches


def naive_likelihood(model, batches):
    """Nats and hits of every target, one (position, offset) at a time; documents are run alone."""
    nats = [[] for _ in range(model.num_future_tokens)]
    hits = [[] for _ in range(model.num_future_tokens)]
    with torch.no_grad():
        for batch in batches:
            for ids, labels, documents in zip(batch.input_ids_BT, batch.labels_BT, batch.document_ids_BT, strict=True):
                for document in documents.unique():
                    own = documents == document
                    logits = model(ids[own][None], return_future_logits=True).future_logits[0]
                    log_probs = logits.log_softmax(-1)
                    for t in range(int(own.sum())):
                        for offset in range(1, model.num_future_tokens + 1):
                            if t + offset < own.sum() and labels[own][t + offset] != -100:
                                target = labels[own][t + offset]
                                nats[offset - 1].append(-float(log_probs[t, offset - 1, target]))
                                hits[offset - 1].append(int(logits[t, offset - 1].argmax() == target))
    return nats, hits


def test_likelihood_equals_the_plain_definition_on_documents_run_alone(model):
    model = model.double()
    batches = packed_batches()
    result = evaluate_likelihood(model, batches, bytes_per_token=2.0, chunk_tokens=7)
    nats, hits = naive_likelihood(model, batches)
    assert result.num_targets == tuple(len(values) for values in nats)
    for offset in range(4):
        mean = sum(nats[offset]) / len(nats[offset])
        # HF's RMSNorm computes in float32 even in a float64 model, so documents run alone agree to about that.
        assert result.nats[offset] == pytest.approx(mean, rel=1e-6)
        assert result.accuracy[offset] == pytest.approx(sum(hits[offset]) / len(hits[offset]))
        assert result.bits_per_byte[offset] == pytest.approx(mean / math.log(2) / 2.0, rel=1e-6)


def test_likelihood_equals_the_models_own_loss_per_offset(model):
    (batch,) = packed_batches(count=1)
    with torch.no_grad():
        out = model(
            batch.input_ids_BT,
            labels=batch.labels_BT,
            position_ids=batch.position_ids_BT,
            document_ids=batch.document_ids_BT,
        )
    result = evaluate_likelihood(model, [batch])
    assert result.nats == pytest.approx(out.loss_per_offset.tolist(), rel=1e-5)
    assert result.bits_per_byte is None


def test_the_mean_runs_over_targets_and_not_over_batches(model):
    batches = packed_batches(count=2)
    batches[1].labels_BT[:, 3:] = -100
    together = evaluate_likelihood(model, batches)
    apart = [evaluate_likelihood(model, [batch]) for batch in batches]
    weights = [result.num_targets[0] for result in apart]
    mean = sum(w * r.nats[0] for w, r in zip(weights, apart, strict=True)) / sum(weights)
    assert weights[0] != weights[1]
    assert together.nats[0] == pytest.approx(mean)


def test_chunked_logits_equal_the_models_future_logits_and_never_exceed_a_chunk(model):
    ids = torch.randint(0, 256, (2, 19))
    with torch.no_grad():
        whole = model(ids, return_future_logits=True).future_logits.flatten(0, 1)
        seen = torch.full(whole.shape[:2], fill_value=False)
        for chunk in offset_logit_chunks(model, ids, chunk_tokens=5):
            assert chunk.logits_PV.shape[0] <= 5
            torch.testing.assert_close(chunk.logits_PV, whole[chunk.positions, chunk.offset - 1])
            seen[chunk.positions, chunk.offset - 1] = True
    assert seen.all()


def test_evaluation_leaves_modes_gradients_and_the_random_state_as_they_were(model):
    model.train()
    model.heads[0].eval()
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    evaluate_likelihood(model, packed_batches(count=1))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_come_back_after_an_error_too(model):
    model.train()
    with pytest.raises(DataError):
        evaluate_likelihood(model, [])
    assert model.training


def test_an_offset_without_targets_is_nan_and_null_in_json(model):
    ids = torch.randint(0, 256, (1, 2))
    zeros = torch.zeros_like(ids)
    batch = Batch(input_ids_BT=ids, labels_BT=ids, position_ids_BT=torch.arange(2)[None], document_ids_BT=zeros)
    result = evaluate_likelihood(model, [batch])
    assert result.num_targets == (1, 0, 0, 0)
    assert math.isnan(result.nats[1])
    assert result.to_json()["accuracy"][1:] == [None, None, None]


def test_wrong_settings_say_what_to_pass(model):
    with pytest.raises(ConfigError, match="total bytes / total tokens"):
        evaluate_likelihood(model, packed_batches(count=1), bytes_per_token=0.0)
    with pytest.raises(ConfigError, match="1024 is the default"):
        evaluate_likelihood(model, packed_batches(count=1), chunk_tokens=0)


def test_compiled_layers_run_eagerly_in_an_evaluation(model):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    expected = evaluate_likelihood(model, packed_batches(count=1))
    layer = model.base.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend=backend)
    assert evaluate_likelihood(model, packed_batches(count=1)) == expected
    assert compiled == []
