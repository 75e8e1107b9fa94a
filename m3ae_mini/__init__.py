"""M³AE, multi-modal masked autoencoders for medical images and text, written from scratch.

Read model.py (the trunk), then objectives.py (the losses), then masking.py (what is hidden)."""
import os

# Threads wait for each other without spinning: where another program runs too, two threads that spin were ten
# times slower; alone on a machine, GOMP_SPINCOUNT=10000 is faster (README). Said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .config import ModelConfig
from .objectives import M3AE
