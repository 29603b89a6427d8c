"""Training beside PyTorch: `model/benches/train.rs`, which prints more than is judged."""

from report import Figure
from sides import model_bench


def run() -> list[Figure]:
    return model_bench("train")
