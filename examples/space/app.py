"""The playground as a Hugging Face Space: the small model that comes along, on the Space's CPU.

For another model load it and its tokenizer with transformers, and attach an adapter:
``Player(model, tokenizer, attach(model, "path-or-hub-id"), "its name", "its adapter's name")``.
"""

import threading

from flux_attention.playground.page import launch
from flux_attention.playground.player import Player
from flux_attention.shipped import load_shipped

if __name__ == "__main__":
    player = Player(*load_shipped(), "shipped", "shipped")
    _, address = launch(player)
    print(f"The playground is at {address}", flush=True)
    try:
        threading.Event().wait()
    finally:
        player.close()
