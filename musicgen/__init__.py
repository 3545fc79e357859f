"End-to-end MIDI music generation: the package that the notebooks in nbs/ export."

__version__ = "0.1.0"
