"""The model that ships, stepped by numpy: the same scores as torch, the same music from one day to the next, whole numbers that cost nothing."""

import numpy as np
import pytest

from musicgen.core import SHIPPED, Refusal
from musicgen.decoder import PRECISIONS, Decoder, numeric_path, read_weights, sample
from musicgen.metrics import density, find_key
from musicgen.preprocess import Layout  # noqa: F401
from musicgen.score import read_midi
from musicgen.sight import Tables, at_home, controls, look, make_piece
from musicgen.tokens import FIELDS, Vocab
