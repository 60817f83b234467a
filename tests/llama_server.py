"""llama.cpp's own HTTP server over a tiny random model, in a process of its own: ``llama_support`` starts it.

One token is one byte of UTF-8, so token counts can be foretold, and a reply that is sent back
as history is read as the very tokens that were written: the prefix cache holds over turns.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import xllamacpp  # type: ignore[import-untyped] # has no types

SLOTS = 4
CONTEXT = 16384
"""Tokens of each slot."""

LAYERS, WIDTH, HEADS, FEED = 2, 32, 1, 64

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokens() -> list[str]:
    """A token for each byte, in the printable letters that GPT-2 gave to bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    rest = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + index) for index, byte in enumerate(rest)}
    return [letters[byte] for byte in range(256)]


def tensors() -> dict[str, np.ndarray]:
    """Weights of a llama, the same every time."""
    random = np.random.default_rng(seed=0)
    vocabulary = 256 + 1
    shapes: dict[str, tuple[int, ...]] = {"output_norm": (WIDTH,)}
    shapes |= {"token_embd": (vocabulary, WIDTH), "output": (vocabulary, WIDTH)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        parts |= {f"attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
        parts |= {"ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH), "ffn_down": (WIDTH, FEED)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in parts.items()}
    return {
        f"{name}.weight": np.ones(shape, dtype=np.float32)
        if name.endswith("norm")
        else random.standard_normal(shape, dtype=np.float32) * np.float32(0.05)
        for name, shape in shapes.items()
    }


def write_model(path: Path) -> None:
    """Make the model's file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte_tokens(), END])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["\u0100 \u0100"])  # llama.cpp wants one; it makes nothing that is a token
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    for name, values in tensors().items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path) -> xllamacpp.Server:
    """A server on a free port."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = ["tiny"]
    params.n_ctx = CONTEXT * SLOTS
    params.n_parallel = SLOTS
    params.port = 0
    params.warmup = False
    params.fit_params = False  # looks for graphics cards
    params.cpuparams.n_threads = 1  # more cost more than they bring on a model this small
    params.cpuparams_batch.n_threads = 1
    return xllamacpp.Server(params)


def main() -> None:
    """Serve, say where, and end with whoever holds the other end of standard input."""
    with tempfile.TemporaryDirectory(prefix="rlm-llama-") as folder:
        model = Path(folder) / "tiny.gguf"
        write_model(model)
        server = serve(model)
    sys.stdout.write(f"{server.listening_address}\n")  # the file is gone by now, whatever happens
    sys.stdout.flush()
    sys.stdin.buffer.read()
    os._exit(0)  # or it would first write to their end the replies that nobody waits for


if __name__ == "__main__":
    main()
