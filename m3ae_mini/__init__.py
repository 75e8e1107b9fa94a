"""M³AE, multi-modal masked autoencoders for medical images and text, written from scratch.

Read model.py (the trunk), then objectives.py (the losses), then masking.py (what is hidden)."""
from .config import ModelConfig
from .objectives import M3AE
