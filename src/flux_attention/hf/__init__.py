"""Engine 1, stock transformers: hooks, cache layers and a decode loop on a model that stays as it is."""
