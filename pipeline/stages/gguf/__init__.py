"""GGUF: metadata, vocabularies, quantized tensors and importance matrices for llama.cpp and Ollama."""
