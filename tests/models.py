"""Models that tests use: random weights, which have learnt nothing and keep every promise."""

from musicgen.core import Layout


def write_untrained(layout: Layout, seed: int = 0, **shape) -> None:
    "Writes a model of random weights that are large, so that its choices are far from even."
    import torch

    from musicgen.model.files import save_model
    from musicgen.model.lstm import MusicLSTM, MusicLSTMConfig

    torch.manual_seed(seed)
    model = MusicLSTM(MusicLSTMConfig(**dict(hidden=32, head=16, sources=("example",)) | shape))
    for weight in model.parameters():
        weight.data *= 3
    save_model(model, layout.model)
