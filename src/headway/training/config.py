"""`TrainConfig`: every option of a training run, typed, frozen and checked in one place.

One field is one YAML key is one flag of `headway train` (`num_future_tokens`, `--num-future-tokens`). This
module imports neither torch nor transformers, so that `headway train --help` answers at once. Reading
files: `config_file.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from headway.data.corpus_spec import CorpusSpec
from headway.data.source_spec import parse_source, source_lines
from headway.heads.options import ORDER_WINDOW, REGISTER_DISTANCE
from headway.training.config_checks import check_together
from headway.training.fields import check_limits, field_specs, option, parse_value

MODEL, LOSS, DATA, OPTIMIZATION, COMPUTE, OUTPUT = (
    "Model",
    "Loss",
    "Data",
    "Optimization",
    "Compute",
    "Output and evaluation",
)

SOURCES = ("data", "held_out")
"""Fields whose items are sources of text: lines, or mappings in YAML."""

DEFAULT_WARMUP_FRACTION = 0.08  # Table S13: 2000 of 25,000 steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: model, data, optimization, compute and output.

    The model is given by exactly one of `size`, `base_config`, `init_from`, or `hidden_size` with `num_layers`
    and `num_heads`.

    Raises:
        ConfigError: a value of another type, out of its range, or in conflict with another field (both are
            named).
    """

    # fmt: off
    size: str | None = option(
        None, "Model size by its name in the paper's Table S14, such as 10M or 0.3B.",
        group=MODEL, on_resume="free")
    base_config: str | None = option(
        None, "Folder with the config.json of a Hugging Face causal LM; only its shape is used, its "
        "num_hidden_layers counts all layers.", group=MODEL, on_resume="free")
    init_from: str | None = option(
        None, "Folder of a headway or Hugging Face model whose weights the run starts from; heads beyond "
        "num_future_tokens are dropped, missing ones start as copies of the last layer.",
        group=MODEL, on_resume="free")
    family: Literal["llama", "mistral", "qwen2", "qwen3", "olmo2"] = option(
        "llama", "Architecture of a model given by size or by hidden_size.", group=MODEL, on_resume="free")
    hidden_size: int | None = option(None, "Model width.", group=MODEL, at_least=1, on_resume="free")
    num_layers: int | None = option(
        None, "Layers in all, the head layers counted (the paper's parity rule).",
        group=MODEL, at_least=1, on_resume="free")
    num_heads: int | None = option(
        None, "Attention heads per layer.", group=MODEL, at_least=1, on_resume="free")
    num_kv_heads: int | None = option(
        None, "Key and value heads per layer; none: as many as attention heads.",
        group=MODEL, at_least=1, on_resume="free")
    intermediate_size: int | None = option(
        None, "Feed-forward width; none: 8/3 of the model width, rounded up.",
        group=MODEL, at_least=1, on_resume="free")
    tie_embeddings: bool = option(
        False, "Share the embedding and the unembedding matrix.", group=MODEL, on_resume="free")
    max_positions: int | None = option(
        None, "Longest context the saved model declares; none: 4 times sequence_length.",
        unit="tokens", group=MODEL, at_least=1, on_resume="free")
    initialization: Literal["family", "scaled"] = option(
        "family", "Initial weights: as the family draws them, or scaled to each matrix's size and to the depth "
        "(better for small models).", group=MODEL, on_resume="free")
    num_future_tokens: int = option(
        4, "Tokens predicted per position, the next one included; 1 is the plain model.",
        group=MODEL, at_least=1, on_resume="free")
    heads: Literal["transformer", "linear", "replicated_unembedding", "medusa", "hydra", "sequential"] = option(
        "transformer", "Architecture of the heads beyond the next token; docs/concepts.md has their formulas.",
        group=MODEL, on_resume="refuse")
    wiring: Literal["parallel", "causal", "anticausal"] = option(
        "parallel", "Transformer heads: each reads the trunk (parallel), the head before it (causal) or after it "
        "(anticausal: the next-token path runs through all heads).", group=MODEL, on_resume="refuse")
    layers_per_head: int = option(
        1, "Transformer heads: decoder layers of each.", group=MODEL, at_least=1, on_resume="refuse")
    tap_back: int = option(
        0, "Read so many layers before the heads' usual place (not with wiring causal or anticausal).",
        unit="layers", group=MODEL, at_least=0, on_resume="refuse")
    blocks_per_head: int = option(
        1, "Medusa and hydra heads: residual blocks of each.", group=MODEL, at_least=1, on_resume="refuse")
    own_unembedding: bool | None = option(
        None, "Medusa and hydra heads: an unembedding for each offset; none: true there.",
        group=MODEL, on_resume="refuse")
    share_modules: bool = option(
        False, "Sequential heads: one module for all depths.", group=MODEL, on_resume="refuse")
    own_output_norm: bool = option(
        False, "Sequential heads: an output norm for each module instead of the final norm.",
        group=MODEL, on_resume="refuse")
    fuse_layers: bool = option(
        False, "Sequential heads: read three layers (low, middle, high) instead of the final hidden state.",
        group=MODEL, on_resume="refuse")
    markov_rank: int = option(
        0, "Parallel heads: rank of a bias on the logits from the previous token; 0 adds none, 256 is usual.",
        group=MODEL, at_least=0, on_resume="refuse")
    shorten_trunk: bool = option(
        True, "Take the decoder layers of the heads from the trunk, so that the model has the layers given in all; "
        "off, they come on top.", group=MODEL, on_resume="refuse")
    offset_weights: tuple[float, ...] | None = option(
        None, "Loss weight of each offset, the next token first; none: all 1, as in the paper.",
        group=LOSS, at_least=0)
    head_weight_decay: float | None = option(
        None, "Loss weight of offset k as a power, decay^(k-1), instead of a list (Medusa: 0.8).",
        group=LOSS, above=0)
    normalize_head_weights: bool = option(
        False, "Scale the weights beyond the next token to a sum of 1 before head_weight (DeepSeek-V3, FastMTP).",
        group=LOSS)
    head_weight: float = option(
        1.0, "Factor on the loss weights beyond the next token.", group=LOSS, at_least=0)
    later_token_weights: tuple[float, ...] | None = option(
        None, "With num_future_tokens 1: score the next-token logits against the tokens 2, 3, ... ahead too, with these "
        "weights; the model stays plain.", group=LOSS, at_least=0)
    weight_schedule: Literal[
        "constant", "linear", "sine", "step", "forward_curriculum", "reverse_curriculum", "fade"
    ] = option(
        "constant", "How the weights beyond the next token change: risen linearly or as a sine from 0, stepped to "
        "head_weight_after, heads added one by one (forward_curriculum), dropped (reverse_curriculum) or faded out.",
        group=LOSS)
    weight_schedule_fraction: float = option(
        1.0, "Share of the run in which the schedule takes place; linear with 0.1 is a warm-up of the heads.",
        unit="fraction of steps", group=LOSS, above=0)
    head_weight_after: float | None = option(
        None, "weight_schedule step: head_weight from then on (DeepSeek-V3: 0.3, then 0.1).", group=LOSS, at_least=0)
    objective: Literal[
        "cross_entropy", "kl", "reverse_kl", "total_variation", "log_acceptance", "hybrid"
    ] = option(
        "cross_entropy", "Loss of the offsets beyond the next token: cross-entropy, or a divergence from a next-token "
        "distribution at the shifted position, the model's own or the teacher's; docs/guides/objectives.md.", group=LOSS)
    cross_entropy_share: float = option(
        0.0, "Share of the cross-entropy in a distilled loss; the divergence has the rest.",
        group=LOSS, at_least=0, below=1)
    distillation_temperature: float = option(
        1.0, "Temperature of both distributions in a divergence.", group=LOSS, above=0)
    teacher: str | None = option(
        None, "Folder or hub name of a causal LM with the same tokenizer that teaches instead of the model itself.",
        group=LOSS)
    distill_next_token: bool = option(
        False, "Distil the next token too; needs a teacher.", group=LOSS)
    detach_trunk: Literal["off", "on", "hidden-states"] = option(
        "off", "on: nothing of the base feels the heads; hidden-states: only the norm and the unembedding that they share "
        "with it do.", group=LOSS)
    train_on_drafts: bool = option(
        False, "Sequential and hydra heads: read their own drafts in training, as they will in decoding (training-time "
        "test).", group=LOSS)
    auxiliary: Literal["none", "top", "mutor"] = option(
        "none", "Objective beside the prediction of tokens, unused in decoding: token-order prediction (top) or register "
        "tokens (mutor).", group=LOSS, on_resume="refuse")
    auxiliary_weight: float | None = option(
        None, "Factor of the auxiliary objective's loss; none: 1 for top, 0.3 for mutor.", group=LOSS, at_least=0)
    order_window: int = option(
        ORDER_WINDOW, "auxiliary top: tokens ahead that are ranked.", unit="tokens", group=LOSS, at_least=1)
    register_distance: int = option(
        REGISTER_DISTANCE, "auxiliary mutor: farthest token that a register predicts.",
        unit="tokens", group=LOSS, at_least=1)
    loss_chunk_tokens: int = option(
        1024, "Rows of logits alive at once in the loss.",
        unit="tokens", group=LOSS, at_least=1, on_resume="free")

    data: tuple[str, ...] = option(
        ("stdlib",), "Text to train on: a file, folder, glob, hf:DATASET, or 'stdlib' (the running Python's standard "
        "library), with options after '::' such as ::field=text,weight=2; docs/guides/data.md. Repeatable.",
        group=DATA, on_resume="free")
    held_out: tuple[str, ...] | None = option(
        None, "Text to evaluate on, given like data; none: held_out_fraction of data. Repeatable.",
        group=DATA, on_resume="free")
    suffixes: tuple[str, ...] | None = option(
        None, "Endings of the files taken from folders, such as .py; none: all files. Repeatable.",
        group=DATA, on_resume="free")
    tokenizer: str = option(
        "auto", "'bytes', 'integers:N' (ids of any modality), or a folder or hub name of a Hugging Face tokenizer; "
        "auto: that of init_from where given, else bytes.", group=DATA, on_resume="free")
    held_out_fraction: float = option(
        0.05, "Share of the text held out for evaluation, in whole groups (packages); 0 holds out nothing.",
        unit="fraction of bytes", group=DATA, at_least=0, below=1, on_resume="free")
    split_seed: int = option(
        0, "Seed of the held-out split, apart from seed so that repeated runs share it.",
        group=DATA, at_least=0, on_resume="free")
    drop_near_duplicates: bool = option(
        True, "Drop training documents that share half of their 13-grams with held-out text.",
        group=DATA, on_resume="free")
    cache_directory: str | None = option(
        None, "Folder of the token caches; none: below output. Runs on the same text can share one.",
        group=DATA, on_resume="free")
    sequence_length: int = option(
        256, "Length of a packed training row.", unit="tokens", group=DATA, at_least=2, on_resume="refuse")
    batch_size: int = option(
        16, "Rows per micro-batch of each process.", unit="rows", group=DATA, at_least=1)
    loader_workers: int = option(
        0, "Threads that make batches ahead of the step; the batches do not depend on them.",
        unit="threads", group=DATA, at_least=0, on_resume="free")
    gradient_accumulation_steps: int = option(
        1, "Micro-batches of each process per optimizer step; the loss is the mean over all of them.",
        unit="micro-batches", group=DATA, at_least=1)

    steps: int = option(
        1000, "Optimizer steps of the whole run; not used where epochs is given.",
        unit="steps", group=OPTIMIZATION, at_least=1)
    epochs: float | None = option(
        None, "Passes over the training text, instead of steps; 0.5 is half of it.",
        unit="epochs", group=OPTIMIZATION, above=0)
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "Optimizer; muon trains hidden matrices with Muon and everything else with AdamW.",
        group=OPTIMIZATION, on_resume="refuse")
    learning_rate: float = option(3e-4, "Peak learning rate.", group=OPTIMIZATION, above=0)
    adamw_learning_rate: float | None = option(
        None, "With optimizer muon: peak learning rate of embeddings, unembedding, norms and biases; none: "
        "learning_rate.", group=OPTIMIZATION, above=0)
    weight_decay: float = option(0.1, "Decoupled weight decay of matrices.", group=OPTIMIZATION, at_least=0)
    adamw_weight_decay: float | None = option(
        None, "With optimizer muon: weight decay of embedding and unembedding; none: weight_decay.",
        group=OPTIMIZATION, at_least=0)
    betas: tuple[float, float] = option(
        (0.9, 0.95), "AdamW's decay rates of the first and second moment.",
        group=OPTIMIZATION, at_least=0, below=1)
    eps: float = option(1e-8, "AdamW's term in the denominator.", group=OPTIMIZATION, above=0)
    muon_momentum: float = option(0.95, "Muon's momentum.", group=OPTIMIZATION, at_least=0, below=1)
    gradient_clip: float | None = option(
        1.0, "Largest norm of the gradient of all parameters; none: no clipping.",
        group=OPTIMIZATION, above=0)
    warmup_steps: int | None = option(
        None, "Steps of linear warm-up.", unit="steps", group=OPTIMIZATION, at_least=0)
    warmup_fraction: float | None = option(
        None, f"Warm-up as a share of steps; used where warmup_steps is none; none: "
        f"{DEFAULT_WARMUP_FRACTION}.", unit="fraction of steps", group=OPTIMIZATION, at_least=0, below=1)
    decay_ratio: float = option(
        0.03, "Learning rate at the end of the cosine decay, as a share of the peak.",
        unit="fraction of the peak", group=OPTIMIZATION, at_least=0)
    max_nonfinite_steps: int = option(
        10, "Steps in a row with a non-finite loss or gradient after which training stops; each is "
        "skipped.", unit="steps", group=OPTIMIZATION, at_least=1, on_resume="free")

    device: str = option("auto", "Device to train on: auto, cpu, cuda or cuda:N.", group=COMPUTE)
    parallel: Literal["auto", "none", "ddp", "fsdp"] = option(
        "auto", "With torchrun: ddp (every process has the whole model) or fsdp (each has a shard of it); auto: none on "
        "one process, ddp on several; docs/guides/distributed.md.", group=COMPUTE)
    precision: Literal["float32", "bfloat16", "bfloat16-residual"] = option(
        "float32", "bfloat16: matrix products in bfloat16 (autocast), weights and optimizer stay float32; "
        "bfloat16-residual: the residual stream too, a little faster.", group=COMPUTE)
    compile: Literal["auto", "on", "off"] = option(
        "off", "Compile the layers' forward; auto: where a C++ compiler is present (announced).",
        group=COMPUTE)
    mfu_peak: str = option(
        "auto", "What the speed is a share of (MFU): auto takes the GPU's data sheet and nothing on a CPU, measure times "
        "matrix products for a quarter of a second at the start, a number is the peak of one device.",
        unit="TFLOP/s", group=COMPUTE, on_resume="free")
    gradient_checkpointing: bool = option(
        False, "Recompute layers in the backward pass: less memory, more time.", group=COMPUTE)
    seed: int = option(
        0, "Seed of initial weights and data order.", group=COMPUTE, at_least=0, on_resume="refuse")
    threads: int | None = option(
        None, "CPU threads of one operation; none: torch's choice.",
        unit="threads", group=COMPUTE, at_least=1)

    output: str = option("out/train", "Folder of the run.", group=OUTPUT, on_resume="free")
    resume: str = option(
        "auto", "auto: continue the output folder's unfinished run; never: refuse one; or a checkpoint "
        "folder.", group=OUTPUT, on_resume="free")
    overwrite: bool = option(
        False, "Replace what a former run left in the output folder.", group=OUTPUT, on_resume="free")
    log_every_steps: int = option(
        10, "Steps between lines of metrics.jsonl.",
        unit="steps", group=OUTPUT, at_least=1, on_resume="free")
    checkpoint_every_steps: int | None = option(
        500, "Steps between checkpoints; none: only at the end and on a signal.",
        unit="steps", group=OUTPUT, at_least=1, on_resume="free")
    keep_checkpoints: int = option(
        2, "Newest checkpoints kept.", group=OUTPUT, at_least=1, on_resume="free")
    keep_best: str | None = option(
        "nats", "Figure of the evaluations by which the best checkpoint is written and kept too, such as accuracy:2 "
        "(offset 2) or walk_acceptance_length; none: only the newest are kept.", group=OUTPUT, on_resume="free")
    tensorboard: bool = option(True, "Write TensorBoard events too.", group=OUTPUT, on_resume="free")
    track: Literal["wandb", "trackio"] | None = option(
        None, "Send the metrics to Weights & Biases or trackio too (pip install wandb, or trackio).",
        group=OUTPUT, on_resume="free")
    track_project: str = option("headway", "Project of the tracked run.", group=OUTPUT, on_resume="free")
    eval_every_steps: int | None = option(
        250, "Steps between evaluations on held-out text, one more at the end; none: never.",
        unit="steps", group=OUTPUT, at_least=1, on_resume="free")
    eval_rows: int = option(
        64, "Held-out rows of sequence_length for the likelihood of an evaluation.",
        unit="rows", group=OUTPUT, at_least=1, on_resume="free")
    eval_prompts: int = option(
        4, "Held-out prompts on which an evaluation decodes; 0 decodes none.",
        unit="prompts", group=OUTPUT, at_least=0, on_resume="free")
    eval_prompt_tokens: int = option(
        64, "Length of those prompts.", unit="tokens", group=OUTPUT, at_least=1, on_resume="free")
    eval_new_tokens: int = option(
        64, "Tokens decoded after each prompt.", unit="tokens", group=OUTPUT, at_least=1, on_resume="free")
    # fmt: on

    def __post_init__(self) -> None:
        for name in SOURCES:
            object.__setattr__(self, name, source_lines(getattr(self, name)))
        for name, spec in field_specs(type(self)).items():
            value = parse_value(getattr(self, name), spec.annotation, where=name)
            check_limits(spec, value)
            object.__setattr__(self, name, value)
        check_together(self)

    @property
    def rows_per_step(self) -> int:
        """Packed rows that one process consumes in one optimizer step; see `headway.training.step_shape` for several."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Input tokens that one process consumes in one optimizer step."""
        return self.rows_per_step * self.sequence_length

    @property
    def total_warmup_steps(self) -> int:
        """Steps of linear warm-up, from `warmup_steps` or `warmup_fraction`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        fraction = DEFAULT_WARMUP_FRACTION if self.warmup_fraction is None else self.warmup_fraction
        return round(fraction * self.steps)

    @property
    def corpus_spec(self) -> CorpusSpec:
        """The sources of text, and what of them is held out."""
        return CorpusSpec(
            sources=tuple(parse_source(line) for line in self.data),
            held_out=tuple(parse_source(line) for line in self.held_out or ()),
            held_out_fraction=self.held_out_fraction,
            split_seed=self.split_seed,
            drop_near_duplicates=self.drop_near_duplicates,
            suffixes=self.suffixes,
        )

    @property
    def tokenizer_name(self) -> str:
        """What `headway.data.tokenizers.load_tokenizer` is to load."""
        return (self.init_from or "bytes") if self.tokenizer == "auto" else self.tokenizer

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-ready fields in the order of declaration; `from_mapping` reads them back."""
        values = {name: getattr(self, name) for name in field_specs(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
