"""The layout of a folder with one fit: arrays in a safetensors file, everything else in a JSON file beside it."""

ARRAYS = "model.safetensors"
DOCUMENT = "model.json"
