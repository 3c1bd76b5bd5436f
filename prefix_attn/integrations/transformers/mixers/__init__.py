"""Recurrent, linear-attention and convolutional mixers of transformers models, along prefix trees.

`find` tells which modules of a decoder they are, `functions` follows the tree in the functions that
they call, and `serve` puts the one in front of the other.
"""

from prefix_attn.integrations.transformers.mixers.find import Mixer, find_mixers
from prefix_attn.integrations.transformers.mixers.serve import Mixers

__all__ = ["Mixer", "Mixers", "find_mixers"]
