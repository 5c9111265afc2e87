"""Checkpoints on disk: lazy reading of every layout, checked against the config; atomic writing; conversion;
inspection.

`layouts` has the names and shapes, `reader` opens, `writer` writes, `atomic` makes directories complete or absent,
`convert` renames between layouts, `quantize` rounds bf16 experts to MXFP4, `gguf` writes one file for llama.cpp (the
container is in `gguf_file`, the vocabulary in `gguf_tokenizer`), `inspect` reports, `changes` counts what differs,
`survival` how much of a change was written. Tensors are always addressed by Hugging Face's names.
"""

from gptoss_infer.checkpoint.atomic import atomic_directory, verify_manifest
from gptoss_infer.checkpoint.reader import Checkpoint, resolve
from gptoss_infer.checkpoint.writer import TensorSpec, rewrite_checkpoint, write_checkpoint

__all__ = [
    "Checkpoint",
    "TensorSpec",
    "atomic_directory",
    "resolve",
    "rewrite_checkpoint",
    "verify_manifest",
    "write_checkpoint",
]
