"""Decoding for one client beside what the memory could deliver: `model/benches/bandwidth.rs`."""

from report import Figure
from sides import model_bench


def run() -> list[Figure]:
    return model_bench("bandwidth")
