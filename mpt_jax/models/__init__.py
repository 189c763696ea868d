"""The MPT model. Read mpt.py, then attention.py, alibi.py and init.py."""
