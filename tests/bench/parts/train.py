"""Training beside PyTorch: `model/benches/train.rs` prints its own table."""

from report import Figure
from sides import model_bench


def run() -> list[Figure]:
    return model_bench("train")
