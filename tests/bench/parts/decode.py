"""Decoding beside PyTorch: `model/benches/decode.rs` prints its own table."""

from report import Figure
from sides import model_bench


def run() -> list[Figure]:
    return model_bench("decode")
