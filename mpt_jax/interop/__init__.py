"""MPT checkpoints of other programs, both ways; nothing is executed that is read.

Read in this order: names.py (whose tensor is which parameter), configs.py (their
config.json and ours), sources.py (what lies in a folder; torch_files.py,
gguf.py), read.py (checks it whole,
then streams it), store.py (the arrays of our own checkpoint, one layer at a time),
write.py (folders of safetensors), gguf_write.py (llama.cpp's file).
"""
