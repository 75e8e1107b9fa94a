"""M³AE, multi-modal masked autoencoders for medical images and text, written from scratch.

Read model.py (the backbone), then objectives.py (the losses), then masking.py (what is hidden)."""
import os

# Threads that spin while they wait were ten times slower on a busy machine. Set before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .config import ModelConfig
from .objectives import M3AE
