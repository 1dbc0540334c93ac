"""Names of the files in a run's output folder; needs no torch. What each is: `run_directory.py`."""

from __future__ import annotations

MARKER, CONFIG = "headway-run.json", "config.yaml"
METRICS, EVALUATIONS, TENSORBOARD, TRACKING = "metrics.jsonl", "evaluations.jsonl", "tensorboard", "tracking.json"
CHECKPOINTS, MODEL, RESULT, TOKENS, LOCK = "checkpoints", "model", "result.json", "tokens", ".lock"
