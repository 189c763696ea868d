"""The data: from text to batches. The only package that imports TensorFlow and SeqIO.

Read in this order: tasks.py (what there is to train on, as SeqIO tasks and a mixture),
sources.py (documents out of files, and what is no document), packing.py (documents to
rows), feed.py (rows to host batches), position.py (the place of a feed, as bytes). Of
prepared data: prepared.py (the folder), order.py (which row comes when), indexed.py
(its feed), preparing.py and caching.py (writing it). Beside: filters.py (those of
MPT-7B's sources), ledger.py (the count of bad rows), stdlib_corpus.py (the text that
every machine has), vocab.py (tokenizers, trained and loaded), seqio_adapters.py (what
SeqIO needs of ours), synthetic.py (the feed without text). TensorFlow is imported when
text is opened.
"""
