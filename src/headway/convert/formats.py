"""The code of every format by its name.

A new format is one file, a line here and a line in `names.py`.
"""

from __future__ import annotations

from headway.convert.facebook.folder import FacebookFolder
from headway.convert.gguf_folder import GgufFolder
from headway.convert.headway_folder import HeadwayFolder
from headway.convert.lazy_model import ModelFormat, WrittenFormat
from headway.convert.medusa.engine import MedusaEngineFolder
from headway.convert.medusa.folder import MedusaFolder
from headway.convert.names import EXPORTS
from headway.convert.plain_folder import PlainFolder
from headway.convert.sequential.folder import TransformersMtpFolder
from headway.errors import ConfigError

MODEL_FORMATS: dict[str, ModelFormat] = {
    format_.name: format_
    for format_ in (
        HeadwayFolder(),
        PlainFolder(),
        FacebookFolder(),
        MedusaFolder(),
        MedusaEngineFolder(),
        TransformersMtpFolder(),
    )
}
"""In the order of `headway.convert.names.FORMATS`."""


EXPORT_FORMATS: dict[str, WrittenFormat] = {format_.name: format_ for format_ in (GgufFolder(), GgufFolder("q8_0"))}
"""In the order of `headway.convert.names.EXPORTS`."""


def model_format(name: str) -> ModelFormat:
    """The format of this name, to read.

    Raises:
        ConfigError: no such format, or one that is only written.
    """
    if name in EXPORTS:
        raise ConfigError(f"format {name} is written, not read: give the folder that it was made from")
    if name not in MODEL_FORMATS:
        raise ConfigError(f"unknown format {name!r}; the formats are {', '.join(MODEL_FORMATS)}")
    return MODEL_FORMATS[name]


def written_format(name: str) -> WrittenFormat:
    """The format of this name, to write.

    Raises:
        ConfigError: no such format.
    """
    known: dict[str, WrittenFormat] = {**MODEL_FORMATS, **EXPORT_FORMATS}
    if name not in known:
        raise ConfigError(f"unknown format {name!r}; the formats to write are {', '.join(known)}")
    return known[name]
