r"""`SourceSpec`: one source of training text, as a line of text, a mapping of YAML, or a dataclass.

    books/                                    a folder: every file in it, compressed ones too
    notes/**/*.md                             a glob
    stdlib                                    the running interpreter's standard library
    books.jsonl.xz::field=text,weight=0.7     records with a named field, and a share of the mixture
    train.jsonl::prompt=question,completion=answer
    tokens.bin::dtype=uint16                  ids
    saved_dataset/                            a folder of datasets.save_to_disk
    hf:owner/name::split=train,field=text     a dataset of the hub (or of a local folder that load_dataset takes)
    hf:owner/name::streaming=true,take=100000

After the last `::` come options, `key=value`, separated by commas; in a value `\,` is a comma, `\n` a newline, `\:` a
colon, `\\` a backslash.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import Any, Literal, get_args, get_type_hints

from headway.errors import ConfigError

Format = Literal["auto", "text", "jsonl", "parquet", "huggingface", "tokens"]

STANDARD_LIBRARY = "stdlib"
"""The path that stands for the running interpreter's standard library ("./stdlib" is a folder of that name)."""

HUB = "hf:"
"""What the path of a Hugging Face dataset begins with."""

_ESCAPES = {"\\": "\\\\", ",": "\\,", ":": "\\:", "\n": "\\n", "\t": "\\t"}
_UNESCAPED = {"n": "\n", "t": "\t"}
_INTEGER_TYPE = re.compile(r"[<>=|]?(?:u?int(?:8|16|32|64)|[iu][1248])")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Where text comes from, and which part of it.

    Attributes:
        path: a file, a folder, a glob, "stdlib", or "hf:" and the name of a dataset.
        format: how it is read; auto goes by the suffix of each file (.jsonl, .ndjson, .parquet, .npy and .bin with a
            dtype; everything else is text) and knows folders of `datasets.save_to_disk`.
        field: of records: the field with the text, "text" unless prompt and completion are given. Dots enter nested
            fields.
        prompt: of records: the field read but not learned.
        completion: of records: the field learned after the prompt.
        reward: of records with a completion: a field that is true or "correct", or false or "incorrect".
        correct: text put before the prompt of a correct completion.
        incorrect: text put before the prompt of an incorrect completion.
        group: of records: a field; records that share its value are never torn apart by the held-out split.
        weight: share of the mixture, relative to the other sources; every source has one or none has.
        name: what the source is called; None takes the last component of the path.
        dtype: of raw ids in a .bin file, such as uint16.
        split: of a dataset of several; None takes "train".
        config: of a dataset of the hub that has several configurations.
        revision: of a dataset of the hub.
        streaming: read a dataset of the hub without downloading it whole; needs `take`.
        take: so many documents from the start.

    Raises:
        ConfigError: a value of another kind or out of its range, or options that exclude each other.
    """

    path: str
    format: Format = "auto"
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    reward: str | None = None
    correct: str = "correct\n"
    incorrect: str = "incorrect\n"
    group: str | None = None
    weight: float | None = None
    name: str | None = None
    dtype: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    take: int | None = None

    def __post_init__(self) -> None:
        for key, annotation in get_type_hints(type(self)).items():
            object.__setattr__(self, key, self._checked(key, annotation, getattr(self, key)))
        self._check_together()

    @property
    def is_hub(self) -> bool:
        """Whether the path names a Hugging Face dataset."""
        return self.path.startswith(HUB)

    @property
    def is_examples(self) -> bool:
        """Whether records are prompts with completions."""
        return self.completion is not None

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """The fields of a record that are read."""
        text = (self.prompt, self.completion) if self.is_examples else (self.field or "text",)
        return tuple(name for name in (*text, self.reward, self.group) if name is not None)

    def __str__(self) -> str:
        """The line of text that `parse_source` reads back."""
        options = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "path" and value != field.default:
                word = str(value).lower() if isinstance(value, bool) else f"{value}"
                options.append(f"{field.name}={''.join(_ESCAPES.get(character, character) for character in word)}")
        return f"{self.path}::{','.join(options)}" if options or "::" in self.path else self.path

    def _checked(self, key: str, annotation: Any, value: Any) -> Any:
        if isinstance(value, PathLike):
            value = fspath(value)
        if key == "format":
            if value not in get_args(Format):
                raise self._refused(key, value, f"one of {', '.join(get_args(Format))}")
        elif key == "weight":
            if isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if value is not None and not (isinstance(value, float) and 0 < value < math.inf):
                raise self._refused(key, value, "a number above 0")
        elif key == "take":
            if value is not None and (type(value) is not int or value < 1):
                raise self._refused(key, value, "a whole number above 0")
        elif key == "streaming":
            if type(value) is not bool:
                raise self._refused(key, value, "true or false")
        elif not isinstance(value, str) and not (value is None and type(None) in get_args(annotation)):
            raise self._refused(key, value, "text")
        return value

    def _refused(self, key: str, value: Any, wanted: str) -> ConfigError:
        return ConfigError(f"{key} of the source {self.path!r} takes {wanted}: got {value!r}; correct it")

    def _check_together(self) -> None:
        problem = None
        if not self.path or self.path == HUB:
            problem = "has no path; name a file, a folder, a glob, stdlib, or hf: and the name of a dataset"
        elif self.field is not None and (self.prompt is not None or self.completion is not None):
            problem = "has field and prompt or completion; give field for plain text, the other two for examples"
        elif (self.prompt is None) != (self.completion is None):
            missing = "prompt" if self.prompt is None else "completion"
            problem = f"has no {missing}; examples need prompt and completion, each the name of a field"
        elif self.reward is not None and not self.is_examples:
            problem = "has reward but no prompt and completion; a reward conditions completions"
        elif self.dtype is not None and not _INTEGER_TYPE.fullmatch(self.dtype):
            problem = f"has dtype={self.dtype}, which is no type of whole numbers; pass for example uint16"
        elif self.dtype is not None and self.format not in ("auto", "tokens"):
            problem = f"has dtype and format={self.format}; dtype belongs to raw ids, format=tokens"
        elif self.streaming and not self.is_hub:
            problem = "has streaming, which is for datasets of the hub; drop it, or begin the path with hf:"
        elif self.streaming and self.take is None:
            problem = (
                "is a stream, whose end is not known, and an order that is exact after a resume needs one; say with "
                "take how many documents to read (take=100000); raising it later reads on from there"
            )
        elif self.is_hub and self.format not in ("auto", "huggingface"):
            problem = f"begins with hf: and has format={self.format}; drop the format"
        if problem:
            raise ConfigError(f"the source {self.path!r} {problem}")


def parse_source(value: str | PathLike[str] | Mapping[str, Any] | SourceSpec) -> SourceSpec:
    """The source that a line of text or a mapping of YAML describes.

    >>> spec = parse_source("books.jsonl.xz::field=text,weight=2")
    >>> spec.path, spec.field, spec.weight
    ('books.jsonl.xz', 'text', 2.0)
    >>> str(parse_source({"path": "books.jsonl.xz", "field": "body"}))
    'books.jsonl.xz::field=body'

    Raises:
        ConfigError: an unknown option, with the nearest one, or a bad value.
    """
    if isinstance(value, SourceSpec):
        return value
    if isinstance(value, Mapping):
        return _from_options(dict(value))
    text = fspath(value)
    path, mark, options = text.rpartition("::")
    if not mark or (options and "=" not in options):
        return SourceSpec(path=text)
    pairs = [_pair(path, option) for option in re.findall(r"(?:\\.|[^,\\])+", options, flags=re.DOTALL)]
    given = dict(pairs)
    if len(given) != len(pairs):
        raise ConfigError(f"an option of the source {path!r} stands twice in {options!r}; keep one of them")
    return _from_options({"path": path} | {key: _value(key, word) for key, word in given.items()})


def source_line(value: Any) -> Any:
    """A source in the form of one line of text; what is neither text nor a mapping is given back as it is."""
    return str(parse_source(value)) if isinstance(value, Mapping | SourceSpec) else value


def source_lines(value: Any) -> Any:
    """`source_line` of each item of a list; anything else is given back as `source_line` gives it."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | PathLike):
        return [source_line(item) for item in value]
    return source_line(value)


