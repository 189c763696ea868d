"""An OpenAI-compatible HTTP server around one engine.

Read protocol.py (what a request may say), jobs.py (the engine's thread, and what the
event loop sees of it), answers.py (what is said back), app.py (the routes) and
server.py (sockets, signals, draining), in this order.
"""
