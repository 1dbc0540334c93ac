"""The formats that `headway convert` knows, by name; imports nothing, so that help stays fast."""

from __future__ import annotations

FORMATS: dict[str, str] = {
    "headway": "a plain checkpoint of the base with the heads under mtp/",
    "hf": "a plain Hugging Face checkpoint without heads, as every engine and every GGUF converter reads it",
    "facebook": "params.json and consolidated.*.pth as in facebook/multi-token-prediction",
    "medusa": "Medusa heads alone in FasterDecoding's layout, medusa_lm_head.pt or .safetensors; --base is their base",
    "medusa-engine": "Medusa heads alone as serving engines load them, config.json and model.safetensors",
    "transformers-mtp": "sequential modules beside their base, as transformers and released checkpoints keep them",
}
"""Name -> what a folder of this format is; `headway.convert.formats` holds the code of each."""

EXPORTS: dict[str, str] = {
    "gguf": "model.gguf for llama.cpp in the weights' own precision: plain llama and mistral models of bytes",
    "gguf-q8_0": "the same with matrices rounded to 8 bits",
}
"""Name -> what is written; formats that are not read back."""
