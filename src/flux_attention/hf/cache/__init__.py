"""The routed KV cache: what each attention layer keeps of each sequence, as data."""
