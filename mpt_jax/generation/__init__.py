"""Text from a model: sample.py is the whole-prefix sampler that training ends with."""
