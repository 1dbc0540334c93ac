import pytest

from headway.evaluation.acceptance import summarize_blocks
from headway.evaluation.likelihood import OffsetLikelihood
from headway.evaluation.speed import ArmSpeed, DecodingSpeed, SpeedRatio
from headway.experiments.demo.generation import (
    Comparison,
    DemoPrompt,
    RecordedGeneration,
    generated_acceptance,
)
from headway.experiments.demo.result import CorpusSummary, CurvePoint, DemoResult, TrainingSummary


def recorded(tokens, lengths, *, step=0.01):
    return RecordedGeneration(
        tokens=tuple(tokens),
        lengths=tuple(lengths),
        moments=tuple(step * (index + 1) for index in range(len(lengths))),
        seconds=step * len(lengths),
        forwards=len(lengths) - 1,
    )


@pytest.fixture
def comparison() -> Comparison:
    """Twelve bytes written plainly, and in six forward passes after the prefill's one byte."""
    text = b"if x<y:\n  go"
    return Comparison(
        prompt=DemoPrompt(source="pkg/<mod>.py", tokens=tuple(b"def f(x, y):\n")),
        plain=recorded(text, [1] * 12),
        self_speculative=recorded(text, [1, 3, 1, 2, 1, 4]),
    )


@pytest.fixture
def hostile_comparison() -> Comparison:
    """Bytes that are not UTF-8, escape sequences, markup, and ids that are not bytes."""
    text = (*b"\x1b[2J\xff\xfe<script>alert(1)</script>[/red][bold]\x00\r\x07\xe2\x82", 256, *b"\xac\xc3\xa9", 257)
    return Comparison(
        prompt=DemoPrompt(source="[red]a\x1b[31m&<b>.py", tokens=tuple(b"\x9b1m\x1b]0;x\x07")),
        plain=recorded(text, [1] * len(text)),
        self_speculative=recorded((*text[:-1], 65), [1] * len(text)),
    )


@pytest.fixture
def demo_result(comparison) -> DemoResult:
    comparisons = (comparison, comparison)
    return DemoResult(
        corpus=CorpusSummary(
            source="the standard library of Python <3.11>",
            train_documents=10,
            train_bytes=12345,
            held_out_documents=2,
            held_out_bytes=678,
            held_out_packages=("json", "<wsgiref>"),
            dropped=(("copy<of>.py", 0.75),),
        ),
        training=TrainingSummary(
            recipe="demo-bytes",
            steps=30,
            tokens=3000,
            seconds=61.0,
            tokens_per_second=49.2,
            parameters=2_000_000,
            head_parameters=600_000,
            num_future_tokens=4,
            curve=tuple(CurvePoint(step, tuple(5 - step / 10 + k / 2 for k in range(4))) for step in (10, 20, 30)),
        ),
        likelihood=OffsetLikelihood(
            nats=(1.5, 2.0, 2.25, float("nan")),
            accuracy=(0.5, 0.4, 0.35, float("nan")),
            bits_per_byte=(2.16, 2.89, 3.25, float("nan")),
            num_targets=(100, 99, 98, 0),
        ),
        walk=summarize_blocks([1, 2, 4, 1, 3], num_draft_tokens=3),
        comparisons=comparisons,
        generated=generated_acceptance(comparisons, num_draft_tokens=3),
        speed=DecodingSpeed(
            arms=(
                ArmSpeed("plain", 100.0, (90.0, 100.0, 105.0), 24, 24),
                ArmSpeed("self-speculative", 150.0, (140.0, 150.0, 170.0), 24, 12),
                ArmSpeed("hugging-face", 50.0, (49.0, 50.0, 51.0), 24, 24),
            ),
            ratios=(
                SpeedRatio("self-speculative", "plain", 1.5, 1.4, 1.7),
                SpeedRatio("plain", "hugging-face", 2.0, 1.8, 2.1),
                SpeedRatio("self-speculative", "hugging-face", 3.0, 2.8, 3.4),
            ),
            identical=True,
            prompts=2,
            max_new_tokens=12,
            repeats=3,
            warmup=1,
            includes_prefill=True,
            threads=2,
            device="cpu",
            dtype="float32",
        ),
        seconds={"corpus": 1.0, "training": 61.0, "total": 70.0},
        options={"quick": False, "seed": 0},
        provenance={
            "versions": {"python": "3.11", "torch": "2"},
            "commit": None,
            "modified": None,
            "date": "2026-11-21T00:00:00+00:00",
            "argv": ["headway", "demo"],
            "machine": {"cpu": "a & b", "threads": 2},
        },
    )