def _from_options(options: dict[str, Any]) -> SourceSpec:
    known = {field.name for field in dataclasses.fields(SourceSpec)}
    path = options.get("path", "")
    for key in options:
        if key == "shuffle_buffer":
            raise ConfigError(
                f"the source {path!r} asks for a shuffle buffer, and what is in a buffer is lost when a run is killed, "
                f"so it could not be resumed exactly; drop shuffle_buffer: headway shuffles all rows, anew in each "
                f"epoch"
            )
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown option {key!r} of the source {path!r}; {hint}")
    if "path" not in options:
        raise ConfigError(f"a source needs a path: got {', '.join(options) or 'nothing'}; add path")
    return SourceSpec(**options)


def _pair(path: str, option: str) -> tuple[str, str]:
    key, mark, word = option.partition("=")
    if not mark:
        raise ConfigError(
            f"an option of the source {path!r} is key=value: got {option!r}; a comma inside a value is written '\\,'"
        )
    return key.strip(), re.sub(r"\\(.)", lambda match: _UNESCAPED.get(match[1], match[1]), word, flags=re.DOTALL)


def _value(key: str, word: str) -> Any:
    """What a word of the line means; a word that does not fit is left to the check of the field."""
    if key == "streaming":
        return {"true": True, "false": False}.get(word.lower(), word)
    try:
        return {"weight": float, "take": int}.get(key, str)(word)
    except ValueError:
        return word
