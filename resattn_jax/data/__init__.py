"""Data: sources, the pipelines that bring batches to the devices, and what is done to them there."""
