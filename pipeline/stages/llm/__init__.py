"""Checkpoints for LLM servers: quantized layer by layer, packed, checked."""
