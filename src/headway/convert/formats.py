"""The code of every format by its name.

A new format is one file, a line here and a line in `names.py`.
"""

from __future__ import annotations

from headway.convert.facebook.folder import FacebookFolder
from headway.convert.headway_folder import HeadwayFolder
from headway.convert.lazy_model import ModelFormat
from headway.convert.medusa.engine import MedusaEngineFolder
from headway.convert.medusa.folder import MedusaFolder
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


def model_format(name: str) -> ModelFormat:
    """The format of this name.

    Raises:
        ConfigError: no such format.
    """
    if name not in MODEL_FORMATS:
        raise ConfigError(f"unknown format {name!r}; the formats are {', '.join(MODEL_FORMATS)}")
    return MODEL_FORMATS[name]
