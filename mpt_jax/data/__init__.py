"""The data: from text to batches. The only package that imports TensorFlow and SeqIO.

Read in this order: tasks.py (what there is to train on, as SeqIO tasks and a mixture),
packing.py (documents to rows), feed.py (rows to host batches), position.py (the place
of a feed, as bytes). stdlib_corpus.py is the text that every machine has, vocab.py
trains its tokenizer, seqio_adapters.py is what SeqIO needs of ours, synthetic.py is the
feed without text. TensorFlow is imported when a SeqIO source is opened.
"""
